"""A run folder: the whole interface between a training and whoever watches it.

The trainer writes `status.json`, curves, exports and checkpoints here; the watcher leaves control files
and reads. Nothing else passes between them, so either may stop and start again.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from .config import write_whole
from .progress import Unit

State = Literal["starting", "caching", "training", "paused", "finished", "stopped", "failed"]
ENDED: tuple[State, ...] = ("finished", "stopped", "failed")
Command = Literal["save", "save_quit", "sample", "resume"]
COMMANDS: tuple[Command, ...] = ("save", "save_quit", "sample", "resume")

_NAME = re.compile(r"\d{8}_\d{2}-\d{2}-\d{2}(_\d+)?$")


@dataclass
class Status:
    """What a training says of itself. Times in seconds, memory in bytes."""

    state: State = "starting"
    phase: str = ""
    """What is being done, for people: "encoding pictures"."""
    phase_done: int = 0
    phase_total: int = 0
    phase_unit: Unit = ""
    step: int = 0
    total_steps: int = 0
    epoch: int = 0
    epochs: int = 0
    loss: float | None = None
    first_loss: float | None = None
    learning_rate: float | None = None
    seconds_per_step: float | None = None
    eta: float | None = None
    """Seconds until the last step; before the first, until the phase is over."""
    gpu_memory: int | None = None
    """Most memory that torch has held on one GPU."""
    exports: list[str] = field(default_factory=list)
    """Exported adapter or model folders, oldest first."""
    checkpoint: str | None = None
    eval_losses: dict[str, float] = field(default_factory=dict)
    """Newest loss of each eval set."""
    eval_step: int | None = None
    """The step after which they were measured."""
    samples: list[str] = field(default_factory=list)
    """Files of the newest drawing, in the order of the prompts."""
    samples_step: int | None = None
    """The step after which they were drawn."""
    error: str | None = None
    """Why it failed, in one or a few lines."""
    updated: float = 0.0
    """Seconds since 1970 of the last write."""


class RunFolder:
    """Names and files of one run folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.train_toml = path / "train.toml"
        self.dataset_toml = path / "dataset.toml"
        self.log = path / "train.log"
        self.samples = path / "samples"
        self.latest = path / "latest"
        """Text file that names the newest checkpoint folder."""
        self._status = path / "status.json"
        self._pause = path / "pause"
        """While this file is there, training waits."""

    @classmethod
    def create(cls, output_dir: Path) -> RunFolder:
        """A new folder named by UTC time, as users of the earlier trainer know it: ``20260131_12-00-00``.

        Raises:
            OSError: The folder cannot be made.
        """
        output_dir.mkdir(parents=True, exist_ok=True)
        stamp = datetime.now(UTC).strftime("%Y%m%d_%H-%M-%S")
        for suffix in ("", *(f"_{n}" for n in range(2, 1000))):
            try:
                (output_dir / (stamp + suffix)).mkdir()
                return cls(output_dir / (stamp + suffix))
            except FileExistsError:
                continue
        raise FileExistsError(f"{output_dir / stamp}: a thousand runs in one second")

    @classmethod
    def all(cls, output_dir: Path) -> list[RunFolder]:
        """The runs below ``output_dir``, oldest first; empty when the folder is not there."""
        if not output_dir.is_dir():
            return []
        return [cls(entry) for entry in sorted(output_dir.iterdir()) if entry.is_dir() and _NAME.match(entry.name)]

    def read_status(self) -> Status:
        """The last written status; "starting" before the first."""
        try:
            known = {f.name for f in fields(Status)}
            values = json.loads(self._status.read_text("utf-8"))
            return Status(**{key: value for key, value in values.items() if key in known})
        except FileNotFoundError:
            return Status()

    def write_status(self, status: Status) -> None:
        """Replaces the status in one step."""
        status.updated = time.time()
        write_whole(self._status, json.dumps(asdict(status), indent=1))

    def request(self, command: Command) -> None:
        """Asks the training to do something after its current step."""
        (self.path / command).touch()

    def take_requests(self) -> Iterator[Command]:
        """The commands left since the last call; each is given once."""
        for command in COMMANDS:
            try:
                os.unlink(self.path / command)
            except FileNotFoundError:
                continue
            if command == "resume":
                self.unpause()
            yield command

    def pause(self) -> None:
        """Asks the training to wait after its current step, until `unpause`."""
        self._pause.touch()

    def unpause(self) -> None:
        """Lets the training go on; leaving the command "resume" does the same."""
        self._pause.unlink(missing_ok=True)

    def is_paused(self) -> bool:
        """Whether the training is asked to wait."""
        return self._pause.exists()

    def checkpoints(self) -> list[Path]:
        """Complete checkpoint folders, oldest first."""
        found = [entry for entry in self.path.glob("global_step*") if entry.is_dir()]
        return sorted(found, key=lambda entry: int(entry.name.removeprefix("global_step")))


def duration(seconds: float) -> str:
    """A time for people: ``45 s``, ``12 min``, ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
