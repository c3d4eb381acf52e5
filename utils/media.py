"""Reading pictures and masks: every format becomes pixels of one size. Videos are in `video`.

Without torch, as this is what the processes of `readers` load. Shape legend: C channels, F frames (1 for
pictures), H W pixels.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from .buckets import Bucket

MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 89_478_485)
"""Larger pictures are refused, as Pillow itself does: a few bytes can claim to be one."""
SMALLEST_SIDE = 16
"""Pixels; a picture with a shorter side holds nothing that could be learnt."""
PICTURE_SUFFIXES = frozenset(Image.registered_extensions()) - {
    ".pdf", ".ps", ".eps", ".mpg", ".mpeg", ".h5", ".hdf", ".grib", ".bufr", ".wmf", ".emf",
}  # fmt: skip
TURNED = (5, 6, 7, 8)
"""EXIF orientations that swap width and height."""

# What these say of odd files is said better in the report, and a picture is opened a thousand times.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class UnreadableMedia(Exception):
    """A file that holds no usable picture or video; the text says why."""


class Source(NamedTuple):
    """Where a picture or video lies: a file, or a stretch of an uncompressed archive."""

    path: str
    member: str = ""
    """Name inside the archive."""
    offset: int = 0
    length: int = 0

    def __str__(self) -> str:
        return f"{self.path}/{self.member}" if self.member else self.path

    @property
    def name(self) -> str:
        """The last part of the path."""
        return str(self).rsplit("/", 1)[-1]

    def open(self) -> BinaryIO:
        """Its bytes, from the start.

        Raises:
            OSError: It cannot be read.
        """
        if not self.member:
            return open(self.path, "rb")
        with open(self.path, "rb") as archive:
            archive.seek(self.offset)
            return io.BytesIO(archive.read(self.length))


class Properties(NamedTuple):
    """What a file's head says."""

    width: int
    """In pixels, as shown, that is after rotation."""
    height: int
    seconds: float | None = None
    """How long a video is; None for pictures."""


def picture_properties(source: Source) -> Properties:
    """Reads the header alone.

    Raises:
        UnreadableMedia: It is no picture, or none that can be trained.
    """
    with source.open() as file, _opened(file) as image:
        width, height = image.size
        if _turned(image):
            width, height = height, width
    refuse_tiny(width, height)
    return Properties(width, height)


def _turned(image: Image.Image) -> bool:
    if image.format == "PNG" and "exif" not in image.info:  # Pillow would decode it all to look behind the pixels
        return False
    try:
        return image.getexif().get(0x0112, 1) in TURNED
    except Exception as error:  # Pillow's parsers raise anything on damaged bytes
        raise UnreadableMedia(f"cannot be decoded: {_reason(error)}") from error


def refuse_tiny(width: int, height: int) -> None:
    """Raises `UnreadableMedia` where a side is shorter than `SMALLEST_SIDE`."""
    if min(width, height) < SMALLEST_SIDE:
        raise UnreadableMedia(f"only {width}x{height} pixels; a side needs at least {SMALLEST_SIDE}")


def read_picture(source: Source, bucket: Bucket, flip: bool = False) -> np.ndarray:
    """Pixels as CFHW, uint8, resized to fill ``bucket`` and cropped around the centre.

    Raises:
        UnreadableMedia: It cannot be decoded.
    """
    return as_array([fitted(_decoded(source), bucket, flip)])


def read_whole(source: Source, most: int) -> np.ndarray:
    """Pixels as CHW, uint8, in the picture's own shape, made smaller where it has more than ``most`` pixels.

    Raises:
        UnreadableMedia: It cannot be decoded.
    """
    image = _decoded(source)
    scale = min(1.0, (most / (image.width * image.height)) ** 0.5)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return as_array([image if scale == 1 else image.resize(size, Image.Resampling.LANCZOS)])[:, 0]


def read_mask(source: Source, bucket: Bucket, size: tuple[int, int], flip: bool = False) -> np.ndarray:
    """The red channel as FHW, uint8, cropped as the picture of width and height ``size`` is.

    Raises:
        UnreadableMedia: It cannot be decoded.
    """
    return red([_decoded(source, keep_alpha=True)], bucket, size, flip)


def red(frames: Sequence[Image.Image], bucket: Bucket, size: tuple[int, int], flip: bool) -> np.ndarray:
    """The red channel of masks as FHW, uint8; see `read_mask`."""
    box, (width, height) = crop_box(*size, bucket), size
    channels = []
    for frame in frames:
        across, down = frame.width / width, frame.height / height
        own = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
        channel = frame.convert("RGB").getchannel("R")
        channel = channel.resize((bucket.width, bucket.height), Image.Resampling.BILINEAR, box=own)
        channels.append(np.asarray(ImageOps.mirror(channel) if flip else channel))
    return np.stack(channels)


def crop_box(width: int, height: int, bucket: Bucket) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of what remains of a picture: the centre, in the bucket's shape."""
    scale = min(width / bucket.width, height / bucket.height)
    across, down = bucket.width * scale, bucket.height * scale
    left, top = (width - across) / 2, (height - down) / 2
    return max(0.0, left), max(0.0, top), min(float(width), left + across), min(float(height), top + down)


def fitted(image: Image.Image, bucket: Bucket, flip: bool = False) -> Image.Image:
    """An RGB picture at the bucket's size."""
    box = crop_box(image.width, image.height, bucket)
    image = image.resize((bucket.width, bucket.height), Image.Resampling.LANCZOS, box=box)
    return ImageOps.mirror(image) if flip else image


def as_array(frames: Sequence[Image.Image]) -> np.ndarray:
    """RGB pictures of one size as CFHW, uint8."""
    return np.ascontiguousarray(np.stack([np.asarray(frame) for frame in frames]).transpose(3, 0, 1, 2))


def _decoded(source: Source, keep_alpha: bool = False) -> Image.Image:
    """Upright; on white where it is transparent, unless ``keep_alpha``: a mask's colours count, not its alpha."""
    with source.open() as file:
        try:
            with _opened(file) as image:
                upright = ImageOps.exif_transpose(image)
                return _levelled(upright).convert("RGB") if keep_alpha else _to_rgb(upright)
        except UnreadableMedia:
            raise
        except Exception as error:  # Pillow's decoders raise anything on damaged bytes
            raise UnreadableMedia(f"cannot be decoded: {_reason(error)}") from error


def _opened(file: BinaryIO) -> Image.Image:
    try:
        image = Image.open(file)
    except Image.DecompressionBombError:
        raise UnreadableMedia(f"more than {MAX_PIXELS // 10**6} megapixels") from None
    except Exception as error:  # as above
        file.seek(0, io.SEEK_END)
        reason = "empty file" if file.tell() == 0 else _reason(error)
        raise UnreadableMedia(f"not a readable picture: {reason}") from error
    return image


def _reason(error: Exception) -> str:
    return str(error).split(" <")[0] or type(error).__name__


def _levelled(image: Image.Image) -> Image.Image:
    """16-bit grey scaled to 8, not cut off."""
    if not (image.mode.startswith("I") or image.mode == "F"):
        return image
    values = np.asarray(image, dtype=np.float32)
    top = 65535.0 if values.max() > 255 else 255.0
    return Image.fromarray(np.clip(values / top * 255.0, 0, 255).astype(np.uint8))


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB, on white where the picture is transparent."""
    image = _levelled(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
