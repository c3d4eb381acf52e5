"""What training leaves as it was, and Cancel."""

# mypy: ignore-errors

from __future__ import annotations

import contextlib
from typing import Any

import comfy.model_management as management
import comfy_miniatures as mini
import safetensors.torch
import torch
from diffusion_trainer.diffusion_nodes import lora_objective, lora_training

from .harness import loras, models, picture_of, refusal, same, train


def check_nothing_else_is_changed() -> None:
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
                    elif management.get_torch_device().type == "cuda":
                        management.load_models_gpu([model])  # as sampling and training leave it
                    before = picture_of(model)
                    way(model, family)
                    after = picture_of(model)
                    for key in before:
                        assert before[key] == after[key], (
                            f"{family}, {way.__name__}: {key} {change(before, after, key)}"
                        )


def change(before: Any, after: Any, key: str) -> str:
    if not isinstance(before[key], dict):
        return f"was {before[key]}, is {after[key]}"
    found = next(name for name in before[key] | after[key] if before[key].get(name) != after[key].get(name))
    return f"of {found} was {before[key].get(found)}, is {after[key].get(found)}"


def check_cancel_keeps_or_discards() -> None:
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
        saved = list((loras()).glob(f"{choice}_*_steps.safetensors"))
        assert len(saved) == 1, saved
    assert torch.is_grad_enabled()


def check_what_is_saved_on_the_way_is_the_lora_of_that_step() -> None:
    for family, model in models():
        name = f"way/{family}"
        train(model, family, steps=5, seed=4, save_every=2, save_prefix=f"loras/{name}", gradient_accumulation=2)
        for steps in (2, 4):
            shorter = train(model, family, steps=steps, seed=4, gradient_accumulation=2)[1]
            saved = safetensors.torch.load_file(loras() / f"{name}_{steps}_steps.safetensors")
            assert same(shorter, saved), f"{family}: {steps}"
        assert not (loras() / f"{name}_5_steps.safetensors").exists()


def check_a_model_without_gradients_is_refused() -> None:
    """Layers that another package computes in its own way, outside autograd."""
    family, model = list(models())[2]
    block = model.model.diffusion_model.head
    usual = block.forward
    block.forward = lambda *args, **kwargs: usual(*args, **kwargs).detach()
    assert "no gradient" in refusal(model, family)


def check_streamed_weights_are_let_go_of() -> None:
    """With dynamic VRAM, pages that stay pinned could never make room for another model."""
    for family, model in models():
        if not getattr(model, "is_dynamic", lambda: False)():
            return
        train(model, family, training_dtype="bf16")
        for held in model.model.dynamic_vbars.values():
            assert not any(page & 2 for page in held.get_residency()), f"{family}: pages are pinned"
