"""How far a phase is: who is told, what it is counted in, and how it reads."""

from __future__ import annotations

from typing import Literal, Protocol

Unit = Literal["", "bytes"]
"""What a phase counts; nothing: pictures, captions, files, as its name says."""
BAR = 20
"""Characters of a progress bar."""


class Stopped(Exception):
    """The run was asked to end before training began."""


class Progress(Protocol):
    """Is told what is being done, how much of it is done and how much there is (0 where that is not known)."""

    def __call__(self, phase: str, done: int, total: int, unit: Unit = "", /) -> None:
        """
        Raises:
            Stopped: What is being done is not wanted any more.
        """


def amount(done: int, total: int, unit: Unit = "", seconds_left: float | None = None) -> str:
    """``50/200``, or ``3.2/23.8 GB``; of bytes, which go by faster or slower from machine to machine, also
    ``3.2/23.8 GB, 1.1 GB/s`` where it is known how long the rest will take."""
    if unit != "bytes":
        return f"{done}/{total}"
    name, size = ("GB", 1e9) if total >= 1e9 else ("MB", 1e6)
    text = f"{done / size:.1f}/{total / size:.1f} {name}"
    if seconds_left:
        text += f", {(total - done) / seconds_left / size:.1f} {name}/s"
    return text


def bar(done: int, total: int) -> str:
    """``[#####---------------]``."""
    filled = done * BAR // total
    return f"[{'#' * filled}{'-' * (BAR - filled)}]"
