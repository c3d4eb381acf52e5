"""Files that families read and write: a component's path, identity and configuration."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..utils.config import SettingsError


def require_path(value: str | None, name: str, expected: str) -> Path:
    """The path in option ``name``.

    Raises:
        SettingsError: It is empty or nothing is there; ``expected`` says what should be.
    """
    if not value:
        raise SettingsError(f"{name}: required here; give {expected}")
    path = Path(value).expanduser()
    if not path.exists():
        raise SettingsError(f"{name}: '{path}' does not exist; give {expected}")
    return path


def in_comfyui(relative: str) -> Path | None:
    """The path of something that ComfyUI ships, if this package lies in its ``custom_nodes`` folder."""
    package = Path(__file__).absolute().parent.parent
    for folder in (package, package.resolve()):  # a package may be linked into custom_nodes
        if folder.parent.name == "custom_nodes" and (folder.parent.parent / relative).exists():
            return folder.parent.parent / relative
    return None


def fingerprint(path: Path) -> str:
    """Identifies the weights in a file, or in a folder of them, wherever it lies and whenever it was copied.

    Reads sizes, safetensors headers, small JSON files and 64 blocks spread over each weight file, so a
    10 GB encoder costs milliseconds.
    """
    digest = hashlib.blake2b(digest_size=16)
    files = (
        sorted(p for p in path.rglob("*") if p.suffix in (".safetensors", ".bin", ".json")) if path.is_dir() else [path]
    )
    for file in files:
        digest.update(f"{file.relative_to(path) if path.is_dir() else ''}:{file.stat().st_size};".encode())
        with file.open("rb") as stream:
            if file.suffix == ".safetensors":
                header = struct.unpack("<Q", stream.read(8))[0]
                digest.update(stream.read(header))
            for block in range(64):
                stream.seek(block * file.stat().st_size // 64)
                digest.update(stream.read(4096))
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A component's ``config.json``."""
    return json.loads(path.read_text("utf-8"))


def file_metadata(path: Path) -> dict[str, str]:
    """What the header of a safetensors file says beside its tensors; nothing for a folder or another file."""
    if path.suffix != ".safetensors" or path.is_dir():
        return {}
    with path.open("rb") as stream:
        header = stream.read(struct.unpack("<Q", stream.read(8))[0])
    return json.loads(header).get("__metadata__", {})


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a component's configuration, folder and all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False), "utf-8")
