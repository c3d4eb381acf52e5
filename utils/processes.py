"""Processes that may outlive the one which started them: noted on disk, known again, ended without a trace.

Every process that we start carries a mark in its environment, which its descendants inherit. So all of
them are found again when those in between are dead, and nobody else's process is ever touched.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from .config import write_whole

logger = logging.getLogger(__name__)

MARK = "DIFFUSION_TRAINER_MARK"
"""Environment variable that says what a process belongs to."""
KILL_TIMEOUT = 15.0
"""Seconds after SIGKILL in which a process has to be gone."""


class ProcessError(RuntimeError):
    """Processes that cannot be started or ended. The text is for the user."""


class Registry:
    """One small JSON file for each live thing of a kind, kept for this user on this machine.

    It lies outside ComfyUI and the run folders, so a restarted ComfyUI, or a second one, finds what runs.
    """

    def __init__(self, kind: str) -> None:
        state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
        self.folder = Path(state) / "diffusion-trainer" / kind

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps every other process of this user out of `locked`; waits until they have left it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("a+b") as file:
            _lock(file.fileno())
            yield  # closing the file lets go of the lock, as does the end of this process

    def read(self) -> list[dict[str, Any]]:
        """The records of this machine, oldest first."""
        records = []
        for path in self.folder.glob("*.json"):
            with suppress(FileNotFoundError):  # removed meanwhile by another process
                record = json.loads(path.read_text("utf-8"))
                if record["machine"] == socket.gethostname():  # a home folder may serve several machines
                    records.append(record)
        return sorted(records, key=lambda record: record["started"])

    def write(self, mark: str, record: dict[str, Any]) -> None:
        """Notes ``record`` (with its ``started`` time) under ``mark``."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self._path(mark), json.dumps(record | {"machine": socket.gethostname()}, indent=1))

    def remove(self, mark: str) -> None:
        """Forgets what is noted under ``mark``."""
        self._path(mark).unlink(missing_ok=True)

    def _path(self, mark: str) -> Path:
        return self.folder / f"{hashlib.sha256(mark.encode()).hexdigest()[:20]}.json"


def _lock(descriptor: int) -> None:
    if os.name == "nt":
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_LOCK, 1)  # type: ignore[attr-defined]
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX)


def create_time(pid: int) -> float:
    """When process ``pid`` began, in seconds since 1970; 0 if it is already gone."""
    try:
        return psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return 0.0


def is_alive(pid: int, created: float, mark: str) -> bool:
    """Whether process ``pid`` is still the one that began at ``created``. A zombie is dead.

    The mark decides where the times differ: WSL's clock jumps after the computer slept.
    """
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return abs(process.create_time() - created) < 1 or process.environ().get(MARK) == mark
    except (psutil.Error, OSError):
        return False


def members(mark: str, leader: int | None = None) -> list[psutil.Process]:
    """All live processes that belong to ``mark``: those that carry it, their descendants and sessions.

    Args:
        leader: A live process that is known to belong, although its environment may not be readable.
    """
    everyone = [process for process in psutil.process_iter() if process.pid != os.getpid() and _is_live(process)]
    found = {process.pid: process for process in everyone if process.pid == leader or _carries(process, mark)}
    for process in list(found.values()):
        with suppress(psutil.Error):
            found |= {child.pid: child for child in process.children(recursive=True) if _is_live(child)}
    if hasattr(os, "getsid"):
        sessions = {_session(pid) for pid in found} - {os.getsid(0), None}
        found |= {process.pid: process for process in everyone if _session(process.pid) in sessions}
    found.pop(os.getpid(), None)
    return list(found.values())


def _is_live(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _carries(process: psutil.Process, mark: str) -> bool:
    with suppress(psutil.Error, OSError):  # another user's process, or one that ends just now
        return process.environ().get(MARK) == mark
    return False


def _session(pid: int) -> int | None:
    with suppress(OSError):
        return os.getsid(pid)
    return None


def end(find: Callable[[], list[psutil.Process]], patience: float) -> None:
    """Ends all processes that ``find`` gives, also those that appear meanwhile.

    Args:
        patience: Seconds between SIGTERM and SIGKILL.

    Raises:
        ProcessError: One of them survives SIGKILL (it hangs inside the kernel).
    """
    _signal(find(), psutil.Process.terminate)
    if not _wait_gone(find, patience):
        deadline = time.monotonic() + KILL_TIMEOUT
        while left := find():
            if time.monotonic() > deadline:
                raise ProcessError(
                    f"processes {', '.join(str(p.pid) for p in left)} cannot be ended, they hang inside "
                    "the system; restart the computer if they hold GPU memory"
                )
            _signal(left, psutil.Process.kill)
            time.sleep(0.05)


def _signal(processes: list[psutil.Process], send: Callable[[psutil.Process], None]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            send(process)


def _wait_gone(find: Callable[[], list[psutil.Process]], patience: float) -> bool:
    deadline = time.monotonic() + patience
    while find():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def free_port(host: str = "127.0.0.1", *, wanted: int = 0, avoid: set[int] | frozenset[int] = frozenset()) -> int:
    """A TCP port on ``host`` that nobody listens on: ``wanted`` or the next free one; any if 0.

    Raises:
        ProcessError: None of the hundred ports from ``wanted`` on is free.
        OSError: ``host`` is not an address of this machine.
    """
    for port in range(wanted, min(wanted + 100, 65536)) if wanted else [0] * 100:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            if os.name != "nt":
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ports of ended servers are free
            try:
                probe.bind((host, port))
            except OSError as error:
                if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                    raise
                continue
            if (found := probe.getsockname()[1]) not in avoid:
                return found
    raise ProcessError(f"no free port on {host} from {wanted} on; give another one")
