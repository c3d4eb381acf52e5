"""Aspect-ratio buckets: the sizes that pictures are cropped and resized to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .settings import DatasetSettings, Directory


@dataclass(frozen=True, order=True)
class Bucket:
    """A size in pixels that the model sees."""

    width: int
    height: int
    frames: int = 1

    def __str__(self) -> str:
        return f"{self.width}x{self.height}" + (f"x{self.frames}" if self.frames > 1 else "")


def aspect_ratios(settings: DatasetSettings, directory: Directory) -> list[float]:
    """Width / height of each bucket of a folder, narrowest first; [1.0] when bucketing is off."""
    if not _pick(directory.enable_ar_bucket, settings.enable_ar_bucket):
        return [1.0]
    listed = _pick(directory.ar_buckets, settings.ar_buckets)
    if listed:
        return sorted({entry[0] / entry[1] if isinstance(entry, Sequence) else float(entry) for entry in listed})
    low, high = _pick(directory.min_ar, settings.min_ar), _pick(directory.max_ar, settings.max_ar)
    count = _pick(directory.num_ar_buckets, settings.num_ar_buckets)
    if count == 1:
        return [round(math.sqrt(low * high), 3)]
    return [round(low * (high / low) ** (n / (count - 1)), 3) for n in range(count)]


def areas(settings: DatasetSettings, directory: Directory) -> list[float]:
    """Pixels of each resolution: ``512`` means 512x512, ``[1280, 720]`` as many as that."""
    sizes = directory.resolutions or settings.resolutions
    return [
        float(math.prod(size))
        if isinstance(size, Sequence) and len(size) == 2
        else float((size[0] if isinstance(size, Sequence) else size) ** 2)
        for size in sizes
    ]


def bucket_for(ratio: float, ratios: Sequence[float], area: float, multiple: int) -> Bucket:
    """The bucket of a picture with width / height ``ratio``: the nearest shape, at ``area`` pixels,
    each side rounded to the nearest ``multiple``."""
    nearest = min(ratios, key=lambda r: abs(math.log(r) - math.log(ratio)))
    width = math.sqrt(area * nearest)
    return Bucket(_round(width, multiple), _round(area / width, multiple))


def _round(value: float, multiple: int) -> int:
    return max(multiple, round(value / multiple) * multiple)


def _pick(own: Any, default: Any) -> Any:
    return default if own is None else own
