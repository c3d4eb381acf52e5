"""Previews: what the model draws while it is trained, always from the same prompts and the same noise.

The prompts are encoded with the dataset, before the denoiser is loaded, so no text encoder is needed later; the
picture decoder is loaded for each drawing and let go after it. Nothing here changes the training: it draws without
gradients and gives back every random state.
"""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from ..models.base import Family, SampleRequest
from .config import SettingsError
from .imports import lazy
from .index import Index, Media, stamp_of
from .live import Live
from .media import Source
from .observation_settings import Sampling
from .world import World

if TYPE_CHECKING:
    import av
else:
    av = lazy("av")  # brings all of ffmpeg, and most families draw no video

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """A text to encode and the pictures that go with it."""

    text: str
    images: tuple[Media, ...] = ()


def prompts_of(settings: Sampling, images: Sequence[Media] = ()) -> list[Prompt]:
    """Every text that drawing needs, the negative one among them; ``images`` as in the settings."""
    shown = [(images[n if len(images) > 1 else 0],) if images else () for n in range(len(settings.prompts))]
    prompts = [Prompt(text, pictures) for text, pictures in zip(settings.prompts, shown, strict=True)]
    negative = [Prompt(settings.negative_prompt, pictures) for pictures in shown]
    return list(dict.fromkeys([*prompts, *negative]))


def requests_of(
    settings: Sampling, family: Family, embeddings: Mapping[Prompt, Mapping[str, torch.Tensor]], images: Sequence[Media]
) -> list[SampleRequest]:
    """One request for each prompt, of a size that the family has.

    Raises:
        SettingsError: A picture to start from cannot be read.
    """
    width, height, frames = size_of(settings, family)
    if (width, height) != (settings.width, settings.height):
        logger.info("sample: drawn at %dx%d, which the model takes", width, height)
    requests = []
    for number, text in enumerate(settings.prompts):
        shown = (images[number if len(images) > 1 else 0],) if images else ()
        requests.append(
            SampleRequest(
                embeddings[Prompt(text, shown)],
                embeddings[Prompt(settings.negative_prompt, shown)],
                width,
                height,
                frames,
                settings.steps,
                settings.guidance,
                settings.true_cfg,
                settings.seed,
                tuple(_opened(media) for media in shown),
            )
        )
    return requests


def size_of(settings: Sampling, family: Family) -> tuple[int, int, int]:
    """Width, height and frames of what is drawn, which the family has."""
    width, height = (_nearest(side, family.size_multiple, 0) for side in (settings.width, settings.height))
    frames = 1
    if family.fps and settings.frames > 1:
        frames = _nearest(settings.frames, family.frame_multiple, family.frame_remainder)
    return width, height, frames


def _nearest(value: int, multiple: int, remainder: int) -> int:
    """The number nearest to ``value`` that is some multiples and the remainder, at least one of either."""
    return max(0 if remainder else 1, round((value - remainder) / multiple)) * multiple + remainder


def _opened(media: Media) -> Image.Image:
    try:
        with Image.open(media.source.path) as picture:
            return picture.convert("RGB")
    except OSError as error:
        raise SettingsError(f"sample.images: '{media.source.path}' cannot be read ({error})") from None


def check_images(settings: Sampling, family: Family) -> None:
    """Sees that the model can draw, and from pictures if there are any; after `Family.check_files`.

    Raises:
        SettingsError: It cannot, or it needs one and there is none.
    """
    if settings.prompts and family.missing_for_samples:
        raise SettingsError(f"sample: {family.missing_for_samples}")
    if settings.images and not family.starts_from_pictures:
        raise SettingsError(
            f"sample.images: this {family.title} model draws from prompts alone and starts from no picture; leave "
            "images out"
        )
    if settings.prompts and not settings.images and not family.takes_pictures:
        raise SettingsError(f"sample.images: this {family.title} model draws from a first frame; give a picture")


def find_images(settings: Sampling, index: Index, family: Family) -> list[Media]:
    """The pictures of the settings.

    Raises:
        SettingsError: One is missing or cannot be read, or they do not go together with the family.
    """
    check_images(settings, family)
    found = []
    for path in settings.images:
        file = os.path.abspath(os.path.expanduser(path))
        if not os.path.isfile(file):
            raise SettingsError(f"sample.images: '{path}' is not a file; give a picture")
        source = Source(file)
        media = index.media(os.path.dirname(file), [(source, stamp_of(os.stat(file)))])[source]
        if isinstance(media, str):
            raise SettingsError(f"sample.images: '{path}': {media}")
        found.append(media)
    return found


class Previews:
    """Draws the requests of a run with the live denoiser; every process has one and draws together."""

    def __init__(
        self,
        family: Family,
        live: Live,
        requests: Sequence[SampleRequest],
        world: World,
        replica: int,
        num_replicas: int,
    ) -> None:
        """``replica``: which of the ``num_replicas`` data-parallel copies of the model this process is of; they share
        the requests out."""
        self._family, self._live, self._requests = family, live, list(requests)
        self._world, self._replica, self._num_replicas = world, replica, num_replicas

    def __bool__(self) -> bool:
        return bool(self._requests)

    def draw(self, tell: Callable[[int, int], None] = lambda *_: None) -> list[list[Image.Image]]:
        """The frames of each request, in order, on rank 0; elsewhere nothing.

        Args:
            tell: Hears how many requests are done, and of how many.
        """
        started, drawn, total = time.monotonic(), dict[int, list[Image.Image]](), len(self._requests)
        tell(0, total)
        with self._live.ready():
            pipeline = self._family.pipeline(self._live, self._world.device, text_encoders=False)
            pipeline.set_progress_bar_config(disable=True)
            for turn in range(-(-len(self._requests) // self._num_replicas)):
                number = turn * self._num_replicas + self._replica
                # All replicas draw as often, because the weights may be shared out among them.
                frames = self._draw_one(pipeline, self._requests[number % len(self._requests)])
                if number < len(self._requests):
                    drawn[number] = frames
                tell(min(total, (turn + 1) * self._num_replicas), total)
            del pipeline
        self._let_go()
        everything = {number: frames for part in self._world.gather(drawn) for number, frames in part.items()}
        if self._world.rank != 0:
            return []
        logger.info("%d samples drawn in %.1f s", len(everything), time.monotonic() - started)
        return [everything[number] for number in range(len(self._requests))]

    def _draw_one(self, pipeline: Any, request: SampleRequest) -> list[Image.Image]:
        try:
            return self._family.sample(pipeline, request)
        except torch.cuda.OutOfMemoryError:
            if not hasattr(pipeline.vae, "enable_tiling"):
                raise
        self._let_go()  # outside the handler, whose traceback holds the failed call's tensors
        logger.warning("sample: not enough GPU memory for a whole picture; it is decoded in tiles")
        pipeline.vae.enable_tiling()
        return self._family.sample(pipeline, request)

    def _let_go(self) -> None:
        gc.collect()
        if self._world.device.type == "cuda":
            torch.cuda.empty_cache()


def save(samples: Sequence[Sequence[Image.Image]], folder: Path, name: str, fps: float | None) -> list[Path]:
    """Writes samples as ``<name>_<number>.png``, clips as ``.mp4``; each file appears whole."""
    folder.mkdir(exist_ok=True)
    files = []
    for number, frames in enumerate(samples):
        file = folder / f"{name}_{number:02d}{'.png' if len(frames) == 1 else '.mp4'}"
        draft = file.with_name(f".{file.name}")
        if len(frames) == 1:
            frames[0].save(draft, format="png")
        else:
            write_clip(draft, frames, fps or 16.0)
        draft.replace(file)
        files.append(file)
    return files


def write_clip(path: Path, frames: Sequence[Image.Image], fps: float) -> None:
    """Frames of even width and height as an H.264 video that every browser plays."""
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = *frames[0].size, "yuv420p"  # type: ignore[assignment]
        stream.options = {"crf": "17"}
        for picture in frames:
            frame = av.VideoFrame.from_ndarray(np.asarray(picture.convert("RGB")), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
