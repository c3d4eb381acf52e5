"""Going on from LoRA files of any spelling."""

# mypy: ignore-errors

from __future__ import annotations

from pathlib import Path

import comfy_miniatures as mini
import safetensors.torch
import torch
from diffusion_trainer.diffusion_nodes.lora_files import read_existing, steps_of
from diffusion_trainer.diffusion_nodes.lora_nodes import SaveTrainedLoRANode, with_lora

from .harness import difference, loras, models, patching_error, refusal, same, train


def check_going_on_is_as_if_never_interrupted() -> None:
    for family, model in models():
        for dtype in ("fp32", "bf16"):
            values = {"lora_dtype": dtype, "learning_rate": 0.01, "seed": 3}
            whole = train(model, family, steps=6, **values)
            part = train(model, family, steps=3, **values)
            name = SaveTrainedLoRANode().save(part[1], f"go/{family}_{dtype}", 3)[0]
            rest = train(model, family, steps=3, existing_lora=name, **values)
            assert rest[3] == 6 and whole[2]["loss"][3:] == rest[2]["loss"], f"{family} {dtype}"
            assert same(whole[1], rest[1]), f"{family} {dtype}"


def check_going_on_from_any_spelling() -> None:
    generator = torch.Generator().manual_seed(0)
    rand = lambda *size: torch.randn(size, generator=generator) * 0.1  # noqa: E731
    for family, model in models():
        layer = {
            "flux": "double_blocks.0.img_attn.proj",
            "wan": "blocks.0.self_attn.q",
            "qwen": "transformer_blocks.0.attn.to_q",
            "sdxl": "input_blocks.2.1.transformer_blocks.0.attn1.to_q",
        }
        if family == "sdxl":
            layer["sdxl"] = next(n for n, m in model.model.named_modules() if n.endswith("attn1.to_q")).removeprefix(
                "diffusion_model.")  # fmt: skip
        name = layer[family]
        kohya = "lora_unet_" + name.replace(".", "_")
        weight = model.model.get_submodule(f"diffusion_model.{name}").weight
        out, inside = weight.shape
        alpha = torch.tensor(3.0)
        files = {
            "kohya": {f"{kohya}.lora_up.weight": rand(out, 6), f"{kohya}.lora_down.weight": rand(6, inside),
                      f"{kohya}.alpha": alpha},
            "peft": {f"diffusion_model.{name}.lora_B.weight": rand(out, 6),
                     f"diffusion_model.{name}.lora_A.weight": rand(6, inside)},
            "lokr": {f"{kohya}.lokr_w1": rand(4, 4), f"{kohya}.lokr_w2_a": rand(out // 4, 3),
                     f"{kohya}.lokr_w2_b": rand(3, inside // 4), f"{kohya}.alpha": alpha},
            "lokr_whole": {f"{kohya}.lokr_w1": rand(4, 4), f"{kohya}.lokr_w2": rand(out // 4, inside // 4),
                           f"{kohya}.alpha": alpha},
            "loha": {f"diffusion_model.{name}.hada_w1_a": rand(out, 4),
                     f"diffusion_model.{name}.hada_w2_a": rand(out, 4),
                     f"diffusion_model.{name}.hada_w1_b": rand(4, inside),
                     f"diffusion_model.{name}.hada_w2_b": rand(4, inside), f"diffusion_model.{name}.alpha": alpha},
        }  # fmt: skip
        if family == "flux":
            files["diffusers"] = {f"transformer.transformer_blocks.0.attn.to_{part}.lora_{side}.weight":
                                  rand(128, 4) if side == "B" else rand(4, 128)
                                  for part in "qkv" for side in "AB"}  # fmt: skip
        files["core"] = {**files["kohya"], f"diffusion_model.{name}.diff_b": rand(out)}
        for kind, tensors in files.items():
            file = loras() / f"{family}-{kind}.safetensors"
            file.parent.mkdir(parents=True, exist_ok=True)
            safetensors.torch.save_file({key: value.contiguous() for key, value in tensors.items()}, file)
            with torch.inference_mode(False):
                existing = read_existing(file, model.model)
            if kind != "core":
                error, size = difference(model, with_lora(model, tensors), existing.adapters, family)
                assert error < patching_error() * size, f"{family} {kind}: {error} of {size}"
            trained, lora, _, steps = train(model, family, existing_lora=file.name, steps=2, learning_rate=1e-7)
            assert steps == 2
            close = (mini.output(trained, family) - mini.output(with_lora(model, tensors), family)).abs().max()
            assert close < 1e-2 * mini.output(trained, family).abs().max(), f"{family} {kind}: {close}"
            if kind == "kohya":
                assert lora[f"diffusion_model.{name}.lora_up.weight"].shape == (out, 6)
                assert lora[f"diffusion_model.{name}.alpha"] == 3.0
            if kind == "core":
                assert torch.equal(lora[f"diffusion_model.{name}.diff_b"], tensors[f"diffusion_model.{name}.diff_b"])


def check_a_lora_of_another_model_is_refused() -> None:
    _, model = next(models())
    file = loras() / "foreign.safetensors"
    safetensors.torch.save_file({"diffusion_model.nowhere.lora_A.weight": torch.zeros(2, 2),
                                 "diffusion_model.nowhere.lora_B.weight": torch.zeros(2, 2)}, file)  # fmt: skip
    assert "existing_lora" in refusal(model, "sdxl", existing_lora=file.name)


def check_steps_in_names() -> None:
    names = {"lora_500_steps_00001_.pt": 500, "lora.pt": 0, "a_20_b_7_steps.pt": 7, "x_steps_.pt": 0}
    assert {name: steps_of(Path(name)) for name in names} == names
