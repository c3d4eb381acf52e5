"""An exponential moving average of the trained weights: smoother than the last step's, and often better.

Kept in float32 beside the weights that the optimizers step. Its decay rises towards the wanted one as
(1 + n) / (10 + n) over the first updates n, so that the start of the training is soon forgotten.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn


class Ema:
    """The average of some parameters.

    Args:
        parameters: What the optimizers step, by name.
        decay: Share of the average that each update keeps.
        start: Optimizer steps after which it begins, with the weights as they are then.
        on_cpu: It lies in main memory, and each update copies the weights there.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], decay: float, start: int = 0, on_cpu: bool = False
    ) -> None:
        self._parameters, self._decay, self._start = parameters, decay, start
        self.step = 0
        """Optimizer steps that the run has made."""
        self.values = {
            name: p.detach().to("cpu" if on_cpu else p.device, torch.float32, copy=True)
            for name, p in parameters.items()
        }  # fmt: skip

    @property
    def has_begun(self) -> bool:
        """Before, there is no average to use."""
        return self.step >= self._start

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the weights after an optimizer step."""
        self.step += 1
        number = self.step - self._start
        if number == 0:
            self.begin()
        elif number > 0:
            weight = 1 - min(self._decay, (1 + number) / (10 + number))
            for name, parameter in self._parameters.items():
                value = self.values[name]
                value.lerp_(parameter.to(value.device, torch.float32), weight)

    @torch.no_grad()
    def begin(self) -> None:
        """Begins with the weights as they are."""
        for name, parameter in self._parameters.items():
            self.values[name].copy_(parameter)

    @torch.no_grad()
    def put_in(self) -> None:
        """Puts the average in the place of the weights."""
        for name, parameter in self._parameters.items():
            parameter.copy_(self.values[name])
