"""What was found in a dataset and what was left out, for the log and ``dataset_report.json``."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from .buckets import Bucket
from .media import crop_box
from .sources import printable

if TYPE_CHECKING:
    from .dataset import Sample
    from .index import Media

logger = logging.getLogger(__name__)

SHOWN = 50
"""Most lines of one kind in the log; the file has them all."""


@dataclass
class BucketReport:
    """What one bucket holds."""

    samples: int = 0
    upscaled: int = 0
    """Of them, pictures smaller than the bucket."""
    cropped: float = 0.0
    """Share of their pixels that is cut off, on average."""


@dataclass
class Report:
    """Built up by `dataset.scan`, completed by the trainer."""

    pictures: int = 0
    videos: int = 0
    samples: int = 0
    upscaled: int = 0
    masks: int = 0
    controls: int = 0
    buckets: dict[str, BucketReport] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    """Files that are not trained, each with the reason."""
    without_caption: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    """Masks and control pictures that belong to nothing."""
    duplicates: dict[str, str] = field(default_factory=dict)
    """Files that hold the same as another, with that."""
    steps_per_epoch: int | None = None
    total_steps: int | None = None
    cache_bytes: int | None = None
    _first: dict[str, str] = field(default_factory=dict, repr=False)

    def add(self, media: Media, buckets: Sequence[Bucket]) -> None:
        """Counts a picture or video that is trained in ``buckets``."""
        path, found = str(media.source), media.properties
        self.videos += found.seconds is not None
        self.pictures += found.seconds is None
        first = self._first.setdefault(media.digest, path)
        if first != path:
            self.duplicates[printable(path)] = printable(first)
        for bucket in buckets:
            if found.width < bucket.width or found.height < bucket.height:
                self.upscaled += 1
                break

    def count(self, samples: Sequence[Sample]) -> None:
        """Counts the samples by bucket."""
        self.samples, self.buckets, self.masks, self.controls = len(samples), {}, 0, 0
        sizes: Counter[tuple[int, int, Bucket]] = Counter()
        for sample in samples:
            sizes[(sample.media.properties.width, sample.media.properties.height, sample.bucket)] += 1
            self.masks += sample.mask is not None
            self.controls += len(sample.controls)
        for (width, height, bucket), count in sizes.items():
            entry = self.buckets.setdefault(str(bucket), BucketReport())
            left, top, right, bottom = crop_box(width, height, bucket)
            entry.samples += count
            entry.upscaled += count * (width < bucket.width or height < bucket.height)
            entry.cropped += count * (1 - (right - left) * (bottom - top) / (width * height))
        for entry in self.buckets.values():
            entry.cropped = round(entry.cropped / entry.samples, 4)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = asdict(self)
        del values["_first"]
        return values

    def lines(self) -> list[str]:
        """The report for people."""
        head = f"{self.pictures} pictures, {self.videos} videos, {self.samples} samples"
        parts = {
            "without caption": len(self.without_caption), "enlarged": self.upscaled, "with mask": self.masks,
            "control pictures": self.controls, "duplicates": len(self.duplicates), "left out": len(self.left_out),
        }  # fmt: skip
        lines = [", ".join([head, *(f"{count} {what}" for what, count in parts.items() if count)])]
        for name, bucket in sorted(self.buckets.items()):
            enlarged = f", {bucket.upscaled} enlarged" if bucket.upscaled else ""
            lines.append(f"bucket {name}: {bucket.samples}, {bucket.cropped:.0%} cut off{enlarged}")
        if self.total_steps is not None:
            lines.append(f"{self.steps_per_epoch} steps in the first epoch, {self.total_steps} in all")
        lines += _limited([f"left out: {path}: {reason}" for path, reason in self.left_out.items()])
        lines += _limited([f"without caption: {path}" for path in self.without_caption])
        lines += _limited([f"belongs to no picture: {path}" for path in self.orphans])
        lines += _limited([f"the same twice: {path} and {other}" for path, other in self.duplicates.items()])
        return lines

    def log(self) -> None:
        """Says it in the log."""
        for line in self.lines():
            logger.log(logging.WARNING if line.startswith("left out") else logging.INFO, "dataset: %s", line)


def _limited(lines: list[str]) -> list[str]:
    more = len(lines) - SHOWN
    return lines if more <= 0 else [*lines[:SHOWN], f"... and {more} more like this, see dataset_report.json"]
