"""ComfyUI's own models, tiny and with random weights, built in memory. Runs inside ComfyUI.

Every family is ComfyUI's class with its real architecture, latent format, sampling and conditioning; only widths
and depths are small.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch

FAMILIES = ("sdxl", "flux", "wan", "qwen")
UNETS: dict[str, dict[str, Any]] = {
    "sdxl": {
        "use_checkpoint": False, "image_size": 32, "use_spatial_transformer": True, "legacy": False, "in_channels": 4,
        "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1], "transformer_depth": [0, 2],
        "channel_mult": [1, 2], "transformer_depth_middle": 2, "transformer_depth_output": [0, 0, 2, 2],
        "use_linear_in_transformer": True, "context_dim": 32, "num_head_channels": 32, "num_heads": -1,
        "num_classes": "sequential", "adm_in_channels": 1536 + 32, "use_temporal_attention": False,
        "use_temporal_resblock": False,
    },
    "flux": {
        "image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2, "vec_in_dim": 16,
        "context_in_dim": 32, "hidden_size": 128, "mlp_ratio": 4.0, "num_heads": 1, "depth": 1,
        "depth_single_blocks": 2, "axes_dim": [16, 56, 56], "theta": 10000, "qkv_bias": True, "guidance_embed": True,
    },
    "wan": {
        "image_model": "wan2.1", "model_type": "t2v", "dim": 128, "out_dim": 16, "num_heads": 1, "ffn_dim": 256,
        "num_layers": 2, "patch_size": (1, 2, 2), "freq_dim": 256, "window_size": (-1, -1), "qk_norm": True,
        "cross_attn_norm": True, "eps": 1e-6, "in_dim": 16, "text_dim": 32, "text_len": 16,
    },
    "qwen": {
        "image_model": "qwen_image", "in_channels": 64, "num_layers": 2, "num_attention_heads": 1,
        "attention_head_dim": 128, "joint_attention_dim": 32, "axes_dims_rope": (16, 56, 56),
    },
}  # fmt: skip
UNETS["sd15"] = UNETS["sdxl"] | {"num_classes": None, "adm_in_channels": None, "use_linear_in_transformer": False}
UNETS["wan_i2v"] = UNETS["wan"] | {"model_type": "i2v", "in_dim": 36}
CONFIGS = {
    "wan_i2v": "WAN21_I2V",
    "sd15": "SD15",
    "sdxl": "SDXL",
    "flux": "Flux",
    "wan": "WAN21_T2V",
    "qwen": "QwenImage",
}
CHANNELS = {"wan_i2v": 16, "sd15": 4, "sdxl": 4, "flux": 16, "wan": 16, "qwen": 16}
WIDTH = 32
"""Of text embeddings."""
POOLED = {"flux": 16}
"""Of pooled embeddings, where it is not the same."""
FULL = {"sdxl": (2048, 1280), "flux": (4096, 768), "wan": (4096, 4096), "qwen": (3584, 3584)}
"""Both as the checkpoints in files have them."""


def make_model(
    family: str,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    operations: Any = None,
    random_on: str = "cpu",
    **changes: Any,
) -> Any:
    """A MODEL as ComfyUI's loaders give it, with the same weights for the same seed.

    Args:
        operations: ComfyUI's classes of layers, where they are not the usual ones; weights are then not filled.
        random_on: Device that draws the weights; they lie in main memory all the same.
        changes: Other widths and depths.
    """
    import comfy.ldm.flux.model
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    if family == "flux" and "txt_ids_dims" in comfy.ldm.flux.model.FluxParams.__dataclass_fields__:
        changes = {"txt_ids_dims": [], **changes}  # newer versions ask for it
    config = getattr(comfy.supported_models, CONFIGS[family])({**UNETS[family], **changes})
    config.set_inference_dtype(dtype, None if dtype in (torch.float32, torch.bfloat16) else torch.float32)
    config.unet_config["dtype"] = dtype
    config.custom_operations = operations
    device = comfy.model_management.get_torch_device()
    with whole_layers():
        model = config.get_model({}, "", device=torch.device("cpu"))
    if operations is None:
        fill(model.diffusion_model, seed, random_on)
    model.diffusion_model.eval()
    patcher = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    return patcher(model, load_device=device, offload_device=torch.device("cpu"))


@contextlib.contextmanager
def whole_layers() -> Iterator[None]:
    """Layers have weights when they are made, also where dynamic VRAM would have them wait for a file."""
    memory = sys.modules.get("comfy.memory_management")  # older versions have none
    enabled = getattr(memory, "aimdo_enabled", False)
    if enabled:
        memory.aimdo_enabled = False
    try:
        yield
    finally:
        if enabled:
            memory.aimdo_enabled = True


def fill(module: torch.nn.Module, seed: int, random_on: str = "cpu") -> None:
    """Random weights at which signals neither vanish nor grow."""
    generator = torch.Generator(random_on).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            value = torch.randn(parameter.shape, generator=generator, device=random_on)
            if parameter.ndim < 2 or "modulation" in name.rsplit(".", 1)[-1]:
                value = value * 0.02 + (1.0 if name.endswith(("norm.weight", "scale", "norm_q.weight")) else 0.0)
                if parameter.ndim == 1 and name.endswith("weight"):
                    value = value + 1.0
            else:
                value = value / parameter[0].numel() ** 0.5
            parameter.data = value.to(parameter.device, parameter.dtype)


def latents(family: str, count: int = 1, seed: int = 0, height: int = 8, width: int = 8, frames: int = 0) -> Any:
    """A LATENT of random pictures, or videos where ``frames`` is given."""
    generator = torch.Generator().manual_seed(seed)
    size = (count, CHANNELS[family], *([frames] if frames else []), height, width)
    return {"samples": torch.randn(size, generator=generator)}


def conditioning(family: str, seed: int = 0, tokens: int = 12, full: bool = False, **extras: Any) -> Any:
    """A CONDITIONING of one random caption; ``full``: as wide as the checkpoints in files want it."""
    generator = torch.Generator().manual_seed(seed)
    width, pooled_width = FULL[family] if full else (WIDTH, POOLED.get(family, WIDTH))
    text = torch.randn(1, tokens, width, generator=generator)
    pooled = torch.randn(1, pooled_width, generator=generator)
    return [[text, {"pooled_output": pooled, **extras}]]


def output(model: Any, family: str, seed: int = 5, frames: int = 0, full: bool = False) -> torch.Tensor:
    """What the model makes of one fixed input, through ComfyUI's own sampling of one step."""
    import comfy.sample

    start = latents(family, 1, seed, frames=frames)["samples"]
    start = start.unsqueeze(2) if family in ("wan", "qwen") and not frames else start
    noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(seed + 1))
    positive = conditioning(family, seed + 2, full=full)
    with torch.inference_mode():
        return comfy.sample.sample(model, noise, 2, 1.0, "euler", "simple", positive, positive, start,
                                   disable_pbar=True, seed=seed).clone()  # fmt: skip
