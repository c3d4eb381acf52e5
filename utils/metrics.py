"""Curves: TensorBoard scalars of the run, and the state of the GPU."""

from __future__ import annotations

import logging
from pathlib import Path
from types import TracebackType

import torch
from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)


class Curves:
    """Writes scalars to the run folder on one rank; elsewhere does nothing."""

    def __init__(self, folder: Path | None, x_axis_examples: bool, global_batch: int, purge_after: int | None) -> None:
        self._scale = global_batch if x_axis_examples else 1
        purge = None if purge_after is None else (purge_after + 1) * self._scale
        self._writer = None if folder is None else SummaryWriter(str(folder), purge_step=purge, flush_secs=10)

    def add(self, step: int, **values: float) -> None:
        """One point of each curve ``train/<name>`` after ``step`` optimizer steps."""
        if self._writer:
            for name, value in values.items():
                self._writer.add_scalar(f"train/{name}", value, step * self._scale)

    def __enter__(self) -> Curves:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer:
            self._writer.close()


class Gpu:
    """Memory and utilisation of this process's GPU; nothing on a machine without one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._handle = None
        if device.type == "cuda":
            import pynvml

            try:
                pynvml.nvmlInit()
                uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
                self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            except pynvml.NVMLError as error:
                logger.warning("GPU utilisation is not logged: %s", error)

    def values(self) -> dict[str, float]:
        """Peak memory in GiB and utilisation in percent, by curve name."""
        if self._device.type != "cuda":
            return {}
        values = {"gpu_memory_gib": torch.cuda.max_memory_allocated(self._device) / 2**30}
        if self._handle is not None:
            import pynvml

            values["gpu_utilisation"] = float(pynvml.nvmlDeviceGetUtilizationRates(self._handle).gpu)
        return values

    def peak_memory(self) -> int | None:
        """Most bytes torch has held on it."""
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else None
