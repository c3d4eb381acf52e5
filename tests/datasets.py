"""Small datasets of real files, for the tests of the data side."""

import os
import random
import struct
import zlib
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import av
import numpy as np
import torch
from diffusion_trainer.models.flux import Flux
from diffusion_trainer.utils.dataset import Sample, scan
from diffusion_trainer.utils.dataset_report import Report
from diffusion_trainer.utils.dataset_settings import parse_dataset_settings
from diffusion_trainer.utils.index import Index
from diffusion_trainer.utils.readers import Readers
from PIL import Image

READERS = Readers(2)
"""Shared, as a process takes a moment to start; they end with the tests."""


class VideoFamily(Flux):
    """As far as the data side asks: a family of videos at 8 frames a second, 4n+1 long."""

    title = "Tiny video"
    fps = 8.0


class EditFamily(Flux):
    """As far as the data side asks: an edit family."""

    title = "Tiny edit"
    max_controls = 2
    text_sees_controls: ClassVar = ("t5",)
    seen: ClassVar[list[Any]] = []

    def encode_edit(
        self, name: str, encoder: Any, captions: Sequence[str], controls: Sequence[Sequence[torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        self.seen.append((list(captions), [[tuple(c.shape) for c in each] for each in controls]))
        return super().encode_edit(name, encoder, captions, controls)


def picture(path: Path, size: tuple[int, int] = (64, 64), seed: int | str = 0, caption: str | None = None) -> Path:
    """A picture of noise that differs with ``seed``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    chance = random.Random(seed)
    Image.frombytes("RGB", size, chance.randbytes(size[0] * size[1] * 3)).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, "utf-8")
    return path


def bomb(path: Path) -> None:
    """A PNG of a few bytes that claims to be 60000 pixels wide and high."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + head
        + struct.pack(">I", zlib.crc32(head))
        + b"\0\0\0\x09IDAT"
        + bytes(13)
    )


def hostile(folder: Path) -> None:
    """Everything that has no business among pictures."""
    folder.mkdir()
    good = picture(folder / "good.png", caption="fine").read_bytes()
    (folder / "truncated.png").write_bytes(good[:40])
    (folder / "zero.jpg").touch()
    (folder / "text.mp4").write_text("not a video")
    (folder / "text.webp").write_text("not a picture")
    (folder / "wrong.jpg").write_bytes(good[:33] + b"\xff" * 50)
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    Image.new("RGB", (30000, 10)).save(folder / "line.png")
    bomb(folder / "bomb.png")
    (folder / "unknown.xyz").write_bytes(good)
    (folder / "loop.png").symlink_to("loop2.png")
    (folder / "loop2.png").symlink_to("loop.png")
    (folder / "around").symlink_to(folder)
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    picture(folder / 'it\'s "so"\nnamed 😀.png', seed=1, caption="odd")
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png")).write_bytes(good)
    picture(folder / "latin.png", seed=2)
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    picture(folder / "long.png", seed=3, caption="x" * 200_000)
    video(folder / "clip.mp4", [0, 0.1])
    sound(folder / "audio.mp4")
    (folder / "still.mp4").write_bytes(good)


def video(
    path: Path, times: Sequence[Fraction | float], size: tuple[int, int] = (64, 48), codec: str = "mpeg4"
) -> Path:
    """A video whose n-th frame, shown from ``times[n]`` on, is as bright as 8 * (n % 32)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = *size, "yuv420p", 20_000_000
        stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(
                np.full((size[1], size[0], 3), 8 * (number % 32), np.uint8), format="rgb24"
            )
            frame.pts, frame.time_base = round(time * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def sound(path: Path) -> None:
    """A video file that holds no frames, only a moment of silence."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("aac", rate=44100)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 44100
        container.mux(stream.encode(silence))
        container.mux(stream.encode())


def family(model: dict[str, Any], kind: Any = Flux) -> Any:
    """A family around a miniature."""
    return kind(kind.Config.model_validate(model))


def look(folder: Path, family: Any = Flux, clip_mode: Any = "none", top: dict | None = None, **options: Any):
    """Samples and report of one folder."""
    values = {"resolutions": [64], "directory": [{"path": str(folder), **options}], **(top or {})}
    index = Index(folder.parent / "index.sqlite", READERS)
    try:
        found: tuple[list[Sample], Report] = scan(parse_dataset_settings(values), index, family, clip_mode)
        return found
    finally:
        index.close()
