"""What a run says of itself and what it is asked to do: status file, control files, signals."""

from __future__ import annotations

import logging
import signal
import time
from types import FrameType, TracebackType
from typing import Any

from .progress import Stopped, Unit, amount, bar
from .run_folder import Command, RunFolder, Status, duration
from .world import World

logger = logging.getLogger(__name__)

SAVE, STOP, SAMPLE, PAUSE = 1, 2, 4, 8
"""What a step may be asked to do after it; what any rank was asked, all do."""
_MEANING: dict[Command, int] = {"save": SAVE, "save_quit": SAVE | STOP, "sample": SAMPLE, "resume": 0}


class Control:
    """One process's side of it; rank 0 alone reads and writes the run folder. A context: within it, signals stop
    the run instead of killing it."""

    def __init__(self, world: World, folder: RunFolder, status: Status) -> None:
        self.status = status
        self._world, self._folder = world, folder
        self._asked = 0
        self._written = 0.0
        self._phase_started = self._phase_said = self._listened = 0.0
        self._phase_first = 0
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

    def progress(self, phase: str, done: int = 0, total: int = 0, unit: Unit = "") -> None:
        """Says how far a phase before training is; ``total`` is 0 where it is not known.

        Raises:
            Stopped: The run was asked to end; the other ranks hear of it in their next call, or in `meet`.
        """
        self.report(phase, done, total, unit)
        if self._world.rank == 0:
            for command in self._folder.take_requests():
                self._asked |= _MEANING[command] & (STOP | SAMPLE)
        if self._world.size > 1 and time.monotonic() - self._listened > 0.5:
            self._listened = time.monotonic()
            if self._asked & STOP:
                self._world.tell("stop")
            elif self._world.was_told("stop"):
                self._asked |= STOP
        if self._asked & STOP:
            raise Stopped

    def report(self, phase: str, done: int = 0, total: int = 0, unit: Unit = "") -> None:
        """Says how far a phase is; while training, the time left stays that until the last step."""
        if self._world.rank != 0:
            return
        now = time.monotonic()
        is_new = phase != self.status.phase
        if is_new:
            self._phase_said = now
        if is_new or unit != self.status.phase_unit:  # before the first bytes come, libraries are loaded
            self._phase_started, self._phase_first = now, done
        past = done - self._phase_first
        left = (now - self._phase_started) / past * (total - done) if past > 0 else None
        eta = self.status.eta if self.status.state == "training" else left
        self.say(is_new, phase=phase, phase_done=done, phase_total=total, phase_unit=unit, eta=eta)
        if is_new or done == total or now - self._phase_said > 10:
            self._phase_said = now
            logger.info("%s", _line(phase, done, total, unit, left))

    def meet(self) -> None:
        """Waits for all ranks.

        Raises:
            Stopped: Any of them was asked to end.
        """
        self._asked |= self._world.union(self._asked & STOP)
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


def _line(phase: str, done: int, total: int, unit: Unit, left: float | None) -> str:
    """``encoding pictures [#####---------------] 50/200, 30 s left``"""
    if not total:
        return phase
    time_left = f", {duration(left)} left" if left else ""
    return f"{phase} {bar(done, total)} {amount(done, total, unit, left)}{time_left}"
