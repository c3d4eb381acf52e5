"""Checks of training inside ComfyUI, run by its own Python with its own modules: one process, many checks.

    COMFYUI_DIR=... $COMFYUI_PYTHON tests/comfy_checks.py OUTPUT.json [CHECK ...]

Writes for each check "" or what went wrong.
"""

# mypy: ignore-errors

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(tempfile.gettempdir())


def enter_comfyui(base: Path, cpu: bool = True) -> None:
    """Makes ComfyUI's modules and this package importable, as main.py does."""
    sys.path.insert(0, os.environ["COMFYUI_DIR"])
    sys.argv = ["main.py", *(["--cpu"] if cpu else []), "--base-directory", str(base)]
    import comfy.options

    comfy.options.enable_args_parsing()
    import utils.extra_config  # noqa: F401  # before others claim the name

    # isort: split
    import server

    server.PromptServer.instance = None
    spec = importlib.util.spec_from_file_location(
        "diffusion_trainer", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])  # fmt: skip
    package = importlib.util.module_from_spec(spec)
    sys.modules["diffusion_trainer"] = package
    spec.loader.exec_module(package)
    sys.path.append(str(ROOT / "tests"))
    import folder_paths

    folder_paths.add_model_folder_path("loras", str(base / "output" / "loras"))  # as main.py does
    import torch

    torch.set_num_threads(1)


def train(model: Any, family: str, latents: Any = None, positive: Any = None, **values: Any) -> Any:
    """TrainLoRANode on one random picture, as ComfyUI's executor calls it."""
    import comfy_miniatures as mini
    import torch
    from diffusion_trainer.diffusion_nodes.lora_nodes import TrainLoRANode

    values = {"steps": 4, "training_dtype": "fp32", "lora_dtype": "fp32", "rank": 4, **values}
    latents = latents or [mini.latents(family, 1, 3)]
    positive = positive or [mini.conditioning(family, 4)]
    with torch.inference_mode():
        return TrainLoRANode().train(
            model=[model], latents=latents, positive=positive,
            **{name: value if isinstance(value, list) else [value] for name, value in values.items()})  # fmt: skip


def same(first: Any, second: Any) -> bool:
    import torch

    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def refusal(*args: Any, **values: Any) -> str:
    """What the node tells about inputs that it must refuse."""
    told = ""
    try:
        train(*args, **values)
    except ValueError as error:
        told = str(error)
    return told


def models() -> Any:
    import comfy_miniatures as mini
    import torch

    for family in mini.FAMILIES:
        with torch.inference_mode():  # as the executor loads them
            model = mini.make_model(family, seed=1)
        yield family, model


# -- what comes out ------------------------------------------------------------------------------------------------


def check_every_family_learns_and_its_file_loads_whole() -> None:
    import comfy.lora
    import comfy_miniatures as mini
    import torch

    for family, model in models():
        trained, lora, curve, steps = train(model, family, steps=8, learning_rate=0.002)
        assert steps == 8 and len(curve["loss"]) == 8
        patches = comfy.lora.load_lora(dict(lora), comfy.lora.model_lora_keys_unet(model.model, {}), log_missing=False)
        used = set().union(*(patch.loaded_keys for patch in patches.values()))
        assert used == set(lora), f"{family}: {sorted(set(lora) - used)[:3]} not loaded"
        before, after = mini.output(model, family), mini.output(trained, family)
        assert torch.isfinite(after).all() and not torch.allclose(before, after, atol=1e-3), family


def check_the_loss_is_the_models_own() -> None:
    import torch
    from diffusion_trainer.diffusion_nodes.lora_objective import loss, noisy

    for family, model in models():
        sampling = model.model.model_sampling
        latent, noise, output = torch.randn(3, 2, 4, 6, 6).unbind(0)
        sigma = sampling.sigmas[[len(sampling.sigmas) // 5, -3]].float().clone()
        x = noisy(sampling, latent, noise, sigma)
        target = noise if family == "sdxl" else noise - latent
        got = loss(sampling, sampling.calculate_denoised(sigma, output, x), latent, sigma, None, "MSE")
        torch.testing.assert_close(got, (output - target).square().mean(), rtol=1e-3, atol=1e-4)
    import comfy.model_base

    v = comfy.model_base.model_sampling(model.model.model_config, comfy.model_base.ModelType.V_PREDICTION)
    sigma = v.sigmas[[100, 800]].float().clone()
    alpha = (1 / (1 + sigma**2)).sqrt().reshape(-1, 1, 1, 1)
    beta = (1 - alpha**2).sqrt()
    x = noisy(v, latent, noise, sigma)
    got = loss(v, v.calculate_denoised(sigma, output, x), latent, sigma, None, "L1")
    torch.testing.assert_close(got, (output - (alpha * noise - beta * latent)).abs().mean(), rtol=1e-3, atol=1e-4)


def check_adapters_at_run_time_are_the_patched_weights() -> None:
    import torch
    from diffusion_trainer.diffusion_nodes import lora_files, lora_nodes
    from diffusion_trainer.diffusion_nodes.lora_layers import shape_of, targets
    from diffusion_trainer.utils.adapter_layers import ALGORITHMS, new_adapter

    generator = torch.Generator().manual_seed(0)
    for family, model in models():
        for algorithm in ALGORITHMS:
            adapters = {}
            for name, module in targets(model.model, ["*"]).items():
                adapter = adapters[name] = new_adapter(algorithm, shape_of(module), 4, 2.0, generator)
                for parameter in adapter.parameters():
                    parameter.data += torch.randn(parameter.shape, generator=generator) * 0.05
            state = lora_files.state_of(adapters, {}, torch.float32)
            error, size = difference(model, lora_nodes.with_lora(model, state), adapters, family)
            assert error < 2e-4 * size, f"{family} {algorithm}: {error} of {size}"


def difference(model: Any, patched: Any, adapters: Any, family: str) -> tuple[float, float]:
    """Of the model with adapters put in at run time from that with patched weights, and the size of outputs."""
    import comfy.model_management as management
    import torch
    from diffusion_trainer.diffusion_nodes.lora_layers import attached

    management.load_models_gpu([patched])
    with torch.inference_mode():
        wanted = apply(patched, family)
    management.load_models_gpu([model])
    with torch.inference_mode(False), attached(model.model, adapters, torch.float32, checkpointing=True):
        got = apply(model, family).detach()
    return (got - wanted).abs().max().item(), wanted.abs().max().item()


def apply(model: Any, family: str) -> Any:
    import comfy_miniatures as mini
    import torch
    from diffusion_trainer.diffusion_nodes.lora_samples import joined, prepare, split_conditioning, split_latents

    with torch.no_grad():
        pairs = split_latents([mini.latents(family, 1, 3)]), split_conditioning([mini.conditioning(family, 4)])
        sample = prepare(model.model, *pairs, None, [], torch.device("cpu"))[0]
    sigma = model.model.model_sampling.sigmas[[500]].float().clone()
    return model.model.apply_model(sample.latent, sigma, transformer_options={}, **joined([sample.conds], sigma.device))


def check_gradients_are_right() -> None:
    import comfy.model_management as management
    import torch
    from diffusion_trainer.diffusion_nodes.lora_layers import attached, shape_of, targets
    from diffusion_trainer.diffusion_nodes.lora_training import untouched
    from diffusion_trainer.utils.adapter_layers import new_adapter

    for family, model in models():
        management.load_models_gpu([model])
        for algorithm in ("LoRA", "LoKr"):
            generator = torch.Generator().manual_seed(0)
            with untouched():
                adapters = {name: new_adapter(algorithm, shape_of(module), 4, 4.0, generator)
                            for name, module in targets(model.model, ["*"]).items()}  # fmt: skip
                weights = [p for adapter in adapters.values() for p in adapter.parameters()]
                for weight in weights:
                    weight.data += torch.randn(weight.shape, generator=generator) * 0.02
                gradients = {}
                for checkpointing in (True, False):
                    with attached(model.model, adapters, torch.float32, checkpointing=checkpointing):
                        value = apply(model, family).square().mean()
                        found = torch.autograd.grad(value, weights, allow_unused=True)
                        gradients[checkpointing] = [torch.zeros_like(w) if g is None else g
                                                    for g, w in zip(found, weights, strict=True)]  # fmt: skip
                norm = torch.sqrt(sum(g.square().sum() for g in gradients[True]))
                for one, other in zip(*gradients.values(), strict=True):
                    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * float(norm))
                moved = []
                for sign in (1, -1):
                    for weight, gradient in zip(weights, gradients[True], strict=True):
                        weight.data += sign * 2e-3 * gradient / norm
                    with attached(model.model, adapters, torch.float32, checkpointing=False):
                        moved.append(apply(model, family).square().mean().item())
                    for weight, gradient in zip(weights, gradients[True], strict=True):
                        weight.data -= sign * 2e-3 * gradient / norm
                slope = (moved[0] - moved[1]) / 4e-3
                assert abs(slope / norm.item() - 1) < 0.03, f"{family} {algorithm}: {slope} for {norm.item()}"


def check_the_same_seed_gives_the_same_lora() -> None:
    import torch

    for family, model in models():
        first = train(model, family, seed=7)[1]
        torch.rand(5)
        assert same(first, train(model, family, seed=7)[1]), family
        assert not same(first, train(model, family, seed=8)[1]), family


def check_overfitting_one_latent() -> None:
    import comfy_miniatures as mini

    for family, model in models():
        latent = mini.latents(family, 1, 3)
        latent["samples"] *= 0.0  # so that a model of this size can tell the noise from the picture
        values = {"steps": 150, "learning_rate": 0.003, "rank": 128, "target": "*", "warmup_steps": 10, "batch_size": 8,
                  "gradient_checkpointing": False}  # fmt: skip
        losses = train(model, family, [latent], **values)[2]["loss"]
        start, end = losses[0], sum(losses[-20:]) / 20
        assert end < start / 10, f"{family}: from {start:.3f} to {end:.3f}"


# -- what stays as it was --------------------------------------------------------------------------------------------


def picture_of(model: Any) -> Any:
    """All of a MODEL that training could touch."""
    import comfy.model_management as management
    import torch

    modules = {name: {key: value for key, value in vars(module).items() if key not in ("_parameters", "_buffers")}
               for name, module in model.model.named_modules()}  # fmt: skip
    held = {name: (id(p), p.data_ptr(), p._version if not p.is_inference() else 0, float(p.float().sum()))
            for name, p in model.model.named_parameters()}  # fmt: skip
    modules[""].pop("current_weight_patches_uuid", None)
    for key in ("model_loaded_weight_memory", "device", "model_lowvram", "lowvram_patch_counter"):
        modules[""].pop(key, None)
    for values in modules.values():  # loading does these, as for sampling
        for key in ("comfy_patched_weights", "comfy_force_cast_weights", "weight_function", "bias_function"):
            values.pop(key, None)
    patcher = (str(model.patches), str(model.object_patches), str(model.model_options), model.patches_uuid)
    flags = (torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.backends.cudnn.benchmark,
             torch.backends.cudnn.enabled, torch.get_float32_matmul_precision(),
             getattr(management, "in_training", None), len(management.current_loaded_models))  # fmt: skip
    return {"modules": {k: sorted(v) for k, v in modules.items()}, "held": held, "patcher": patcher, "flags": flags,
            "forward": [name for name, module in model.model.named_modules() if "forward" in vars(module)],
            "random": torch.get_rng_state().sum().item()}  # fmt: skip


def check_nothing_else_is_changed() -> None:
    import comfy_miniatures as mini
    import torch
    from diffusion_trainer.diffusion_nodes import lora_objective

    def ends_well(model: Any, family: str) -> None:
        train(model, family)

    def fails(model: Any, family: str) -> None:
        usual = lora_objective._LOSSES["Huber"]
        lora_objective._LOSSES["Huber"] = broken
        with contextlib.suppress(ZeroDivisionError):
            train(model, family, loss_function="Huber")
            raise AssertionError("no error")
        lora_objective._LOSSES["Huber"] = usual

    def broken(*_: Any, **__: Any) -> Any:
        torch.rand(3)
        torch.backends.cudnn.benchmark = True
        return 1 / 0

    def is_cancelled(model: Any, family: str) -> None:
        import comfy.model_management as management

        management.interrupt_current_processing()
        with contextlib.suppress(management.InterruptProcessingException):
            train(model, family)
            raise AssertionError("not cancelled")

    for family, model in models():
        with torch.inference_mode():
            for way in (ends_well, fails, is_cancelled):
                for sampled in (False, True):
                    if sampled:
                        mini.output(model, family)
                    before = picture_of(model)
                    way(model, family)
                    after = picture_of(model)
                    for key in before:
                        assert before[key] == after[key], f"{family}, {way.__name__}: {key} changed"


def check_cancel_keeps_or_discards() -> None:
    import comfy.model_management as management
    import torch
    from diffusion_trainer.diffusion_nodes import lora_training

    family, model = next(models())
    usual = lora_training._Run._step
    for choice in ("discard", "keep"):

        def step(self: Any) -> float:
            if self.done == 3:
                management.interrupt_current_processing()
            return usual(self)

        lora_training._Run._step = step
        try:
            result = train(model, family, steps=50, on_cancel=choice, save_every=40, save_prefix=f"loras/{choice}")
            assert choice == "keep" and len(result[2]["loss"]) in (3, 4) and result[3] in (3, 4)
        except management.InterruptProcessingException:
            assert choice == "discard"
        finally:
            lora_training._Run._step = usual
        saved = list((FOLDER / "output/loras").glob(f"{choice}_*_steps.safetensors"))
        assert len(saved) == 1, saved
    assert torch.is_grad_enabled()


# -- captions, sizes, conditions ------------------------------------------------------------------------------------


@contextlib.contextmanager
def calls_of(model: Any) -> Any:
    """The arguments of every call of the model."""
    seen: list[tuple[Any, Any, Any]] = []
    usual = model.model.apply_model

    def spy(x: Any, t: Any, **kwargs: Any) -> Any:
        seen.append((x.detach().clone(), t, kwargs))
        return usual(x, t, **kwargs)

    vars(model.model)["apply_model"] = spy
    try:
        yield seen
    finally:
        del vars(model.model)["apply_model"]


def check_each_picture_has_its_caption_and_one_place_in_the_batch() -> None:
    import comfy_miniatures as mini
    import torch

    for family, model in models():
        latent = mini.latents(family, 4, 3)
        for index in range(4):
            latent["samples"][index] = index * 10.0
        captions = [[[torch.full((1, 12, mini.WIDTH), float(n)), mini.conditioning(family)[0][1]]] for n in range(4)]
        batch = [[torch.cat([c[0][0] for c in captions]), {"pooled_output": captions[0][0][1]["pooled_output"]}]]
        for given in (captions, [[c[0] for c in captions]], [batch]):
            with calls_of(model) as seen:
                train(model, family, [latent], given, batch_size=4, steps=3)
            assert len(seen) == 3, f"{family}: {len(seen)} calls for 3 steps"
            for x, t, kwargs in seen:
                assert x.shape[0] == 4 and sorted(kwargs["c_crossattn"][:, 0, 0].tolist()) == [0, 1, 2, 3]
                if family in ("flux", "wan", "qwen"):
                    inner = model.model.process_latent_in(latent["samples"] if x.ndim == 4
                                                          else latent["samples"].unsqueeze(2))  # fmt: skip
                    keep = (1 - t.reshape(-1, *[1] * (x.ndim - 1))) * inner[kwargs["c_crossattn"][:, 0, 0].long()]
                    assert (x - keep).flatten(1).std(1).le(1.5).all(), family
        for count in (2, 3):
            told = refusal(model, family, [latent], captions[:count])
            assert str(count) in told and "4" in told


def check_every_size_goes_through_the_latent_format() -> None:
    import comfy_miniatures as mini
    from diffusion_trainer.diffusion_nodes import lora_training

    for family, model in models():
        sizes = [(8, 8), (8, 12), (8, 8), (4, 8)]
        latents = [mini.latents(family, 1, n, *size) for n, size in enumerate(sizes)]
        prepared: list[Any] = []
        usual = lora_training.prepare

        def noting(*args: Any, usual: Any = usual, prepared: Any = prepared) -> Any:
            prepared.append(usual(*args))
            return prepared[-1]

        lora_training.prepare = noting
        try:
            with calls_of(model) as seen:
                train(model, family, latents, [mini.conditioning(family)], steps=12, batch_size=2)
        finally:
            lora_training.prepare = usual
        assert {tuple(x.shape[-2:]) for x, *_ in seen} == {(8, 8), (8, 12), (4, 8)}
        for sample, latent in zip(prepared[0], latents, strict=True):
            raw = latent["samples"]
            raw = raw.unsqueeze(2) if sample.latent.ndim == 5 else raw
            wanted = model.model.process_latent_in(raw)
            assert (sample.latent - wanted).abs().max() < 1e-6
            assert (wanted - raw).abs().max() > 1e-3


def check_pictures_count_alike() -> None:
    import itertools
    from collections import Counter

    import torch
    from diffusion_trainer.diffusion_nodes.lora_samples import Sample, batches

    samples = [Sample(torch.zeros(1, 4, 8, 8 if n < 5 else 16), {}, {}) for n in range(7)]
    drawn = Counter(index for batch in itertools.islice(batches(samples, 3, 0), 700) for index in batch)
    assert max(drawn.values()) - min(drawn.values()) <= 3, drawn


def check_videos_and_control_latents() -> None:
    import comfy_miniatures as mini
    import torch

    for family, model in models():
        if family == "wan":
            with calls_of(model) as seen:
                train(model, family, [mini.latents(family, 2, frames=3)], batch_size=2)
            assert seen[0][0].shape == (2, 16, 3, 8, 8)
        if family in ("flux", "qwen"):
            reference = mini.latents(family, 1, 9, frames=int(family == "qwen"))["samples"]
            positive = mini.conditioning(family, 4, reference_latents=[reference])
            with calls_of(model) as seen:
                train(model, family, positive=[positive])
            carried = seen[0][2]["ref_latents"][0]
            wanted = model.model.process_latent_in(reference)
            assert torch.allclose(carried.float(), wanted.float(), atol=1e-5)


def check_masks_decide_what_is_learned() -> None:
    import torch
    from diffusion_trainer.diffusion_nodes.lora_objective import loss

    family, model = next(models())
    mask = torch.zeros(1, 64, 64)
    mask[:, :32] = 1
    masked = train(model, family, masks=[mask])[1]
    assert not same(masked, train(model, family)[1])
    assert same(train(model, family, masks=[torch.ones(1, 64, 64)])[1], train(model, family)[1])
    sampling = model.model.model_sampling
    denoised = torch.randn(1, 4, 8, 8, requires_grad=True)
    half = torch.zeros(1, 1, 8, 8)
    half[..., :4, :] = 1
    loss(sampling, denoised, torch.zeros(1, 4, 8, 8), sampling.sigmas[[500]].clone(), half, "MSE").backward()
    assert denoised.grad[..., :4, :].abs().min() > 0 and denoised.grad[..., 4:, :].abs().max() == 0


def check_captions_of_unlike_lengths_keep_their_own() -> None:
    import comfy_miniatures as mini

    for family, model in models():
        captions = [mini.conditioning(family, 1, tokens=8), mini.conditioning(family, 2, tokens=12)]
        with calls_of(model) as seen:
            train(model, family, [mini.latents(family, 2)], captions, batch_size=2, steps=2)
        assert sum(x.shape[0] for x, *_ in seen) == 4
        assert {kwargs["c_crossattn"].shape[1] for *_, kwargs in seen} == {8, 12}


# -- other weights -------------------------------------------------------------------------------------------------


def check_float8_and_half_precision_models() -> None:
    import comfy_miniatures as mini
    import torch

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
    import comfy.ops
    import comfy_miniatures as mini
    import torch

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
    import torch

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
    import comfy_miniatures as mini
    import torch
    from diffusion_trainer.diffusion_nodes.lora_nodes import with_lora

    family, model = next(models())
    first = train(model, family, learning_rate=0.01)[1]
    carrier = with_lora(model, first)
    trained = train(carrier, family, learning_rate=0.01)[0]
    outputs = [mini.output(m, family) for m in (model, carrier, trained)]
    assert not torch.allclose(outputs[0], outputs[1]) and not torch.allclose(outputs[1], outputs[2])


# -- going on ------------------------------------------------------------------------------------------------------


def check_going_on_is_as_if_never_interrupted() -> None:
    from diffusion_trainer.diffusion_nodes.lora_nodes import SaveTrainedLoRANode

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
    import comfy_miniatures as mini
    import safetensors.torch
    import torch
    from diffusion_trainer.diffusion_nodes.lora_files import read_existing
    from diffusion_trainer.diffusion_nodes.lora_nodes import with_lora

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
            file = FOLDER / "output/loras" / f"{family}-{kind}.safetensors"
            file.parent.mkdir(parents=True, exist_ok=True)
            safetensors.torch.save_file({key: value.contiguous() for key, value in tensors.items()}, file)
            with torch.inference_mode(False):
                existing = read_existing(file, model.model)
            if kind != "core":
                error, size = difference(model, with_lora(model, tensors), existing.adapters, family)
                assert error < 2e-4 * size, f"{family} {kind}: {error} of {size}"
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
    import safetensors.torch
    import torch

    _, model = next(models())
    file = FOLDER / "output/loras" / "foreign.safetensors"
    safetensors.torch.save_file({"diffusion_model.nowhere.lora_A.weight": torch.zeros(2, 2),
                                 "diffusion_model.nowhere.lora_B.weight": torch.zeros(2, 2)}, file)  # fmt: skip
    assert "existing_lora" in refusal(model, "sdxl", existing_lora=file.name)


def check_steps_in_names() -> None:
    from diffusion_trainer.diffusion_nodes.lora_files import steps_of

    names = {"lora_500_steps_00001_.pt": 500, "lora.pt": 0, "a_20_b_7_steps.pt": 7, "x_steps_.pt": 0}
    assert {name: steps_of(Path(name)) for name in names} == names


def check_accumulation_is_a_larger_batch() -> None:
    import comfy_miniatures as mini
    import torch

    family, model = next(models())
    latents, captions = [mini.latents(family, 4)], [mini.conditioning(family)]
    values = {"steps": 1, "optimizer": "SGD", "learning_rate": 1.0, "gradient_clipping": 0.0}
    losses = train(model, family, latents, captions, gradient_accumulation=4, **values)[2]["loss"]
    assert len(losses) == 1 and torch.isfinite(torch.tensor(losses)).all()


def main() -> int:
    """Runs the checks named, or all."""
    global FOLDER
    output, wanted = Path(sys.argv[1]).resolve(), sys.argv[2:]
    with tempfile.TemporaryDirectory() as folder:
        FOLDER = Path(folder)
        for name in ("custom_nodes", "models", "input", "output/loras", "temp", "user"):
            (FOLDER / name).mkdir(parents=True)
        enter_comfyui(FOLDER)
        results = {}
        for name in wanted or CHECKS:
            try:
                globals()[f"check_{name}"]()
                results[name] = ""
            except BaseException:
                results[name] = traceback.format_exc()
            output.write_text(json.dumps(results))
    return 0


CHECKS = [name.removeprefix("check_") for name in list(globals()) if name.startswith("check_")]

if __name__ == "__main__":
    sys.exit(main())
