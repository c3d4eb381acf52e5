"""The encoders at work: pictures, clips, masks and captions are read ahead, encoded in batches and stored.

Each encoder is on the device only while it works.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool3d

from ..models.base import Encodings, Family
from .buckets import Bucket
from .index import Media
from .media import UnreadableMedia, read_mask, read_picture, read_whole
from .progress import Progress
from .randomness import generator
from .store import Store
from .video import read_clip, read_mask_clip
from .weights import counted

CONTROL_PIXELS = 1024 * 1024
"""Most pixels of a control picture that a text encoder looks at."""
AHEAD = 8
"""Pictures or clips that are read while others are encoded; a clip may have 100 MB."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture or clip to encode, or a mask to shrink."""

    media: Media
    bucket: Bucket
    start: float | None
    flip: bool
    shape: Media
    """What it is cropped like: itself, or for a mask its picture."""

    @property
    def files(self) -> tuple[Media, ...]:
        """What is read for it."""
        return (self.media,)


@dataclass(frozen=True, slots=True)
class Text:
    """A caption to encode."""

    caption: str
    files: tuple[Media, ...] = ()
    """Control pictures that the encoder looks at, too."""


Job = TypeVar("Job", Picture, Text)
Ready = list[tuple[str, Job, list[np.ndarray]]]
"""Keys and jobs with the pixels of their files."""
Call = tuple[Any, ...]
"""A function and its arguments, for a reader."""


class Encoder:
    """Does the jobs of one process on one device."""

    def __init__(
        self, family: Family, device: torch.device, batch_size: int, readers: Executor, progress: Progress, again: bool
    ) -> None:
        self._family, self._device, self._batch_size = family, device, batch_size
        self._readers, self._progress, self._again = readers, progress, again

    def media(self, store: Store, jobs: dict[str, Picture]) -> dict[str, str]:
        """Encodes pictures and clips, in batches of one bucket; what failed, with the reason."""
        vae = self._load("loading the picture encoder", self._family.load_vae)
        groups = _groups_by(jobs, lambda job: job.bucket, self._batch_size)
        encode = partial(self._encode_pictures, vae, store)
        failed = self._read_and("encoding pictures", store, groups, self._reading_picture, encode)
        del vae, encode
        self._let_go()
        return failed

    def _encode_pictures(self, vae: Any, store: Store, group: Ready[Picture]) -> None:
        pixels = torch.from_numpy(np.stack([pixels for _, _, (pixels,) in group])).to(self._device)
        with torch.no_grad():
            generators = [generator("posterior", key) for key, *_ in group]
            encoded = self._family.encode_media(vae, pixels.float() / 127.5 - 1.0, generators)
        _put_rows(store, group, encoded)

    def masks(self, store: Store, jobs: dict[str, Picture]) -> dict[str, str]:
        """Shrinks masks to the grid of their latents; what failed, with the reason."""
        black = {}

        def shrink(group: Ready[Picture]) -> None:
            for key, job, (mask_FHW,) in group:
                bucket = job.bucket
                grid = self._family.latent_size(bucket.width, bucket.height, bucket.frames)
                whole = torch.from_numpy(mask_FHW).expand(bucket.frames, -1, -1)
                mask = mask_on_grid(whole, grid, self._family.frame_remainder == 1)
                if mask.any():
                    store.put(key, {"mask": mask})
                else:
                    black[str(job.media.source)] = "the mask is black all over, so nothing would be trained"

        groups = _groups_by(jobs, lambda job: job.bucket, 1)
        return self._read_and("shrinking masks", store, groups, self._reading_mask, shrink) | black

    def texts(self, name: str, store: Store, jobs: dict[str, Text]) -> dict[str, str]:
        """Encodes captions; what could not be read for it, with the reason."""
        encoder = self._load(f"loading text encoder {name}", partial(self._family.load_text_encoder, name))
        groups = _groups_by(jobs, lambda job: None, self._batch_size)
        encode = partial(self._encode_captions, name, encoder, store)
        failed = self._read_and(f"encoding captions ({name})", store, groups, self._reading_control, encode)
        del encoder, encode
        self._let_go()
        return failed

    def _encode_captions(self, name: str, encoder: Any, store: Store, group: Ready[Text]) -> None:
        captions = [text.caption for _, text, _ in group]
        with torch.no_grad():
            if name in self._family.text_sees_controls:
                controls = [[torch.from_numpy(each) for each in pixels] for *_, pixels in group]
                encoded = self._family.encode_edit(name, encoder, captions, controls)
            else:
                encoded = self._family.encode_text(name, encoder, captions)
        _put_rows(store, group, encoded)

    # -- reading ahead ----------------------------------------------------------------------------------

    def _reading_picture(self, job: Picture, media: Media) -> Call:
        if job.start is None:
            return read_picture, media.source, job.bucket, job.flip
        assert self._family.fps
        return read_clip, media.source, job.bucket, self._family.fps, job.start, job.flip

    def _reading_mask(self, job: Picture, media: Media) -> Call:
        size = job.shape.properties.width, job.shape.properties.height
        if media.properties.seconds is None:
            return read_mask, media.source, job.bucket, size, job.flip
        return read_mask_clip, media.source, job.bucket, self._family.fps or 1.0, job.start or 0.0, size, job.flip

    def _reading_control(self, job: Text, media: Media) -> Call:
        return read_whole, media.source, CONTROL_PIXELS

    def _read_and(
        self,
        phase: str,
        store: Store,
        groups: list[dict[str, Job]],
        reading: Callable[[Job, Media], Call],
        use: Callable[[Ready[Job]], None],
    ) -> dict[str, str]:
        """Hands each group to ``use`` with its files as read by the readers, who are some groups ahead."""
        failed: dict[str, str] = {}
        done, total = 0, sum(map(len, groups))
        self._progress(phase, 0, total)
        for size, begun in self._ahead(store, groups, reading):
            ready: Ready[Job] = []
            for key, job, futures in begun:
                results = [_outcome(future) for future in futures]
                pixels = [result for result in results if not isinstance(result, str)]
                if len(pixels) == len(results):
                    ready.append((key, job, pixels))
                pairs = zip(job.files, results, strict=True)
                failed |= {str(media.source): result for media, result in pairs if isinstance(result, str)}
            if ready:
                use(ready)
            done += size
            self._progress(phase, done, total)
        return failed

    def _ahead(
        self, store: Store, groups: list[dict[str, Job]], reading: Callable[[Job, Media], Call]
    ) -> Iterator[tuple[int, list[tuple[str, Job, list[Future[np.ndarray]]]]]]:
        """Size of each group, and the reading of its files, begun while those before are used.

        What another training has made meanwhile is left out.
        """
        waiting: deque[tuple[int, list[tuple[str, Job, list[Future[np.ndarray]]]]]] = deque()
        following = iter(groups)
        while True:
            while sum(size for size, _ in waiting) < AHEAD + (waiting[0][0] if waiting else 0):
                if not (group := next(following, None)):
                    break
                wanted = {key: job for key, job in group.items() if self._again or not store.has(key)}
                begun = [
                    (key, job, [self._readers.submit(*reading(job, media)) for media in job.files])
                    for key, job in wanted.items()
                ]
                waiting.append((len(group), begun))
            if not waiting:
                return
            yield waiting.popleft()

    def _load(self, phase: str, load: Callable[[torch.device], Any]) -> Any:
        """A model on the device; its weights are counted as they are read."""
        self._progress(phase, 0, 0)
        with counted(lambda done, total: self._progress(phase, done, total, "bytes")):
            return load(self._device)

    def _let_go(self) -> None:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _put_rows(store: Store, group: Ready[Job], encoded: Encodings) -> None:
    for row, (key, *_) in enumerate(group):
        store.put(key, {name: tensor[row] for name, tensor in encoded.items()})


def _outcome(future: Future[np.ndarray]) -> np.ndarray | str:
    """The pixels, or why there are none."""
    try:
        return future.result()
    except UnreadableMedia as problem:
        return str(problem)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"


def mask_on_grid(mask_FHW: torch.Tensor, grid: tuple[int, int, int], first_alone: bool = True) -> torch.Tensor:
    """A mask (uint8) as mean brightness of the pixels below each latent, float32 in [0, 1].

    Args:
        grid: Frames, height and width of the latents.
        first_alone: The first frame of the latents stands for the first picture alone.
    """

    def shrink(part: torch.Tensor, frames: int) -> torch.Tensor:
        return adaptive_avg_pool3d(part.float()[None] / 255, (frames, *grid[1:]))[0]

    if grid[0] == 1 or not first_alone:
        return shrink(mask_FHW, grid[0])
    return torch.cat([shrink(mask_FHW[:1], 1), shrink(mask_FHW[1:], grid[0] - 1)])


def _groups_by(jobs: dict[str, Job], kind: Callable[[Job], Hashable], size: int) -> list[dict[str, Job]]:
    """The jobs in groups of one kind and at most so many."""
    by_kind: dict[Hashable, list[tuple[str, Job]]] = {}
    for key, job in jobs.items():
        by_kind.setdefault(kind(job), []).append((key, job))
    return [
        dict(members[start : start + size]) for members in by_kind.values() for start in range(0, len(members), size)
    ]
