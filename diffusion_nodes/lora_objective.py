"""The loss that a model was trained with, for whatever kind of model: flow, epsilon, v or the picture itself.

Every kind of ComfyUI's model turns its output linearly into a denoised picture: denoised = a(sigma) x +
b(sigma) output. So the error of the output is the error of the denoised picture divided by b, and the target
needs no case of its own: it is the velocity for flow models, the noise for epsilon models, v for v models.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_LOSSES: dict[str, Any] = {"MSE": F.mse_loss, "L1": F.l1_loss, "Huber": F.huber_loss, "SmoothL1": F.smooth_l1_loss}


def is_flow(sampling: Any) -> bool:
    """Whether noise and picture are mixed in a straight line, with sigma from 0 to 1."""
    import comfy.model_sampling

    return isinstance(sampling, comfy.model_sampling.CONST)


def draw_sigmas(sampling: Any, size: int, distribution: str, generator: torch.Generator) -> Tensor:
    """Noise levels (size,) on the CPU, as that kind of model is trained.

    Args:
        sampling: The model's ``model_sampling``.
        distribution: ``auto``: logit-normal in time for flow models, uniform over the steps of others.
            ``uniform`` or ``logit_normal`` in any case. The model's own shift comes on top.
    """
    if distribution == "logit_normal" or (distribution == "auto" and is_flow(sampling)):
        time = torch.sigmoid(torch.randn(size, generator=generator))
    else:
        time = torch.rand(size, generator=generator)
    if is_flow(sampling):
        end = sampling.timestep(torch.ones(1)).float().cpu()
        return sampling.sigma(time.clamp(1e-4, 1.0) * end).float().cpu()
    table = sampling.sigmas.float().cpu()
    return table[(time * len(table)).long().clamp(max=len(table) - 1)].clone()


def noisy(sampling: Any, latent: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """The latent with noise of level ``sigma`` (batch,)."""
    return sampling.noise_scaling(_over(sigma, latent), noise.clone(), latent.clone(), False)


def loss(sampling: Any, denoised: Tensor, latent: Tensor, sigma: Tensor, mask: Tensor | None, kind: str) -> Tensor:
    """Mean loss of the model's output over the batch, fp32.

    Args:
        denoised: What the model made of the noisy latent.
        mask: Weight of each place; each sample's weights are brought to a mean of 1.
        kind: MSE, L1, Huber or SmoothL1.
    """
    ones = torch.ones_like(_over(sigma, latent))
    factor = sampling.calculate_denoised(sigma, ones, torch.zeros_like(ones))
    error = (denoised.float() - latent.float()) / factor.float()
    each = _LOSSES[kind](error, torch.zeros_like(error), reduction="none")
    if mask is not None:
        weight = mask.expand_as(each)
        each = each * weight / weight.flatten(1).mean(1).clamp(min=1e-6).reshape(_over(sigma, latent).shape)
    return each.mean()


def _over(sigma: Tensor, latent: Tensor) -> Tensor:
    return sigma.reshape(-1, *[1] * (latent.ndim - 1))
