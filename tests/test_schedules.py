"""The learning rate: torch's own schedulers as reference, over the horizon that the run really has."""

import math
from pathlib import Path

import pytest
import torch
from diffusion_trainer.utils.schedules import learning_rate_factor
from diffusion_trainer.utils.settings import parse_train_settings
from torch.optim import lr_scheduler as reference
from training import Bench

TOTAL = 40


def rates(**changes) -> list[float]:
    table = {"output_dir": "/o", "model": {"type": "flux", "diffusers_path": "/m"}, "adapter": {"type": "lora"},
             "optimizer": {"type": "adamw", "lr": 1e-4}, **changes}  # fmt: skip
    settings = parse_train_settings(table)
    return [learning_rate_factor(settings, step, TOTAL) for step in range(TOTAL)]


def torchs(make) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, found = make(optimizer), []
    for _ in range(TOTAL):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(
    ("changes", "make"),
    [
        ({"lr_scheduler": "linear"}, lambda o: reference.LinearLR(o, 1.0, 0.0, TOTAL)),
        ({"lr_scheduler": "linear", "lr_min_ratio": 0.2}, lambda o: reference.LinearLR(o, 1.0, 0.2, TOTAL)),
        ({"lr_scheduler": "cosine"}, lambda o: reference.CosineAnnealingLR(o, TOTAL)),
        ({"lr_scheduler": "cosine", "lr_min_ratio": 0.1}, lambda o: reference.CosineAnnealingLR(o, TOTAL, 0.1)),
        ({"lr_scheduler": "cosine", "lr_cycles": 4}, lambda o: reference.CosineAnnealingWarmRestarts(o, TOTAL // 4)),
        ({"lr_scheduler": "polynomial"}, lambda o: reference.PolynomialLR(o, TOTAL, 2.0)),
        ({"lr_scheduler": "polynomial", "lr_power": 1.0}, lambda o: reference.PolynomialLR(o, TOTAL, 1.0)),
        ({"lr_scheduler": "one_cycle"}, lambda o: reference.OneCycleLR(o, 1.0, TOTAL, cycle_momentum=False)),
        (
            {"lr_scheduler": "one_cycle", "warmup_steps": 4},
            lambda o: reference.OneCycleLR(o, 1.0, TOTAL, pct_start=0.1, cycle_momentum=False),
        ),
        ({}, lambda o: reference.ConstantLR(o, 1.0)),
    ],
)
def test_schedules_are_torchs(changes: dict, make) -> None:
    assert rates(**changes) == pytest.approx(torchs(make), abs=1e-7)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "polynomial"])
def test_warm_up_comes_before(kind: str) -> None:
    found = rates(lr_scheduler=kind, warmup_steps=10)
    assert found[:10] == pytest.approx([(n + 1) / 10 for n in range(10)])
    assert found[10] == 1.0
    assert kind == "constant" or found[-1] < 0.05
    assert all(math.isfinite(rate) for rate in rates(lr_scheduler=kind, warmup_steps=1000))


def test_a_forced_rate_stays() -> None:
    assert rates(lr_scheduler="cosine", warmup_steps=5, force_constant_lr=1e-3) == [1.0] * TOTAL


def test_the_horizon_is_that_of_the_run(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    result = bench.train(max_steps=6, lr_scheduler="linear", optimizer={"lr": 6e-3})  # four epochs would be 16 steps
    assert result.curve("lr") == pytest.approx([6e-3, 5e-3, 4e-3, 3e-3, 2e-3, 1e-3])
