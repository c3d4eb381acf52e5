"""The gradients of a stage in one piece of memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


class Gradients:
    """The gradients of some parameters in one piece of memory per dtype: emptied, reduced and measured at once.

    Args:
        dtype: What gradients of micro-batches are summed in; left out: each in its parameter's own.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], dtype: torch.dtype | None = None) -> None:
        self._flat: list[torch.Tensor] = []
        self.views: dict[str, torch.Tensor] = {}
        """The gradient of each parameter, by name."""
        kinds = {name: dtype or parameter.dtype for name, parameter in parameters.items()}
        for kind in dict.fromkeys(kinds.values()):
            group = {name: parameters[name] for name in parameters if kinds[name] == kind}
            sizes = [p.numel() for p in group.values()]
            flat = torch.zeros(sum(sizes), dtype=kind, device=next(iter(group.values())).device)
            for (name, parameter), part in zip(group.items(), flat.split(sizes), strict=True):
                self.views[name] = part.view_as(parameter)
                if parameter.dtype == kind:
                    parameter.grad = self.views[name]
                else:
                    parameter.register_post_accumulate_grad_hook(_adding_to(self.views[name]))
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


def _adding_to(view: torch.Tensor) -> Any:
    def add(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        view.add_(parameter.grad)
        parameter.grad = None

    return add
