"""Encoded pictures, videos and captions: made once, shared by all runs, never wrong.

One file per value, named by what the value depends on: encoder, file content, size, text. So nothing has
to be invalidated: what changed has another name. Any number of processes and trainings may fill one cache.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.nn.functional import adaptive_avg_pool3d

from ..models.base import Encodings, Family
from .buckets import Bucket
from .dataset import Sample
from .index import Media, Progress
from .media import UnreadableMedia, normalised, read_mask, read_picture, read_whole
from .randomness import generator
from .store import Store, Uses
from .video import read_clip, read_mask_clip

logger = logging.getLogger(__name__)
T = TypeVar("T")

CONTROL_PIXELS = 1024 * 1024
"""Most pixels of a control picture that a text encoder looks at."""


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
    """A picture or clip to encode."""

    media: Media
    bucket: Bucket
    start: float | None
    flip: bool
    shape: Media
    """What it is cropped like: itself, or for a mask its picture."""


@dataclass(frozen=True, slots=True)
class _Text:
    """A caption to encode."""

    caption: str
    controls: tuple[Media, ...]


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
        self._jobs: list[tuple[Store, dict[str, int], list[str]]] = []
        self._vae_identity = family.identity("vae")
        self._text_identity = {name: family.identity(name) for name in family.text_encoders}
        root = folder / family.config.type
        self._media, self._masks = Store(root / "media"), Store(root / "masks")
        self._texts = {name: Store(root / f"text-{name}") for name in family.text_encoders}

    # -- keys: what each value depends on ---------------------------------------------------------------

    def media_key(self, media: Media, bucket: Bucket, start: float | None = None, flip: bool = False) -> str:
        """Key of latents: what is in the file, at which size, through which encoder."""
        clip = [] if start is None else [self._family.fps, start]
        return _key("media", self._vae_identity, media.digest, bucket, *clip, *["flipped"] * flip)

    def text_key(self, encoder: str, caption: str, controls: Sequence[Media] = ()) -> str:
        """Key of a caption's embeddings."""
        seen = [c.digest for c in controls] if encoder in self._family.text_sees_controls else []
        return _key("text", self._text_identity[encoder], caption, *seen)

    def mask_key(self, sample: Sample, flip: bool) -> str:
        """Key of a sample's mask on the grid of its latents."""
        assert sample.mask
        grid, shape = self._grid(sample.bucket), sample.media.properties
        size = shape.width, shape.height
        return _key("mask", sample.mask.digest, size, sample.bucket, sample.start, self._family.fps, grid, flip)

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
        failed = Cache(self._folder, self._family, [sample], self._uncond).fill(torch.device("cpu"), 1)
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
        progress: Progress = lambda *_: None,
        rank: int = 0,
        world: int = 1,
        barrier: Callable[[], None] = lambda: None,
        *,
        regenerate: bool = False,
        num_readers: int | None = None,
    ) -> dict[str, str]:
        """Encodes this process's share of what is missing; every process calls it.

        Args:
            regenerate: Encode also what is there.
            num_readers: Threads that read pictures ahead of the encoder.

        Returns:
            Files that could not be decoded, with the reason (this process's share).
        """
        work = _Work(self._family, device, batch_size, progress, num_readers or min(8, os.cpu_count() or 1), regenerate)
        failed: dict[str, str] = {}
        self._jobs.clear()

        def share(store: Store, jobs: dict[str, T]) -> dict[str, T]:
            """What this process does: by key, so that processes which look at other times leave no gap."""
            if rank == 0:
                store.sweep()
            present = {} if regenerate else store.sizes()
            self._jobs.append((store, present, list(jobs)))
            return {key: job for key, job in jobs.items() if key not in present and int(key[:8], 16) % world == rank}

        if pictures := share(self._media, self._picture_jobs()):
            failed |= work.media(self._media, pictures)
        barrier()
        if masks := share(self._masks, self._mask_jobs()):
            failed |= work.masks(self._masks, masks)
        barrier()
        for name, store in self._texts.items():
            if texts := share(store, self._text_jobs(name)):
                work.texts(name, store, texts)
            barrier()
        return failed

    def note_use(self, name: str) -> int:
        """Keeps what the dataset ``name`` uses since `fill`, for pruning; returns its bytes."""
        identity = _key(name, self._vae_identity, *self._text_identity.values())
        Uses(self._folder).note(identity, (key for *_, keys in self._jobs for key in keys))
        total = 0
        for store, before, keys in self._jobs:
            sizes = before if all(key in before for key in keys) else store.sizes()
            total += sum(sizes.get(key, 0) for key in keys)
        return total

    def _picture_jobs(self) -> dict[str, _Picture]:
        jobs = {}
        for sample in self.samples:
            still = Bucket(sample.bucket.width, sample.bucket.height)
            parts = [(sample.media, sample.bucket, sample.start), *((c, still, None) for c in sample.controls)]
            for media, bucket, start in parts:
                for flip in (False, True)[: 1 + sample.flip]:
                    job = _Picture(media, bucket, start, flip, media)
                    jobs[self.media_key(media, bucket, start, flip)] = job
        return jobs

    def _mask_jobs(self) -> dict[str, _Picture]:
        return {
            self.mask_key(s, flip): _Picture(s.mask, s.bucket, s.start, flip, s.media)
            for s in self.samples
            if s.mask
            for flip in (False, True)[: 1 + s.flip]
        }

    def _text_jobs(self, encoder: str) -> dict[str, _Text]:
        jobs = {}
        for sample in self.samples:
            dropped = ("",) if self._uncond or sample.caption_dropout else ()
            for caption in (*sample.captions, *dropped):
                jobs[self.text_key(encoder, caption, sample.controls)] = _Text(caption, sample.controls)
        for caption, controls in self._further:
            jobs[self.text_key(encoder, caption, controls)] = _Text(caption, controls)
        return jobs


class _Work:
    """Encoding on one device, each encoder there only while it works."""

    def __init__(
        self, family: Family, device: torch.device, batch_size: int, progress: Progress, num_readers: int, again: bool
    ) -> None:
        self._family, self._device, self._batch_size, self._progress = family, device, batch_size, progress
        self._num_readers, self._again = num_readers, again

    def media(self, store: Store, jobs: dict[str, _Picture]) -> dict[str, str]:
        """Encodes pictures and clips, in batches of one bucket; what failed, with the reason."""
        self._progress("loading the picture encoder", 0, len(jobs))
        vae = self._family.load_vae(self._device)

        failed = self._read_and("encoding pictures", store, jobs, self._read, partial(self._encode_media, vae, store))
        del vae
        self._let_go()
        return failed

    def _encode_media(self, vae: Any, store: Store, group: list[tuple[str, _Picture, torch.Tensor]]) -> None:
        pixels = torch.stack([pixels for *_, pixels in group]).to(self._device)
        with torch.no_grad():
            generators = [generator("posterior", key) for key, *_ in group]
            encoded = self._family.encode_media(vae, normalised(pixels), generators)
        for row, (key, *_) in enumerate(group):
            store.put(key, {name: tensor[row] for name, tensor in encoded.items()})

    def masks(self, store: Store, jobs: dict[str, _Picture]) -> dict[str, str]:
        """Shrinks masks to the grid of their latents; what failed, with the reason."""

        def keep(group: list[tuple[str, _Picture, torch.Tensor]]) -> None:
            for key, _, mask in group:
                store.put(key, {"mask": mask})

        return self._read_and("shrinking masks", store, jobs, self._read_mask, keep)

    def texts(self, name: str, store: Store, jobs: dict[str, _Text]) -> None:
        """Encodes captions."""
        self._progress(f"loading text encoder {name}", 0, len(jobs))
        encoder = self._family.load_text_encoder(name, self._device)
        done = 0
        for group in _groups(list(jobs.items()), self._batch_size):
            todo = [(key, text) for key, text in group if self._again or not store.has(key)]
            if todo:
                captions = [text.caption for _, text in todo]
                with torch.no_grad():
                    encoded = self._encode_text(name, encoder, captions, [text for _, text in todo])
                for row, (key, _) in enumerate(todo):
                    store.put(key, {part: tensor[row] for part, tensor in encoded.items()})
            done += len(group)
            self._progress(f"encoding captions ({name})", done, len(jobs))
        del encoder
        self._let_go()

    def _encode_text(self, name: str, encoder: Any, captions: list[str], texts: Sequence[_Text]) -> Encodings:
        if name not in self._family.text_sees_controls:
            return self._family.encode_text(name, encoder, captions)
        pictures = [[read_whole(c.source, CONTROL_PIXELS) for c in text.controls] for text in texts]
        return self._family.encode_edit(name, encoder, captions, pictures)

    def _read_and(
        self,
        phase: str,
        store: Store,
        jobs: dict[str, _Picture],
        read: Callable[[_Picture], torch.Tensor],
        use: Callable[[list[tuple[str, _Picture, torch.Tensor]]], None],
    ) -> dict[str, str]:
        """Reads ahead what ``use`` gets in groups of one bucket."""
        by_bucket: dict[Bucket, list[tuple[str, _Picture]]] = {}
        for key, job in jobs.items():
            by_bucket.setdefault(job.bucket, []).append((key, job))
        groups = [group for members in by_bucket.values() for group in _groups(members, self._batch_size)]
        failed: dict[str, str] = {}
        done = 0

        def attempt(entry: tuple[str, _Picture]) -> torch.Tensor | str | None:
            if not self._again and store.has(entry[0]):  # another training was faster
                return None
            try:
                return read(entry[1])
            except UnreadableMedia as problem:
                return str(problem)
            except OSError as error:
                return f"cannot be read: {error.strerror or error}"

        with ThreadPoolExecutor(self._num_readers) as pool:
            for group, found in _ahead(pool, attempt, groups, self._num_readers):
                good = [
                    (*entry, value)
                    for entry, value in zip(group, found, strict=True)
                    if isinstance(value, torch.Tensor)
                ]
                for (_, job), value in zip(group, found, strict=True):
                    if isinstance(value, str):
                        failed[str(job.media.source)] = value
                if good:
                    use(good)
                done += len(group)
                self._progress(phase, done, len(jobs))
        return failed

    def _read(self, job: _Picture) -> torch.Tensor:
        if job.start is None:
            return read_picture(job.media.source, job.bucket, job.flip)
        assert self._family.fps
        return read_clip(job.media.source, job.bucket, self._family.fps, job.start, job.flip)

    def _read_mask(self, job: _Picture) -> torch.Tensor:
        size = job.shape.properties.width, job.shape.properties.height
        source, bucket = job.media.source, job.bucket
        if job.media.properties.seconds is None:
            mask_FHW = read_mask(source, bucket, size, job.flip).expand(bucket.frames, -1, -1)
        else:
            mask_FHW = read_mask_clip(source, bucket, self._family.fps or 1.0, job.start or 0.0, size, job.flip)
        grid = self._family.latent_size(bucket.width, bucket.height, bucket.frames)
        mask = mask_on_grid(mask_FHW, grid, self._family.frame_remainder == 1)
        if not mask.any():
            raise UnreadableMedia("the mask is black all over, so nothing would be trained")
        return mask

    def _let_go(self) -> None:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


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


def _ahead(
    pool: ThreadPoolExecutor, read: Callable[[T], Any], groups: list[list[T]], at_once: int
) -> Iterator[tuple[list[T], list[Any]]]:
    """Each group with what ``read`` gives for its entries, read while those before are used."""
    waiting: deque[tuple[list[T], list[Future[Any]]]] = deque()
    depth = 1 + max(1, -(-at_once // len(groups[0]))) if groups else 0
    following = iter(groups)
    while True:
        while len(waiting) < depth and (group := next(following, None)):
            waiting.append((group, [pool.submit(read, entry) for entry in group]))
        if not waiting:
            return
        group, futures = waiting.popleft()
        yield group, [future.result() for future in futures]


def _groups(items: Sequence[T], size: int) -> list[list[T]]:
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def _key(*parts: object) -> str:
    text = repr([str(part) for part in parts])
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=20).hexdigest()
