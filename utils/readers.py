"""Reading pictures and videos in processes of their own: ahead of the GPU, on all cores.

A file that brings a decoder down takes its process along, not the training. The processes end with whoever
started them, however that ends: their stdin closes then.
"""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from .reader_process import receive

T = TypeVar("T")

SCRIPT = Path(__file__).with_name("reader_process.py")
PACKAGE = __name__.rsplit(".utils.", 1)[0]
MOST = 8
PIPE_BYTES = 2**20


class ReaderDied(OSError):
    """The process that read a file ended while it did, twice."""


def usual_count(num_sharing: int = 1) -> int:
    """Processes for one rank: the cores that this process may use, shared with the ranks beside it."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, min(MOST, cores // num_sharing))


class Readers(Executor):
    """An executor of functions of this package that need no torch, each call in one of ``count`` processes.

    Processes start when they are first needed. An exception in a call is that of its future.
    """

    def __init__(self, count: int) -> None:
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="reader")
        self._own = threading.local()
        self._processes: list[_Process] = []
        self._closed = False

    def submit(self, function: Callable[..., T], /, *arguments: Any, **named: Any) -> Future[T]:
        """The call's future; it takes no named arguments.

        Raises (the future):
            ReaderDied: The process that worked on it ended.
        """
        assert not named
        return self._threads.submit(self._call, pickle.dumps((function, arguments)))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Ends the processes, also those that are at work."""
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in list(self._processes):
            process.end()
        self._threads.shutdown(wait=wait)

    def _call(self, call: bytes) -> Any:
        """What the process of this thread answers; a process that dies gets one successor."""
        for is_last in (False, True):
            process = self._process()
            try:
                good, value = process.ask(call)
            except (EOFError, BrokenPipeError):
                self._own.process = None
                how = process.how_it_ended()
                process.end()
                if is_last or self._closed:
                    raise ReaderDied(
                        f"the process that read it ended {how}; is the file damaged, or memory short?"
                    ) from None
            else:
                if good:
                    return value
                raise value

    def _process(self) -> _Process:
        process: _Process | None = getattr(self._own, "process", None)
        if process is None:
            process = self._own.process = _Process()
            self._processes.append(process)
            if self._closed:
                process.end()
        return process


class _Process:
    """One process and its pipes."""

    def __init__(self) -> None:
        # -P: the script's folder holds modules whose names are not meant for "import config"
        command = [sys.executable, "-P", str(SCRIPT), PACKAGE, str(SCRIPT.parent.parent)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        assert self._process.stdin and self._process.stdout
        self._calls, self._results = self._process.stdin, self._process.stdout
        if sys.platform == "linux":
            import fcntl

            with suppress(OSError):  # beyond what this user may have
                fcntl.fcntl(self._results, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        try:
            receive(self._results)
        except EOFError:
            raise RuntimeError(
                f"a process that reads pictures could not start; it ended {self.how_it_ended()}"
            ) from None

    def ask(self, call: bytes) -> tuple[bool, Any]:
        """Whether the call went well, and its value or exception.

        Raises:
            EOFError, BrokenPipeError: The process has ended.
        """
        self._calls.write(struct.pack("<Q", len(call)))
        self._calls.write(call)
        self._calls.flush()
        return receive(self._results)

    def how_it_ended(self) -> str:
        """For a process that no longer answers."""
        try:
            status = self._process.wait(5)
        except subprocess.TimeoutExpired:
            return "without a word"
        return f"by signal {-status}" if status < 0 else f"with status {status}"

    def end(self) -> None:
        """Ends it, whatever it does."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._calls, self._results):
            with suppress(OSError):
                pipe.close()
