"""The gradients of a stage in one piece of memory."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

MOST_WAITING = 2**25
"""Bytes of gradients that wait to be added."""


class Gradients:
    """The gradients of some parameters in one piece of memory per dtype: emptied, reduced and measured at once.

    A backward pass adds many of them by one kernel: adapters have a thousand small ones. The parameters' own
    ``grad`` is None.

    Args:
        dtype: What gradients of micro-batches are summed in; left out: each in its parameter's own.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], dtype: torch.dtype | None = None) -> None:
        self._flat: list[torch.Tensor] = []
        self._waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._bytes, self._pass = 0, -1
        self._hooks: list[Any] = []
        self.views: dict[str, torch.Tensor] = {}
        """The gradient of each parameter, by name."""
        kinds = {name: dtype or parameter.dtype for name, parameter in parameters.items()}
        for kind in dict.fromkeys(kinds.values()):
            group = {name: parameters[name] for name in parameters if kinds[name] == kind}
            sizes = [p.numel() for p in group.values()]
            flat = torch.zeros(sum(sizes), dtype=kind, device=next(iter(group.values())).device)
            for (name, parameter), part in zip(group.items(), flat.split(sizes), strict=True):
                self.views[name] = part.view_as(parameter)
                take = partial(self._take, self.views[name])
                self._hooks.append(parameter.register_post_accumulate_grad_hook(take))
            self._flat.append(flat)

    def _take(self, view: torch.Tensor, parameter: nn.Parameter) -> None:
        if parameter.grad is None:
            return  # the parameter has no part in the loss, as that of text in some models' last block
        if (current := torch._C._current_graph_task_id()) != self._pass:
            self._forget()  # what a pass left that failed
            self._pass = current
            torch.autograd.Variable._execution_engine.queue_callback(self._add)  # type: ignore[attr-defined]
        self._waiting.append((view, parameter.grad))
        self._bytes += parameter.grad.nbytes
        parameter.grad = None
        if self._bytes > MOST_WAITING:
            self._add()

    @torch.no_grad()
    def _add(self) -> None:
        if self._waiting:
            views, grads = zip(*self._waiting, strict=True)
            self._forget()
            torch._foreach_add_(views, grads)

    def _forget(self) -> None:
        self._waiting.clear()
        self._bytes = 0

    def let_go(self) -> None:
        """The parameters' gradients are no longer taken."""
        for hook in self._hooks:
            hook.remove()

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
