"""Exports in a real ComfyUI: models, and adapters of every kind on every layer, give there what they give here.

The files are read by ComfyUI's loaders, which know a model by its shapes. Small ones are known but for two things:
SDXL must have 320 channels, 2048 features of text and its ten transformer blocks, though not its wider levels (the
depth of its text encoders is told); and ComfyUI 0.3.64, not 0.33, must be told Flux's widths.
"""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ChromaTransformer2DModel,
    FluxTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from diffusion_trainer.models import autoencoder
from diffusion_trainer.models.base import Example, Family
from diffusion_trainer.models.chroma import Chroma
from diffusion_trainer.models.flux import Flux, pack
from diffusion_trainer.models.hunyuan_video import HunyuanVideo
from diffusion_trainer.models.hunyuan_video_attention import as_original
from diffusion_trainer.models.sd3 import SD3, joined_text, to_original
from diffusion_trainer.models.sdxl import SDXL
from diffusion_trainer.models.wan import Wan
from diffusion_trainer.models.z_image import ZImage, patches
from diffusion_trainer.utils.adapted import Adapted, adapted_layers
from diffusion_trainer.utils.adapter_settings import Loha, Lokr, Lora
from diffusion_trainer.utils.adapters import export_tensors, inject
from diffusion_trainer.utils.config import validate
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.skipif(
        not {"COMFYUI_DIR", "COMFYUI_PYTHON"} <= os.environ.keys(), reason="set COMFYUI_DIR and COMFYUI_PYTHON"
    ),
]
ADAPTERS = {
    "lora": Lora(rank=4, alpha=6.0, target_modules=["."]),
    "dora": Lora(rank=4, alpha=6.0, target_modules=["."], use_dora=True),
    "loha": Loha(rank=4, alpha=6.0, target_modules=["."]),
    "lokr": Lokr(rank=4, alpha=6.0, target_modules=["."]),
}
"""On all that may have one."""
SHORT_CAPTION = "a photo of a red cat and a dog "
CAPTION = SHORT_CAPTION * 12
"""Of two pieces, in words of one token."""
TEXT_LAYERS = 3
COMPLAINTS = r"not loaded|missing|unexpected|left ?over|mismatch|no match|error"
"""What ComfyUI logs of tensors that it does not know or lacks."""


def run(family: Family, denoiser: Any, values: Any) -> Any:
    with torch.no_grad():
        for layer in family.layers(denoiser):
            values = layer.forward(SimpleNamespace(**layer.submodules), *values)
    return values


def with_adapters(family: Family, denoiser: Any, folder: Path, predict: Callable[[], Any]) -> dict[str, Any]:
    """What ``predict`` gives with the bare denoiser and with each adapter, whose file is written into ``folder``."""
    expected = {"plain": predict()}
    for kind, settings in ADAPTERS.items():
        inject(denoiser, family, settings, seed=3, rates=family.learning_rates())
        layers = adapted_layers(denoiser)
        for layer in layers.values():
            randomize(layer)
        save_file(export_tensors(layers, family, torch.float32), folder / f"{kind}.safetensors")
        expected[kind] = predict()
        for name, layer in layers.items():
            owner, _, leaf = name.rpartition(".")
            setattr(denoiser.get_submodule(owner), leaf, layer.base_layer)
    return expected


@torch.no_grad()
def randomize(layer: Adapted) -> None:
    """Makes the adapter's update half as large as the weight."""
    parameters = list(layer.adapter.parameters())
    for parameter in parameters:
        parameter.normal_()
    parameters[0] *= 0.5 * layer.weight.norm() / layer.adapter.delta().norm()
    if layer.magnitude is not None:
        layer.magnitude *= 1 + 0.2 * torch.randn_like(layer.magnitude)


def answers(folder: Path, inputs: dict[str, torch.Tensor], **task: Any) -> dict[str, torch.Tensor]:
    """What ComfyUI makes of the files in ``folder``, which it must know to the last tensor."""
    save_file({name: value.contiguous() for name, value in inputs.items()}, folder / "inputs.safetensors")
    (folder / "task.json").write_text(json.dumps({"adapters": list(ADAPTERS), **task}))
    done = subprocess.run(
        [os.environ["COMFYUI_PYTHON"], str(ROOT / "tests/comfy_predict.py"), str(folder)],
        cwd=os.environ["COMFYUI_DIR"], capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    complaints = [line for line in done.stderr.splitlines() if re.search(COMPLAINTS, line, re.IGNORECASE)]
    assert not complaints, "\n".join(complaints[:20])
    return load_file(folder / "answers.safetensors")


def assert_same(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], untouched: tuple[str, ...] = ()
) -> None:
    """Alike within rounding, and each adapter makes a difference, but to what ends in one of ``untouched``."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        size = value.pow(2).mean().sqrt().item()
        torch.testing.assert_close(
            found[name], value, atol=1e-4 * size, rtol=1e-3, msg=lambda text, n=name: f"{n}: {text}"
        )
        kind, dot, part = name.partition(".")
        if kind in ADAPTERS and not name.endswith(untouched):
            bare = expected[f"plain{dot}{part}"]
            assert (value - bare).norm() > 0.1 * bare.norm(), name


# -- Wan --------------------------------------------------------------------------------------------------

WANS = {
    "t2v": {"in_channels": 16},
    "i2v": {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 128},
    "flf2v": {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 128, "pos_embed_seq_len": 514},
    "i2v_a14b": {"in_channels": 36},
    "ti2v_5b": {"in_channels": 48, "out_channels": 48},
}
"""One head, two blocks, and what ComfyUI takes for granted: 4096 features of text, 256 of time, 1280 of CLIP."""


@pytest.mark.parametrize("variant", WANS)
def test_wan(variant, tmp_path):
    torch.manual_seed(0)
    denoiser = WanTransformer3DModel(num_attention_heads=1, ffn_dim=256, num_layers=2, text_dim=4096, **WANS[variant])
    family = Wan(validate(Wan.Config, {"type": "wan", "dtype": "float32"}))
    save_file(family.comfyui_tensors(denoiser.state_dict()), tmp_path / "model.safetensors")
    inputs = {"x": torch.randn(1, WANS[variant]["in_channels"], 3, 6, 8), "timestep": torch.tensor([612.5])}
    inputs["context"] = torch.randn(1, 512, 4096)
    if "image_dim" in WANS[variant]:
        inputs["clip_fea"] = torch.randn(1, WANS[variant].get("pos_embed_seq_len", 257), 1280)
    expected = with_adapters(family, denoiser, tmp_path, lambda: run(family, denoiser, tuple(inputs.values())))
    assert_same(answers(tmp_path, inputs, widths={}), expected)


# -- Flux -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["dev", "schnell", "kontext"])
def test_flux(variant, tmp_path):
    torch.manual_seed(0)
    denoiser = FluxTransformer2DModel(
        in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=128, num_attention_heads=2,
        joint_attention_dim=64, pooled_projection_dim=32, guidance_embeds=variant != "schnell")  # fmt: skip
    family = Flux(validate(Flux.Config, {"type": "flux", "dtype": "float32"}))
    save_file(family.comfyui_tensors(denoiser.state_dict()), tmp_path / "model.safetensors")
    inputs = {"x": torch.randn(1, 16, 6, 8), "timestep": torch.tensor([0.6125]), "y": torch.randn(1, 32)}
    inputs |= {"context": torch.randn(1, 20, 64), "guidance": torch.tensor([3.5])}
    if variant == "kontext":
        inputs["ref_latents"] = torch.randn(1, 16, 6, 8)
    expected = with_adapters(family, denoiser, tmp_path, lambda: run(family, denoiser, tuple(inputs.values())))
    found = answers(tmp_path, inputs, widths={"hidden_size": 256, "num_heads": 2, "context_in_dim": 64})
    assert_same({name: pack(value) for name, value in found.items()}, expected)


# -- Chroma -----------------------------------------------------------------------------------------------


def test_chroma(tmp_path):
    """ComfyUI takes 344 modulations for granted: those of 19 double and 38 single blocks, or of 28 and 2."""
    torch.manual_seed(0)
    denoiser = ChromaTransformer2DModel(
        in_channels=64, num_layers=28, num_single_layers=2, attention_head_dim=128, num_attention_heads=2,
        joint_attention_dim=64, approximator_hidden_dim=64, approximator_layers=2)  # fmt: skip
    family = Chroma(validate(Chroma.Config, {"type": "chroma", "dtype": "float32"}))
    save_file(family.comfyui_tensors(denoiser.state_dict()), tmp_path / "model.safetensors")
    inputs = {"x": torch.randn(1, 16, 6, 8), "timestep": torch.tensor([0.6125]), "context": torch.randn(1, 20, 64)}
    values = *inputs.values(), torch.ones(1, 1, dtype=torch.uint8)
    expected = with_adapters(family, denoiser, tmp_path, lambda: run(family, denoiser, values))
    widths = {"hidden_size": 256, "num_heads": 2, "context_in_dim": 64, "out_dim": 256, "hidden_dim": 64, "n_layers": 2}
    found = answers(tmp_path, {**inputs, "guidance": torch.zeros(1)}, widths=widths)
    assert_same({name: pack(value) for name, value in found.items()}, expected)


# -- HunyuanVideo -----------------------------------------------------------------------------------------


def test_hunyuan_video(tmp_path):
    """ComfyUI takes 768 features of pooled text and two blocks of the refiner for granted."""
    torch.manual_seed(0)
    denoiser = as_original(
        HunyuanVideoTransformer3DModel(
            num_layers=2, num_single_layers=2, num_attention_heads=2, text_embed_dim=64, pooled_projection_dim=768)
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in denoiser.named_parameters():
            if ".norm" in name and parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    table = {"type": "hunyuan-video", "dtype": "float32", "diffusers_path": str(tmp_path)}
    family = HunyuanVideo(validate(HunyuanVideo.Config, table))
    save_file(family.comfyui_tensors(denoiser.state_dict()), tmp_path / "model.safetensors")
    inputs = {"x": torch.randn(1, 16, 3, 6, 8), "timestep": torch.tensor([612.5]), "context": torch.randn(1, 20, 64)}
    text = dict.fromkeys(("llama_embeds", "llama_picture_embeds"), inputs["context"][0])
    pooled = torch.randn(768)
    batch = family.collate([Example({"latents": inputs["x"][0]}, {**text, "clip_pooled": pooled}, inputs["x"][0], 0.5)])
    values = inputs["x"], inputs["timestep"], *batch.inputs[2:5], torch.tensor([3500.0])
    expected = with_adapters(family, denoiser, tmp_path, lambda: run(family, denoiser, values))
    found = answers(tmp_path, {**inputs, "y": pooled[None], "guidance": torch.tensor([3.5])}, widths={})
    assert_same(found, expected)


# -- Z-Image ----------------------------------------------------------------------------------------------

Z_IMAGE = {
    "n_heads": 9, "n_kv_heads": 9, "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512], "rope_theta": 256.0,
    "ffn_dim_multiplier": 8 / 3, "z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32,
}  # fmt: skip
"""What ComfyUI knows by the published width alone; of others it wants 1024 at least."""


def test_z_image(tmp_path):
    if "z_image" not in Path(os.environ["COMFYUI_DIR"], "comfy/utils.py").read_text("utf-8"):
        pytest.skip("this ComfyUI has no Z-Image")
    torch.manual_seed(0)
    denoiser = ZImageTransformer2DModel(dim=1152, n_layers=1, n_heads=9, n_kv_heads=9, cap_feat_dim=64)
    with torch.no_grad():
        denoiser.x_pad_token.normal_()
        denoiser.cap_pad_token.normal_()
    family = ZImage(validate(ZImage.Config, {"type": "z_image", "dtype": "float32"}))
    save_file(family.comfyui_tensors(denoiser.state_dict()), tmp_path / "model.safetensors")
    inputs = {"x": torch.randn(1, 16, 6, 8), "timesteps": torch.tensor([0.6125]), "context": torch.randn(1, 20, 64)}
    batch = family.collate(
        [Example({"latents": inputs["x"][0]}, {"qwen_embeds": inputs["context"][0]}, inputs["x"][0], 0.5)]
    )
    values = inputs["x"], 1 - inputs["timesteps"], *batch.inputs[2:]
    expected = with_adapters(family, denoiser, tmp_path, lambda: -run(family, denoiser, values))
    found = answers(tmp_path, {**inputs, "num_tokens": torch.tensor([20])}, widths=Z_IMAGE)
    assert_same({name: patches(value) for name, value in found.items()}, expected)


# -- Stable Diffusion 3 -----------------------------------------------------------------------------------

SD3S: dict[str, dict[str, Any]] = {
    "sd3": {},
    "sd35_medium": {"qk_norm": "rms_norm", "dual_attention_layers": (0,)},
    "sd35_large": {"qk_norm": "rms_norm"},
}
"""As many blocks as heads, of 64 features, as ComfyUI takes for granted."""


@pytest.mark.parametrize("variant", SD3S)
def test_sd3(variant, tmp_path):
    torch.manual_seed(0)
    denoiser = SD3Transformer2DModel(
        num_layers=2, num_attention_heads=2, attention_head_dim=64, joint_attention_dim=64, caption_projection_dim=128,
        pooled_projection_dim=32, pos_embed_max_size=24, **SD3S[variant])  # fmt: skip
    with torch.no_grad():
        for name, parameter in denoiser.named_parameters():
            if ".norm_" in name and parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    denoiser.save_pretrained(tmp_path / "model/transformer")
    family = SD3(validate(SD3.Config, {"type": "sd3", "dtype": "float32", "diffusers_path": str(tmp_path / "model")}))
    parameters = dict(denoiser.named_parameters())
    exported = {**family.other_tensors(parameters), **family.comfyui_tensors(parameters)}
    save_file({name: value.detach().contiguous() for name, value in exported.items()}, tmp_path / "model.safetensors")
    inputs = {"x": torch.randn(1, 16, 6, 8), "timesteps": torch.tensor([612.5]), "context": torch.randn(1, 20, 64)}
    inputs["y"] = torch.randn(1, 32)
    expected = with_adapters(family, denoiser, tmp_path, lambda: run(family, denoiser, tuple(inputs.values())))
    assert_same(answers(tmp_path, inputs, widths={}), expected)


def write_sd3(file: Path) -> None:
    """A checkpoint as Stability AI's that hold all, whose parts have the widths that ComfyUI takes for granted."""
    torch.manual_seed(0)
    text = {"num_hidden_layers": TEXT_LAYERS, "vocab_size": 49408, "bos_token_id": 0, "eos_token_id": 2,
            "pad_token_id": 1}  # fmt: skip
    first = CLIPTextConfig(
        **text, hidden_size=768, intermediate_size=3072, num_attention_heads=12, hidden_act="quick_gelu",
        projection_dim=768)  # fmt: skip
    second = CLIPTextConfig(
        **text, hidden_size=1280, intermediate_size=5120, num_attention_heads=20, hidden_act="gelu",
        projection_dim=1280)  # fmt: skip
    transformer = SD3Transformer2DModel(
        num_layers=2, num_attention_heads=2, attention_head_dim=64, joint_attention_dim=4096, qk_norm="rms_norm",
        caption_projection_dim=128, pooled_projection_dim=2048, pos_embed_max_size=24,
        dual_attention_layers=(0,))  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=16,
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, use_quant_conv=False,
        use_post_quant_conv=False)  # fmt: skip
    parts = {
        "model.diffusion_model.": to_original(transformer.state_dict(), 2),
        "first_stage_model.": autoencoder.to_original(vae.state_dict()),
        "text_encoders.clip_l.transformer.": CLIPTextModelWithProjection(first).state_dict(),
        "text_encoders.clip_g.transformer.": CLIPTextModelWithProjection(second).state_dict(),
        "text_encoders.t5xxl.transformer.": T5EncoderModel(T5Config(vocab_size=32128, **T5_SHAPE)).state_dict(),
    }
    tensors = {prefix + name: value.bfloat16().contiguous() for prefix, part in parts.items()
               for name, value in part.items() if name != "encoder.embed_tokens.weight"}  # fmt: skip
    save_file(tensors, file)


T5_SHAPE: dict[str, Any] = {"d_model": 4096, "d_ff": 128, "d_kv": 64, "num_heads": 2, "num_layers": 2,
                            "feed_forward_proj": "gated-gelu"}  # fmt: skip


def test_sd3_checkpoint(tmp_path):
    """Stability AI's layout as it is: all text encoders, the VAE, and one step of the sampler."""
    write_sd3(tmp_path / "model.safetensors")
    comfy = Path(os.environ["COMFYUI_DIR"], "comfy")
    family = SD3(validate(SD3.Config, {
        "type": "sd3", "dtype": "float32", "checkpoint_path": str(tmp_path / "model.safetensors"),
        "clip_tokenizer_path": str(comfy / "sd1_tokenizer"), "max_sequence_length": 77,
        "t5_tokenizer_path": str(comfy / "text_encoders/t5_tokenizer")}))  # fmt: skip
    family.check_files()
    text: dict[str, Any] = {}
    for name in family.text_encoders:
        text |= family.encode_text(name, family.load_text_encoder(name, CPU), [SHORT_CAPTION])
    text = {name: value[0] for name, value in text.items()}
    torch.manual_seed(1)
    latents, noise = torch.randn(2, 1, 16, 8, 12)
    batch = family.collate([Example({"latents": latents[0]}, text, noise[0], quantile=0.6)])
    denoiser: Any = family.load_denoiser(CPU)
    sigma, (text_LD, pooled_D) = batch.inputs[1] / 1000, joined_text(text)

    def predicted() -> dict[str, torch.Tensor]:
        clean = batch.inputs[0] - sigma * run(family, denoiser, batch.inputs)
        return {"": clean, ".text": text_LD[None], ".pooled": pooled_D[None]}

    found = with_adapters(family, denoiser, tmp_path, predicted)
    expected = {name + part: value for name, parts in found.items() for part, value in parts.items()}
    with torch.no_grad():
        expected["vae"] = family.load_vae(CPU).decode(latents).sample
    layers = {"num_hidden_layers": TEXT_LAYERS}
    told = {"clip_l_model_config": layers, "clip_g_model_config": layers, "t5xxl_model_config": T5_SHAPE}
    inputs = {"x_t": batch.inputs[0], "sigma": sigma, "latents": latents}
    found = answers(tmp_path, inputs, caption=SHORT_CAPTION, text_encoders=told)
    (tmp_path / "model.safetensors").unlink()  # most of a gigabyte
    assert_same(found, expected, untouched=(".text", ".pooled"))


# -- SDXL -------------------------------------------------------------------------------------------------


def write_sdxl(folder: Path) -> None:
    """The parts, in diffusers layout, that ComfyUI knows for SDXL's."""
    torch.manual_seed(0)
    text = {"num_hidden_layers": TEXT_LAYERS, "vocab_size": 49408, "bos_token_id": 0, "eos_token_id": 2,
            "pad_token_id": 1}  # fmt: skip
    first = CLIPTextConfig(
        **text, hidden_size=768, intermediate_size=3072, num_attention_heads=12, hidden_act="quick_gelu")  # fmt: skip
    second = CLIPTextConfig(
        **text, hidden_size=1280, intermediate_size=5120, num_attention_heads=20, hidden_act="gelu",
        projection_dim=1280)  # fmt: skip
    parts: dict[str, Any] = {
        "unet": UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 320, 320), layers_per_block=2, transformer_layers_per_block=(1, 2, 10),
            reverse_transformer_layers_per_block=(1, 1, 1), attention_head_dim=(5, 5, 5), cross_attention_dim=2048,
            use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816),
        "vae": AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512), layers_per_block=2),
        "text_encoder": CLIPTextModel(first),
        "text_encoder_2": CLIPTextModelWithProjection(second),
    }  # fmt: skip
    for name, part in parts.items():
        part.to(torch.bfloat16).save_pretrained(folder / name)


@pytest.fixture(scope="module")
def sdxl_folder(tmp_path_factory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("sdxl")
    write_sdxl(folder)
    yield folder
    shutil.rmtree(folder)  # pytest keeps the folders of several runs, and this is nearly a gigabyte


def sdxl_predictions(family: SDXL, denoiser: Any, batch: Any) -> dict[str, torch.Tensor]:
    """The clean latents that the prediction stands for, by diffusers' schedule, and the text on its way."""
    values = batch.inputs
    with torch.no_grad():
        for layer in family.layers(denoiser):
            if layer.name == "unet.embed":
                first, second, pooled = (value.float() for value in values[4:])
            values = layer.forward(SimpleNamespace(**layer.submodules), *values)
    x_t, alpha = batch.inputs[0], family.noise_scheduler.alphas_cumprod[batch.inputs[1]]
    clean = alpha.sqrt() * x_t - (1 - alpha).sqrt() * values
    if not family.predicts_v:
        clean = (x_t - (1 - alpha).sqrt() * values) / alpha.sqrt()
    return {"": clean, ".text": torch.cat([first, second], dim=-1).flatten(0, 1)[None], ".pooled": pooled}


@pytest.mark.parametrize("v_pred", [False, True])
def test_sdxl(sdxl_folder, v_pred, tmp_path):
    tokenizer = f"{os.environ['COMFYUI_DIR']}/comfy/sd1_tokenizer"
    family = SDXL(validate(SDXL.Config, {"type": "sdxl", "dtype": "float32", "v_pred": v_pred,
                                         "diffusers_path": str(sdxl_folder), "tokenizer_path": tokenizer}))  # fmt: skip
    denoiser: Any = family.load_denoiser(CPU)
    weights = dict(denoiser.named_parameters())
    tensors = {**family.other_tensors(weights), **family.comfyui_tensors(weights)}
    save_file({name: value.detach().bfloat16().contiguous() for name, value in tensors.items()},
              tmp_path / "model.safetensors")  # fmt: skip
    torch.manual_seed(1)
    latents, noise = torch.randn(2, 1, 4, 8, 12)
    text: dict[str, Any] = {}
    for name in family.text_encoders:
        text |= family.encode_text(name, family.load_text_encoder(name, CPU), [CAPTION])
    text = {name: value[0] for name, value in text.items()}
    batch = family.collate([Example({"latents": latents[0]}, text, noise[0], quantile=0.6)])
    predicted = with_adapters(family, denoiser, tmp_path, lambda: sdxl_predictions(family, denoiser, batch))
    expected = {name + part: value for name, parts in predicted.items() for part, value in parts.items()}
    with torch.no_grad():
        expected["vae"] = family.load_vae(CPU).decode(latents).sample
    layers = {"num_hidden_layers": TEXT_LAYERS}
    inputs = {"x_t": batch.inputs[0], "t": batch.inputs[1], "latents": latents}
    told = {"clip_l_model_config": layers, "clip_g_model_config": layers}
    found = answers(tmp_path, inputs, caption=CAPTION, text_encoders=told)
    (tmp_path / "model.safetensors").unlink()  # as large
    assert_same(found, expected)
    assert {key[:9] for key in load_file(tmp_path / "lora.safetensors")} == {"lora_unet", "lora_te1_", "lora_te2_"}
