"""Runs of the trainer: started detached, watched through their run folder, found again, stopped whole.

A run belongs to no one: it goes on when ComfyUI ends. A registry for this user says what runs, on which
GPUs and with which settings, so that the next ComfyUI finds it.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import psutil

from .failure import cause_of, log_tail, rank_died
from .processes import MARK, ProcessError, Registry, create_time, end, free_port, is_alive, members
from .run_folder import ENDED, RunFolder, Status

logger = logging.getLogger(__name__)

Outcome = Literal["finished", "stopped", "failed", "vanished"]
TRAIN_SCRIPT = Path(__file__).resolve().parent.parent / "train.py"
DEEPSPEED: tuple[str, ...] = ("-u", "-m", "deepspeed.launcher.launch")
"""What the ``deepspeed`` command starts on each machine; on one it would only take time to import torch once more."""
TERM_PATIENCE = 5.0
"""Seconds between SIGTERM and SIGKILL for processes that ignored `save_quit`."""
ORPHAN_GRACE = 60.0
"""Seconds in which the trainers of a killed launcher may save."""

_children: dict[int, subprocess.Popen[bytes]] = {}
"""The launchers that this process started: it alone can learn their exit codes, and has to."""


@dataclass
class Run:
    """A run of the trainer that was started on this machine by this user."""

    path: str
    pid: int
    """The launcher, which leads a session of its own."""
    created: float
    gpus: tuple[int, ...]
    """Indices; on a machine without GPUs they stand for the CPU."""
    identity: str
    """Equal for equal settings."""
    port: int
    """DeepSpeed's master port."""
    started: float
    """Seconds since 1970."""
    log_start: int
    """Bytes of the log that are older than this run: a resumed one goes on in its folder."""

    def __post_init__(self) -> None:
        self.folder = RunFolder(Path(self.path))
        self._outcome: Outcome | None = None
        self._asked_to_stop = False
        self._lost_launcher = False

    @property
    def name(self) -> str:
        """The run folder's name."""
        return self.folder.path.name

    @property
    def exit_code(self) -> int | None:
        """The launcher's, negative for a signal; None while it runs and when another process started it."""
        child = _children.get(self.pid)
        return child.poll() if child else None

    def status(self) -> Status:
        """What the trainer says of itself since this start."""
        status = self.folder.read_status()
        return status if status.updated >= self.started else Status()

    def is_alive(self) -> bool:
        """Whether anything of the run is alive, be it without its launcher."""
        return self._has_launcher() or bool(self._members())

    def poll(self) -> Outcome | None:
        """How the run ended; None while it runs.

        Trainers whose launcher was killed are asked to save and then ended, which may take a minute.
        """
        if self._outcome is None and not self._has_launcher():
            if self._members():
                logger.warning("%s: its launcher is gone; ending what it left", self.path)
                self._lost_launcher = self.status().state not in ENDED
                self._end(ORPHAN_GRACE if self._lost_launcher else 0)
            self._outcome = self._judge()
            self._forget()
        return self._outcome

    def wait(self, timeout: float | None = None) -> Outcome:
        """Waits for the end.

        Raises:
            TimeoutError: It has not ended within ``timeout`` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while (outcome := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(f"{self.path}: still running after {timeout} seconds")
            time.sleep(0.1)
        return outcome

    def stop(self, grace: float = 60.0) -> Outcome:
        """Lets the trainer save and quit; after ``grace`` seconds ends all its processes.

        Raises:
            ProcessError: A process cannot be ended.
        """
        self._asked_to_stop = True
        self._end(grace)
        return self.wait(timeout=30)

    def failure_text(self) -> str:
        """The plain cause, where it can be known, and the last lines of the log."""
        status = self.status()
        if self._lost_launcher:
            status.error = status.error or ("DeepSpeed's launcher was killed; the trainers that it left were asked to "
                                            "save and were ended")  # fmt: skip
        return failure_text(self.folder, status=status, exit_code=self.exit_code, since=self.log_start)

    def __str__(self) -> str:
        status = self.status()
        step = f"step {status.step} of {status.total_steps}" if status.total_steps else status.phase or status.state
        return f"'{self.name}' in {self.folder.path.parent} ({step})"

    def _end(self, grace: float) -> None:
        if self.folder.path.is_dir():
            self.folder.request("save_quit")
        deadline = time.monotonic() + grace
        while time.monotonic() < deadline and self.is_alive():
            time.sleep(0.1)
        end(self._members, TERM_PATIENCE)
        list(self.folder.take_requests())  # what nobody took would stop the run when it is resumed

    def _has_launcher(self) -> bool:
        child = _children.get(self.pid)
        if child is not None:
            return child.poll() is None
        return is_alive(self.pid, self.created, self.path)

    def _members(self) -> list[psutil.Process]:
        return members(self.path, self.pid if self._has_launcher() else None)

    def _judge(self) -> Outcome:
        """The state on disk, unless processes died in a way that contradicts it.

        When one rank is killed the others are terminated and may still save and say "stopped".
        """
        state, code = self.status().state, self.exit_code
        if state == "finished" or state == "failed":
            return state
        if self._asked_to_stop:
            return "stopped"
        died = self._lost_launcher or code == -9 or rank_died(self.folder.log, since=self.log_start)
        if state == "stopped" and not died:
            return "stopped"
        return "failed" if died or code else "vanished"

    def _forget(self) -> None:
        registry = Registry("runs")
        for record in registry.read():  # a later start in the same folder has its own record there
            if record["path"] == self.path and record["pid"] == self.pid:
                registry.remove(self.path)


def running() -> list[Run]:
    """The live runs of this user on this machine, oldest first; forgets the dead."""
    live = []
    for record in Registry("runs").read():
        run = Run(**{key: record[key] for key in Run.__dataclass_fields__} | {"gpus": tuple(record["gpus"])})
        if run.is_alive():
            live.append(run)
        else:
            run._forget()
    return live


def find(identity: str) -> Run | None:
    """The live run with these settings."""
    return next((run for run in running() if run.identity == identity), None)


def start(
    folder: RunFolder,
    *,
    num_gpus: int,
    identity: str,
    resume: str | None = None,
    gpus: Sequence[int] | None = None,
    env: Mapping[str, str] | None = None,
    master_port: int | None = None,
    machines: Sequence[str] = (),
    allow_shared: bool = False,
    script: Path = TRAIN_SCRIPT,
    launcher: Sequence[str] = DEEPSPEED,
) -> Run:
    """Starts the trainer on ``folder``, which holds train.toml and dataset.toml.

    Args:
        num_gpus: Number of processes, one per GPU.
        identity: Equal for equal settings; `find` takes it.
        resume: Name of the run folder whose newest checkpoint to go on from.
        gpus: Which GPUs; left out, the first ones of those visible.
        env: Added to the environment of the trainer.
        master_port: Where the processes meet; left out, at a free port.
        machines: The script's arguments that name several machines, each with ``num_gpus`` GPUs; the script then
            starts itself on each of them (`machines.py`), and DeepSpeed's launcher is not used here.
        allow_shared: Start although another run uses the same GPUs.
        script: What the launcher runs on each GPU.
        launcher: Python's arguments before the script.

    Raises:
        ProcessError: The GPUs or the folder are in use, or the processes cannot be started.
    """
    environment = _environment(env or {})
    selection = None if machines else _visible_gpus(environment) if gpus is None else list(gpus)
    used = tuple((selection or range(num_gpus))[:num_gpus])
    if len(used) < num_gpus:
        raise ProcessError(f"number_of_gpus: {num_gpus} asked for, but only {len(used)} are visible {list(used)}")
    for run in running():
        run.poll()  # ends what a killed launcher left, which would hold its GPUs for ever
    registry = Registry("runs")
    with registry.locked():
        others = running()
        _refuse_conflicts(folder, used, others, allow_shared)
        list(folder.take_requests())
        if machines:  # a port that is free on the first of them is found there
            port, launcher = master_port or 0, ()
            which = [*machines, f"--num_gpus={num_gpus}", *([f"--master_port={port}"] if port else [])]
        else:
            port = master_port or free_port(avoid={run.port for run in others})
            which = [f"--world_info={_world(used)}", f"--master_port={port}"] if launcher else []
        arguments = _arguments(folder, which, resume, script, launcher)
        run = _spawn(folder, arguments, environment, used, identity, port)
        try:
            registry.write(run.path, asdict(run))
        except BaseException:
            end(run._members, 0)
            raise
    logger.info("%s: started as process %d", run.path, run.pid)
    return run


def failure_text(
    folder: RunFolder, *, status: Status | None = None, exit_code: int | None = None, since: int = 0
) -> str:
    """The plain cause of a failure, where it can be known, and the last lines of the log."""
    error = (status or folder.read_status()).error
    cause = cause_of(folder.log, error=error, exit_code=exit_code, since=since)
    lines = log_tail(folder.log, since=since)
    return "\n".join([
        f"The training in {folder.path} failed: {cause or 'it ended without saying why; it may have been killed'}",
        *([f"Last lines of {folder.log.name}:", lines] if lines else ["Its log is empty."]),
    ])  # fmt: skip


def _spawn(
    folder: RunFolder, arguments: list[str], environment: dict[str, str], gpus: tuple[int, ...], identity: str,
    port: int,
) -> Run:  # fmt: skip
    path = str(folder.path.resolve())
    started = time.time()
    try:
        with folder.log.open("ab") as log:
            log_start = log.seek(0, 2)
            child = subprocess.Popen(
                arguments, cwd=path, env=environment | {MARK: path}, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
    except OSError as error:
        raise ProcessError(f"{path}: the training cannot be started: {error}") from error
    _children[child.pid] = child
    return Run(path, child.pid, create_time(child.pid), gpus, identity, port, started, log_start)


def _world(gpus: Sequence[int]) -> str:
    """The GPUs of this machine, as the launcher wants to be told."""
    return base64.urlsafe_b64encode(json.dumps({"localhost": list(gpus)}).encode()).decode()


def _arguments(
    folder: RunFolder, which: Sequence[str], resume: str | None, script: Path, launcher: Sequence[str]
) -> list[str]:
    ours = [*launcher, *which, str(script)] if launcher else [str(script), *which]
    return [
        sys.executable, "-P", *ours,  # -P: a module of the working folder must not stand in for a library
        "--deepspeed", "--config", str(folder.train_toml.resolve()),
        "--run_dir", str(folder.path.resolve()),
        *(["--resume_from_checkpoint", resume] if resume else []),
    ]  # fmt: skip


def _refuse_conflicts(folder: RunFolder, gpus: tuple[int, ...], others: list[Run], allow_shared: bool) -> None:
    for run in others:
        if run.folder.path == folder.path.resolve():
            raise ProcessError(f"the run {run} is still going on; stop it before it is resumed")
        if not allow_shared and (shared := sorted(set(gpus) & set(run.gpus))):
            names = ", ".join(map(str, shared))
            raise ProcessError(f"GPU {names} is used by the run {run}; wait for it or stop it (a file named "
                               f"'save_quit' in its folder does), or switch share_gpu on")  # fmt: skip


def _visible_gpus(environment: dict[str, str]) -> list[int] | None:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves; None when it is unset.

    The launcher sets that variable anew, so we hand the choice on.
    """
    text = environment.get("CUDA_VISIBLE_DEVICES", "").strip()
    if not text or text == "-1":
        return None
    try:
        return [int(index) for index in text.split(",")]
    except ValueError:
        raise ProcessError(f"CUDA_VISIBLE_DEVICES: must be numbers such as 0,2 for training, got '{text}'") from None


def _environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Ours without what concerns ComfyUI alone."""
    environment = dict(os.environ)
    paths = environment.pop("PYTHONPATH", "").split(os.pathsep)
    kept = [path for path in paths if path and not _holds_comfy(Path(path))]
    if kept:
        environment["PYTHONPATH"] = os.pathsep.join(kept)
    return environment | {"PYTHONUNBUFFERED": "1"} | dict(extra)


def _holds_comfy(path: Path) -> bool:
    """Whether ComfyUI's modules (``comfy``, and ``utils`` inside it) would shadow others from here."""
    with suppress(OSError):
        return path.name == "comfy" or (path / "comfy").is_dir()
    return False
