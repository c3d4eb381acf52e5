"""Encoded pictures, videos and captions: made once, shared by all runs, never wrong.

One file per value, named by what the value depends on: encoder, file content, size, text. So nothing has
to be invalidated: what changed has another name. Any number of processes and trainings may fill one cache.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import logging
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool3d

from ..models.base import Encodings, Family
from .buckets import Bucket
from .dataset import Sample, collector_off
from .index import Media, Progress, Stopped
from .media import UnreadableMedia, read_mask, read_picture, read_whole
from .randomness import generator
from .store import Store, Uses
from .video import read_clip, read_mask_clip

logger = logging.getLogger(__name__)

CONTROL_PIXELS = 1024 * 1024
"""Most pixels of a control picture that a text encoder looks at."""
AHEAD = 8
"""Pictures or clips that are read while others are encoded; a clip may have 100 MB."""


@dataclass(frozen=True, slots=True)
class View:
    """How a sample is trained this time."""

    caption: str = ""
    flip: bool = False


@dataclass
class Encoded:
    """A sample as the encoders left it, without batch dimension."""

    media: dict[str, torch.Tensor]
    text: dict[str, torch.Tensor]
    mask: torch.Tensor | None = None
    """FHW, one value in [0, 1] for each latent."""
    controls: tuple[dict[str, torch.Tensor], ...] = ()


@dataclass(frozen=True, slots=True)
class _Picture:
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
class _Text:
    """A caption to encode."""

    caption: str
    files: tuple[Media, ...] = ()
    """Control pictures that the encoder looks at, too."""


Job = TypeVar("Job", _Picture, _Text)


class _Part(Generic[Job]):
    """What is needed of one store, and which of it this process makes."""

    def __init__(self, store: Store, known: dict[str, int], rank: int, world: int) -> None:
        """``known``: sizes of what there is and need not be made."""
        self.store, self.known = store, known
        self.keys: dict[str, None] = {}
        self.jobs: dict[str, Job] = {}
        self._rank, self._world = rank, world

    def add(self, key: str, kind: Callable[..., Job], *arguments: Any) -> None:
        """Notes a value. Processes share by key, so that those which look at other times leave no gap."""
        self.keys[key] = None
        if key not in self.known and int(key[:8], 16) % self._world == self._rank:
            self.jobs[key] = kind(*arguments)


Ready = list[tuple[str, Job, list[np.ndarray]]]
"""Keys and jobs with the pixels of their files."""
Call = tuple[Any, ...]
"""A function and its arguments, for a reader."""


class Cache:
    """Media and text of a dataset as one family encodes them."""

    def __init__(
        self,
        folder: Path,
        family: Family,
        samples: Sequence[Sample],
        uncond: bool = False,
        texts: Sequence[tuple[str, tuple[Media, ...]]] = (),
    ) -> None:
        """
        Args:
            uncond: The empty caption is needed for every sample, not only for those that may lose theirs.
            texts: Further texts, each with its control pictures; `text` reads them.
        """
        self._folder, self._family, self._uncond, self._further = folder, family, uncond, texts
        self.samples = list(samples)
        self._parts: list[_Part[Any]] = []
        self._media_base = _base("media", family.identity("vae"))
        self._text_bases = {name: _base("text", family.identity(name)) for name in family.text_encoders}
        root = folder / family.config.type
        self._media, self._masks = Store(root / "media"), Store(root / "masks")
        self._texts = {name: Store(root / f"text-{name}") for name in family.text_encoders}

    # -- keys: what each value depends on ---------------------------------------------------------------

    def media_key(self, media: Media, bucket: Bucket, start: float | None = None, flip: bool = False) -> str:
        """Key of latents: what is in the file, at which size, through which encoder."""
        clip = "" if start is None else f";{self._family.fps};{start}"
        return _key(f"{media.digest};{bucket}{clip}" + ";flipped" * flip, self._media_base)

    def text_key(self, encoder: str, caption: str, controls: Sequence[Media] = ()) -> str:
        """Key of a caption's embeddings."""
        seen = "".join(f"{c.digest};" for c in controls) if encoder in self._family.text_sees_controls else ""
        return _key(f"{len(seen)};{seen}{caption}", self._text_bases[encoder])

    def mask_key(self, sample: Sample, flip: bool) -> str:
        """Key of a sample's mask on the grid of its latents."""
        assert sample.mask
        grid, shape = self._grid(sample.bucket), sample.media.properties
        size = shape.width, shape.height
        return _key(
            str(("mask", sample.mask.digest, *size, *sample.bucket, sample.start, self._family.fps, grid, flip))
        )

    def _grid(self, bucket: Bucket) -> tuple[int, int, int]:
        return self._family.latent_size(bucket.width, bucket.height, bucket.frames)

    # -- reading ----------------------------------------------------------------------------------------

    def load(self, sample: Sample, view: View) -> Encoded | None:
        """A sample's values; None when a file is missing or damaged."""
        media = self._media.get(self.media_key(sample.media, sample.bucket, sample.start, view.flip))
        # All are read before any is missed: reading is what notices damage and removes it.
        texts = [store.get(self.text_key(name, view.caption, sample.controls)) for name, store in self._texts.items()]
        mask = self._masks.get(self.mask_key(sample, view.flip)) if sample.mask else {"mask": None}
        still = Bucket(sample.bucket.width, sample.bucket.height)
        controls = [self._media.get(self.media_key(c, still, None, view.flip)) for c in sample.controls]
        if media is None or mask is None or any(part is None for part in (*texts, *controls)):
            return None
        text = {name: tensor for part in texts for name, tensor in (part or {}).items()}
        return Encoded(media, text, mask["mask"], tuple(control for control in controls if control is not None))

    def text(self, caption: str, controls: tuple[Media, ...] = ()) -> dict[str, torch.Tensor]:
        """What the text encoders gave for one of the further texts.

        Raises:
            FileNotFoundError: It is not in the cache.
        """
        found: dict[str, torch.Tensor] = {}
        for name, store in self._texts.items():
            part = store.get(self.text_key(name, caption, controls))
            if part is None:
                raise FileNotFoundError(f"the cached encoding of '{caption}' is missing or damaged; start again")
            found |= part
        return found

    def remake(self, sample: Sample) -> None:
        """Makes on the CPU what is missing of one sample, while the GPU trains.

        Raises:
            UnreadableMedia: Its file cannot be read any more.
        """
        logger.warning("cache: encoding %s again; this takes a while", sample.path)
        with ThreadPoolExecutor(1) as readers:
            failed = Cache(self._folder, self._family, [sample], self._uncond).fill(torch.device("cpu"), 1, readers)
        for reason in failed.values():
            raise UnreadableMedia(reason)

    def part(self, samples: Sequence[Sample]) -> Cache:
        """The same cache for some of its samples."""
        part = copy.copy(self)
        part.samples = list(samples)
        return part

    # -- making -----------------------------------------------------------------------------------------

    def fill(
        self,
        device: torch.device,
        batch_size: int,
        readers: Executor,
        progress: Progress = lambda *_: None,
        rank: int = 0,
        world: int = 1,
        barrier: Callable[[], None] = lambda: None,
        *,
        regenerate: bool = False,
    ) -> dict[str, str]:
        """Encodes this process's share of what is missing; every process calls it.

        Args:
            readers: Read pictures ahead of the encoder.
            regenerate: Encode also what is there.

        Returns:
            Files that could not be decoded, with the reason (this process's share).
        """
        work = _Work(self._family, device, batch_size, readers, progress, regenerate)
        failed: dict[str, str] = {}
        self._parts.clear()

        def part(store: Store) -> _Part[Any]:
            present = store.sizes(sweep=rank == 0)
            self._parts.append(_Part(store, {} if regenerate else present, rank, world))
            return self._parts[-1]

        def make(jobs: dict[str, Job], encode: Callable[[Store, dict[str, Job]], dict[str, str]], store: Store) -> None:
            try:
                if jobs:
                    failed.update(encode(store, jobs))
            except Stopped:
                barrier()  # the others come to it, too, and must not be left alone there
                raise
            barrier()

        with collector_off():
            pictures = self._list_pictures(part(self._media))
        make(pictures.jobs, work.media, self._media)
        make(self._list_masks(part(self._masks)).jobs, work.masks, self._masks)
        for name, store in self._texts.items():
            with collector_off():
                texts = self._list_texts(name, part(store))
            make(texts.jobs, partial(work.texts, name), store)
        return failed

    def note_use(self, name: str) -> int:
        """Keeps what the dataset ``name`` uses since `fill`, for pruning; returns its bytes."""
        identity = _key(name + "".join(base.hexdigest() for base in (self._media_base, *self._text_bases.values())))
        Uses(self._folder).note(identity, (key for part in self._parts for key in part.keys))
        total = 0
        for part in self._parts:
            complete = part.known and all(key in part.known for key in part.keys)
            sizes = part.known if complete else part.store.sizes()
            total += sum(sizes.get(key, 0) for key in part.keys)
        return total

    def _list_pictures(self, part: _Part[_Picture]) -> _Part[_Picture]:
        for sample in self.samples:
            flips = (False, True)[: 1 + sample.flip]
            for flip in flips:
                key = self.media_key(sample.media, sample.bucket, sample.start, flip)
                part.add(key, _Picture, sample.media, sample.bucket, sample.start, flip, sample.media)
            if sample.controls:
                still = Bucket(sample.bucket.width, sample.bucket.height)
                for control in sample.controls:
                    for flip in flips:
                        part.add(
                            self.media_key(control, still, None, flip), _Picture, control, still, None, flip, control
                        )
        return part

    def _list_masks(self, part: _Part[_Picture]) -> _Part[_Picture]:
        for sample in self.samples:
            if sample.mask:
                for flip in (False, True)[: 1 + sample.flip]:
                    key = self.mask_key(sample, flip)
                    part.add(key, _Picture, sample.mask, sample.bucket, sample.start, flip, sample.media)
        return part

    def _list_texts(self, encoder: str, part: _Part[_Text]) -> _Part[_Text]:
        sees = encoder in self._family.text_sees_controls
        for sample in self.samples:
            seen = sample.controls if sees else ()
            dropped = ("",) if self._uncond or sample.caption_dropout else ()
            for caption in (*sample.captions, *dropped):
                part.add(self.text_key(encoder, caption, seen), _Text, caption, seen)
        for caption, controls in self._further:
            seen = controls if sees else ()
            part.add(self.text_key(encoder, caption, seen), _Text, caption, seen)
        return part


class _Work:
    """Encoding on one device, each encoder there only while it works."""

    def __init__(
        self, family: Family, device: torch.device, batch_size: int, readers: Executor, progress: Progress, again: bool
    ) -> None:
        self._family, self._device, self._batch_size = family, device, batch_size
        self._readers, self._progress, self._again = readers, progress, again

    def media(self, store: Store, jobs: dict[str, _Picture]) -> dict[str, str]:
        """Encodes pictures and clips, in batches of one bucket; what failed, with the reason."""
        self._progress("loading the picture encoder", 0, 0)
        vae = self._family.load_vae(self._device)

        groups = _groups_by(jobs, lambda job: job.bucket, self._batch_size)
        encode = partial(self._encode_pictures, vae, store)
        failed = self._read_and("encoding pictures", store, groups, self._reading_picture, encode)
        del vae, encode
        self._let_go()
        return failed

    def _encode_pictures(self, vae: Any, store: Store, group: Ready[_Picture]) -> None:
        pixels = torch.from_numpy(np.stack([pixels for _, _, (pixels,) in group])).to(self._device)
        with torch.no_grad():
            generators = [generator("posterior", key) for key, *_ in group]
            encoded = self._family.encode_media(vae, pixels.float() / 127.5 - 1.0, generators)
        _put_rows(store, group, encoded)

    def masks(self, store: Store, jobs: dict[str, _Picture]) -> dict[str, str]:
        """Shrinks masks to the grid of their latents; what failed, with the reason."""
        black = {}

        def shrink(group: Ready[_Picture]) -> None:
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

    def texts(self, name: str, store: Store, jobs: dict[str, _Text]) -> dict[str, str]:
        """Encodes captions; what could not be read for it, with the reason."""
        self._progress(f"loading text encoder {name}", 0, 0)
        encoder = self._family.load_text_encoder(name, self._device)

        groups = _groups_by(jobs, lambda job: None, self._batch_size)
        encode = partial(self._encode_captions, name, encoder, store)
        failed = self._read_and(f"encoding captions ({name})", store, groups, self._reading_control, encode)
        del encoder, encode
        self._let_go()
        return failed

    def _encode_captions(self, name: str, encoder: Any, store: Store, group: Ready[_Text]) -> None:
        captions = [text.caption for _, text, _ in group]
        with torch.no_grad():
            if name in self._family.text_sees_controls:
                controls = [[torch.from_numpy(each) for each in pixels] for *_, pixels in group]
                encoded = self._family.encode_edit(name, encoder, captions, controls)
            else:
                encoded = self._family.encode_text(name, encoder, captions)
        _put_rows(store, group, encoded)

    # -- reading ahead ----------------------------------------------------------------------------------

    def _reading_picture(self, job: _Picture, media: Media) -> Call:
        if job.start is None:
            return read_picture, media.source, job.bucket, job.flip
        assert self._family.fps
        return read_clip, media.source, job.bucket, self._family.fps, job.start, job.flip

    def _reading_mask(self, job: _Picture, media: Media) -> Call:
        size = job.shape.properties.width, job.shape.properties.height
        if media.properties.seconds is None:
            return read_mask, media.source, job.bucket, size, job.flip
        return read_mask_clip, media.source, job.bucket, self._family.fps or 1.0, job.start or 0.0, size, job.flip

    def _reading_control(self, job: _Text, media: Media) -> Call:
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


def _base(*parts: str) -> hashlib.blake2b:
    """What keys begin with, hashed once for all."""
    return hashlib.blake2b(repr(parts).encode("utf-8", "surrogatepass"), digest_size=20)


def _key(text: str, base: hashlib.blake2b | None = None) -> str:
    digest = base.copy() if base else _base()
    digest.update(text.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
