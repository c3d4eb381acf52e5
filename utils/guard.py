"""What keeps a run's processes on one of several machines: started there by ssh, it ends them with the connection.

A script of its own, because it must answer on machines on which something is missing. It speaks with
`machines.py`: one line of JSON each says what is to be run, whether that can be done here, and that it shall begin.
After that a line "stop" asks the trainers to save and end; when the connection closes, all is ended.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

ANSWER = "diffusion-trainer-guard "
"""Begins the line of the answer, because a login shell may write lines of its own."""
ORPHAN_GRACE = 60.0
"""Seconds in which trainers may save whose starter is gone."""
COMPARED = ("torch", "deepspeed")
"""Packages that must be the same everywhere."""


def main() -> int:
    """Serves one run; returns the exit code of its processes here."""
    task = json.loads(sys.stdin.readline() or "{}")
    problem = _problem(task)
    print(ANSWER + json.dumps({"problem": problem} if problem else _about()), flush=True)
    line = sys.stdin.readline()
    if problem or line.strip() in ("", "stop"):  # another machine was not ready
        return 2 if problem else 0
    launcher = _start(task, json.loads(line))
    keeper = _Keeper(launcher)
    signal.signal(signal.SIGTERM, lambda *_: keeper.stop())
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    threading.Thread(target=keeper.listen, daemon=True).start()
    code = launcher.wait()
    keeper.kill()  # what outlived its launcher
    return code if code >= 0 else 128 - code


def _problem(task: dict[str, Any]) -> str:
    """Why the run cannot be here, and what to do; empty if it can."""
    if not Path(task["script"]).is_file():
        return f"has no '{task['script']}'; install the package there, too, under the same path"
    for what, folder in task["folders"].items():
        try:
            os.listdir(folder)
        except OSError as error:
            return (f"cannot use the {what} '{folder}' ({error.strerror}); it must lie on a file system that all "
                    "machines share under the same path")  # fmt: skip
    for path in task["paths"]:
        if not os.path.exists(path):
            return f"has not '{path}', which the settings name; models and pictures must be there under the same path"
    here = versions()
    for name, version in task["versions"].items():
        if here[name] != version:
            return (f"has {name} {here[name] or 'not at all'}, but where the training was started it is {version}; "
                    f"install the same there: {sys.executable} -m pip install {name}=={version}")  # fmt: skip
    return ""


def versions() -> dict[str, str]:
    """What must be equal on all machines."""
    found = {}
    for name in COMPARED:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return {name: found.get(name, "") for name in COMPARED}


def _about() -> dict[str, Any]:
    """The addresses of both ends of the connection, and a free port."""
    starter, _, own, _ = os.environ.get("SSH_CONNECTION", "127.0.0.1 0 127.0.0.1 0").split()
    with socket.socket(socket.AF_INET6 if ":" in own else socket.AF_INET) as probe:
        probe.bind((own, 0))
        return {"address": own, "starter": starter, "port": probe.getsockname()[1]}


def _start(task: dict[str, Any], go: dict[str, Any]) -> subprocess.Popen[bytes]:
    environment = os.environ | task["environment"]
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
    if interface := _interface(go["address"]):  # else gloo takes that of the host name, often 127.0.1.1
        environment.setdefault("GLOO_SOCKET_IFNAME", interface)
    command = [
        sys.executable, "-P", "-u", "-m", "deepspeed.launcher.launch", f"--world_info={go['world']}",
        f"--node_rank={go['rank']}", f"--master_addr={go['master_addr']}", f"--master_port={go['master_port']}",
        task["script"], *task["arguments"],
    ]  # fmt: skip
    return subprocess.Popen(
        command,
        cwd=task["folders"]["working folder"],
        env=environment,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )


def _interface(address: str) -> str | None:
    """The network interface with this address; all of 127.0.0.0/8 is the loopback's."""
    for name, addresses in psutil.net_if_addrs().items():
        known = {entry.address.partition("%")[0] for entry in addresses}
        if address in known or (address.startswith("127.") and "127.0.0.1" in known):
            return name
    return None


class _Keeper:
    """Ends the processes of the run here: first asks, then kills."""

    def __init__(self, launcher: subprocess.Popen[bytes]) -> None:
        self._launcher, self._was_asked = launcher, False

    def listen(self) -> None:
        """Follows what the starter says, to the end of the connection."""
        for line in sys.stdin:
            if line.strip() == "stop":
                self.stop()
        if not self._was_asked:
            self.stop()
            deadline = time.monotonic() + ORPHAN_GRACE
            while time.monotonic() < deadline and self._launcher.poll() is None:
                time.sleep(0.2)
        self.kill()

    def stop(self) -> None:
        """Asks the trainers to save and end. Their launcher would give them half a minute, and then kill."""
        self._was_asked = True
        with suppress(psutil.Error):
            launcher = psutil.Process(self._launcher.pid)
            for process in launcher.children() or [launcher]:
                with suppress(psutil.Error):
                    process.terminate()

    def kill(self) -> None:
        """Ends what is left, whatever it does."""
        while left := self._family():
            for process in left:
                with suppress(psutil.Error):
                    process.kill()
            time.sleep(0.05)

    def _family(self) -> list[psutil.Process]:
        """The launcher and what it started, also where those in between are dead."""
        found: dict[int, psutil.Process] = {}
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if process.status() != psutil.STATUS_ZOMBIE and os.getsid(process.pid) == self._launcher.pid:
                    found |= {process.pid: process} | {p.pid: p for p in process.children(recursive=True)}
        return [process for process in found.values() if process.is_running() and process.pid != os.getpid()
                and process.status() != psutil.STATUS_ZOMBIE]  # fmt: skip


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # the thread that listens would be waited for
