"""Wan's exports in a real ComfyUI: model file and LoRA give there what they give here."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusion_trainer.models.wan import Wan
from diffusion_trainer.utils.adapted import adapted_layers
from diffusion_trainer.utils.adapters import export_tensors, inject
from diffusion_trainer.utils.config import validate
from diffusion_trainer.utils.settings import Lora
from safetensors.torch import load_file, save_file
from test_wan import run

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.skipif(
        not {"COMFYUI_DIR", "COMFYUI_PYTHON"} <= os.environ.keys(), reason="set COMFYUI_DIR and COMFYUI_PYTHON"
    ),
]
SIZES = {
    "t2v": {"in_channels": 16},
    "i2v": {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 128},
    "flf2v": {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 128, "pos_embed_seq_len": 514},
    "i2v_a14b": {"in_channels": 36},
    "ti2v_5b": {"in_channels": 48, "out_channels": 48},
}
"""One head, two blocks, and what ComfyUI takes for granted: 4096 features of text, 256 of time, 1280 of CLIP."""


@pytest.mark.parametrize("variant", SIZES)
def test_predictions_in_comfyui_are_those_of_the_trainer(variant, tmp_path):
    torch.manual_seed(0)
    denoiser = WanTransformer3DModel(num_attention_heads=1, ffn_dim=256, num_layers=2, text_dim=4096, **SIZES[variant])
    family = Wan(validate(Wan.Config, {"type": "wan", "dtype": "float32"}))
    save_file(family.comfyui_tensors(denoiser.state_dict()), tmp_path / "model.safetensors")
    x = torch.randn(1, SIZES[variant]["in_channels"], 3, 6, 8)
    inputs = [x, torch.tensor([612.5]), torch.randn(1, 512, 4096)]
    if "image_dim" in SIZES[variant]:
        inputs.append(torch.randn(1, SIZES[variant].get("pos_embed_seq_len", 257), 1280))
    names = ("x", "timestep", "context", "clip_fea")
    save_file(dict(zip(names, inputs, strict=False)), tmp_path / "inputs.safetensors")
    expected = {"plain": run(family, denoiser, tuple(inputs))}
    settings = Lora(type="lora", rank=4, alpha=6.0)
    inject(denoiser, family, settings, seed=3)
    for parameter in denoiser.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    save_file(export_tensors(adapted_layers(denoiser), family, torch.float32), tmp_path / "lora.safetensors")
    expected["lora"] = run(family, denoiser, tuple(inputs))
    assert (expected["lora"] - expected["plain"]).norm() > 0.1 * expected["plain"].norm()
    done = subprocess.run(
        [os.environ["COMFYUI_PYTHON"], str(ROOT / "tests/comfy_predict.py"), str(tmp_path)],
        cwd=os.environ["COMFYUI_DIR"], capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "lora key not loaded" not in done.stderr
    answers = load_file(tmp_path / "answers.safetensors")
    for name, value in expected.items():
        torch.testing.assert_close(answers[name], value, atol=1e-4, rtol=1e-3, msg=lambda text, n=name: f"{n}: {text}")
