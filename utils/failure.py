"""Why a training failed, in plain words, from what it left behind: its log's end and its exit code."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

TAIL_BYTES = 256 * 1024
_LINE_LENGTH = 500
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]")

_KNOWN: tuple[tuple[str, str], ...] = (
    (r"CUDA out of memory|OutOfMemoryError|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED",
     "the GPU ran out of memory; lower resolutions, micro_batch_size_per_gpu or the adapter's rank, switch "
     "activation_checkpointing on, or store the transformer as float8"),
    (r"No space left on device|Disk quota exceeded",
     "the disk is full; free some space, then resume the run"),
    (r"can't allocate memory|Cannot allocate memory|(?m:^MemoryError)",
     "main memory ran out; close other programs or lower caching_batch_size and map_num_proc"),
    (r"Address already in use|EADDRINUSE",
     "a network port that the training needs was taken in the last moment; start it again"),
    (r"(?:return code = |exitcode: |signal )-?9\b",
     "a process was killed (signal 9); usually the system does that when main memory runs out"),
    (r"return code = -(?:11|6)\b|Segmentation fault",
     "a process crashed inside a library; the log says more, and a driver or package update may help"),
)  # fmt: skip
_NAMED: tuple[tuple[str, Callable[[re.Match[str]], str]], ...] = (
    (r"FileNotFoundError: .*?(['\"].+['\"])", lambda found: f"a file is missing: {found[1]}"),
    (r"PermissionError: .*?(['\"].+['\"])", lambda found: f"a file may not be read or written: {found[1]}"),
    (r"ModuleNotFoundError: No module named '([^']+)'",
     lambda found: f"the Python package '{found[1]}' is not installed; install the package's requirements.txt again"),
    (r"SettingsError: (.+)", lambda found: f"a setting cannot be used: {found[1]}"),
)  # fmt: skip
_ANY_ERROR = re.compile(r"^(?:\[rank\d+\]: ?)?((?:\w+\.)*\w*(?:Error|Exception)\b(?:: .*)?)$", re.MULTILINE)


def log_tail(path: Path, *, since: int = 0, lines: int = 30) -> str:
    """The last ``lines`` lines of a log of any size and content, as a terminal would show them.

    Args:
        since: Bytes at the start that are older than what is asked about.
    """
    return "\n".join(_read_end(path, since).splitlines()[-lines:])


def cause_of(path: Path, *, error: str | None = None, exit_code: int | None = None, since: int = 0) -> str:
    """What went wrong in one sentence; empty when nothing tells.

    Args:
        error: What the training itself said.
        exit_code: Of its launcher; negative for a signal.
    """
    text = _read_end(path, since)
    known = _known_cause(error or "") or _known_cause(text)
    if error:
        return f"{error}\n({known})" if known else error
    if known:
        return known
    if exit_code == -9:
        return "its launcher was killed (signal 9); usually the system does that when main memory runs out"
    found = _ANY_ERROR.findall(text)
    if found:
        return found[-1]
    return f"its launcher ended with code {exit_code}" if exit_code else ""


def rank_died(path: Path, *, since: int = 0) -> bool:
    """Whether DeepSpeed's launcher reports that one of its processes failed or was killed."""
    return re.search(r"exits with return code = -?[1-9]", _read_end(path, since)) is not None


def _known_cause(text: str) -> str:
    """The cause whose trace stands last in ``text``: earlier ones may have been survived."""
    found = [(match.start(), cause) for pattern, cause in _KNOWN for match in re.finditer(pattern, text)]
    found += [(match.start(), words(match)) for pattern, words in _NAMED for match in re.finditer(pattern, text)]
    return max(found)[1] if found else ""


def _read_end(path: Path, since: int) -> str:
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(min(since, size), size - TAIL_BYTES))
            text = file.read(TAIL_BYTES).decode("utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    shown = (line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))  # what a progress bar showed last
    plain = (_ESCAPES.sub("", line).rstrip()[:_LINE_LENGTH] for line in shown)
    return "\n".join(line for line in plain if line)
