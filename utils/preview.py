"""A contact sheet of samples as the model will see them: cropped, resized, with captions, masks and controls."""

from __future__ import annotations

import random
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from .buckets import Bucket
from .dataset import Sample
from .index import Media
from .media import UnreadableMedia, read_mask, read_picture
from .video import read_clip, read_mask_clip

CELL = 256
"""Pixels of a cell's side."""
TEXT_LINES, LINE = 4, 12
UNTRAINED = (255, 0, 0)
"""What a mask leaves out is tinted with it."""


def choose(samples: Sequence[Sample], count: int, seed: int) -> list[Sample]:
    """Up to ``count`` samples, of all buckets alike, in the order of the dataset."""
    order = list(range(len(samples)))
    random.Random(seed).shuffle(order)
    by_bucket: dict[Bucket, list[int]] = {}
    for index in order:
        by_bucket.setdefault(samples[index].bucket, []).append(index)
    queues, chosen = list(by_bucket.values()), list[int]()
    while queues and len(chosen) < count:
        chosen += [queue.pop() for queue in queues][: count - len(chosen)]
        queues = [queue for queue in queues if queue]
    return [samples[index] for index in sorted(chosen)]


def contact_sheet(samples: Sequence[Sample], fps: float | None) -> Image.Image:
    """The samples in rows of cells; each with its first, middle and last frame, its mask and its controls."""
    cells = [_cell(sample, fps) for sample in samples]
    columns = max(1, min(4, round(len(cells) ** 0.5)))
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    heights = [max(cell.height for cell in row) for row in rows]
    widths = [max((row[n].width for row in rows if n < len(row)), default=0) for n in range(columns)]
    sheet = Image.new("RGB", (max(1, sum(widths)), max(1, sum(heights))), "white")
    for top, row in zip(_starts(heights), rows, strict=True):
        for left, cell in zip(_starts(widths), row, strict=False):
            sheet.paste(cell, (left, top))
    return sheet


def dump(samples: Sequence[Sample], folder: Path, fps: float | None) -> int:
    """Writes each sample to ``folder``: its frames at full size, mask tinted, then its controls; returns how many."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, sample in enumerate(samples):
        name = f"{number:03d}_{sample.bucket.width}x{sample.bucket.height}"
        for part, picture in enumerate(_pictures(sample, fps)):
            picture.save(folder / f"{name}_{part}.png")
        (folder / f"{name}.txt").write_text("\n".join(sample.captions), "utf-8")
    return len(samples)


def _cell(sample: Sample, fps: float | None) -> Image.Image:
    try:
        tiles = [_small(picture) for picture in _pictures(sample, fps)]
    except (UnreadableMedia, OSError) as problem:
        tiles = [Image.new("RGB", (CELL, CELL), "grey")]
        ImageDraw.Draw(tiles[0]).text((8, 8), textwrap.fill(str(problem), 38), fill="white")
    width = sum(tile.width for tile in tiles) + 4 * (len(tiles) + 1)
    height = max(tile.height for tile in tiles)
    cell = Image.new("RGB", (width, height + (TEXT_LINES + 1) * LINE + 12), "white")
    left = 4
    for tile in tiles:
        cell.paste(tile, (left, 4))
        left += tile.width + 4
    draw = ImageDraw.Draw(cell)
    caption = sample.captions[0] or "(no caption)"
    more = f" (+{len(sample.captions) - 1})" if len(sample.captions) > 1 else ""
    lines = [f"{sample.bucket}  x{sample.num_repeats:g}", *textwrap.wrap(caption + more, max(8, width // 6))]
    for number, line in enumerate(lines[: TEXT_LINES + 1]):
        draw.text((4, height + 8 + number * LINE), line.encode("latin-1", "replace").decode("latin-1"), fill="black")
    return cell


def _pictures(sample: Sample, fps: float | None) -> list[Image.Image]:
    bucket = sample.bucket
    pixels_CFHW = _read(sample.media, bucket, sample.start, fps)
    frames = sorted({0, bucket.frames // 2, bucket.frames - 1})
    pictures = [_image(pixels_CFHW[:, frame]) for frame in frames]
    if sample.mask:
        mask_FHW = _mask(sample, sample.mask, fps)
        pictures = [
            _tinted(picture, mask_FHW[min(n, len(mask_FHW) - 1)]) for n, picture in zip(frames, pictures, strict=True)
        ]
    still = Bucket(bucket.width, bucket.height)
    return pictures + [_image(_read(control, still, None, fps)[:, 0]) for control in sample.controls]


def _read(media: Media, bucket: Bucket, start: float | None, fps: float | None) -> np.ndarray:
    if start is None:
        return read_picture(media.source, bucket)
    return read_clip(media.source, bucket, fps or 1.0, start)


def _mask(sample: Sample, mask: Media, fps: float | None) -> np.ndarray:
    size = sample.media.properties.width, sample.media.properties.height
    if mask.properties.seconds is None:
        return read_mask(mask.source, sample.bucket, size)
    return read_mask_clip(mask.source, sample.bucket, fps or 1.0, sample.start or 0.0, size)


def _tinted(picture: Image.Image, mask_HW: np.ndarray) -> Image.Image:
    covered = Image.blend(picture, Image.new("RGB", picture.size, UNTRAINED), 0.5)
    return Image.composite(picture, covered, Image.fromarray(mask_HW))


def _image(pixels_CHW: np.ndarray) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(pixels_CHW.transpose(1, 2, 0)))


def _small(picture: Image.Image) -> Image.Image:
    picture.thumbnail((CELL, CELL))
    return picture


def _starts(lengths: Sequence[int]) -> list[int]:
    return [sum(lengths[:n]) for n in range(len(lengths))]
