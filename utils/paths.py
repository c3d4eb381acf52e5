"""What people type for a path, turned into a path of this system."""

from __future__ import annotations

import os
import re
from pathlib import Path

_QUOTES = ('""', "''", "“”", "‘’")
_WSL_SHARE = re.compile(r"[\\/]{2,}(?:wsl\.localhost|wsl\$)[\\/]+[^\\/]+(.*)", re.IGNORECASE | re.DOTALL)
_DRIVE = re.compile(r"([A-Za-z]):(?:[\\/](.*))?", re.DOTALL)
_LONG_PATH = re.compile(r"[\\/]{2}\?[\\/](?:UNC(?=[\\/]))?")


def local_path(text: str, *, windows: bool = os.name == "nt", root: str = "/") -> str:
    r"""``text`` as a path of this system; what it names need not exist.

    Surrounding blanks and quotes are dropped and ``~`` is expanded. On native Windows nothing else
    changes. Elsewhere Windows' spellings are taken as seen from inside WSL:

    - ``\\wsl.localhost\Ubuntu\home\x`` and ``\\wsl$\Ubuntu\home\x`` are ``/home/x``; the name of the
      distribution does not count, because only this one can be read.
    - ``C:\a\b`` and ``C:/a/b`` are ``/mnt/c/a/b``.
    - ``Z:\home\x`` is ``/home/x`` if there is no ``/mnt/z`` and there is a ``/home``: a drive that is not
      mounted, whose first folder exists at the root, is a share of this system's own files. C never is.
    - Other backslashes become slashes, except in shares of other machines (``\\server\share``), which
      cannot be reached by any path and stay as they are.

    Args:
        windows: Whether this system is native Windows.
        root: Where to look for ``mnt`` and the first folder.
    """
    text = _unquoted(text)
    if windows:
        return os.path.expanduser(text)
    if long := _LONG_PATH.match(text):
        text = text[long.end() :] if "UNC" not in long.group() else "\\" + text[long.end() :]
    if share := _WSL_SHARE.fullmatch(text):
        return "/" + _slashes(share.group(1)).lstrip("/")
    if text.startswith("\\\\"):
        return text
    if drive := _DRIVE.fullmatch(text):
        return _on_drive(drive.group(1).lower(), _slashes(drive.group(2) or "").lstrip("/"), Path(root))
    return os.path.expanduser(text.replace("\\", "/"))


def _on_drive(letter: str, rest: str, root: Path) -> str:
    first = rest.split("/")[0]
    own_share = letter != "c" and first and not (root / "mnt" / letter).is_dir() and (root / first).is_dir()
    return f"/{rest}" if own_share else f"/mnt/{letter}/{rest}".rstrip("/")


def _unquoted(text: str) -> str:
    text = text.strip()
    while len(text) >= 2 and text[0] + text[-1] in _QUOTES:
        text = text[1:-1].strip()
    return text


def _slashes(text: str) -> str:
    return re.sub(r"[\\/]+", "/", text)
