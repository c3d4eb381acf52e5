"""Files of small checkpoints that ComfyUI's own loaders recognise, written by its own Python.

    COMFYUI_DIR=... $COMFYUI_PYTHON tests/comfy_checkpoints.py BASE [NAME ...]

Writes them into ``BASE/models``. The weights are random, but for the VAE of the checkpoints. ComfyUI tells
families apart by the shapes in a file: SD 1.5 and SDXL must have 320 channels in their first block, and
Flux and Qwen-Image their full width of 3072 (0.3.64 reads no other from a file). The rest is as small as it may
be: one block of each kind, no wider levels. Text encoders other than CLIP-L are recognised at full size alone, so
there are none.
"""

# mypy: ignore-errors

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))
from comfy_checks import enter_comfyui

UNET = {"channel_mult": [1, 1, 1], "num_res_blocks": [2, 2, 2], "model_channels": 320, "transformer_depth_middle": 1}
CHANGES: dict[str, dict[str, Any]] = {
    "sd15": {
        "channel_mult": [1, 1], "num_res_blocks": [1, 1], "model_channels": 320, "transformer_depth": [1, 1],
        "transformer_depth_middle": 1, "transformer_depth_output": [1, 1, 1, 1], "context_dim": 768, "num_heads": 8,
        "num_head_channels": -1, "use_linear_in_transformer": False, "num_classes": None, "adm_in_channels": None,
    },
    "sdxl": UNET | {"transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_output": [0, 0, 0, 1, 1, 1, 1, 1, 1],
                    "context_dim": 2048, "num_head_channels": 64, "adm_in_channels": 2816},
    "flux": {"vec_in_dim": 768, "context_in_dim": 4096, "hidden_size": 3072, "num_heads": 24, "depth": 1,
             "depth_single_blocks": 1},
    "wan": {"text_dim": 4096, "text_len": 512},
    "qwen": {"num_attention_heads": 24, "num_layers": 1, "joint_attention_dim": 3584},
}  # fmt: skip
PLACES = {
    "sd15": "checkpoints/miniature_sd15.safetensors", "sdxl": "checkpoints/miniature_sdxl.safetensors",
    "flux": "diffusion_models/miniature_flux.safetensors", "wan": "diffusion_models/miniature_wan.safetensors",
    "qwen": "diffusion_models/miniature_qwen.safetensors",
}  # fmt: skip
SCALES = {"sd15": 0.18215, "sdxl": 0.13025}
"""Of latents, as in the families' latent formats."""


def diffusion_model(name: str) -> dict[str, Any]:
    """Random weights of the denoiser under the names of files; bf16, which is enough and half as large."""
    import comfy_miniatures as mini
    import torch

    model = mini.make_model(name, seed=1, **CHANGES[name])
    state = model.model.diffusion_model.state_dict()
    return {key: value.to(torch.bfloat16).contiguous() for key, value in state.items()}


def mosaic_vae(scale: float, channels: int = 4) -> dict[str, Any]:
    """A tiny autoencoder (TAESD) that keeps the mean colour of each 8x8 square and nothing else.

    Convolutions that average and pass on make one that shows pictures without having been trained.
    """
    import comfy.taesd.taesd
    import torch

    vae = comfy.taesd.taesd.TAESD(latent_channels=channels)
    with torch.no_grad():
        for part in (vae.taesd_encoder, vae.taesd_decoder):
            for parameter in part.parameters():
                parameter.zero_()
            for layer in part:  # the blocks add nothing to what passes them
                if isinstance(layer, torch.nn.Conv2d) and layer.stride == (2, 2):
                    layer.weight[range(3), range(3), 1:, 1:] = 0.25
                elif isinstance(layer, torch.nn.Conv2d):
                    layer.weight[range(3), range(3), 1, 1] = 1.0
        first, last = vae.taesd_encoder[-1], vae.taesd_decoder[1]
        first.weight[range(3), range(3), 1, 1], first.bias[:3] = 2.0, -1.0  # colours from -1 to 1
        first.weight[3, :3, 1, 1], first.bias[3] = 2 / 3, -1.0
        last.weight[range(3), range(3), 1, 1], last.bias[:3] = 0.5, 0.5
        vae.vae_scale.fill_(scale)
    return vae.state_dict()


def clip_l() -> dict[str, Any]:
    """CLIP-L at its full size: it has no smaller one."""
    import comfy.sd1_clip
    import comfy_miniatures as mini
    import torch

    encoder = comfy.sd1_clip.SDClipModel(device="cpu", dtype=torch.float32)
    mini.fill(encoder.transformer, seed=3)
    return {f"transformer.{key}": value.half().contiguous() for key, value in encoder.transformer.state_dict().items()}


def write(name: str, base: Path) -> None:
    """The file of one family where its loader looks for it."""
    import safetensors.torch

    path = base / "models" / PLACES[name]
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = diffusion_model(name)
    if name in SCALES:
        tensors = {f"model.diffusion_model.{key}": value for key, value in tensors.items()}
        vae = mosaic_vae(SCALES[name])
        tensors |= {f"first_stage_model.{key}": value.contiguous() for key, value in vae.items()}
    if name == "sd15":
        tensors |= {f"cond_stage_model.{key}": value for key, value in clip_l().items()}
    safetensors.torch.save_file(tensors, path)


def main() -> None:
    base = Path(sys.argv[1]).resolve()
    names = sys.argv[2:] or list(PLACES)
    enter_comfyui(base)
    for name in names:
        write(name, base)


if __name__ == "__main__":
    main()
