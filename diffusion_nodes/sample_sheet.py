"""The newest samples of a training in one picture, for the node that shows how it goes."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

SIDE = 512
"""Pixels of the picture's longer side, at most."""


def sample_sheet(files: Sequence[str]) -> Any:
    """The pictures, and of each clip the middle frame, side by side in rows; None when there is none to show."""
    from PIL import Image

    pictures = [picture for file in files if (picture := _opened(Path(file))) is not None]
    if not pictures:
        return None
    columns = math.ceil(math.sqrt(len(pictures)))
    cell = SIDE // columns
    for picture in pictures:
        picture.thumbnail((cell, cell))
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    heights = [max(picture.height for picture in row) for row in rows]
    width = max(sum(picture.width for picture in row) for row in rows)
    sheet, top = Image.new("RGB", (width, sum(heights))), 0
    for row, height in zip(rows, heights, strict=True):
        left = 0
        for picture in row:
            sheet.paste(picture, (left, top))
            left += picture.width
        top += height
    return sheet


def _opened(file: Path) -> Any:
    """A Pillow image; None for a file that is gone or cannot be read, since showing it is not worth failing for."""
    from PIL import Image

    try:
        if file.suffix != ".mp4":
            with Image.open(file) as picture:
                return picture.convert("RGB")
        import av

        with av.open(str(file)) as container:
            frames = [frame.to_image() for frame in container.decode(video=0)]
        return frames[len(frames) // 2]
    except (OSError, IndexError) as error:
        logger.warning("%s: cannot be shown: %s", file, error)
        return None
