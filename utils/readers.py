"""Reading pictures and videos in processes of their own: ahead of the GPU, on all cores.

A file that brings a decoder down takes its process along, not the training, and so does one that a decoder never
comes back from. The processes end with whoever started them, however that ends: their stdin closes then.
"""

from __future__ import annotations

import logging
import os
import pickle
import select
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from .reader_process import receive

logger = logging.getLogger(__name__)

T = TypeVar("T")

SCRIPT = Path(__file__).with_name("reader_process.py")
PACKAGE = __name__.rsplit(".utils.", 1)[0]
MOST = 8
PIPE_BYTES = 2**20
LONG = 60.0
"""Seconds after which a call is said to take long."""
LONGEST = 600.0
"""Seconds after which it is given up: nothing that can be trained takes as long, but a disk that is away does."""


class ReaderDied(OSError):
    """The process that read a file ended while it did, twice, or did not end."""


def usual_count(num_sharing: int = 1) -> int:
    """Processes for one rank: the cores that this process may use, shared with the ranks beside it."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, min(MOST, cores // num_sharing))


class Readers(Executor):
    """An executor of functions of this package that need no torch, each call in one of ``count`` processes.

    Processes start when they are first needed. An exception in a call is that of its future.
    """

    def __init__(self, count: int, longest: float = LONGEST) -> None:
        """``longest``: seconds that a call may take."""
        self._longest = longest
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="reader")
        self._own = threading.local()
        self._processes: list[_Process] = []
        self._closed = False

    def submit(self, function: Callable[..., T], /, *arguments: Any, **named: Any) -> Future[T]:
        """The call's future; it takes no named arguments.

        Raises (the future):
            ReaderDied: The process that worked on it ended, or took too long.
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
                good, value = process.ask(call, self._longest)
            except TimeoutError:
                self._own.process = None
                process.end()
                raise ReaderDied(
                    f"reading it took more than {self._longest:.0f} s; is the file damaged, or its disk away?"
                ) from None
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
        self._ended = False
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

    def ask(self, call: bytes, longest: float) -> tuple[bool, Any]:
        """Whether the call went well, and its value or exception.

        Raises:
            EOFError, BrokenPipeError: The process has ended.
            TimeoutError: It has not answered within ``longest`` seconds.
        """
        self._calls.write(struct.pack("<Q", len(call)))
        self._calls.write(call)
        self._calls.flush()
        try:
            if os.name == "posix":
                self._wait(call, longest)
            return receive(self._results)
        except ValueError:  # of a pipe that `end` has closed meanwhile
            if self._ended:
                raise EOFError from None
            raise

    def _wait(self, call: bytes, longest: float) -> None:
        """Until an answer is there or the process has ended, even one that a dead disk keeps from being killed."""
        began, is_long = time.monotonic(), False
        while not self._ended and not select.select([self._results], [], [], 1.0)[0]:
            seconds = time.monotonic() - began
            if seconds > longest:
                raise TimeoutError
            if seconds > LONG and not is_long:
                is_long = True
                logger.warning("reading takes long, and is given up after %.0f s: %s", longest, _subject(call))

    def how_it_ended(self) -> str:
        """For a process that no longer answers."""
        try:
            status = self._process.wait(5)
        except subprocess.TimeoutExpired:
            return "without a word"
        return f"by signal {-status}" if status < 0 else f"with status {status}"

    def end(self) -> None:
        """Ends it, whatever it does; one that waits for a dead disk ends when that is back."""
        self._ended = True
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        for pipe in (self._calls, self._results):
            with suppress(OSError):
                pipe.close()


def _subject(call: bytes) -> str:
    """What a call is about: its first argument, or the first few of them."""
    _, arguments = pickle.loads(call)
    first = arguments[0] if arguments else ""
    return ", ".join(map(str, first)) if isinstance(first, list) else str(first)
