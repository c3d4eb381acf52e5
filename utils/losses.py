"""How far a prediction is from its target: the loss that settings ask for, weighted by element."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from .settings import TrainSettings

Loss = Callable[[Tensor, tuple[Tensor, Tensor]], Tensor]
"""Takes the prediction and a pair of target and weight (it broadcasts); gives a float32 scalar."""


def loss_for(settings: TrainSettings) -> Loss:
    """The loss of a run: the mean over all elements of weight times error."""
    if settings.huber_delta:
        return partial(weighted_mean, partial(F.huber_loss, reduction="none", delta=settings.huber_delta))
    if settings.smooth_l1_beta:
        return partial(weighted_mean, partial(F.smooth_l1_loss, reduction="none", beta=settings.smooth_l1_beta))
    if settings.pseudo_huber_c:
        return partial(weighted_mean, partial(pseudo_huber, c=settings.pseudo_huber_c))
    return partial(weighted_mean, partial(F.l1_loss if settings.loss == "l1" else F.mse_loss, reduction="none"))


def pseudo_huber(prediction: Tensor, target: Tensor, c: float) -> Tensor:
    """``c^2 (sqrt(1 + (e / c)^2) - 1)``: half the squared error where it is small, c times its size where it is
    large (Charbonnier et al. 1997)."""
    square = (prediction - target) ** 2
    return square / (torch.sqrt(1 + square / c**2) + 1)  # the same without the difference of near numbers


def weighted_mean(
    error: Callable[[Tensor, Tensor], Tensor], prediction: Tensor, label: tuple[Tensor, Tensor]
) -> Tensor:
    """Mean over all elements of weight times ``error(prediction, target)``, in float32."""
    target, weight = label
    return (error(prediction.float(), target.float()) * weight).mean()
