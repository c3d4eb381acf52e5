"""What each option of the node does to the LoRA."""

# mypy: ignore-errors

from __future__ import annotations

import math
from typing import Any

import comfy.lora
import comfy_miniatures as mini
import torch
from diffusion_trainer.diffusion_nodes import lora_training
from diffusion_trainer.diffusion_nodes.lora_nodes import SaveTrainedLoRANode
from diffusion_trainer.diffusion_nodes.lora_samples import generator
from diffusion_trainer.diffusion_nodes.lora_settings import LoraTraining

from .harness import calls_of, models, refusal, same, train


def part(lora: Any, ending: str) -> torch.Tensor:
    """All weights of one kind in one row."""
    return torch.cat([value.flatten() for key, value in sorted(lora.items()) if key.endswith(ending)])


def check_gradients_are_clipped() -> None:
    for family, model in models():
        values = {"steps": 1, "optimizer": "SGD", "learning_rate": 1.0}
        free = part(train(model, family, gradient_clipping=0.0, **values)[1], "lora_up.weight")
        clipped = part(train(model, family, gradient_clipping=1e-3, **values)[1], "lora_up.weight")
        assert free.norm() > 2e-3 and math.isclose(float(clipped.norm()), 1e-3, rel_tol=1e-2), family
        torch.testing.assert_close(clipped / clipped.norm(), free / free.norm(), rtol=1e-3, atol=1e-6)


def check_weight_decay_shrinks() -> None:
    family, model = next(models())
    values = {"steps": 1, "learning_rate": 0.1}
    plain, decayed = (part(train(model, family, weight_decay=decay, **values)[1], "lora_down.weight")
                      for decay in (0.0, 1.0))  # fmt: skip
    torch.testing.assert_close(decayed, plain * 0.9, rtol=1e-4, atol=1e-7)


def check_schedule_and_warm_up() -> None:
    def rates(**values: Any) -> list[float]:
        settings = LoraTraining(steps=10, **values)
        return [lora_training.schedule(settings, done) for done in range(10)]

    assert rates() == [1.0] * 10
    line = rates(schedule="linear", warmup_steps=2)
    assert line[:3] == [1 / 3, 2 / 3, 1.0] and math.isclose(line[9], 1 / 8)
    curve = rates(schedule="cosine")
    assert curve[0] == 1.0 and math.isclose(curve[5], 0.5) and 0 < curve[9] < 0.03
    family, model = next(models())
    whole, warm = (part(train(model, family, steps=1, optimizer="SGD", warmup_steps=warmup)[1], "lora_up.weight")
                   for warmup in (0, 3))  # fmt: skip
    torch.testing.assert_close(warm, whole / 4, rtol=1e-4, atol=1e-9)


def check_accumulation_averages() -> None:
    """Four times the same batch for one step give the step of that batch."""
    usual = lora_training._Run._losses
    lora_training._Run._losses = lambda self, batch, draws: usual(self, [0], generator(0, "the same"))
    try:
        for family, model in models():
            values = {"steps": 2, "optimizer": "SGD", "learning_rate": 0.1}
            once = train(model, family, **values)
            four = train(model, family, gradient_accumulation=4, **values)
            assert four[2]["loss"] == once[2]["loss"] or torch.allclose(
                torch.tensor(four[2]["loss"]), torch.tensor(once[2]["loss"]), rtol=1e-5)  # fmt: skip
            torch.testing.assert_close(part(four[1], "lora_up.weight"), part(once[1], "lora_up.weight"))
    finally:
        lora_training._Run._losses = usual


def check_target_patterns() -> None:
    names = {"sdxl": ("attn1", "to_k"), "flux": ("img_attn", "qkv"), "wan": ("self_attn", ".k"),
             "qwen": ("attn", "to_k")}  # fmt: skip
    for family, model in models():
        wanted, unwanted = names[family]
        chosen = {key.rpartition(".lora")[0] for key in train(model, family, steps=1, target=wanted)[1]
                  if ".lora" in key}  # fmt: skip
        fewer = {key.rpartition(".lora")[0] for key in train(model, family, steps=1, target=f"{wanted}, -{unwanted}")[1]
                 if ".lora" in key}  # fmt: skip
        assert chosen and all(wanted in name for name in chosen), family
        assert fewer and fewer == {name for name in chosen if unwanted not in name}, f"{family}: {fewer}"
        assert "target" in refusal(model, family, target="no_such_layer")


def check_captions_are_dropped() -> None:
    for family, model in models():
        caption, negative = mini.conditioning(family, 4), mini.conditioning(family, 7)
        for share, given, wanted in ((0.0, {}, caption[0][0]), (1.0, {}, torch.zeros_like(caption[0][0])),
                                     (1.0, {"negative": [negative]}, negative[0][0])):  # fmt: skip
            with calls_of(model) as seen:
                train(model, family, positive=[caption], caption_dropout=share, steps=3, **given)
            for *_, kwargs in seen:
                torch.testing.assert_close(kwargs["c_crossattn"].float(), wanted, msg=f"{family}: {share}")


def check_every_algorithm_optimizer_and_loss_trains_and_goes_on() -> None:
    family, model = list(models())[2]
    known = comfy.lora.model_lora_keys_unet(model.model, {})
    seen = []
    for algorithm in ("LoRA", "LoHa", "LoKr"):
        for optimizer in ("AdamW", "Adam", "SGD", "RMSprop"):
            values = {
                "algorithm": algorithm,
                "optimizer": optimizer,
                "learning_rate": 0.01,
                "seed": 3,
                "loss_function": {"SGD": "L1", "Adam": "Huber", "RMSprop": "SmoothL1"}.get(optimizer, "MSE"),
            }
            trained, lora, curve, _ = train(model, family, steps=4, **values)
            name = SaveTrainedLoRANode().save(train(model, family, steps=2, **values)[1], f"{algorithm}{optimizer}", 2)
            rest = train(model, family, steps=2, existing_lora=name[0], **values)
            assert rest[3] == 4 and same(rest[1], lora), f"{algorithm} {optimizer}"
            assert rest[2]["loss"] == curve["loss"][2:], f"{algorithm} {optimizer}"
            used = set().union(*(patch.loaded_keys for patch in
                                 comfy.lora.load_lora(dict(lora), known, log_missing=False).values()))  # fmt: skip
            assert used == set(lora), f"{algorithm} {optimizer}"
            seen.append(mini.output(trained, family))
            assert torch.isfinite(seen[-1]).all()
    assert all(not torch.equal(one, other) for n, one in enumerate(seen) for other in seen[:n])
