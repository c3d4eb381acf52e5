"""Frozen linear layers whose weights are stored in fewer bits than they compute in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Storage:
    """How the weights of a model's linear layers are stored."""

    dtype: torch.dtype
    kept: Sequence[str] = ()
    """Regular expressions; layers whose name one of them matches stay as they are."""


class StoredLinear(nn.Linear):
    """A frozen linear layer with a weight of another dtype; float8 has one scale for each output.

    The weight is converted each time it is used, forward and backward, so that no converted copy is kept.
    """

    weight_scale: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Linear``."""
        return _FrozenLinear.apply(input, self.weight, self.weight_scale, self.bias)

    def store(self, value_OI: Tensor, dtype: torch.dtype) -> nn.Parameter:
        """Takes over a weight, as float8 with each row scaled to float8's range; returns the stored parameter."""
        self.weight_scale = None
        if dtype.itemsize == 1:
            largest = value_OI.float().abs().amax(1, keepdim=True).clamp(min=1e-12)
            self.weight_scale = largest / torch.finfo(dtype).max
            value_OI = value_OI.float() / self.weight_scale
        parameter = nn.Parameter(value_OI.to(dtype), requires_grad=False)
        self.weight = parameter
        return parameter


def convert(weight_OI: Tensor, scale_O1: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The stored weight's value in ``dtype``."""
    weight_OI = weight_OI.to(dtype)
    return weight_OI if scale_O1 is None else weight_OI * scale_O1.to(dtype)


def use_storage(module: nn.Module, storage: Storage) -> None:
    """Turns the linear layers of ``module`` (on the meta device, without values) into `StoredLinear`."""
    for name, layer in list(module.named_modules()):
        if type(layer) is not nn.Linear or any(re.search(pattern, f"{name}.weight") for pattern in storage.kept):
            continue
        layer.__class__ = StoredLinear
        layer.register_buffer("weight_scale", None)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, scale_O1: Tensor | None, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight_OI, scale_O1)
        return F.linear(x, convert(weight_OI, scale_O1, x.dtype), bias_O)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        weight_OI, scale_O1 = ctx.saved_tensors
        return grad @ convert(weight_OI, scale_O1, grad.dtype), None, None, None
