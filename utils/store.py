"""Tensors on disk by key: each file appears whole, carries a checksum and is known by its name alone."""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

logger = logging.getLogger(__name__)

SUFFIX = ".safetensors"
STALE = 24 * 3600.0
"""Seconds after which an unfinished file of another machine is nobody's."""


class Store:
    """A folder of tensors by key."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, key: str) -> Path:
        """Where the value of ``key`` is or will be."""
        return self._folder / key[:2] / f"{key}{SUFFIX}"

    def sizes(self, sweep: bool = False) -> dict[str, int]:
        """Bytes of each value that there is; an empty file is none.

        Args:
            sweep: Also remove what processes left unfinished that are no more.
        """
        found = {}
        for sub in _folders(self._folder):
            with os.scandir(sub) as entries:
                for entry in entries:
                    name = entry.name
                    try:
                        if name.endswith(SUFFIX):
                            if size := entry.stat().st_size:
                                found[name[: -len(SUFFIX)]] = size
                        elif sweep and name.endswith(".tmp") and _abandoned(entry):
                            os.unlink(entry)
                    except FileNotFoundError:  # removed meanwhile
                        continue
        return found

    def has(self, key: str) -> bool:
        """Whether there is a value of ``key``."""
        try:
            return self.path(key).stat().st_size > 0
        except FileNotFoundError:
            return False

    def put(self, key: str, tensors: dict[str, torch.Tensor]) -> None:
        """Stores a value in one step: tensors of any type and shape.

        Raises:
            OSError: No space is left, or the folder cannot be written.
        """
        # Copies: of views of one tensor, safetensors would take only one.
        own = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
        }
        data = save(own, metadata={"checksum": _checksum(own)})
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        owner = f"{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}"
        temporary = path.with_name(f".{key}-{owner}.tmp")
        try:
            temporary.write_bytes(data)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
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
        except (SafetensorError, OSError) as error:
            logger.warning("cache: %s: %s", path, error)
            intact = False
        if not intact:
            logger.warning("cache: %s is damaged and will be made again", path)
            path.unlink(missing_ok=True)
            return None
        return tensors

    def prune(self, used: set[str], min_age: float) -> tuple[int, int]:
        """Removes the values whose keys are not in ``used`` and that are older than so many seconds.

        Returns:
            How many, and how many bytes.
        """
        count = freed = 0
        for key, size in self.sizes(sweep=True).items():
            if key in used:
                continue
            with suppress(FileNotFoundError):  # removed by another process meanwhile
                if time.time() - self.path(key).stat().st_mtime >= min_age:
                    self.path(key).unlink()
                    count, freed = count + 1, freed + size
        return count, freed


class Uses:
    """Which keys each dataset with each model used last; the rest of a cache is used by nothing."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "uses"

    def note(self, name: str, keys: Iterable[str]) -> None:
        """Keeps what ``name`` uses now, in place of what it used before."""
        self._folder.mkdir(parents=True, exist_ok=True)
        temporary = self._folder / f".{name}-{os.getpid()}.tmp"
        temporary.write_text("\n".join(keys), "utf-8")
        os.replace(temporary, self._folder / name)

    def keys(self, days: float) -> set[str]:
        """The keys in use; what was not used for so many days is forgotten."""
        found: set[str] = set()
        if self._folder.is_dir():
            for path in self._folder.iterdir():
                if time.time() - path.stat().st_mtime > days * 86400:
                    path.unlink()
                else:
                    found.update(path.read_text("utf-8").split())
        return found


def prune(cache: Path, days: float, min_age: float = 6 * 3600) -> tuple[int, int]:
    """Removes from a cache folder what no dataset used in ``days`` days; how many files and bytes.

    What is younger than ``min_age`` seconds stays: a training that fills the cache now has not said yet
    what it uses.
    """
    used, count, size = Uses(cache).keys(days), 0, 0
    for family in _folders(cache):
        for folder in _folders(Path(family)):
            if folder.name == "media" or folder.name.startswith(("text-", "mask")):
                store = Store(Path(folder))
                removed, freed = store.prune(used, min_age)
                count, size = count + removed, size + freed
    return count, size


def _abandoned(entry: os.DirEntry[str]) -> bool:
    owner = entry.name.removesuffix(".tmp").split("-", 1)[-1].rsplit("-", 2)
    if len(owner) == 3 and owner[0] == socket.gethostname():
        pid = int(owner[1])
        return pid == os.getpid() or not psutil.pid_exists(pid)
    return time.time() - entry.stat().st_mtime > STALE


def _folders(root: Path) -> list[os.DirEntry[str]]:
    return [entry for entry in os.scandir(root) if entry.is_dir()] if root.is_dir() else []


def _checksum(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
