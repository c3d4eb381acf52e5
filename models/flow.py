"""Rectified flow, as most families have it: noise, velocity, and where training moves along the noise levels.

A sample at time t is t * noise + (1 - t) * data, and the network predicts noise - data (Liu et al. 2022,
arXiv 2209.03003; Esser et al. 2024, arXiv 2403.03206).

Shape legend: N batch, C latent channels, H W height and width of the latents, T tokens, D features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..utils.config import option
from ..utils.imports import lazy
from .base import Example, Family, ModelConfig

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")


SHIFT_BY_SIZE = "Move training towards high noise: more for larger pictures. 'shift' overrides it."


class FlowConfig(ModelConfig):
    """What the ``[model]`` tables of these families have."""

    flux_shift: bool = option(False, SHIFT_BY_SIZE)


class FlowFamily(Family):
    """A family that predicts the velocity of rectified flow."""

    config: FlowConfig

    def timestep_shift(self, latent_size: tuple[int, ...]) -> float:
        if self.config.shift is None and self.config.flux_shift:
            return resolution_shift(latent_size)
        return super().timestep_shift(latent_size)

    def noised(self, examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What rectified flow trains on: x_t = t * noise + (1 - t) * x0, the times t, and the velocity noise - x0.

        Returns:
            x_t and velocity shaped like the latents, batch first, and t_N, all float32.
        """
        x0 = torch.stack([example.media["latents"] for example in examples]).float()
        noise = torch.stack([example.noise for example in examples]).to(x0)
        latent_size = tuple(x0.shape[2:])
        times = [self.timestep(example.quantile, latent_size) for example in examples]
        t_N = torch.tensor(times, dtype=torch.float32, device=x0.device)
        t = t_N.view(-1, *[1] * (x0.ndim - 1))
        return t * noise + (1.0 - t) * x0, t_N, noise - x0

    def time_weight(self, t_N: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Weight of each sample's loss by its noise level, as ``loss_weighting`` says; broadcasts against ``target``.

        The weightings of Esser et al. 2024 (Stable Diffusion 3), section 3.1. Below t = 0.001 sigma_sqrt grows no
        more.
        """
        match self.config.loss_weighting:
            case "sigma_sqrt":
                weight_N = t_N.clamp(min=1e-3) ** -2
            case "cosmap":
                weight_N = 2 / (math.pi * (1 - 2 * t_N + 2 * t_N**2))
            case _:
                weight_N = torch.ones_like(t_N)
        return weight_N.view(-1, *[1] * (target.ndim - 1))


def resolution_shift(latent_size: tuple[int, ...]) -> float:
    """The shift that Flux uses for a picture of this size: e^mu, mu linear in the number of image tokens.

    Anchors are 256 tokens (mu 0.5) and 4096 tokens (mu 1.15); a token is 2x2 latents. Source: the
    sampling code of Black Forest Labs' flux repository (`get_schedule`).
    """
    tokens = (latent_size[-2] // 2) * (latent_size[-1] // 2)
    return math.exp(0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256))


def pack(latents_NCHW: torch.Tensor) -> torch.Tensor:
    """2x2 patches of latents as tokens of 4C features: NTD."""
    n, c, h, w = latents_NCHW.shape
    return latents_NCHW.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w // 4, c * 4)
