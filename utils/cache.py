"""Encoded pictures, videos and captions: made once, shared by all runs, never wrong.

One file per value, named by what the value depends on: encoder, file content, size, text. So nothing has
to be invalidated: what changed has another name. Any number of processes and trainings may fill one cache.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic

import torch

from ..models.base import Family
from .buckets import Bucket
from .dataset import Sample, collector_off
from .encoding import Encoder, Job, Picture, Text
from .index import Media
from .media import UnreadableMedia
from .progress import Progress, Stopped
from .store import Store, Uses

logger = logging.getLogger(__name__)


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
        work = Encoder(self._family, device, batch_size, readers, progress, regenerate)
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

    def _list_pictures(self, part: _Part[Picture]) -> _Part[Picture]:
        for sample in self.samples:
            flips = (False, True)[: 1 + sample.flip]
            for flip in flips:
                key = self.media_key(sample.media, sample.bucket, sample.start, flip)
                part.add(key, Picture, sample.media, sample.bucket, sample.start, flip, sample.media)
            if sample.controls:
                still = Bucket(sample.bucket.width, sample.bucket.height)
                for control in sample.controls:
                    for flip in flips:
                        part.add(
                            self.media_key(control, still, None, flip), Picture, control, still, None, flip, control
                        )
        return part

    def _list_masks(self, part: _Part[Picture]) -> _Part[Picture]:
        for sample in self.samples:
            if sample.mask:
                for flip in (False, True)[: 1 + sample.flip]:
                    key = self.mask_key(sample, flip)
                    part.add(key, Picture, sample.mask, sample.bucket, sample.start, flip, sample.media)
        return part

    def _list_texts(self, encoder: str, part: _Part[Text]) -> _Part[Text]:
        sees = encoder in self._family.text_sees_controls
        for sample in self.samples:
            seen = sample.controls if sees else ()
            dropped = ("",) if self._uncond or sample.caption_dropout else ()
            for caption in (*sample.captions, *dropped):
                part.add(self.text_key(encoder, caption, seen), Text, caption, seen)
        for caption, controls in self._further:
            seen = controls if sees else ()
            part.add(self.text_key(encoder, caption, seen), Text, caption, seen)
        return part


def _base(*parts: str) -> hashlib.blake2b:
    """What keys begin with, hashed once for all."""
    return hashlib.blake2b(repr(parts).encode("utf-8", "surrogatepass"), digest_size=20)


def _key(text: str, base: hashlib.blake2b | None = None) -> str:
    digest = base.copy() if base else _base()
    digest.update(text.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
