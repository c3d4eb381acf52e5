"""Models whose weights are not plain fp32, and what else may come with a model."""

# mypy: ignore-errors

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import comfy.ldm.wan.vae
import comfy.model_management as management
import comfy.ops
import comfy.sd
import comfy.utils
import comfy_miniatures as mini
import torch
from comfy_checkpoints import mosaic_vae
from diffusion_trainer.diffusion_nodes.lora_layers import Layer, shape_of
from diffusion_trainer.diffusion_nodes.lora_nodes import with_lora

with contextlib.suppress(ImportError):  # came in 0.4
    import comfy.quant_ops

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


def check_weights_of_any_mode_take_part() -> None:
    """Those made in inference mode or moved in it, as from one device to another, are none that autograd keeps."""
    for family in mini.FAMILIES:
        losses = []
        for made, moved in ((False, False), (False, True), (True, False), (True, True)):
            with torch.inference_mode(made):
                model = mini.make_model(family, seed=1)
            with torch.inference_mode(moved), torch.no_grad():
                for weight in (*model.model.parameters(), *model.model.buffers()):
                    weight.data = weight.data.clone()
            losses.append(train(model, family)[2]["loss"])
        assert all(of_one == losses[0] for of_one in losses), f"{family}: {losses}"


def check_quantised_layers() -> None:
    """Every format of ComfyUI whose weights are no plain tensors; versions before 0.4 have none."""
    if not hasattr(comfy.ops, "mixed_precision_ops"):
        return
    for family in ("flux", "wan", "qwen"):
        for algorithm in comfy.quant_ops.QUANT_ALGOS:
            if "e5m2" in algorithm and management.get_torch_device().type == "cuda":
                continue  # GPUs do not multiply two of them, so no such model works there
            model = quantised(family, algorithm)
            frozen = [module for module in model.model.modules() if hasattr(module, "quant_format")]
            assert len(frozen) > 5 and all("Quantized" in type(module.weight.data).__name__ for module in frozen)
            compare_weights(frozen[0], algorithm)
            compare_outputs(frozen[0])
            trained, _, curve, _ = train(model, family, steps=8, learning_rate=0.005)
            assert all(0 < value < 20 for value in curve["loss"]), f"{family} {algorithm}: {curve}"
            before, after = mini.output(model, family), mini.output(trained, family)
            assert torch.isfinite(after).all(), f"{family} {algorithm}"
            assert not torch.allclose(before, after, atol=1e-3), f"{family} {algorithm}"


def quantised(family: str, algorithm: str) -> Any:
    """A miniature whose blocks' linear layers are stored in one of ComfyUI's formats, loaded as from a file."""
    wide = {"flux": {"hidden_size": 256, "num_heads": 2}, "wan": {"dim": 256, "num_heads": 2},
            "qwen": {"num_attention_heads": 2}}[family]  # fmt: skip
    plain = mini.make_model(family, seed=1, **wide)
    layout = comfy.quant_ops.QUANT_ALGOS[algorithm]["comfy_tensor_layout"]
    state = {}
    for key, value in plain.model.diffusion_model.state_dict().items():
        stem = key.removesuffix(".weight")
        if "block" in key and key.endswith(".weight") and value.ndim == 2 and min(value.shape) >= 256:
            held = comfy.quant_ops.QuantizedTensor.from_float(value, layout, scale="recalculate")
            state |= held.state_dict(key)
            config = json.dumps({"format": algorithm}).encode()
            state[f"{stem}.comfy_quant"] = torch.tensor(list(config), dtype=torch.uint8)
        else:
            state[key] = value.clone()
    config = SimpleNamespace(quant_config={"mixed_ops": True})
    device = management.get_torch_device()
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16  # ComfyUI's products in float8 give no other
    operations = comfy.ops.pick_operations(dtype, dtype, device, model_config=config)
    with torch.inference_mode():
        model = mini.make_model(family, dtype, seed=1, operations=operations, **wide)
        model.model.load_model_weights(state, "")
    return model


def compare_weights(module: Any, algorithm: str) -> None:
    """The weight that gradients are computed from is the one that outputs are, but for rounding of activations."""
    shape = shape_of(module)
    with torch.inference_mode():
        device = management.get_torch_device()
        x = torch.randn(
            64, shape.inputs, device=device, dtype=torch.float32 if device.type == "cpu" else torch.bfloat16
        )
        got = module(x) - module(torch.zeros_like(x))
        weight, release = Layer(module, shape, None).weight(x.dtype, x.device)
        wanted = x @ weight.t()
        release()
    error = (got - wanted).norm() / wanted.norm()
    assert error < 0.2, f"{algorithm}: {error}"


def compare_outputs(module: Any) -> None:
    """In float32 a quantised layer computes with its weights as they are, as its gradient does."""
    layer = Layer(module, shape_of(module), None)
    x = torch.randn(64, layer.shape.inputs, device=management.get_torch_device())
    weight, release = layer.weight(torch.float32, x.device)
    with torch.no_grad():
        got = layer.output(x) - layer.output(torch.zeros_like(x))
        torch.testing.assert_close(got, x @ weight.t(), atol=1e-4, rtol=1e-4)
    release()


def check_previews_and_offloading_change_nothing() -> None:
    """With VAEs of ComfyUI's own classes: TAESD for pictures, Wan's for the others."""
    for family, model in models():
        plain = train(model, family)[1]
        with torch.inference_mode():
            vae = mini_vae(family)
        with pictures_of_nodes() as shown:
            assert same(plain, train(model, family, vae=vae, preview_every=2)[1]), family
        both = [picture for picture in shown if picture.size == (512, 512)]
        assert len(both) >= 2, f"{family}: {[picture.size for picture in shown]}"
        assert any(low < high for low, high in both[0].crop((0, 0, 512, 320)).getextrema()), family
        assert same(plain, train(model, family, offloading=True)[1]), family


def mini_vae(family: str) -> Any:
    """TAESD, with the channels of the family; for Wan and Qwen-Image, which know videos, Wan's own."""
    if family not in ("wan", "qwen"):
        return comfy.sd.VAE(sd=mosaic_vae(1.0, mini.CHANNELS[family]))
    vae = comfy.ldm.wan.vae.WanVAE(dim=96, z_dim=16, num_res_blocks=2, temperal_downsample=[False, True, True])
    mini.fill(vae, seed=2)
    return comfy.sd.VAE(sd=vae.state_dict())


@contextlib.contextmanager
def pictures_of_nodes() -> Iterator[list[Any]]:
    """What nodes show while they work."""
    shown: list[Any] = []

    def see(done: int, total: int, preview: Any, node_id: str | None = None) -> None:
        if preview is not None:
            shown.append(preview[1])

    before = comfy.utils.PROGRESS_BAR_HOOK
    comfy.utils.set_progress_bar_global_hook(see)
    try:
        yield shown
    finally:
        comfy.utils.set_progress_bar_global_hook(before)


def check_models_with_a_lora_already() -> None:
    family, model = next(models())
    first = train(model, family, learning_rate=0.01)[1]
    carrier = with_lora(model, first)
    trained = train(carrier, family, learning_rate=0.01)[0]
    outputs = [mini.output(m, family) for m in (model, carrier, trained)]
    assert not torch.allclose(outputs[0], outputs[1]) and not torch.allclose(outputs[1], outputs[2])
