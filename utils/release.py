"""Gradient release: each weight is stepped as soon as its gradient is there, which is then let go of.

Saves the memory of all gradients in full fine-tuning. It works where one backward pass makes up a step: without
gradient accumulation and with one process for each weight. The gradient cannot be shortened, as its length is known
only when all weights have been stepped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from .gradients import Gradients
from .trained import Build, Trained

Step = Callable[[torch.Tensor], None]


class ReleasedGradients(Gradients):
    """Measures gradients as they pass."""

    def __init__(self) -> None:
        self.views: dict[str, torch.Tensor] = {}
        self._square: torch.Tensor | None = None

    def take(self, grad: torch.Tensor) -> None:
        """One weight's gradient of this step."""
        square = torch.linalg.vector_norm(grad, dtype=torch.float32).square()
        self._square = square if self._square is None else self._square + square

    def zero(self) -> None:
        self._square = None

    def squared_norm(self, device: torch.device) -> torch.Tensor:
        return torch.zeros((), device=device) if self._square is None else self._square


class ReleasedTrained(Trained):
    """Weights that are stepped in the backward pass, each by an optimizer of its own."""

    def __init__(self, names: Mapping[nn.Parameter, str], module: nn.Module, build: Build, *, kahan: bool) -> None:
        def each(parameters: Mapping[str, nn.Parameter]) -> list[torch.optim.Optimizer]:
            return [optimizer for name, p in parameters.items() for optimizer in build({name: p})]

        super().__init__(names, module, each, kahan=kahan)

    def _bind_gradients(self, wide: bool) -> Gradients:
        released = ReleasedGradients()
        for number, (name, parameter) in enumerate(self.parameters.items()):
            parameter.register_post_accumulate_grad_hook(self._stepping(number, self.stepped[name], released))
        return released

    def _stepping(self, number: int, stepped: nn.Parameter, released: ReleasedGradients) -> Step:
        def step(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            released.take(parameter.grad)
            grad, parameter.grad = parameter.grad, None
            stepped.grad = grad.to(stepped.dtype)
            self.optimizers[number].step()
            stepped.grad = None
            if stepped is not parameter:
                parameter.data.copy_(stepped)

        return step

    def step(self) -> None:
        if self.ema:
            self.ema.update()
