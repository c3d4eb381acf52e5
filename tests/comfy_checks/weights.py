"""Models whose weights are not plain fp32, and what else may come with a model."""

# mypy: ignore-errors

from __future__ import annotations

import json
from typing import Any

import comfy.ops
import comfy_miniatures as mini
import torch
from diffusion_trainer.diffusion_nodes.lora_nodes import with_lora

from .harness import models, picture_of, same, train


def check_float8_and_half_precision_models() -> None:
    for family in mini.FAMILIES:
        for dtype in (torch.float8_e4m3fn, torch.float16, torch.bfloat16):
            with torch.inference_mode():
                model = mini.make_model(family, dtype, seed=1)
            before = picture_of(model)["held"]
            losses = train(model, family, training_dtype="bf16", steps=2)[2]["loss"]
            assert all(0 < value < 20 for value in losses), f"{family} {dtype}: {losses}"
            assert picture_of(model)["held"] == before, f"{family} {dtype}"


def check_quantised_layers() -> None:
    """ComfyUI's float8 with scales, whose weights are no plain tensors; versions before have none."""
    if not hasattr(comfy.ops, "mixed_precision_ops"):
        return
    for family in ("flux", "wan", "qwen"):
        plain = mini.make_model(family, seed=1)
        state = {}
        marker = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
        for key, value in plain.model.diffusion_model.state_dict().items():
            stem = key.removesuffix(".weight")
            if "block" in key and key.endswith(".weight") and value.ndim == 2:
                scale = value.abs().max() / 448
                state |= {key: (value / scale).to(torch.float8_e4m3fn), f"{stem}.weight_scale": scale.clone(),
                          f"{stem}.comfy_quant": marker.clone()}  # fmt: skip
            else:
                state[key] = value.clone()
        with torch.inference_mode():
            model = mini.make_model(
                family, seed=1, operations=comfy.ops.mixed_precision_ops({}, compute_dtype=torch.float32))  # fmt: skip
            model.model.load_model_weights(state, "")
        kinds = {type(module.weight).__name__ + type(getattr(module.weight, "data", None)).__name__
                 for module in model.model.modules() if hasattr(module, "quant_format")}  # fmt: skip
        assert any("Quantized" in kind for kind in kinds), kinds
        trained, _, curve, _ = train(model, family, steps=8, learning_rate=0.005)
        assert all(0 < value < 20 for value in curve["loss"]), curve
        before, after = mini.output(model, family), mini.output(trained, family)
        assert torch.isfinite(after).all() and not torch.allclose(before, after, atol=1e-3)


def check_previews_and_offloading_change_nothing() -> None:
    class Vae:
        seen: list[Any] = []  # noqa: RUF012

        def decode(self, latent: Any) -> Any:
            self.seen.append(latent)
            return torch.rand(1, 8, 8, 3)

    for family, model in models():
        plain = train(model, family)[1]
        Vae.seen.clear()
        assert same(plain, train(model, family, vae=Vae(), preview_every=2)[1]), family
        assert len(Vae.seen) == 2 and torch.isfinite(Vae.seen[0]).all(), family
        assert same(plain, train(model, family, offloading=True)[1]), family


def check_models_with_a_lora_already() -> None:
    family, model = next(models())
    first = train(model, family, learning_rate=0.01)[1]
    carrier = with_lora(model, first)
    trained = train(carrier, family, learning_rate=0.01)[0]
    outputs = [mini.output(m, family) for m in (model, carrier, trained)]
    assert not torch.allclose(outputs[0], outputs[1]) and not torch.allclose(outputs[1], outputs[2])
