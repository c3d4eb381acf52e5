"""What training makes of a model: the loss, the gradients, the LoRA."""

# mypy: ignore-errors

from __future__ import annotations

import gc
from typing import Any

import comfy.lora
import comfy.model_base
import comfy.model_management as management
import comfy.sample
import comfy_miniatures as mini
import torch
from diffusion_trainer.diffusion_nodes import lora_files, lora_nodes, lora_training
from diffusion_trainer.diffusion_nodes.lora_layers import attached, shape_of, targets
from diffusion_trainer.diffusion_nodes.lora_objective import loss, noisy
from diffusion_trainer.diffusion_nodes.lora_recompute import Copies
from diffusion_trainer.diffusion_nodes.lora_training import untouched
from diffusion_trainer.utils.adapter_layers import ALGORITHMS, new_adapter

from .harness import apply, difference, models, patching_error, same, train


def check_every_family_learns_and_its_file_loads_whole() -> None:
    for family, model in models():
        trained, lora, curve, steps = train(model, family, steps=8, learning_rate=0.002)
        assert steps == 8 and len(curve["loss"]) == 8
        patches = comfy.lora.load_lora(dict(lora), comfy.lora.model_lora_keys_unet(model.model, {}), log_missing=False)
        used = set().union(*(patch.loaded_keys for patch in patches.values()))
        assert used == set(lora), f"{family}: {sorted(set(lora) - used)[:3]} not loaded"
        before, after = mini.output(model, family), mini.output(trained, family)
        assert torch.isfinite(after).all() and not torch.allclose(before, after, atol=1e-3), family


def check_the_loss_is_the_models_own() -> None:
    for family, model in models():
        sampling = model.model.model_sampling
        latent, noise, output = torch.randn(3, 2, 4, 6, 6).unbind(0)
        sigma = sampling.sigmas[[len(sampling.sigmas) // 5, -3]].float().clone()
        x = noisy(sampling, latent, noise, sigma)
        target = noise if family == "sdxl" else noise - latent
        got = loss(sampling, sampling.calculate_denoised(sigma, output, x), latent, sigma, None, "MSE")
        torch.testing.assert_close(got, (output - target).square().mean(), rtol=1e-3, atol=1e-4)

    v = comfy.model_base.model_sampling(model.model.model_config, comfy.model_base.ModelType.V_PREDICTION)
    sigma = v.sigmas[[100, 800]].float().clone()
    alpha = (1 / (1 + sigma**2)).sqrt().reshape(-1, 1, 1, 1)
    beta = (1 - alpha**2).sqrt()
    x = noisy(v, latent, noise, sigma)
    got = loss(v, v.calculate_denoised(sigma, output, x), latent, sigma, None, "L1")
    torch.testing.assert_close(got, (output - (alpha * noise - beta * latent)).abs().mean(), rtol=1e-3, atol=1e-4)


def check_adapters_at_run_time_are_the_patched_weights() -> None:
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
            assert error < patching_error() * size, f"{family} {algorithm}: {error} of {size}"


def check_gradients_are_right() -> None:
    device = management.get_torch_device()
    for family, model in models():
        management.load_models_gpu([model])
        for algorithm in ("LoRA", "LoKr"):
            generator = torch.Generator().manual_seed(0)
            with untouched():
                adapters = {name: new_adapter(algorithm, shape_of(module), 4, 4.0, generator).to(device)
                            for name, module in targets(model.model, ["*"]).items()}  # fmt: skip
                weights = [p for adapter in adapters.values() for p in adapter.parameters()]
                for weight in weights:
                    weight.data += torch.randn(weight.shape, generator=generator).to(device) * 0.02
                gradients = {}
                for checkpointing in (True, False):
                    with attached(model.model, adapters, torch.float32, Copies(made=True), checkpointing=checkpointing):
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
                    with attached(model.model, adapters, torch.float32, Copies(made=True), checkpointing=False):
                        moved.append(apply(model, family).square().mean().item())
                    for weight, gradient in zip(weights, gradients[True], strict=True):
                        weight.data -= sign * 2e-3 * gradient / norm
                slope = (moved[0] - moved[1]) / 4e-3
                assert abs(slope / norm.item() - 1) < 0.03, f"{family} {algorithm}: {slope} for {norm.item()}"


def check_the_same_seed_gives_the_same_lora() -> None:
    for family, model in models():
        first = train(model, family, seed=7)[1]
        torch.rand(5)
        assert same(first, train(model, family, seed=7)[1]), family
        assert not same(first, train(model, family, seed=8)[1]), family


def check_copies_are_made_where_a_model_needs_them() -> None:
    usual, made = lora_training.Copies, []

    def told() -> Any:
        made.append(usual())
        return made[-1]

    for family, model in models():
        for checkpointing in (True, False):
            given = {"gradient_checkpointing": checkpointing, "gradient_accumulation": 2}
            try:
                lora_training.Copies = told
                lora = train(model, family, **given)[1]
                lora_training.Copies = lambda: usual(made=True)
                always = train(model, family, **given)[1]
            finally:
                lora_training.Copies = usual
            for key, value in lora.items():  # copies may lie otherwise in memory, which rounds otherwise
                assert (value - always[key]).abs().max() < 1e-5, f"{family} {checkpointing}: {key}"
    del model
    gc.collect()
    held = [one for one in gc.get_objects() if type(one).__name__ == "_FrozenBackward"]
    assert not held, f"{len(held)} layers of a step that was done again are held"
    assert {copies.made for copies in made} == {True, False}, "some of these models need them, some do not"


WIDE = {"sdxl": {}, "flux": {"hidden_size": 256, "num_heads": 2}, "qwen": {"num_attention_heads": 2},
        "wan": {"dim": 256, "num_heads": 2, "ffn_dim": 1024}}  # fmt: skip
"""At half of this width the random, frozen rest of a transformer lets too little of a token's noise through: Wan ends
at a sixth of its first loss, however long it trains."""
STEPS = {"sdxl": 200, "flux": 200, "qwen": 200, "wan": 600}


def check_overfitting_one_latent() -> None:
    """A smooth picture: the loss can fall to nothing, because noise follows from the noisy latent and the latent."""
    for family in mini.FAMILIES:
        with torch.inference_mode():
            model = mini.make_model(family, seed=1, **WIDE[family])
        coarse = mini.latents(family, 1, 3, 3, 3)["samples"]
        smooth = torch.nn.functional.interpolate(coarse, size=(8, 8), mode="bicubic", align_corners=True)
        inner = smooth / smooth.std()
        inner = inner.unsqueeze(2) if family in ("wan", "qwen") else inner
        latent = model.model.process_latent_out(inner)
        values = {"steps": STEPS[family], "learning_rate": 0.005, "rank": 32, "target": "*", "warmup_steps": 10,
                  "batch_size": 4, "schedule": "cosine", "gradient_checkpointing": False}  # fmt: skip
        trained, _, curve, _ = train(model, family, [{"samples": latent}], **values)
        start, end = curve["loss"][0], sum(curve["loss"][-20:]) / 20
        assert end < start / 10, f"{family}: from {start:.3f} to {end:.3f}"
        far, near = (distance(patched, family, latent) for patched in (model, trained))
        assert near < far / 10, f"{family}: what it makes is {near:.3f} from the latent, and was {far:.3f}"


def check_bf16_learns_what_fp32_does() -> None:
    """The loss of each step depends on what the steps before it have learned."""
    rates = {"AdamW": 0.01, "Adam": 0.01, "SGD": 1.0, "RMSprop": 0.001}
    for family in mini.FAMILIES:
        with torch.inference_mode():
            model = mini.make_model(family, seed=1)
        for optimizer in rates if family == "flux" else ["AdamW"]:
            values = {"steps": 30, "learning_rate": rates[optimizer], "optimizer": optimizer, "target": "*"}
            exact, rounded, none = (
                sum(train(model, family, **{**values, **changes})[2]["loss"][15:]) / 15
                for changes in ({}, {"training_dtype": "bf16"}, {"learning_rate": 1e-7})
            )
            told = f"{family} {optimizer}: {none} without, {exact} and {rounded} after learning"
            assert exact < 0.9 * none and abs(rounded - exact) < 0.2 * (none - exact), told


def distance(model: Any, family: str, latent: torch.Tensor) -> float:
    """Mean square distance of what the model makes of its caption from ``latent``."""
    shape = latent.unsqueeze(2) if family in ("wan", "qwen") and latent.ndim == 4 else latent
    noise = torch.randn(shape.shape, generator=torch.Generator().manual_seed(1))
    caption = mini.conditioning(family, 4)
    with torch.inference_mode():
        made = comfy.sample.sample(model, noise, 8, 1.0, "euler", "simple", caption, caption,
                                   torch.zeros_like(shape), disable_pbar=True, seed=1)  # fmt: skip
    return float((made - shape).square().mean())


def check_alpha_stays_as_it_was() -> None:
    family, model = next(models())
    for alpha, told in ((0.0, 4.0), (3.0, 3.0)):
        lora = train(model, family, alpha=alpha, learning_rate=0.05)[1]
        found = {float(value) for key, value in lora.items() if key.endswith(".alpha")}
        assert found == {told}, found
