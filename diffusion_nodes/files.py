"""Where nodes may write: the folder of runs, and the copies of TOML files that a user asks for."""

from __future__ import annotations

import ipaddress
import logging
import os
import stat
import sys
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ..utils.config import SettingsError, write_toml
from ..utils.paths import local_path
from ..utils.user_settings import settings_file, user_settings
from . import comfy

logger = logging.getLogger(__name__)

LONGEST_NAME, LONGEST_PATH = 255, 4095
"""Of Linux' file systems, in bytes."""
EARLIER_PACKAGE = "Diffusion_pipe_in_ComfyUI"
"""Saved workflows name places inside this package's folder, which need not exist here."""


def output_folder(text: str) -> str:
    """The absolute folder of runs that ``output_dir`` means, if nodes may write there.

    Empty is ``training`` in ComfyUI's output folder; relative paths lie in that output folder. So do
    the earlier package's own folder and ``/output`` where there is nothing of that name.

    Raises:
        SettingsError: They may not.
    """
    if not text.strip():
        return str(comfy.runs_directory())
    return str(folder("output_dir", text))


def folder(option: str, text: str) -> Path:
    """The folder that ``text`` means, if nodes may write into it; it need not exist.

    Raises:
        SettingsError: They may not; names ``option``.
    """
    path = _absolute(option, text)
    if path.exists() and not path.is_dir():
        raise SettingsError(f"{option}: '{path}' is not a folder; choose another name")
    return _permitted(option, path)


def write_copy(option: str, text: str, values: Mapping[str, Any]) -> str:
    """Writes ``values`` as TOML to the path ``text`` and returns that; does nothing when it is empty.

    Raises:
        SettingsError: The place is not one for such a file, or cannot be written; names ``option``.
    """
    if not text.strip():
        return ""
    path = copy_path(option, text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_toml(path, values)
    except OSError as error:
        raise SettingsError(
            f"{option}: '{path}' cannot be written ({error.strerror}); leave it empty or give "
            "a file in ComfyUI's output folder"
        ) from None
    return str(path)


def copy_path(option: str, text: str) -> Path:
    """The TOML file that ``text`` means, if a node may write it.

    Raises:
        SettingsError: It may not; names ``option``.
    """
    path = _absolute(option, text)
    if path.suffix.lower() != ".toml":
        raise SettingsError(f"{option}: must be a file name that ends in .toml, got '{text}'")
    if path.is_symlink() or (path.exists() and not stat.S_ISREG(path.stat().st_mode)):
        raise SettingsError(f"{option}: '{path}' is not an ordinary file; choose another name")
    return _permitted(option, path)


def _absolute(option: str, text: str) -> Path:
    """What was typed as an absolute path whose spelling is beyond doubt."""
    path = Path(_adopted(local_path(text.strip()))).expanduser()
    path = path if path.is_absolute() else comfy.output_directory() / path
    if ".." in path.parts:
        raise SettingsError(f"{option}: must not contain '..', got '{text}'")
    if not str(path).isprintable():
        raise SettingsError(f"{option}: must not contain control characters, got {text!r}")
    if len(os.fsencode(path)) > LONGEST_PATH or any(len(os.fsencode(part)) > LONGEST_NAME for part in path.parts):
        raise SettingsError(
            f"{option}: a name may have {LONGEST_NAME} bytes and a path {LONGEST_PATH}; '{text[:40]}...' is too long"
        )
    return path


def _permitted(option: str, path: Path) -> Path:
    """``path``, if it may be written to.

    Inside ComfyUI's output, input, temp, user and datasets folders and those that the user has listed
    always; elsewhere only when nobody but this machine can send prompts, because a prompt could then
    overwrite any file.
    """
    folders = [*_writable_folders(), *(Path(listed).expanduser() for listed in user_settings().writable_folders)]
    if any(path.resolve().is_relative_to(entry.resolve()) for entry in folders):
        return path
    listing = f"list its folder in {settings_file()} as one of writable_folders"
    if any(path.is_relative_to(entry) for entry in folders):
        raise SettingsError(
            f"{option}: '{path}' leads out of ComfyUI's folders by a symbolic link; choose another place or {listing}"
        )
    if not _only_this_machine():
        raise SettingsError(
            f"{option}: '{path}' is outside ComfyUI's output, user, temp, input and datasets folders, where nothing "
            f"may be written while ComfyUI can be reached from other machines; choose a place there or {listing}"
        )
    logger.info("%s: '%s' is outside ComfyUI's folders", option, path)
    return path


def _adopted(text: str) -> str:
    """A path of the earlier package as the same place in ComfyUI's output folder, unless it exists."""
    parts = PurePosixPath(text.replace("\\", "/")).parts
    if EARLIER_PACKAGE in parts:
        cut = parts.index(EARLIER_PACKAGE) + 1
        rest = parts[cut + 1 :] if parts[cut : cut + 1] == ("output",) else parts[cut:]
        if not Path(*parts[:cut]).is_dir():
            return str(comfy.runs_directory().joinpath(*rest))
    if parts[:2] == ("/", "output") and not Path("/output").is_dir():
        return str(comfy.output_directory().joinpath(*parts[2:]))
    return text


def _writable_folders() -> list[Path]:
    return [comfy.output_directory(), comfy.user_directory(), comfy.temp_directory(), comfy.input_directory(),
            *comfy.dataset_directories()]  # fmt: skip


def _only_this_machine() -> bool:
    """Whether ComfyUI listens on loopback alone, or is not there at all."""
    if not comfy.inside():
        return True
    arguments = sys.modules["comfy.cli_args"]
    hosts = str(arguments.args.listen).split(",")
    return all(host == "localhost" or _is_loopback(host) for host in hosts)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip()).is_loopback
    except ValueError:
        return False
