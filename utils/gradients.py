"""The gradients of a stage in one piece of memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


class Gradients:
    """The gradients of some parameters in one piece of memory per dtype: emptied, reduced and measured at once."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._flat: list[torch.Tensor] = []
        for dtype in dict.fromkeys(p.dtype for p in parameters):
            group = [p for p in parameters if p.dtype == dtype]
            flat = torch.zeros(sum(p.numel() for p in group), dtype=dtype, device=group[0].device)
            for parameter, part in zip(group, flat.split([p.numel() for p in group]), strict=True):
                parameter.grad = part.view_as(parameter)
            self._flat.append(flat)

    def zero(self) -> None:
        """Sets all to zero."""
        for flat in self._flat:
            flat.zero_()

    def average(self, group: Any) -> None:
        """The mean over the ranks of ``group``."""
        for flat in self._flat:
            dist.all_reduce(flat, group=group)
            flat /= dist.get_world_size(group)

    def squared_norm(self, device: torch.device) -> torch.Tensor:
        """The square of their length, float32, without dimension."""
        norms = [torch.linalg.vector_norm(flat, dtype=torch.float32).square() for flat in self._flat]
        return torch.stack(norms).sum() if norms else torch.zeros((), device=device)

    def scale(self, factor: torch.Tensor) -> None:
        """Multiplies all by ``factor``."""
        for flat in self._flat:
            flat.mul_(factor)
