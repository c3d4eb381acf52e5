"""A contact sheet of samples as the model will see them: cropped, resized, with captions, masks and controls."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from . import lettering
from .buckets import Bucket
from .dataset import Sample
from .index import Media
from .media import UnreadableMedia, read_mask, read_picture
from .sources import printable
from .video import read_clip, read_mask_clip

CELL = 256
"""Pixels of a cell's side."""
MIN_CELL, MIN_WIDTH, GAP = 256, 1000, 6
TEXT, LINE, TEXT_LINES = 14, 19, 6
"""Size of letters, height of a line, and most lines of a caption."""
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
    """The samples in rows of numbered cells; each with its first, middle and last frame, its mask and its controls."""
    cells = [_cell(number, sample, fps) for number, sample in enumerate(samples, 1)]
    area = sum(cell.width * cell.height for cell in cells)
    most = max([MIN_WIDTH, round((area * 1.5) ** 0.5), *(cell.width for cell in cells)])
    places, left, top, height = list[tuple[int, int]](), 0, 0, 0
    for cell in cells:
        if left and left + cell.width > most:
            left, top, height = 0, top + height, 0
        places.append((left, top))
        left, height = left + cell.width, max(height, cell.height)
    right = max((x + cell.width for (x, _), cell in zip(places, cells, strict=True)), default=1)
    sheet = Image.new("RGB", (right, max(1, top + height)), "white")
    for place, cell in zip(places, cells, strict=True):
        sheet.paste(cell, place)
    return sheet


def legend(samples: Sequence[Sample]) -> list[str]:
    """What the cells of a sheet show: file, bucket and all captions, whatever the sheet had room for."""
    lines = []
    for number, sample in enumerate(samples, 1):
        lines.append(f"{number}: {printable(sample.path)}, {_facts(sample)}")
        lines += [f"    {printable(caption) or '(no caption)'}" for caption in sample.captions]
    if unknown := lettering.missing("".join(lines)):
        lines.append(
            f"no font of this system has {len(unknown)} of these characters, so the sheet shows boxes; install one "
            "that has them, such as Noto Sans CJK"
        )
    return lines


def dump(samples: Sequence[Sample], folder: Path, fps: float | None) -> int:
    """Writes each sample to ``folder``: its frames at full size, mask tinted, then its controls; returns how many."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, sample in enumerate(samples):
        name = f"{number:03d}_{sample.bucket.width}x{sample.bucket.height}"
        for part, picture in enumerate(_pictures(sample, fps)):
            picture.save(folder / f"{name}_{part}.png")
        (folder / f"{name}.txt").write_text("\n".join(sample.captions), "utf-8")
    return len(samples)


def _cell(number: int, sample: Sample, fps: float | None) -> Image.Image:
    """Header, pictures with what each is, caption."""
    try:
        tiles = [(title, _small(picture)) for title, picture in _titled(sample, fps)]
    except (UnreadableMedia, OSError) as problem:
        tiles = [("cannot be read", Image.new("RGB", (CELL, CELL), "grey"))]
        for n, line in enumerate(lettering.wrap(str(problem), TEXT, CELL - 2 * GAP, 12)):
            lettering.write(tiles[0][1], (GAP, GAP + n * LINE), line, TEXT, "white")
    width = max(sum(tile.width for _, tile in tiles) + GAP * (len(tiles) - 1), MIN_CELL)
    more = f" (+{len(sample.captions) - 1} more)" if len(sample.captions) > 1 else ""
    head = lettering.wrap(f"{number}: {printable(sample.name or sample.path)}", TEXT, width, 2)
    head += lettering.wrap(_facts(sample), TEXT, width, 2)
    caption = printable(sample.captions[0]) or "(no caption)"
    text = lettering.wrap(caption + more, TEXT, width, TEXT_LINES)
    below = GAP + len(head) * LINE + LINE + max(tile.height for _, tile in tiles)
    cell = Image.new("RGB", (width + 2 * GAP, below + len(text) * LINE + 3 * GAP), "white")
    for n, line in enumerate(head):
        lettering.write(cell, (GAP, GAP + n * LINE), line, TEXT)
    left = GAP
    for title, tile in tiles:
        lettering.write(cell, (left, GAP + len(head) * LINE), title, TEXT, "dimgrey")
        cell.paste(tile, (left, GAP + (len(head) + 1) * LINE))
        left += tile.width + GAP
    for n, line in enumerate(text):
        lettering.write(cell, (GAP, below + GAP + n * LINE), line, TEXT)
    return cell


def _facts(sample: Sample) -> str:
    facts = [str(sample.bucket), f"{sample.num_repeats:g} times an epoch" if sample.num_repeats != 1 else ""]
    facts += [f"from {sample.start:.2f} s" if sample.start else "", "mirrored half the time" if sample.flip else ""]
    return ", ".join(filter(None, [*facts, "red is not trained" if sample.mask else ""]))


def _titled(sample: Sample, fps: float | None) -> list[tuple[str, Image.Image]]:
    pictures, num_controls = _pictures(sample, fps), len(sample.controls)
    frames = [f"{frame / (fps or 1):.2f} s" for frame in _frames(sample)] if sample.start is not None else [""]
    controls = [f"control {n}" if num_controls > 1 else "control" for n in range(1, num_controls + 1)]
    return list(zip([*frames, *controls], pictures, strict=True))


def _frames(sample: Sample) -> list[int]:
    """The first, the middle and the last."""
    return sorted({0, sample.bucket.frames // 2, sample.bucket.frames - 1})


def _pictures(sample: Sample, fps: float | None) -> list[Image.Image]:
    bucket = sample.bucket
    pixels_CFHW = _read(sample.media, bucket, sample.start, fps)
    frames = _frames(sample)
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
    grey = ImageOps.grayscale(picture).convert("RGB")  # so that red shows on a red picture, too
    covered = Image.blend(grey, Image.new("RGB", picture.size, UNTRAINED), 0.5)
    return Image.composite(picture, covered, Image.fromarray(mask_HW))


def _image(pixels_CHW: np.ndarray) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(pixels_CHW.transpose(1, 2, 0)))


def _small(picture: Image.Image) -> Image.Image:
    picture.thumbnail((CELL, CELL))
    return picture
