"""Buckets: the sizes and lengths that pictures and videos are cropped, resized and cut to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .dataset_settings import FolderOptions


class Bucket(NamedTuple):
    """A size in pixels, and a number of frames, that the model sees."""

    width: int
    height: int
    frames: int = 1

    def __str__(self) -> str:
        return f"{self.width}x{self.height}" + (f"x{self.frames}" if self.frames > 1 else "")


@dataclass(frozen=True)
class Grid:
    """What a family can take."""

    multiple: int = 16
    """Width and height are multiples of this many pixels."""
    fps: float | None = None
    """Frames in a second of a video; None where the family takes pictures alone."""
    frame_multiple: int = 4
    frame_remainder: int = 1
    """Lengths of videos are ``frame_multiple * n + frame_remainder``."""

    def side(self, pixels: float) -> int:
        """The nearest side that the family takes, in pixels."""
        return max(self.multiple, round(pixels / self.multiple) * self.multiple)

    def length(self, frames: int) -> int:
        """The longest video of at most ``frames`` frames that the family takes; 0 if there is none."""
        count = (frames - self.frame_remainder) // self.frame_multiple
        return max(0, count * self.frame_multiple + self.frame_remainder) if frames > 0 and count >= 0 else 0


class Buckets:
    """The buckets of one folder."""

    def __init__(self, options: FolderOptions, grid: Grid) -> None:
        self._ratios, self._areas = aspect_ratios(options), areas(options)
        self._grid = grid
        self._chosen: dict[tuple[int, int, int], list[Bucket]] = {}
        lengths = {grid.length(frames) for frames in options.frame_buckets if frames > 1}
        self._lengths = sorted(length for length in lengths if length > 1)
        self._sizes = [_size_bucket(entry, grid) for entry in options.size_buckets or []]

    def choose(self, width: int, height: int, frames: int = 1) -> list[Bucket]:
        """Where a picture (``frames`` 1) or a video goes, once for each resolution; nowhere if it is too short.

        A video never goes to a bucket of pictures.
        """
        key = width, height, frames
        if key not in self._chosen:
            self._chosen[key] = self._choose(*key)
        return self._chosen[key]

    def _choose(self, width: int, height: int, frames: int) -> list[Bucket]:
        ratio = width / height
        if self._sizes:
            nearest = sorted(self._sizes, key=lambda size: _distance(size.width / size.height, ratio))
            fits = [size for size in nearest if (size.frames == 1 if frames == 1 else 1 < size.frames <= frames)]
            return fits[:1]
        length = 1 if frames == 1 else max((entry for entry in self._lengths if entry <= frames), default=0)
        if not length:
            return []
        shapes = [bucket_for(ratio, self._ratios, area, self._grid) for area in self._areas]
        return [Bucket(shape.width, shape.height, length) for shape in dict.fromkeys(shapes)]

    @property
    def lengths(self) -> list[int]:
        """Frames of the buckets for videos, shortest first."""
        return sorted({size.frames for size in self._sizes if size.frames > 1}) if self._sizes else self._lengths


def aspect_ratios(options: FolderOptions) -> list[float]:
    """Width / height of each bucket of a folder, narrowest first; [1.0] when bucketing is off."""
    if not options.enable_ar_bucket:
        return [1.0]
    if options.ar_buckets:
        entries = options.ar_buckets
        return sorted({entry[0] / entry[-1] if isinstance(entry, list) and len(entry) == 2 else float(entry[0])
                       if isinstance(entry, list) else float(entry) for entry in entries})  # fmt: skip
    low, high, count = options.min_ar, options.max_ar, options.num_ar_buckets
    if count == 1:
        return [round(math.sqrt(low * high), 3)]
    return [round(low * (high / low) ** (n / (count - 1)), 3) for n in range(count)]


def areas(options: FolderOptions) -> list[float]:
    """Pixels of each resolution: ``512`` means 512x512, ``[1280, 720]`` as many as that."""
    return [
        float(math.prod(size))
        if isinstance(size, Sequence) and len(size) == 2
        else float((size[0] if isinstance(size, Sequence) else size) ** 2)
        for size in options.resolutions
    ]


def bucket_for(ratio: float, ratios: Sequence[float], area: float, grid: Grid) -> Bucket:
    """The bucket of a picture with width / height ``ratio``: the nearest shape, at ``area`` pixels,
    each side rounded as the family takes it."""
    nearest = min(ratios, key=lambda known: _distance(known, ratio))
    width = math.sqrt(area * nearest)
    return Bucket(grid.side(width), grid.side(area / width))


def _distance(one: float, other: float) -> float:
    return abs(math.log(one) - math.log(other))


def _size_bucket(entry: Sequence[int], grid: Grid) -> Bucket:
    frames = entry[2] if len(entry) == 3 else 1
    return Bucket(grid.side(entry[0]), grid.side(entry[1]), 1 if frames == 1 else max(1, grid.length(frames)))
