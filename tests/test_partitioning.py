"""Pipeline stages: how layers are shared out."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusion_trainer.models import families
from diffusion_trainer.models.base import Batch
from diffusion_trainer.utils.assembly import Assembly
from diffusion_trainer.utils.config import SettingsError
from diffusion_trainer.utils.partitioning import layer_costs, partition
from training import Bench


def spans(costs: list[int], bounds: list[int]) -> list[int]:
    return [sum(costs[start:stop]) for start, stop in pairwise(bounds)]


def test_flux_at_its_real_size_is_cut_by_time_not_by_weights() -> None:
    """Blocks of two streams have 2.4 times the weights of the others, but hardly more arithmetic."""
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(guidance_embeds=True)
        picture, text = torch.zeros(1, 16, 128, 128), torch.zeros(1, 512, 4096)
        batch = Batch((picture, torch.zeros(1), torch.zeros(1, 768), text, torch.zeros(1)), torch.zeros(()))
    family = families()["flux"](families()["flux"].Config(type="flux"))
    layers = family.layers(model)
    costs = layer_costs(family, model, batch)
    assert len(costs) == len(layers) == 59
    by_time = spans(costs, partition(layers, 2, "cost", None, costs))
    by_weights = spans(costs, partition(layers, 2, "parameters", None))
    assert max(by_time) < 1.05 * min(by_time)
    assert max(by_weights) > 1.5 * min(by_weights)


@pytest.mark.parametrize("name", sorted(families()))
def test_every_family_can_be_measured(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a real training, which then goes on with what it has."""
    found: list[list[int] | None] = []
    measure = Assembly._costs

    def measured(self: Assembly, denoiser: Any) -> list[int] | None:
        found.append(measure(self, denoiser))
        return found[-1]

    monkeypatch.setattr(Assembly, "_costs", measured)
    Bench(tmp_path, name).train(max_steps=1, blocks_to_swap=1)
    (costs,) = found
    assert costs and sum(cost > 0 for cost in costs) >= 3


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_no_stage_is_empty(stages: int) -> None:
    layers: Any = [None] * 6
    bounds = partition(layers, stages, "cost", None, [0, 0, 0, 0, 0, 100])
    assert all(start < stop for start, stop in pairwise(bounds))


def test_more_stages_than_layers_are_refused() -> None:
    layers: Any = [None] * 2
    with pytest.raises(SettingsError, match="pipeline_stages: this model has 2 layers"):
        partition(layers, 3, "uniform", None)
