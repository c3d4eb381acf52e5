"""Reading videos through ffmpeg (PyAV): frames by time stamp, so that any frame rate comes out right."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image

from .buckets import Bucket
from .imports import lazy
from .media import Properties, Source, UnreadableMedia, as_array, fitted, red, refuse_tiny

if TYPE_CHECKING:
    import av
else:
    av = lazy("av")  # brings all of ffmpeg, and most datasets have no video

SUFFIXES = frozenset({
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".flv", ".wmv", ".mpg", ".mpeg", ".ts", ".m2ts", ".mts", ".3gp",
    ".ogv", ".vob", ".mxf",
})  # fmt: skip
ClipMode = Literal["none", "single_beginning", "single_middle", "multiple_overlapping"]

# A playlist that is called .mp4 could make ffmpeg open other files and addresses.
_OPTIONS = {
    "format_whitelist": "mov,mp4,matroska,webm,avi,flv,live_flv,asf,mpeg,mpegts,mpegvideo,ogg,mxf,h264,hevc,m4v,ivf,"
    "gif,apng,png_pipe,jpeg_pipe,image2",
}
_EARLY = 0.003
"""Seconds that a frame may come early: containers round time stamps to milliseconds."""


def video_properties(source: Source) -> Properties:
    """Size and length of a video, from its packets and first frame.

    Raises:
        UnreadableMedia: It is no video, or none that can be trained.
    """
    with _reading(source) as container:
        stream = _stream(container)
        times, last, tick = [], 0.0, stream.time_base or Fraction(1, 1)
        for packet in container.demux(stream):
            stamp = packet.pts if packet.pts is not None else packet.dts
            if stamp is not None and packet.size:
                times.append(float(stamp * tick))
                last = float((packet.duration or 0) * tick)
        container.seek(0)
        first = next(container.decode(stream), None)
        if first is None or not times:
            raise UnreadableMedia("holds no frames")
        width, height = _shown(first, stream).size
    refuse_tiny(width, height)
    span = max(times) - min(times)
    average = span / (len(times) - 1) if len(times) > 1 else 0.0
    return Properties(width, height, span + (last or average))


def num_frames(seconds: float, fps: float) -> int:
    """Frames of a video of this length at ``fps``."""
    return math.floor(seconds * fps + 0.1)


def clip_starts(seconds: float, fps: float, length: int, mode: ClipMode) -> list[float]:
    """Where clips of ``length`` frames begin, in seconds."""
    spare = max(0, num_frames(seconds, fps) - length)
    if mode == "single_middle":
        return [spare // 2 / fps]
    if mode == "multiple_overlapping":
        count = math.ceil((spare + length) / length)
        return [round(spare * n / (count - 1)) / fps if count > 1 else 0.0 for n in range(count)]
    return [0.0]


def read_clip(source: Source, bucket: Bucket, fps: float, start: float, flip: bool = False) -> np.ndarray:
    """Pixels of ``bucket.frames`` frames from ``start`` seconds on, as CFHW, uint8.

    Each frame is the one that is shown at its time, ``1 / fps`` seconds after the one before.

    Raises:
        UnreadableMedia: It cannot be decoded, or ends before.
    """
    with _reading(source) as container:
        return as_array([fitted(frame, bucket, flip) for frame in _frames(container, bucket.frames, fps, start)])


def read_mask_clip(
    source: Source, bucket: Bucket, fps: float, start: float, size: tuple[int, int], flip: bool = False
) -> np.ndarray:
    """The red channel of the same frames as FHW, uint8, cropped as the video of width and height ``size`` is.

    Raises:
        UnreadableMedia: It cannot be decoded, or ends before.
    """
    with _reading(source) as container:
        return red(list(_frames(container, bucket.frames, fps, start)), bucket, size, flip)


@contextmanager
def _reading(source: Source) -> Iterator[av.container.InputContainer]:
    with source.open() as file:
        try:
            with av.open(file, mode="r", options=_OPTIONS) as container:
                yield container
        except (UnreadableMedia, GeneratorExit):
            raise
        except Exception as error:  # ffmpeg's errors have no common class below this one
            raise UnreadableMedia(f"not a readable video: {getattr(error, 'strerror', None) or error}") from error


def _stream(container: av.container.InputContainer) -> av.VideoStream:
    if container.format.name.endswith("_pipe") or container.format.name == "image2":
        raise UnreadableMedia("a picture that is named like a video; rename it")
    best = container.streams.best("video")
    if not isinstance(best, av.VideoStream):
        raise UnreadableMedia("holds no video")
    return best


def _frames(container: av.container.InputContainer, count: int, fps: float, start: float) -> Iterator[Image.Image]:
    stream = _stream(container)
    stream.thread_type = "AUTO"
    wanted = 0
    shown: av.VideoFrame | None = None
    time = 0.0
    for frame, time in _timed(container, stream, start):
        while wanted < count and shown is not None and start + wanted / fps < time - _EARLY:
            yield _shown(shown, stream)
            wanted += 1
        if wanted == count:
            return
        shown = frame
    if shown is None:
        raise UnreadableMedia("holds no frames")
    if start + (count - 1) / fps > time + max(0.5, 2 / fps):
        raise UnreadableMedia(f"ends after {time:.2f} s; {start + count / fps:.2f} s are needed")
    last = _shown(shown, stream)
    for _ in range(wanted, count):
        yield last


def _timed(
    container: av.container.InputContainer, stream: av.VideoStream, start: float
) -> Iterator[tuple[av.VideoFrame, float]]:
    """Frames with their seconds since the first one, from a little before ``start`` on."""
    rate = float(stream.average_rate or 25)
    origin: float | None = None
    for number, frame in enumerate(container.decode(stream)):
        if origin is None:
            origin = frame.time
            if start > 2 and frame.time is not None:
                break
        yield frame, number / rate if frame.time is None else frame.time - (origin or 0.0)
    else:
        return
    container.seek(int((origin + start) / (stream.time_base or 1)), stream=stream)
    for frame in container.decode(stream):
        yield frame, (frame.time or 0.0) - origin


def _shown(frame: av.VideoFrame, stream: av.VideoStream) -> Image.Image:
    """A frame as a player shows it: with square pixels, and turned."""
    image = frame.to_image()
    stretch = float(stream.sample_aspect_ratio or 1) or 1.0
    if stretch != 1:
        image = image.resize((max(1, round(image.width * stretch)), image.height), Image.Resampling.BICUBIC)
    turns = (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
    turn = round(frame.rotation / 90) % 4
    return image.transpose(turns[turn - 1]) if turn else image
