"""Which noise levels are trained, and how much each counts: distributions and weights against other computations."""

import math

import numpy as np
import pytest
import torch
from diffusers.training_utils import compute_loss_weighting_for_sd3
from diffusion_trainer.models import families
from diffusion_trainer.models.base import Family
from diffusion_trainer.utils.config import SettingsError, validate

SIZE = (64, 64)


def family(name: str = "flux", **changes) -> Family:
    kind = families()[name]
    return kind(validate(kind.Config, {"type": name, **changes}))


def sampled(of: Family, number: int = 4000) -> np.ndarray:
    """Noise levels of evenly spread quantiles, rising."""
    return np.array([of.timestep((n + 0.5) / number, SIZE) for n in range(number)])


def drawn(options: dict, shift: float, number: int = 400_000) -> np.ndarray:
    """The same distribution the other way: drawn at random, shifted, and what lies outside of the range thrown away."""
    source = np.random.default_rng(0)
    if options.get("timestep_sample_method") == "uniform":
        times = source.uniform(size=number)
    else:
        normal = source.normal(options.get("logit_mean", 0.0), options.get("sigmoid_scale", 1.0), number)
        times = 1 / (1 + np.exp(-normal))
    times = shift * times / (1 + (shift - 1) * times)
    return np.sort(times[(times >= options.get("min_t", 0.0)) & (times <= options.get("max_t", 1.0))])


@pytest.mark.parametrize("name", ["flux", "wan"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"timestep_sample_method": "uniform"},
        {"sigmoid_scale": 0.5},
        {"logit_mean": -0.8, "sigmoid_scale": 1.4},
        {"shift": 3.0},
        {"flux_shift": True},
        {"timestep_sample_method": "uniform", "shift": 5.0, "min_t": 0.2, "max_t": 0.9},
        {"logit_mean": 0.5, "shift": 2.0, "min_t": 0.1, "max_t": 0.6},
    ],
    ids=str,
)
def test_distributions(name: str, options: dict) -> None:
    of = family(name, **({"ckpt_path": "/m"} if name == "wan" else {}), **options)
    expected = drawn(options, of.timestep_shift(SIZE))
    ours = sampled(of)
    assert (np.diff(ours) > 0).all()
    for quantile in np.linspace(0.01, 0.99, 25):
        assert np.quantile(ours, quantile) == pytest.approx(np.quantile(expected, quantile), abs=0.006)


@pytest.mark.parametrize("kind", ["none", "sigma_sqrt", "cosmap"])
@pytest.mark.parametrize("name", ["flux", "wan"])
def test_weights_are_stable_diffusion_3s(name: str, kind: str) -> None:
    of = family(name, **({"ckpt_path": "/m"} if name == "wan" else {}), loss_weighting=kind)
    times, target = torch.tensor([0.05, 0.3, 0.5, 0.95]), torch.zeros(4, 3, 2)
    weight = of.time_weight(times, target)
    assert weight.shape == (4, 1, 1)
    torch.testing.assert_close(weight.flatten(), compute_loss_weighting_for_sd3(kind, times))


def test_cosmap_is_a_density() -> None:
    times = (torch.arange(100_000) + 0.5) / 100_000
    weight = family(loss_weighting="cosmap").time_weight(times, times)
    assert weight.mean().item() == pytest.approx(1.0, abs=1e-4)


def test_sigma_sqrt_stays_finite() -> None:
    weight = family(loss_weighting="sigma_sqrt").time_weight(torch.tensor([0.0, 1e-6]), torch.zeros(2))
    assert math.isfinite(weight.max().item())


def test_what_has_no_such_weights_refuses_them() -> None:
    with pytest.raises(SettingsError, match="loss_weighting: "):
        family("sdxl", loss_weighting="cosmap")
