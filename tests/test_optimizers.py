"""Optimizers: that each learns, goes on exactly, keeps small steps of bfloat16 weights, and what they refuse."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusion_trainer.utils.checkpoint import load_checkpoint, save_checkpoint
from diffusion_trainer.utils.config import SettingsError
from diffusion_trainer.utils.generic_optimizer import NEWTON_SCHULZ, POLAR_EXPRESS, orthogonal
from diffusion_trainer.utils.optimizers import KAHAN, build_optimizers, is_offloaded, keeps_kahan_sums
from diffusion_trainer.utils.release import ReleasedTrained
from diffusion_trainer.utils.run_folder import RunFolder
from diffusion_trainer.utils.step_settings import Optimizer
from diffusion_trainer.utils.trained import Trained
from torch import nn
from training import Bench

TYPES: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 1e-2},
    "adamw8bit": {"lr": 1e-2},
    "AdamW8bitKahan": {"lr": 1e-2, "stabilize": True},
    "adamw_optimi": {"lr": 1e-2},
    "stableadamw": {"lr": 1e-2},
    "sgd": {"lr": 1e-1, "momentum": 0.9},
    "automagic": {"min_lr": 1e-4, "max_lr": 1e-1, "lr_bump": 1e-3},
    "genericoptim": {"lr": 1e-2, "skip_invalid_grads": True},
    "Lion": {"lr": 3e-3},
    "Adafactor": {"lr": 1e-2},
    "Prodigy": {"lr": 1.0},
    "ScheduleFreeAdamW": {"lr": 3e-2},
    "Muon": {"lr": 1e-2, "adamw_lr": 1e-2},
    "offload": {"lr": 1e-2},
    "CAME": {"lr": 1e-2},
}
GENERIC = [
    {"momentum_type": "none", "second_moment_type": "none", "lr": 0.1},
    {"second_moment_type": "sn"},
    {"second_moment_type": "factored"},
    {"muon": True},
    {"muon": True, "polar_express": True},
    {"adamuon": True},
    {"normuon": True},
    {"automagic": True, "lr": 1e-3, "min_lr": 1e-4, "max_lr": 1e-1, "lr_bump": 1e-3},
]


class Small:
    """A small network that learns to be another, through what trains large ones."""

    def __init__(self, dtype: torch.dtype = torch.float32, released: bool = False, **settings: Any) -> None:
        torch.manual_seed(0)
        teacher = nn.Sequential(nn.Linear(64, 72), nn.Tanh(), nn.Linear(72, 64))
        self.network = nn.Sequential(nn.Linear(64, 72), nn.Tanh(), nn.Linear(72, 64)).to(dtype)
        self.x = torch.randn(128, 64)
        self.y = teacher(self.x).detach()
        table = Optimizer(**settings)
        names = {p: name for name, p in self.network.named_parameters()}
        build = lambda parameters: build_optimizers(table, parameters, {}, 8)  # noqa: E731
        kahan = keeps_kahan_sums(table)
        if released:
            self.trained: Trained = ReleasedTrained(names, self.network, build, kahan=kahan)
        else:
            self.trained = Trained(names, self.network, build, kahan=kahan, offload=is_offloaded(table))

    def loss(self) -> torch.Tensor:
        return (self.network(self.x.to(self.network[0].weight.dtype)).float() - self.y).square().mean()

    def learn(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            loss = self.loss()
            loss.backward()
            self.trained.step()
            self.trained.gradients.zero()
            losses.append(loss.item())
        return losses

    def weights(self) -> torch.Tensor:
        return torch.cat([p.detach().float().flatten() for p in self.network.parameters()])

    def save(self, folder: Path) -> Path:
        return save_checkpoint(RunFolder(folder), 1, "0-0", True, True, self.trained, {}, lambda: None, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", TYPES)
def test_learns_and_goes_on_from_a_checkpoint_exactly(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    settings = {"type": kind, **TYPES[kind]}
    whole = Small(dtype, **settings)
    losses = whole.learn(40)
    assert losses[-1] < 0.7 * losses[0]
    first = Small(dtype, **settings)
    assert first.learn(15) == losses[:15]
    second = Small(dtype, **settings)
    load_checkpoint(first.save(tmp_path), second.trained)
    assert second.learn(25) == losses[15:]
    assert torch.equal(second.weights(), whole.weights())


@pytest.mark.parametrize("parts", GENERIC, ids=lambda parts: ",".join(parts))
def test_parts_of_genericoptim(parts: dict[str, Any]) -> None:
    losses = Small(**{"type": "genericoptim", "lr": 1e-2, **parts}).learn(40)
    assert losses[-1] < 0.8 * losses[0]


def test_genericoptim_without_parts_is_adamw() -> None:
    arguments: dict[str, Any] = {"lr": 1e-2, "betas": [0.9, 0.99], "weight_decay": 0.1, "eps": 1e-8}
    ours, torchs = (Small(type=kind, **arguments) for kind in ("genericoptim", "adamw"))
    assert ours.learn(20) == pytest.approx(torchs.learn(20), rel=1e-4)


@pytest.mark.parametrize("series", [NEWTON_SCHULZ, POLAR_EXPRESS], ids=["Newton-Schulz", "Polar Express"])
@pytest.mark.parametrize("shape", [(24, 24), (40, 24), (24, 40)])
def test_orthogonal_has_singular_values_of_one(series: Any, shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(matrix, series))
    assert values.min() > 0.3  # of a random square matrix the least singular values are tiny
    assert values.median() > 0.65
    assert values.max() < 1.25


@pytest.mark.parametrize("kind", ["adamw", *KAHAN])
def test_small_steps_of_bfloat16_weights_add_up(kind: str) -> None:
    tiny = {"lr_bump": 0.0, "min_lr": 1e-5, "max_lr": 1e-5} if kind == "automagic" else {"lr": 1e-5}
    settings: dict[str, Any] = {"type": kind, "weight_decay": 0.0, **tiny}
    exact, rounded = Small(torch.float32, **settings), Small(torch.bfloat16, **settings)
    exact.network.load_state_dict({key: value.float() for key, value in rounded.network.state_dict().items()})
    before = exact.weights()
    exact.learn(60)
    rounded.learn(60)
    assert rounded.weights() is not None
    moved, expected = rounded.weights() - before, exact.weights() - before
    part = (moved * expected).sum() / expected.square().sum()  # 0 if every step were lost
    assert 0.7 < part < 1.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_released_gradients_change_nothing(dtype: torch.dtype) -> None:
    settings: dict[str, Any] = {"type": "adamw", "lr": 1e-2}
    kept, released = Small(dtype, **settings), Small(dtype, released=True, **settings)
    assert released.learn(10) == pytest.approx(kept.learn(10), rel=1e-5)
    assert all(p.grad is None for p in released.network.parameters())
    assert torch.allclose(released.weights(), kept.weights(), atol=1e-6)


def test_schedule_free_gives_its_average_and_goes_on_unchanged() -> None:
    small = Small(type="ScheduleFreeAdamW", lr=3e-2)
    small.learn(30)
    training = small.weights()
    with small.trained.averaged():
        average = small.weights()
        assert small.loss() < 0.5
    assert not torch.equal(average, training)
    assert torch.equal(small.weights(), training)
    other = Small(type="ScheduleFreeAdamW", lr=3e-2)
    other.learn(30)
    assert small.learn(5) == other.learn(5)


def test_half_life_sets_the_second_beta() -> None:
    (optimizer,) = Small(type="adamw", lr=1e-3, beta2_half_life=80).trained.optimizers
    assert optimizer.param_groups[0]["betas"] == (0.9, pytest.approx(0.5 ** (8 / 80)))


def test_curves_of_found_rates() -> None:
    prodigy, automagic = Small(type="Prodigy", lr=1.0), Small(type="automagic", lr=1e-3)
    for small in (prodigy, automagic):
        small.learn(5)
    assert prodigy.trained.curves()["prodigy_d"] > 0
    assert automagic.trained.curves()["automagic_avg_lr"] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"type": "SAM"}, "optimizer.type: SAM computes gradients by itself"),
        ({"type": "SophiaH"}, "needs second derivatives"),
        ({"type": "nothing"}, "optimizer.type: 'nothing' is unknown"),
        ({"type": "adamw", "momentun": 1}, "optimizer.momentun: adamw does not take it"),
        ({"type": "genericoptim", "momentum_type": "sm"}, "momentum_type: must be one of ema, none"),
    ],
)
def test_what_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Small(**{"lr": 1e-3, **settings})


def test_release_and_offload_reach_the_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(tmp_path)
    full: dict[str, Any] = {"adapter": None, "epochs": 1, "gradient_clipping": 0.0, "model": {"dtype": "bfloat16"}}
    plain = bench.train(**full, optimizer={"lr": 1e-3})
    for option in ("gradient_release", "offload"):
        result = bench.train(**full, optimizer={"lr": 1e-3, option: True})
        assert result.curve("loss") == pytest.approx(plain.curve("loss"), rel=2e-2), option
        assert result.curve("grad_norm") == pytest.approx(plain.curve("grad_norm"), rel=2e-2), option
    found = bench.train(**full, optimizer={"type": "Prodigy", "lr": 1.0})
    assert len(found.curve("prodigy_d")) == found.status.step
    assert "finds one rate from all weights" not in caplog.text
    bench.train(**full, max_steps=1, optimizer={"type": "Prodigy", "lr": 1.0, "gradient_release": True})
    assert "finds one rate from all weights" in caplog.text
    with pytest.raises(SettingsError, match=r"optimizer.gradient_release: steps after each micro-batch"):
        bench.train(**full, gradient_accumulation_steps=2, optimizer={"gradient_release": True})
