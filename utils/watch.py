"""Watches a training for what makes it slow unnoticed: memory that leaves the GPU, and steps that take longer."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from statistics import median

import torch

from .config import SettingsError

logger = logging.getLogger(__name__)

GIB = 2**30
SETTLED = 3
"""Steps until compilation and graphs are done."""
WINDOW = 20
"""Steps whose median is compared."""
SLOWER = 1.5
SPILLED = 0.97
"""Share of the GPU's memory from which drivers of Windows and WSL begin to use main memory instead."""


class Watch:
    """Is told of every step; warns once of each thing."""

    def __init__(self, device: torch.device, planned: Callable[[], float] | None = None) -> None:
        """``planned``: gives the bytes that the plan expects on this GPU; asked once, if there is a GPU."""
        self._device, self._planned = device, planned
        self._total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._usual: float | None = None
        self.steps = 0
        """That it was told of."""
        self._said_spilled = False

    def step(self, seconds: float) -> None:
        """A step took ``seconds``."""
        self.steps += 1
        if self.steps <= SETTLED:
            return
        if self._total:
            self._look_at_memory()
        self._compare(seconds)

    def _look_at_memory(self) -> None:
        if self.steps == SETTLED + 1 and self._planned is not None:
            try:
                planned = self._planned()
            except (RuntimeError, SettingsError) as error:  # an operator that needs values; no reason to end a training
                logger.warning("memory: there is no plan to compare with (%s)", str(error).splitlines()[0])
            else:
                peak = torch.cuda.max_memory_allocated(self._device)
                logger.info("memory: %.1f GiB, planned %.1f", peak / GIB, planned / GIB)
        taken = torch.cuda.max_memory_reserved(self._device)
        if taken > SPILLED * self._total and not self._said_spilled:
            self._said_spilled = True
            logger.warning(
                "memory: %.1f of %.1f GiB are taken; what does not fit goes to main memory on Windows and WSL, which "
                "is many times slower. Save memory with activation_checkpointing, blocks_to_swap or transformer_dtype",
                taken / GIB,
                self._total / GIB,
            )

    def _compare(self, seconds: float) -> None:
        self._recent.append(seconds)
        if len(self._recent) < WINDOW:
            return
        now = median(self._recent)
        if self._usual is None:
            self._usual = now
        elif now > SLOWER * self._usual:
            logger.warning(
                "steps take %.2f s, at first %.2f: is something else using the GPU, is it hot, or has memory spilled?",
                now,
                self._usual,
            )
            self._usual = now
