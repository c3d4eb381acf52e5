"""Reading pictures: every format becomes RGB pixels of one size."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from .buckets import Bucket

Image.MAX_IMAGE_PIXELS = 300_000_000
"""Larger pictures are refused: nobody trains on them, and a few bytes can claim to be one."""

# Pillow's name -> what it means for a user
SUFFIXES = frozenset(Image.registered_extensions()) - {
    ".pdf",
    ".ps",
    ".eps",
    ".mpg",
    ".mpeg",
    ".h5",
    ".hdf",
    ".grib",
    ".bufr",
    ".wmf",
    ".emf",
}


class UnreadableMedia(Exception):
    """A file that holds no usable picture; the text says why."""


def picture_size(path: Path) -> tuple[int, int]:
    """Width and height as shown, that is after EXIF rotation; reads the header alone.

    Raises:
        UnreadableMedia: It is no picture.
    """
    with _open(path) as image:
        width, height = image.size
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        return (height, width) if turned else (width, height)


def read_picture(path: Path, bucket: Bucket) -> torch.Tensor:
    """The picture as pixels_CHW in [-1, 1], float32, resized to fill ``bucket`` and cropped around its centre.

    Raises:
        UnreadableMedia: It cannot be decoded.
    """
    with _open(path) as image:
        try:
            upright = ImageOps.exif_transpose(image)
            fitted = ImageOps.fit(_to_rgb(upright), (bucket.width, bucket.height), Image.Resampling.LANCZOS)
        except (OSError, SyntaxError, ValueError, EOFError) as error:
            raise UnreadableMedia(f"cannot be decoded: {error}") from None
        pixels = torch.from_numpy(np.asarray(fitted, dtype=np.uint8).copy())
    return pixels.permute(2, 0, 1).float() / 127.5 - 1.0


def _open(path: Path) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # twice the limit still raises
            image = Image.open(path)
    except Image.DecompressionBombError:
        raise UnreadableMedia(f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6} megapixels") from None
    except (OSError, SyntaxError, ValueError) as error:
        reason = (
            "empty file"
            if path.exists() and path.stat().st_size == 0
            else str(error).split(" '")[0] or type(error).__name__
        )
        raise UnreadableMedia(f"not a readable picture: {reason}") from None
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB on white where the picture is transparent; 16-bit grey scaled, not cut off."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float32)
        top = 65535.0 if values.max() > 255 else 255.0
        image = Image.fromarray(np.clip(values / top * 255.0, 0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
