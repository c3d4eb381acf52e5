"""Curves: TensorBoard scalars of the run, and the state of the GPU."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from .wandb_run import WandbRun

logger = logging.getLogger(__name__)


class Curves:
    """Writes scalars and pictures to the run folder on one rank; elsewhere does nothing.

    A place on the curves is a number of steps or of samples, as the run counts.
    """

    def __init__(self, folder: Path | None, purge_after: int | None, mirror: WandbRun | None = None) -> None:
        """
        Args:
            purge_after: The place after which points of an earlier process no longer hold.
            mirror: Gets the same.
        """
        self._mirror = mirror
        purge = None if purge_after is None else purge_after + 1
        self._writer = None if folder is None else SummaryWriter(str(folder), purge_step=purge, flush_secs=10)

    def add(self, place: int, **values: float) -> None:
        """One point of each curve ``train/<name>``."""
        self.add_all(place, {f"train/{name}": value for name, value in values.items()})

    def add_all(self, place: int, values: Mapping[str, float]) -> None:
        """One point of each curve, by its whole name."""
        if self._writer:
            for name, value in values.items():
                self._writer.add_scalar(name, value, place)
        if self._mirror:
            self._mirror.add_all(place, values)

    def add_spread(self, place: int, name: str, values: Sequence[torch.Tensor]) -> None:
        """A histogram ``train/<name>`` of all values; nothing of none."""
        if self._writer and values:
            self._writer.add_histogram(f"train/{name}", torch.cat([value.flatten().cpu() for value in values]), place)

    def add_pictures(
        self, place: int, pictures: Sequence[Sequence[Image.Image]], files: Sequence[Path], fps: float
    ) -> None:
        """Pictures ``samples/00`` ..., clips as moving ones; ``files`` hold the same."""
        if self._mirror:
            self._mirror.add_pictures(place, pictures, files)
        for number, frames in enumerate(pictures):
            if self._writer:
                buffer = io.BytesIO()
                kind: dict[str, Any] = {"format": "png"}
                if len(frames) > 1:
                    kind = {"format": "gif", "save_all": True, "append_images": frames[1:], "loop": 0,
                            "duration": round(1000 / fps)}  # fmt: skip
                frames[0].save(buffer, **kind)
                width, height = frames[0].size
                image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=buffer.getvalue())
                summary = Summary(value=[Summary.Value(tag=f"samples/{number:02d}", image=image)])
                self._writer._get_file_writer().add_summary(summary, place)
                self._writer.flush()

    def __enter__(self) -> Curves:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer:
            self._writer.close()
        if self._mirror:
            self._mirror.close(failed=error is not None)


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
