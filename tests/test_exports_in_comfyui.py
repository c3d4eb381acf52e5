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
    AnimaTextConditioner,
    AutoencoderKL,
    AutoencoderKLFlux2,
    ChromaTransformer2DModel,
    CosmosTransformer3DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    Lumina2Transformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from diffusion_trainer.models import autoencoder, flux2_vae, qwen25_vl
from diffusion_trainer.models.anima import Anima
from diffusion_trainer.models.base import Example, Family
from diffusion_trainer.models.chroma import Chroma
from diffusion_trainer.models.cosmos_predict2 import CosmosPredict2
from diffusion_trainer.models.flux import Flux, pack
from diffusion_trainer.models.flux2 import Flux2, tokens_of
from diffusion_trainer.models.hunyuan_video import HunyuanVideo
from diffusion_trainer.models.hunyuan_video_attention import as_original
from diffusion_trainer.models.ltx_video import LTXVideo
from diffusion_trainer.models.ltx_video import pack as pack_tokens
from diffusion_trainer.models.lumina2 import Lumina2
from diffusion_trainer.models.lumina2_attention import fuse_attention
from diffusion_trainer.models.mistral import miniature_tekken
from diffusion_trainer.models.qwen_image import QwenImage, QwenImage2511
from diffusion_trainer.models.sd3 import SD3, joined_text, to_original
from diffusion_trainer.models.sdxl import SDXL
from diffusion_trainer.models.wan import Wan
from diffusion_trainer.models.z_image import ZImage, patches
from diffusion_trainer.utils.adapted import Adapted, adapted_layers
from diffusion_trainer.utils.adapter_settings import Loha, Lokr, Lora
from diffusion_trainer.utils.adapters import export_tensors, inject
from diffusion_trainer.utils.config import validate
from diffusion_trainer.utils.weights import Weights
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    MistralConfig,
    MistralForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
)

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
MODEL_FILE = Path(os.environ.get("COMFYUI_DIR", ""), "comfy/ldm/qwen_image/model.py")
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


def answers(
    folder: Path, inputs: dict[str, torch.Tensor], script: str = "comfy_predict.py", **task: Any
) -> dict[str, torch.Tensor]:
    """What ComfyUI makes of the files in ``folder``, which it must know to the last tensor."""
    save_file({name: value.contiguous() for name, value in inputs.items()}, folder / "inputs.safetensors")
    (folder / "task.json").write_text(json.dumps({"adapters": list(ADAPTERS), **task}))
    done = subprocess.run(
        [os.environ["COMFYUI_PYTHON"], str(ROOT / "tests" / script), str(folder)],
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


# -- FLUX.2 -----------------------------------------------------------------------------------------------


@pytest.fixture
def flux2() -> Flux2:
    if "flux2" not in Path(os.environ["COMFYUI_DIR"], "comfy/model_detection.py").read_text("utf-8"):
        pytest.skip("this ComfyUI has no FLUX.2")
    torch.manual_seed(0)
    return Flux2(validate(Flux2.Config, {"type": "flux2", "dtype": "float32"}))


@pytest.mark.parametrize("variant", ["klein", "dev", "edit"])
def test_flux2(variant, flux2, tmp_path):
    denoiser = Flux2Transformer2DModel(
        num_layers=2, num_single_layers=2, attention_head_dim=128, num_attention_heads=2, joint_attention_dim=96,
        guidance_embeds=variant == "dev")  # fmt: skip
    save_file(flux2.comfyui_tensors(denoiser.state_dict()), tmp_path / "model.safetensors")
    inputs = {"x": torch.randn(1, 128, 6, 8), "timestep": torch.tensor([0.6125]), "context": torch.randn(1, 20, 96)}
    inputs["guidance"] = torch.tensor([3.5])
    if variant == "edit":
        inputs["ref_latents"] = torch.randn(1, 128, 6, 8)
    expected = with_adapters(flux2, denoiser, tmp_path, lambda: run(flux2, denoiser, tuple(inputs.values())))
    found = answers(tmp_path, inputs, widths={})
    assert_same({name: tokens_of(value) for name, value in found.items()}, expected)


@pytest.mark.parametrize("part", ["qwen3_4b", "mistral3_24b"])
def test_flux2_text(part, flux2, tmp_path):
    """ComfyUI's own text encoder gives the same, but for what fills up dev's text."""
    is_dev = part == "mistral3_24b"
    sizes: Any = {"vocab_size": 400 if is_dev else 151936, "hidden_size": 16, "intermediate_size": 32,
                  "num_attention_heads": 1, "num_key_value_heads": 1}  # fmt: skip
    config: Any = {**sizes, "head_dim": 128, "num_hidden_layers": 30 if is_dev else 36}
    if is_dev:
        made: Any = MistralForCausalLM(MistralConfig(**config, rope_theta=1e9, rms_norm_eps=1e-5, sliding_window=None))
    else:
        made = Qwen3ForCausalLM(Qwen3Config(**config, rope_theta=1e6))
    for parameter in made.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    left_out = ("lm_head.weight", "model.norm.weight") if is_dev else ("lm_head.weight",)
    weights = {name: value.contiguous() for name, value in made.state_dict().items() if name not in left_out}
    if is_dev:
        weights["tekken_model"] = torch.frombuffer(bytearray(miniature_tekken()), dtype=torch.uint8)
    save_file(weights, tmp_path / "model.safetensors")
    Flux2.write_miniature(tmp_path / "whole", "dev" if is_dev else "klein")
    tokenizer = None if is_dev else f"{os.environ['COMFYUI_DIR']}/comfy/text_encoders/qwen25_tokenizer"
    family = Flux2(validate(Flux2.Config, {
        "type": "flux2", "dtype": "float32", "diffusers_path": str(tmp_path / "whole"), "tokenizer_path": tokenizer,
        "text_encoders": [{"path": str(tmp_path / "model.safetensors"), "type": "flux2"}]}))  # fmt: skip
    family.check_files()
    captions = ["a photo of a red (cat:1.2), 12 cats.", ""]
    ours = family.encode_text("text", family.load_text_encoder("text", CPU), captions)["text_embeds"]
    found = answers(tmp_path, {}, "comfy_encode.py", part=part, captions=captions, sizes=sizes)
    lengths = [value.shape[1] for value in found.values()]
    assert lengths == [512, 512] if not is_dev else lengths[1] < lengths[0] < 512
    assert_same(found, {str(n): ours[n : n + 1, -length:] for n, length in enumerate(lengths)})


def test_flux2_vae(flux2, tmp_path):
    """Of real size, which ComfyUI takes for granted."""
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)  # fmt: skip
    vae.bn.running_mean.normal_(std=0.3)
    vae.bn.running_var.uniform_(0.5, 2.0)
    file = tmp_path / "model.safetensors"
    tensors = flux2_vae.to_original(vae.state_dict())
    save_file({name: value.contiguous() for name, value in tensors.items()}, file)
    pixels = torch.rand(1, 64, 96, 3)
    loaded = flux2_vae.load_vae(Weights(file, "model.vae"), torch.float32, CPU)
    latents = flux2_vae.encode(loaded, pixels.permute(0, 3, 1, 2)[:, :, None] * 2 - 1, torch.float32)
    found = answers(tmp_path, {"pixels": pixels}, "comfy_encode.py", part="vae")
    file.unlink()  # large
    torch.testing.assert_close(found["latents"], latents, atol=1e-4, rtol=1e-3)
    assert found["pixels"].shape == pixels.shape


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


# -- Cosmos-Predict2 --------------------------------------------------------------------------------------


def test_cosmos_predict2(tmp_path):
    """ComfyUI knows the heads of the two published widths alone, and 0.3.64 not other numbers of blocks."""
    torch.manual_seed(0)
    denoiser = CosmosTransformer3DModel(
        num_attention_heads=2, attention_head_dim=128, num_layers=2, text_embed_dim=64, rope_scale=(1.0, 4.0, 4.0),
        extra_pos_embed_type=None)  # fmt: skip
    family = CosmosPredict2(
        validate(CosmosPredict2.Config, {"type": "cosmos_predict2", "dtype": "float32", "diffusers_path": "/none"})
    )
    save_file(family.comfyui_tensors(denoiser.state_dict()), tmp_path / "model.safetensors")
    inputs = {"x": torch.randn(1, 16, 6, 8), "timesteps": torch.tensor([0.6125]), "context": torch.randn(1, 20, 64)}
    expected = with_adapters(family, denoiser, tmp_path, lambda: run(family, denoiser, tuple(inputs.values())))
    widths = {"num_heads": 2, "num_blocks": 2, "crossattn_emb_channels": 64}
    found = answers(tmp_path, inputs | {"x": inputs["x"][:, :, None]}, widths=widths)
    assert_same({name: value[:, :, 0] for name, value in found.items()}, expected)


def test_anima(tmp_path):
    """The adapter at its real size, which ComfyUI takes for granted."""
    if not Path(os.environ["COMFYUI_DIR"], "comfy/ldm/anima").is_dir():
        pytest.skip("this ComfyUI has no Anima")
    torch.manual_seed(0)
    denoiser = CosmosTransformer3DModel(
        num_attention_heads=2, attention_head_dim=128, num_layers=1, text_embed_dim=1024, rope_scale=(1.0, 4.0, 4.0),
        extra_pos_embed_type=None)  # fmt: skip
    denoiser.llm_adapter = AnimaTextConditioner()
    family = Anima(validate(Anima.Config, {"type": "anima", "dtype": "float32", "diffusers_path": "/none"}))
    save_file(family.comfyui_tensors(denoiser.state_dict()), tmp_path / "model.safetensors")
    inputs = {"x": torch.randn(1, 16, 6, 8), "timesteps": torch.tensor([0.6125]), "context": torch.randn(1, 12, 1024)}
    ids, seen = torch.randint(32128, (1, 17)), torch.ones(1, 1, dtype=torch.uint8)
    values = inputs["x"], inputs["timesteps"], ids, seen, inputs["context"], seen
    expected = with_adapters(family, denoiser, tmp_path, lambda: run(family, denoiser, values))
    found = answers(tmp_path, inputs | {"x": inputs["x"][:, :, None], "t5xxl_ids": ids}, widths={"num_heads": 2})
    assert_same({name: value[:, :, 0] for name, value in found.items()}, expected)


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


# -- LTX-Video --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True], ids=["0.9", "0.9.5"])
@pytest.mark.parametrize("given", [False, True], ids=["text", "first frame"])
def test_ltx_video(causal, given, tmp_path):
    """32 heads, as ComfyUI takes for granted. Where the first latent ends its loader of models reads in the header;
    that of 0.3.64, other than its loader of checkpoints, is told."""
    torch.manual_seed(0)
    denoiser = LTXVideoTransformer3DModel(
        num_attention_heads=32, attention_head_dim=2, cross_attention_dim=64, num_layers=2, caption_channels=64
    )
    with torch.no_grad():
        for name, parameter in denoiser.named_parameters():
            if ".norm_" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    denoiser.save_pretrained(tmp_path / "model/transformer")
    LTXVideo.write_miniature(tmp_path / "parts", "0.9.5" if causal else "0.9")
    shutil.copytree(tmp_path / "parts/vae", tmp_path / "model/vae")
    folder = str(tmp_path / "model")
    family = LTXVideo(validate(LTXVideo.Config, {"type": "ltx-video", "dtype": "float32", "diffusers_path": folder,
                                                 "first_frame_conditioning_p": float(given)}))  # fmt: skip
    tensors, told = family.comfyui_tensors(denoiser.state_dict()), family.exported_metadata()
    save_file(tensors, tmp_path / "model.safetensors", metadata=told)
    latents, noise = torch.randn(2, 128, 3, 2, 3)
    batch = family.collate([Example({"latents": latents}, {"t5_embeds": torch.randn(20, 64)}, noise, 0.6)])
    x_t, told_NS, text_NLD, _ = batch.inputs
    inputs = {"x": x_t, "context": text_NLD, "timestep": told_NS / 1000}
    if given:  # ComfyUI tells each token its time
        inputs["timestep"] = inputs["timestep"].repeat_interleave(torch.tensor([6, 12]), dim=1)[..., None]
    inputs["attention_mask"] = torch.ones(1, 20, dtype=torch.int64)
    expected = with_adapters(family, denoiser, tmp_path, lambda: run(family, denoiser, batch.inputs))
    loader = Path(os.environ["COMFYUI_DIR"], "comfy/sd.py").read_text("utf-8")
    knows = "load_diffusion_model_state_dict(sd, model_options=model_options, metadata=metadata" in loader
    found = answers(tmp_path, inputs, widths={} if knows else json.loads(told["config"])["transformer"])
    assert_same({name: pack_tokens(value) for name, value in found.items()}, expected)


def layers(number: int, **more: Any) -> list[Any]:
    return ["res_x", {"num_layers": number, **more}]


SMALLER, WIDER, LARGER = ["compress_all", {}], ["res_x_y", 1], ["compress_all", {"residual": True, "multiplier": 2}]
LTX_ENCODER = [layers(1), SMALLER, WIDER, layers(1), SMALLER, WIDER, layers(1), SMALLER, layers(1), layers(1)]
LTX_VAES: dict[str, dict[str, Any]] = {
    "0.9": {
        "encoder_blocks": LTX_ENCODER, "timestep_conditioning": False,
        "decoder_blocks": [*LTX_ENCODER[:3], layers(2), *LTX_ENCODER[4:]]},
    "0.9.1": {
        "encoder_blocks": LTX_ENCODER, "timestep_conditioning": True,
        "decoder_blocks": [layers(1), LARGER, layers(2, inject_noise=True), LARGER, layers(1, inject_noise=True),
                           LARGER, layers(1, inject_noise=True)]},
    "0.9.5": {
        "encoder_blocks": [layers(1), ["compress_space_res", {"multiplier": 2}], layers(1),
                           ["compress_time_res", {"multiplier": 1}], layers(1), ["compress_all_res", {"multiplier": 2}],
                           layers(1), ["compress_all_res", {"multiplier": 1}], layers(1)],
        "timestep_conditioning": True,
        "decoder_blocks": [layers(1), LARGER, layers(2), LARGER, layers(1), LARGER, layers(1)]},
}  # fmt: skip
"""What the header of a file with the miniature's VAE says of it."""


@pytest.mark.parametrize("variant", LTX_VAES)
def test_the_vae_of_ltx_video(variant, tmp_path):
    """An exported checkpoint's, with its statistics."""
    source = Path(os.environ["COMFYUI_DIR"], "comfy/ldm/lightricks/vae/causal_video_autoencoder.py")
    if "encoder_base_channels" not in source.read_text("utf-8"):
        pytest.skip("this ComfyUI knows the published widths alone")
    LTXVideo.write_miniature(tmp_path / "model", variant)
    folder = str(tmp_path / "model")
    family = LTXVideo(validate(LTXVideo.Config, {"type": "ltx-video", "dtype": "float32", "diffusers_path": folder}))
    told = {**LTX_VAES[variant], "dims": 3, "in_channels": 3, "out_channels": 3, "latent_channels": 128,
            "norm_layer": "pixel_norm", "patch_size": 4, "latent_log_var": "uniform", "use_quant_conv": False,
            "causal_decoder": False, "spatial_padding_mode": "zeros", "encoder_base_channels": 8,
            "decoder_base_channels": 8}  # fmt: skip
    exported = {name.removeprefix("vae."): value.contiguous() for name, value in family.other_tensors(()).items()}
    save_file(exported, tmp_path / "model.safetensors", metadata={"config": json.dumps({"vae": told})})
    vae: Any = family.load_vae(CPU)
    torch.manual_seed(1)
    inputs = {"pixels": torch.rand(1, 3, 9, 64, 64) * 2 - 1, "latents": torch.randn(1, 128, 2, 2, 2)}
    mean, std = (value.view(1, -1, 1, 1, 1) for value in (vae.latents_mean, vae.latents_std))
    time = torch.tensor([0.05]) if told["timestep_conditioning"] else None
    with torch.no_grad():
        encoded = (vae.encode(inputs["pixels"]).latent_dist.mode() - mean) / std
        decoded = vae.decode(inputs["latents"] * std + mean, time).sample
    found = answers(tmp_path, inputs, adapters=[], vae=True)
    assert_same(found, {"plain.encoded": encoded, "plain.decoded": decoded})


# -- Qwen-Image -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["", "edit", "2511"])
def test_qwen_image(variant, tmp_path):
    """ComfyUI takes heads of 128 features for granted, and 24 of them unless told."""
    if variant == "2511" and "index_timestep_zero" not in MODEL_FILE.read_text("utf-8"):
        pytest.skip("this ComfyUI has no Qwen-Image-Edit-2511")
    torch.manual_seed(0)
    denoiser = QwenImageTransformer2DModel(
        num_layers=2, num_attention_heads=2, joint_attention_dim=64, zero_cond_t=variant == "2511")  # fmt: skip
    kind = QwenImage2511 if variant == "2511" else QwenImage
    denoiser.save_pretrained(tmp_path / "diffusers/transformer")
    table = {"type": "qwen2511" if variant == "2511" else "qwen_image", "dtype": "float32"}
    family = kind(validate(kind.Config, {**table, "diffusers_path": str(tmp_path / "diffusers")}))
    weights = dict(denoiser.named_parameters())
    tensors = {**family.other_tensors(weights), **family.comfyui_tensors(weights)}
    save_file({name: value.detach() for name, value in tensors.items()}, tmp_path / "model.safetensors")
    inputs = {"x": torch.randn(1, 16, 1, 8, 12), "timestep": torch.tensor([0.6125])}
    inputs["context"] = torch.randn(1, 20, 64)
    values = *inputs.values(), torch.ones(1, 1, dtype=torch.uint8)
    if variant:
        inputs["ref_latents"] = torch.randn(1, 16, 1, 8, 12)
        values = *values, inputs["ref_latents"]
    expected = with_adapters(family, denoiser, tmp_path, lambda: run(family, denoiser, values))
    found = answers(tmp_path, inputs, widths={"num_attention_heads": 2, "joint_attention_dim": 64})
    assert_same({name: pack(value.squeeze(2)) for name, value in found.items()}, expected)


def test_qwen_image_text_encoder(tmp_path):
    """Its last hidden states of a text with pictures of two shapes, by the names of ComfyUI's file. ComfyUI takes
    heads of 128 features for granted, and 0.3.64 leaves a picture's tokens in the order of its windows."""
    if "reverse_indices" not in Path(os.environ["COMFYUI_DIR"], "comfy/text_encoders/qwen_vl.py").read_text("utf-8"):
        pytest.skip("this ComfyUI mixes up a picture's tokens")
    torch.manual_seed(0)
    vocabulary = qwen25_vl.write_tokenizer(tmp_path / "tokenizer", ["a red cat"])
    text = {"vocab_size": len(vocabulary), "hidden_size": 256, "intermediate_size": 128, "num_hidden_layers": 3,
            "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
    visual = {"hidden_size": 160, "intermediate_size": 48, "num_heads": 2}
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        text_config={**text, "rope_parameters": qwen25_vl.rope_parameters(128)},
        vision_config={**visual, "depth": 8, "out_hidden_size": 256, "fullatt_block_indexes": [7]}))  # fmt: skip
    for name, parameter in model.named_parameters():
        mean = 1.0 if "norm" in name or "ln_q" in name else 0.0
        torch.nn.init.normal_(parameter, mean, 0.2 if parameter.ndim == 1 else 0.05)
    file = tmp_path / "model.safetensors"
    save_file(
        {
            name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): value
            for name, value in model.state_dict().items()
        },
        file,
    )
    encoder = qwen25_vl.load(
        Weights(file, "model.text_encoder_path"), tmp_path / "tokenizer", tmp_path, torch.float32, CPU, None
    )
    pictures = [Image.effect_noise(size, 80).convert("RGB") for size in ((224, 140), (84, 168))]
    caption = f"hello {qwen25_vl.PICTURE} and {qwen25_vl.PICTURE} a red cat"
    expected = qwen25_vl.encode_with_pictures(encoder, caption, pictures)
    patches_of = encoder.processor(images=pictures, return_tensors="pt")
    inputs = {"ids": torch.tensor(encoder.tokenizer(caption).input_ids), "pixels": patches_of.pixel_values}
    inputs |= {"grid": patches_of.image_grid_thw, "token": torch.tensor(vocabulary[qwen25_vl.PICTURE_TOKEN])}
    sizes = {"text": text, "visual": {**visual, "num_layers": 8}}
    found = answers(tmp_path, inputs, "comfy_text_encoder.py", **sizes)["states"]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


# -- Lumina Image 2 ---------------------------------------------------------------------------------------

LUMINA = {"dim": 384, "n_heads": 4, "n_kv_heads": 2, "axes_dims": [32, 32, 32], "axes_lens": [300, 512, 512]}
"""What ComfyUI knows by the published width alone."""


def test_lumina2(tmp_path):
    torch.manual_seed(0)
    denoiser = fuse_attention(Lumina2Transformer2DModel(
        hidden_size=384, num_layers=2, num_attention_heads=4, num_kv_heads=2, cap_feat_dim=64))  # fmt: skip
    with torch.no_grad():
        for parameter in denoiser.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    family = Lumina2(validate(Lumina2.Config, {"type": "lumina_2", "dtype": "float32"}))
    tensors = family.comfyui_tensors(denoiser.state_dict())
    network = Path(os.environ["COMFYUI_DIR"], "comfy/ldm/lumina/model.py").read_text("utf-8")
    if re.search(r"^ +self\.norm_final = .*\(dim", network, re.MULTILINE):  # ComfyUI 0.3.64 asks for it in vain
        tensors["norm_final.weight"] = torch.ones(384)
    save_file(tensors, tmp_path / "model.safetensors")
    inputs = {"x": torch.randn(1, 16, 6, 8), "timesteps": torch.tensor([0.6125]), "context": torch.randn(1, 20, 64)}
    values = inputs["x"], 1 - inputs["timesteps"], inputs["context"], torch.ones(1, 1, dtype=torch.uint8)
    expected = with_adapters(family, denoiser, tmp_path, lambda: -run(family, denoiser, values))
    found = answers(tmp_path, {**inputs, "num_tokens": torch.tensor(20)}, widths=LUMINA)
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
