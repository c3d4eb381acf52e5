"""How weights are trained: steps and their batches, optimizer, learning rates, moving average, loss.

All but ``[optimizer]`` stand at the top level of ``train.toml``.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import ConfigDict, field_validator

from .config import Table, option

MicroBatch = int | list[list[int]]
"""Samples that one GPU works on at once: a number, or pairs of a resolution and a number."""


class Optimizer(Table):
    """Which optimizer, and its arguments; what is left out is the optimizer's own default."""

    type: str = option(
        ...,
        "adamw, adamw8bit, adamw_optimi, stableadamw, AdamW8bitKahan, Lion, Adafactor, Prodigy, ScheduleFreeAdamW, "
        "Muon, automagic, genericoptim, sgd, offload, or the name of any class in pytorch_optimizer.",
    )
    lr: float | None = option(
        None, "Learning rate. Prodigy finds its own and wants 1.0 here; automagic ignores it.", ge=0, le=10, step=1e-8
    )
    betas: list[float] | None = option(None, "Decay of the running averages of gradient and squared gradient.")
    weight_decay: float | None = option(None, "Pull of the weights towards zero.", ge=0, step=0.001)
    eps: float | None = option(
        None, "Guards the division by the root of the squared gradient.", gt=0, step=1e-12, advanced=True
    )
    beta2_half_life: float | None = option(
        None,
        "Samples after which the running average of the squared gradient has half forgotten; sets the second of betas, "
        "whatever the batch.",
        gt=0,
        step=1,
        advanced=True,
    )
    offload: bool = option(
        False,
        "Keep the optimizer's state and float32 weights in main memory and step there: slower, much less GPU memory.",
        advanced=True,
    )
    gradient_release: bool = option(
        False,
        "Step each weight as soon as its gradient is there, so that gradients take no memory. Without accumulation, "
        "clipping and further GPUs for the same weights.",
        advanced=True,
    )
    model_config = ConfigDict(extra="allow")

    @field_validator("betas")
    @classmethod
    def _betas(cls, value: list[float] | None) -> list[float] | None:
        if value is not None and not all(0 <= beta < 1 for beta in value):
            raise ValueError(f"each must be at least 0 and less than 1, got {value}")
        return value


class Steps(Table):
    """How many steps, of what batches, from which random numbers."""

    epochs: int = option(50, "How often each picture is trained (times its num_repeats).", ge=1, step=1, ui_max=100000)
    max_steps: int | None = option(
        None,
        "Stop after this many optimizer steps even if epochs are left. Left out: all epochs.",
        ge=1,
        step=1,
        also=("num_steps",),
    )
    micro_batch_size_per_gpu: MicroBatch = option(
        1,
        "Pictures that one GPU works on at once; or by resolution, such as [[512, 4], [1024, 1]].",
        step=1,
        ui_min=1,
        ui_max=1024,
    )
    image_micro_batch_size_per_gpu: MicroBatch | None = option(
        None,
        "The same for pictures among videos. Left out: as for videos.",
        step=1,
        ui_min=1,
        ui_max=1024,
        advanced=True,
    )
    gradient_accumulation_steps: int = option(
        1,
        "Micro-batches that make up one optimizer step; also what fills the pipeline with several stages.",
        ge=1,
        step=1,
        ui_max=1024,
    )
    gradient_clipping: float = option(
        1.0, "Largest length of the gradient; longer ones are shortened to it. 0 switches clipping off.", ge=0, step=0.1
    )
    seed: int = option(
        0, "Fixes order, noise, timesteps and the adapter's initial weights.", ge=0, le=2**63 - 1, step=1
    )

    @field_validator("micro_batch_size_per_gpu", "image_micro_batch_size_per_gpu")
    @classmethod
    def _micro_batch(cls, value: MicroBatch | None) -> MicroBatch | None:
        return checked_micro_batch(value)


class LearningRates(Table):
    """Which weights are trained, and how fast in the course of time."""

    train_only: list[str] | None = option(
        None,
        "Without an adapter: train weights in whose name one of these regular expressions is found. Left out: all.",
        lines=True,
        advanced=True,
    )
    freeze: list[str] | None = option(
        None,
        "Without an adapter: do not train weights in whose name one of these regular expressions is found.",
        lines=True,
        advanced=True,
    )
    learning_rates: dict[str, float] = option(
        {},
        "Learning rates of weights in whose name a regular expression is found; the first counts, 0 freezes.",
        advanced=True,
    )

    lr_scheduler: Literal["constant", "linear", "cosine", "polynomial", "one_cycle"] = option(
        "constant",
        "How the learning rate goes on after warm-up, up to the last step: stays, falls straight, along a cosine or a "
        "power, or rises and falls once (one_cycle).",
    )
    lr_min_ratio: float = option(
        0.0, "Share of the learning rate that falling schedules end with.", ge=0, le=1, step=0.01, advanced=True
    )
    lr_power: float = option(
        2.0,
        "For lr_scheduler polynomial: 1 falls straight, more falls sooner.",
        gt=0,
        step=0.1,
        ui_max=100,
        advanced=True,
    )
    lr_cycles: int = option(
        1,
        "For lr_scheduler cosine: how often it falls, beginning anew each time.",
        ge=1,
        step=1,
        ui_max=1000,
        advanced=True,
    )
    warmup_steps: int = option(0, "Steps over which the learning rate rises from 0.", ge=0, step=1, ui_max=100000)
    force_constant_lr: float | None = option(
        None,
        "Use exactly this learning rate everywhere, also when resuming. Left out: the optimizer's lr and lr_scheduler.",
        gt=0,
        step=1e-8,
        advanced=True,
    )


class Average(Table):
    """The moving average of the trained weights."""

    ema_decay: float | None = option(
        None,
        "Keep a moving average of the trained weights that keeps this share of itself at each step, such as 0.999. "
        "Left out: none.",
        gt=0,
        lt=1,
        step=0.0001,
    )
    ema_start_step: int = option(0, "Steps before the average begins.", ge=0, step=1, ui_max=1000000, advanced=True)
    ema_on_cpu: bool = option(False, "Keep the average in main memory: less on the GPU, slower steps.", advanced=True)
    ema_export: Literal["both", "ema", "trained"] = option(
        "both",
        "Which weights are exported: the average (in a folder whose name ends in _ema if both are), those of the last "
        "step, or both.",
        advanced=True,
    )
    ema_for_samples: bool = option(
        True, "Draw samples and measure eval sets with the average, not with the last step's weights.", advanced=True
    )


class Loss(Table):
    """What the distance between target and prediction is."""

    loss: Literal["mse", "l1"] = option(
        "mse", "Squared error, or its plain size, which minds outliers less.", advanced=True
    )
    huber_delta: float | None = option(
        None, "Use the Huber loss: squared below this error, linear above.", gt=0, step=0.01, advanced=True
    )
    smooth_l1_beta: float | None = option(
        None, "Use the smooth L1 loss: squared below this error, linear above.", gt=0, step=0.01, advanced=True
    )
    pseudo_huber_c: float | None = option(
        None, "Use the pseudo-Huber loss with this c. Left out: the mean squared error.", gt=0, step=0.01, advanced=True
    )


def checked_micro_batch(value: MicroBatch | None) -> MicroBatch | None:
    """``value``, if it can be used; `micro_batch_size` reads it."""
    pairs = [[1, value]] if isinstance(value, int) else value
    if pairs is not None and (not pairs or not all(len(pair) == 2 and min(pair) >= 1 for pair in pairs)):
        raise ValueError(f"must be at least 1, or pairs such as [[512, 4], [1024, 1]], got {value}")
    return value


def micro_batch_size(value: MicroBatch, width: int, height: int) -> int:
    """The number, or that of the nearest resolution."""
    if isinstance(value, int):
        return value
    return min(value, key=lambda pair: abs(pair[0] - math.sqrt(width * height)))[1]
