"""What a user has set for this machine: further folders to write to, and folders with own model families.

The file is ``~/.config/diffusion-trainer/settings.toml`` (below ``$XDG_CONFIG_HOME`` where that is set): no node
may write there, because what it allows is what nodes may do.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from .config import SettingsError, Table, option, read_toml, validate


class UserSettings(Table):
    """The settings file of a user on a machine."""

    writable_folders: list[str] = option(
        [], "Folders besides ComfyUI's own in which nodes may make run folders, caches and copies of TOML files."
    )
    family_folders: list[str] = option([], "Folders with model families of your own, one Python file each.")


def settings_file() -> Path:
    """Where the file is, or would be."""
    home = os.environ.get("XDG_CONFIG_HOME", "").strip()
    return (Path(home) if home else Path.home() / ".config") / "diffusion-trainer" / "settings.toml"


def user_settings() -> UserSettings:
    """What the file says; defaults where there is none.

    Raises:
        SettingsError: The file cannot be used.
    """
    path = settings_file()
    return _read(path, path.stat().st_mtime_ns) if path.is_file() else UserSettings()


@cache
def _read(path: Path, _changed: int) -> UserSettings:
    try:
        return validate(UserSettings, read_toml(path))
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from None
