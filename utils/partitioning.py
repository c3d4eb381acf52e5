"""Cutting a chain of layers into pipeline stages that take the same time."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Sequence

import torch
from deepspeed.runtime.utils import partition_balanced, partition_uniform
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..models.base import Batch, Family, Layer
from .config import SettingsError

logger = logging.getLogger(__name__)


def partition(
    layers: Sequence[Layer],
    num_stages: int,
    method: str,
    split: Sequence[int] | None,
    costs: Sequence[int] | None = None,
) -> list[int]:
    """First layer of each stage, and the number of layers at the end.

    Args:
        costs: Of each layer, for method "cost".

    Raises:
        SettingsError: The method is unknown or the split does not fit the layers.
    """
    if num_stages > len(layers):
        raise SettingsError(
            f"pipeline_stages: this model has {len(layers)} layers, so at most that many stages, got {num_stages}"
        )
    if method == "manual":
        bounds = [0, *(split or []), len(layers)]
        if bounds != sorted(set(bounds)):
            raise SettingsError(f"partition_split: must rise between 1 and {len(layers) - 1}, got {split}")
        return bounds
    if method == "uniform":
        return list(partition_uniform(len(layers), num_stages))
    if method.startswith("type:"):
        pattern = re.compile(method.removeprefix("type:"), re.IGNORECASE)
        weights = [int(any(pattern.search(type(m).__name__) for m in layer.submodules.values())) for layer in layers]
        if not any(weights):
            raise SettingsError(f"partition_method: no layer's class matches '{pattern.pattern}'")
        return list(partition_balanced(weights, num_stages))
    if method == "cost" and costs is not None:
        return _every_stage_some(list(partition_balanced(list(costs), num_stages)), len(layers))
    weights = [sum(p.numel() for m in layer.submodules.values() for p in m.parameters()) for layer in layers]
    return list(partition_balanced(weights, num_stages))


def _every_stage_some(bounds: list[int], num_layers: int) -> list[int]:
    """The same bounds, but no stage without a layer: layers without arithmetic cost nothing."""
    for place in range(1, len(bounds) - 1):
        bounds[place] = max(bounds[place], bounds[place - 1] + 1)
    for place in range(len(bounds) - 2, 0, -1):
        bounds[place] = min(bounds[place], bounds[place + 1] - 1)
    assert bounds[-1] == num_layers
    return bounds


def layer_costs(family: Family, denoiser: nn.Module, batch: Batch) -> list[int]:
    """Arithmetic of each layer's forward pass for ``batch``, in floating-point operations; computes shapes alone.

    Weights tell little: those of a stream work on its own tokens, those of a convolution on every place.
    """
    shapes = copy.deepcopy(denoiser).to("meta").float()  # a copy, as buffers have values
    tensors = tuple(_shape(tensor) for tensor in batch.inputs)
    costs = []
    for layer in family.layers(shapes):
        modules = nn.Module()
        for name, module in layer.submodules.items():
            modules.add_module(name, module)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            outputs = layer.forward(modules, *tensors)
        tensors = outputs if isinstance(outputs, tuple) else (outputs,)
        costs.append(counter.get_total_flops())
    return costs


def _shape(tensor: torch.Tensor) -> torch.Tensor:
    """Floats in the precision of the weights' copy."""
    return tensor.to("meta", torch.float32) if tensor.is_floating_point() else tensor.to("meta")
