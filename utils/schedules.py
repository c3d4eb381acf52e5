"""The learning rate over the run."""

from __future__ import annotations

import math

from .settings import TrainSettings

ONE_CYCLE_WARMUP = 0.3
"""Share of the steps over which one_cycle rises where warmup_steps says nothing."""
ONE_CYCLE_START = 1 / 25
"""Factor that one_cycle begins with (Smith and Topin 2018, with the numbers that are usual since)."""
ONE_CYCLE_END = ONE_CYCLE_START / 1e4


def learning_rate_factor(settings: TrainSettings, step: int, total_steps: int) -> float:
    """What the learning rate is multiplied with at ``step`` (from 0) of ``total_steps``.

    Warm-up rises by equal parts, first step 1 / warmup_steps; then the schedule spans the rest, down to
    ``lr_min_ratio`` after the last step. one_cycle has a warm-up of its own and reaches its end in the last step.
    """
    if settings.force_constant_lr:
        return 1.0
    warmup = settings.warmup_steps
    if settings.lr_scheduler == "one_cycle":
        return _one_cycle(step, total_steps, warmup or ONE_CYCLE_WARMUP * total_steps, settings.lr_min_ratio)
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    least = settings.lr_min_ratio
    return least + (1 - least) * _falling(settings, progress)


def _falling(settings: TrainSettings, progress: float) -> float:
    """From 1 to 0."""
    match settings.lr_scheduler:
        case "linear":
            return 1 - progress
        case "cosine":
            cycle = progress * settings.lr_cycles
            within = cycle - math.floor(cycle) if progress < 1 else 1.0
            return 0.5 * (1 + math.cos(math.pi * within))
        case "polynomial":
            return (1 - progress) ** settings.lr_power
    return 1.0


def _one_cycle(step: int, total_steps: int, warmup: float, least: float) -> float:
    top, last = warmup - 1, total_steps - 1  # the steps of the highest and the lowest rate
    if step <= top:
        return _cosine(ONE_CYCLE_START, 1.0, step / top if top > 0 else 1.0)
    return _cosine(1.0, max(least, ONE_CYCLE_END), min(1.0, (step - top) / max(1e-9, last - top)))


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))
