"""Several machines: a run's processes are started on each by ssh, and end together.

``python train.py --hostfile hosts --config train.toml``. On each machine a guard (`guard.py`) starts DeepSpeed's own
launcher for that machine. DeepSpeed's way to all machines (``deepspeed --hostfile``) works too, but waits for ever for
a machine that cannot be reached, leaves all trainers behind when it is killed, ends every training of this user when it
is interrupted, and takes no paths with apostrophes or dollar signs (0.19.8).
"""

from __future__ import annotations

import base64
import ipaddress
import json
import logging
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from . import guard
from .config import SettingsError

logger = logging.getLogger(__name__)

SSH = ("ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=20", "-o", "ServerAliveInterval=15", "-o",
       "ServerAliveCountMax=8")  # fmt: skip
READY_TIMEOUT = 120.0
"""Seconds in which every machine has to say that it is ready; a first look into a big environment takes some."""
END_GRACE = 60.0
"""Seconds in which the trainers may save when those of another machine have ended."""
_LINE = re.compile(r"([^\s#-]\S*)\s+slots\s*=\s*(\d+)")
_HANDED_ON = re.compile(
    r"(NCCL|GLOO|TORCH|PYTORCH|CUDA|OMP|UCX|WANDB|HF|DS|DIFFUSION_TRAINER)_\w+|PYTHON\w+|TOKENIZERS_PARALLELISM|"
    r"LD_LIBRARY_PATH"
)
"""Variables that the processes of all machines get; over the connection, never as arguments that others can list."""
DEEPSPEED_ENV = Path("~/.deepspeed_env")
"""Where users of DeepSpeed keep further ones, ``NAME=value`` a line."""


def read_hostfile(path: Path, num_nodes: int | None = None, num_gpus: int | None = None) -> dict[str, int]:
    """DeepSpeed's list of machines, ``name slots=GPUs`` a line: names, as ssh takes them, to numbers of GPUs.

    Args:
        num_nodes: How many machines are used, from the first on; left out, all.
        num_gpus: How many GPUs of each; left out, those that the file gives it.

    Raises:
        SettingsError: The file cannot be used.
    """
    where, hosts = f"environment.hostfile: '{path}'", dict[str, int]()
    try:
        lines = path.expanduser().read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise SettingsError(f"{where} cannot be read: {error}") from None
    for number, line in enumerate(lines, 1):
        if not (text := line.partition("#")[0].strip()):
            continue
        found = _LINE.fullmatch(text)
        if not found or not int(found[2]):
            raise SettingsError(
                f"{where} line {number}: must be 'name slots=GPUs', such as 'node2 slots=8', got '{text}'"
            )
        if found[1] in hosts:
            raise SettingsError(f"{where} line {number}: '{found[1]}' is there twice; give its GPUs in one line")
        hosts[found[1]] = int(found[2])
    if not hosts:
        raise SettingsError(f"{where} is empty; write 'name slots=GPUs' for each machine")
    if num_nodes and num_nodes > len(hosts):
        raise SettingsError(f"environment.num_nodes: {num_nodes} asked for, but '{path}' has {len(hosts)}")
    used = dict(list(hosts.items())[:num_nodes])
    for name, slots in used.items():
        if num_gpus and num_gpus > slots:
            raise SettingsError(f"number_of_gpus: {num_gpus} for each machine, but '{path}' gives '{name}' {slots}")
    return {name: num_gpus or slots for name, slots in used.items()}


def paths_in(settings: Any) -> list[str]:
    """The files and folders of this machine that tables and lists of settings name in full, such as models."""
    if isinstance(settings, Mapping):
        settings = list(settings.values())
    if isinstance(settings, list):
        return [path for value in settings for path in paths_in(value)]
    return [settings] if isinstance(settings, str) and settings.startswith("/") and os.path.exists(settings) else []


def run(
    hosts: Mapping[str, int], script: Path, arguments: list[str], *, folders: Mapping[str, str] | None = None,
    paths: Sequence[str] = (), master_addr: str | None = None, master_port: int | None = None,
) -> int:  # fmt: skip
    """Runs ``script`` on all GPUs of ``hosts``; SIGINT and SIGTERM let it save and end, the second kills.

    Args:
        folders: What it is called to its path, of folders that all machines must have besides the working folder.
        paths: Further files and folders that all must have.
        master_addr: Where the processes meet; left out, the first machine's address as the others see it.
        master_port: Left out, one that is free there.

    Returns:
        The exit code: that of the first that failed.

    Raises:
        SettingsError: Machines are not ready, and why; nothing was started on any.
    """
    task = {
        "script": str(script), "arguments": arguments, "environment": _environment(), "versions": guard.versions(),
        "folders": {"working folder": os.getcwd(), **(folders or {})}, "paths": list(paths),
    }  # fmt: skip
    fleet = _Fleet(hosts)
    try:
        fleet.open(task)
        first = fleet.machines[0]
        world = {name: list(range(slots)) for name, slots in hosts.items()}
        meeting = {
            "world": base64.urlsafe_b64encode(json.dumps(world).encode()).decode(),
            "master_addr": master_addr or fleet.address(first), "master_port": master_port or first.about["port"],
        }  # fmt: skip
        for rank, machine in enumerate(fleet.machines):
            machine.say({**meeting, "rank": rank, "address": fleet.address(machine)})
        return fleet.wait()
    finally:
        fleet.close()


class _Fleet:
    """The connections to all machines."""

    def __init__(self, hosts: Mapping[str, int]) -> None:
        self._ended: queue.Queue[_Machine] = queue.Queue()
        self._was_asked = False
        # ssh leaves signals alone that are ignored when it starts: Ctrl-C in a terminal goes to all of its processes.
        self._handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
        self.machines = [_Machine(name, self._ended) for name in hosts]
        for number in self._handlers:
            signal.signal(number, self._on_signal)

    def open(self, task: Mapping[str, Any]) -> None:
        """Waits until all are ready for ``task``.

        Raises:
            SettingsError: Some are not.
        """
        for machine in self.machines:
            machine.say(task)
        deadline = time.monotonic() + READY_TIMEOUT
        for machine in self.machines:
            machine.answered.wait(max(0.0, deadline - time.monotonic()))
        if problems := [problem for machine in self.machines if (problem := machine.problem())]:
            raise SettingsError("\n".join(f"environment.hostfile: {problem}" for problem in problems))
        if self._was_asked:
            raise SettingsError("interrupted before anything was started")

    def address(self, machine: _Machine) -> str:
        """By which the others reach ``machine``. One that is reached through the loopback is this one, and the others
        know by which address it came to them."""
        if _is_loopback(machine.about["address"]):
            for other in self.machines:
                if not _is_loopback(other.about["address"]):
                    return str(other.about["starter"])
        return str(machine.about["address"])

    def wait(self) -> int:
        """Waits for the end of all; when one fails, the others are asked to save and end."""
        code, deadline = 0, float("inf")
        for _ in self.machines:
            machine = self._next_end(deadline)
            if machine.process.returncode and not code:
                code, deadline = machine.process.returncode, time.monotonic() + END_GRACE
                if not self._was_asked:
                    logger.error("%s ended with code %d; ending the other machines", machine.name, code)
                    self._ask()
        return code

    def close(self) -> None:
        """Ends all connections, and with them what is left on the machines."""
        for machine in self.machines:
            machine.close()
        for machine in self.machines:
            machine.process.wait()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _next_end(self, deadline: float) -> _Machine:
        while True:
            try:
                return self._ended.get(timeout=0.2)  # short, because a signal is handled between two waits
            except queue.Empty:
                if time.monotonic() > deadline:
                    for machine in self.machines:
                        machine.close()

    def _ask(self) -> None:
        for machine in self.machines:
            machine.say("stop")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._was_asked:
            for machine in self.machines:
                machine.close()
        self._was_asked = True
        self._ask()


class _Machine:
    """The connection to one machine's guard."""

    def __init__(self, name: str, ended: queue.Queue[_Machine]) -> None:
        self.name, self.about, self.said = name, dict[str, Any](), list[str]()
        self.answered = threading.Event()
        remote = shlex.join([sys.executable, "-P", "-u", guard.__file__])
        self.process = subprocess.Popen(
            [*SSH, name, f"exec {remote}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self._ended = ended
        threading.Thread(target=self._read, daemon=True).start()

    def say(self, words: Mapping[str, Any] | str) -> None:
        """One line to the guard, if it still listens."""
        assert self.process.stdin
        with suppress(BrokenPipeError, ValueError):
            self.process.stdin.write((words if isinstance(words, str) else json.dumps(words)).encode() + b"\n")
            self.process.stdin.flush()

    def close(self) -> None:
        """Ends the connection and with it what runs there."""
        assert self.process.stdin
        with suppress(BrokenPipeError):
            self.process.stdin.close()

    def _read(self) -> None:
        assert self.process.stdout
        for raw in self.process.stdout:
            line = raw.decode("utf-8", "replace").rstrip("\n")
            if line.startswith(guard.ANSWER) and not self.answered.is_set():
                self.about = json.loads(line.removeprefix(guard.ANSWER))
                self.answered.set()
            else:
                self.said = [*self.said[-20:], line]
                print(f"[{self.name}] {line}", flush=True)
        self.process.wait()
        self.answered.set()
        self._ended.put(self)

    def problem(self) -> str:
        """Why it is not ready; empty if it is."""
        if self.about:
            return f"{self.name} {self.about['problem']}" if self.about.get("problem") else ""
        if self.process.poll() is None:
            return f"{self.name} does not answer within {READY_TIMEOUT:.0f} s; is it busy, or its file system?"
        said = " ".join(line.strip() for line in self.said if line.strip())[-500:] or f"code {self.process.returncode}"
        if self.process.returncode == 255:
            return (f"{self.name} cannot be reached by ssh ({said}); 'ssh -o BatchMode=yes {self.name} true' must work "
                    "without a password and without a question")  # fmt: skip
        same = f"install it there, too, under the same path as here, '{sys.executable}'; a symbolic link will do"
        if self.process.returncode in (126, 127):
            return f"{self.name} has not the Python that trains ({said}); {same}"
        return f"{self.name} cannot run the package ({said}); {same}, and the package as well"


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def _environment() -> dict[str, str]:
    found = {name: value for name, value in os.environ.items() if _HANDED_ON.fullmatch(name)}
    found.pop("CUDA_VISIBLE_DEVICES", None)  # the launcher numbers each machine's GPUs by itself
    path = DEEPSPEED_ENV.expanduser()
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    pairs = (line.partition("=") for line in lines if "=" in line and not line.startswith("#"))
    return found | {name.strip(): value.strip().strip("\"'") for name, _, value in pairs}
