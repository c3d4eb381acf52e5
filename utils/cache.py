"""Encoded pictures and captions on disk: made once, shared by all runs, never wrong.

One safetensors file per value, named by what the value depends on: encoder, file content, size, text.
So nothing has to be invalidated: what changed has another name. Files appear whole, carry a checksum,
and any number of processes and trainings may fill one cache at once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..models.base import Family
from .buckets import Bucket
from .dataset import Sample
from .media import UnreadableMedia, read_picture
from .randomness import generator

logger = logging.getLogger(__name__)
T = TypeVar("T")

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done and how much there is; may raise to stop."""


class Store:
    """A folder of tensors by key."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, key: str) -> Path:
        """Where the value of ``key`` is or will be."""
        return self._folder / key[:2] / f"{key}.safetensors"

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of ``keys`` that have no value yet, each once, in order."""
        present = {
            entry.name.partition(".")[0]
            for sub in _folders(self._folder)
            for entry in os.scandir(sub)
            if entry.name.endswith(".safetensors")
        }
        return [key for key in dict.fromkeys(keys) if key not in present]

    def put(self, key: str, tensors: dict[str, torch.Tensor]) -> None:
        """Stores a value in one step.

        Raises:
            OSError: No space is left, or the folder cannot be written.
        """
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        data = save(contiguous, metadata={"checksum": _checksum(contiguous)})
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def get(self, key: str) -> dict[str, torch.Tensor] | None:
        """The value of ``key``; None when there is none or the file is damaged (it is removed then)."""
        path = self.path(key)
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                intact = (file.metadata() or {}).get("checksum") == _checksum(tensors)
        except FileNotFoundError:
            return None
        except SafetensorError:
            intact = False
        if not intact:
            logger.warning("cache: %s is damaged and will be made again", path)
            path.unlink(missing_ok=True)
            return None
        return tensors


class Cache:
    """Media and text of a dataset as one family encodes them."""

    def __init__(self, folder: Path, family: Family, samples: Sequence[Sample]) -> None:
        self._family = family
        self.samples = list(samples)
        self._vae_identity = family.identity("vae")
        self._text_identity = {name: family.identity(name) for name in family.text_encoders}
        root = folder / family.config.type
        self._media = Store(root / "media")
        self._texts = {name: Store(root / f"text-{name}") for name in family.text_encoders}

    def media_key(self, digest: str, bucket: Bucket) -> str:
        """Key of a picture's latents: what is in the file, at which size, through which encoder."""
        return _key("media", self._vae_identity, digest, bucket)

    def text_key(self, encoder: str, caption: str) -> str:
        """Key of a caption's embeddings."""
        return _key("text", self._text_identity[encoder], caption)

    def fill(
        self,
        device: torch.device,
        batch_size: int,
        progress: Progress,
        rank: int = 0,
        world: int = 1,
        barrier: Callable[[], None] = lambda: None,
    ) -> dict[str, str]:
        """Encodes this process's share of what is missing; every process calls it.

        Returns:
            Pictures that could not be decoded, with the reason (this process's share).
        """
        jobs = {self.media_key(s.digest, s.bucket): s for s in self.samples}
        mine = [jobs[key] for key in self._media.missing(jobs)][rank::world]
        failed = self._fill_media(mine, device, batch_size, progress) if mine else {}
        barrier()
        for name, store in self._texts.items():
            captions = {self.text_key(name, s.caption): s.caption for s in self.samples}
            texts = [captions[key] for key in store.missing(captions)][rank::world]
            if texts:
                self._fill_text(name, store, texts, device, batch_size, progress)
            barrier()
        return failed

    def load(self, sample: Sample) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] | None:
        """Media and text of a sample, without batch dimension; None when a file is missing or damaged."""
        media = self._media.get(self.media_key(sample.digest, sample.bucket))
        text: dict[str, torch.Tensor] = {}
        for name, store in self._texts.items():
            value = store.get(self.text_key(name, sample.caption))
            if value is None:
                return None
            text |= value
        return None if media is None else (media, text)

    def _fill_media(
        self, samples: list[Sample], device: torch.device, batch_size: int, progress: Progress
    ) -> dict[str, str]:
        progress("loading the picture encoder", 0, len(samples))
        vae = self._family.load_vae(device)
        by_bucket: dict[Bucket, list[Sample]] = defaultdict(list)
        for sample in samples:
            by_bucket[sample.bucket].append(sample)
        failed: dict[str, str] = {}
        done = 0
        with ThreadPoolExecutor(2) as readers:
            for bucket, members in by_bucket.items():
                for group, pictures in _ahead(readers, _groups(members, batch_size), bucket):
                    good = [(s, p) for s, p in zip(group, pictures, strict=True) if isinstance(p, torch.Tensor)]
                    failed |= {
                        s.path: str(p) for s, p in zip(group, pictures, strict=True) if not isinstance(p, torch.Tensor)
                    }
                    if good:
                        self._encode_media(vae, good, device)
                    done += len(group)
                    progress("encoding pictures", done, len(samples))
        return failed

    @torch.no_grad()
    def _encode_media(
        self, vae: torch.nn.Module, group: list[tuple[Sample, torch.Tensor]], device: torch.device
    ) -> None:
        keys = [self.media_key(sample.digest, sample.bucket) for sample, _ in group]
        pixels = torch.stack([picture for _, picture in group]).unsqueeze(2).to(device)
        encoded = self._family.encode_media(vae, pixels, [generator("posterior", key) for key in keys])
        for row, key in enumerate(keys):
            self._media.put(key, {name: tensor[row] for name, tensor in encoded.items()})

    @torch.no_grad()
    def _fill_text(
        self, name: str, store: Store, texts: list[str], device: torch.device, batch_size: int, progress: Progress
    ) -> None:
        progress(f"loading text encoder {name}", 0, len(texts))
        encoder = self._family.load_text_encoder(name, device)
        for start in range(0, len(texts), batch_size):
            group = texts[start : start + batch_size]
            encoded = self._family.encode_text(name, encoder, group)
            for row, caption in enumerate(group):
                store.put(self.text_key(name, caption), {key: tensor[row] for key, tensor in encoded.items()})
            progress(f"encoding captions ({name})", start + len(group), len(texts))


def _ahead(
    pool: ThreadPoolExecutor, groups: list[list[Sample]], bucket: Bucket
) -> Iterator[tuple[list[Sample], list[torch.Tensor | UnreadableMedia]]]:
    """The pictures of each group, read while the group before is encoded."""

    def read(group: list[Sample]) -> list[torch.Tensor | UnreadableMedia]:
        return [_read(sample.path, bucket) for sample in group]

    waiting = [(group, pool.submit(read, group)) for group in groups[:2]]
    for position in range(len(groups)):
        group, future = waiting.pop(0)
        if position + 2 < len(groups):
            following = groups[position + 2]
            waiting.append((following, pool.submit(read, following)))
        yield group, future.result()


def _read(path: str, bucket: Bucket) -> torch.Tensor | UnreadableMedia:
    try:
        return read_picture(Path(path), bucket)
    except UnreadableMedia as problem:
        return problem


def _groups(items: Sequence[T], size: int) -> list[list[T]]:
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def _folders(root: Path) -> list[os.DirEntry[str]]:
    return [entry for entry in os.scandir(root) if entry.is_dir()] if root.is_dir() else []


def _key(*parts: object) -> str:
    return hashlib.blake2b(json.dumps([str(part) for part in parts]).encode(), digest_size=20).hexdigest()


def _checksum(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
