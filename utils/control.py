"""What a run says of itself and what it is asked to do: status file, control files, signals."""

from __future__ import annotations

import logging
import signal
import time
from types import FrameType, TracebackType
from typing import Any

from .run_folder import Command, RunFolder, Status
from .world import World

logger = logging.getLogger(__name__)

SAVE, STOP, SAMPLE, PAUSE = 1, 2, 4, 8
"""What a step may be asked to do after it; what any rank was asked, all do."""
_MEANING: dict[Command, int] = {"save": SAVE, "save_quit": SAVE | STOP, "sample": SAMPLE, "resume": 0}


class Stopped(Exception):
    """The run was asked to end before training began."""


class Control:
    """One process's side of it; rank 0 alone reads and writes the run folder. A context: within it, signals stop
    the run instead of killing it."""

    def __init__(self, world: World, folder: RunFolder, status: Status) -> None:
        self.status = status
        self._world, self._folder = world, folder
        self._asked = 0
        self._written = 0.0
        self._phase_started = self._phase_said = 0.0
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Control:
        if self._world.rank == 0:
            self._folder.unpause()  # a pause of the run that is resumed is over
        self._handlers = {n: signal.signal(n, self._on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def say(self, now: bool = False, **changes: Any) -> None:
        """Updates the status; writes it at once when the state changes or ``now``, else twice a second at most."""
        now = now or changes.get("state", self.status.state) != self.status.state
        for name, value in changes.items():
            setattr(self.status, name, value)
        if self._world.rank == 0 and (now or time.monotonic() - self._written > 0.5):
            self._written = time.monotonic()
            self._folder.write_status(self.status)

    def fail(self, reason: str) -> None:
        """The last word of a failing run; a full disk must not hide why it failed."""
        try:
            self.say(state="failed", error=reason)
        except OSError as error:
            logger.error("the status could not be written: %s", error)

    def progress(self, phase: str, done: int, total: int) -> None:
        """Says how far a phase before training is.

        Raises:
            Stopped: The run was asked to end.
        """
        if self._world.rank == 0:
            for command in self._folder.take_requests():
                self._asked |= _MEANING[command] & (STOP | SAMPLE)
            now = time.monotonic()
            if phase != self.status.phase:
                self._phase_started = self._phase_said = now
            left = (now - self._phase_started) / done * (total - done) if done else None
            self.say(phase=phase, phase_done=done, phase_total=total, eta=left)
            if done in (0, total) or now - self._phase_said > 10:
                self._phase_said = now
                logger.info("%s: %d of %d%s", phase, done, total, f", {left:.0f} s left" if left else "")
        if self._asked & STOP:
            raise Stopped

    def agree(self, save_too: bool = False) -> int:
        """What all ranks do after this step, as asked of any of them; ``save_too``: this one asks for a save."""
        asked, self._asked = self._asked | (SAVE if save_too else 0), self._asked & STOP
        if self._world.rank == 0:
            for command in self._folder.take_requests():
                asked |= _MEANING[command]
            asked |= PAUSE if self._folder.is_paused() else 0
        return self._world.union(asked)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._asked & STOP and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked |= STOP
