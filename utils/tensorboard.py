"""TensorBoard on a log folder: started, found again after a restart, ended only if it is ours."""

from __future__ import annotations

import atexit
import http.client
import json
import logging
import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from .failure import log_tail
from .processes import MARK, ProcessError, Registry, create_time, end, free_port, is_alive, members

logger = logging.getLogger(__name__)

SERVER = Path(__file__).with_name("tensorboard_server.py")
STOP_PATIENCE = 5.0
"""Seconds between SIGTERM and SIGKILL."""

_children: dict[int, subprocess.Popen[bytes]] = {}
"""Servers that this process started: they stay zombies until it asks for them."""


@dataclass(frozen=True)
class Server:
    """A TensorBoard that this package started for this user."""

    logdir: str
    host: str
    port: int
    pid: int
    created: float
    survive: bool
    """Whether it outlives the process that started it."""
    started: float
    """Seconds since 1970."""

    @property
    def url(self) -> str:
        """Where a browser on this machine finds it."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host and host[0] != '[' else host}:{self.port}/"

    @property
    def mark(self) -> str:
        """What its processes carry and the registry knows it by."""
        return f"tensorboard:{self.host}:{self.port}:{self.started}"

    def is_alive(self) -> bool:
        """Whether its process runs; it may not answer yet."""
        child = _children.get(self.pid)
        return child.poll() is None if child else is_alive(self.pid, self.created, self.mark)

    def answers(self) -> bool:
        """Whether it serves, and it is a TensorBoard that does."""
        connection = http.client.HTTPConnection(_address(self.host, connect=True), self.port, timeout=5)
        try:
            connection.request("GET", "/data/environment")
            return "version" in json.loads(connection.getresponse().read())
        except (OSError, ValueError, http.client.HTTPException):
            return False
        finally:
            connection.close()


def start(logdir: Path, *, host: str = "localhost", port: int = 6006, survive: bool = True,
          timeout: float = 60.0) -> Server:  # fmt: skip
    """A TensorBoard on ``logdir`` that answers: one that already runs, or a new one.

    Args:
        host: Address to listen on; ``localhost`` is 127.0.0.1.
        port: The next free one is taken if another program listens there.
        survive: Whether it outlives this process.
        timeout: Seconds in which it has to answer.

    Raises:
        ProcessError: It ended early or does not answer; holds the end of its log.
    """
    found = find(logdir, host)
    if found and found.survive != survive:
        stop(found)
    elif found and _wait_ready(found, timeout):
        return found
    for _ in range(5):  # another program may take the port between our look and TensorBoard's
        server = _spawn(logdir, host, port, survive)
        if _wait_ready(server, timeout):
            return server
        text = log_tail(_log(server))
        stop(server)
        if "already in use" not in text and "identified port" not in text:
            break
    raise ProcessError(f"TensorBoard did not start on {host}:{server.port}. Last lines of its log:\n{text}")


def running() -> list[Server]:
    """The live ones of this user on this machine, oldest first; forgets the dead."""
    registry, live = Registry("tensorboard"), []
    for record in registry.read():
        server = Server(**{key: record[key] for key in Server.__dataclass_fields__})
        if server.is_alive():
            live.append(server)
        else:
            registry.remove(server.mark)
    return live


def find(logdir: Path, host: str | None = None) -> Server | None:
    """The live one on ``logdir``, of ``host`` if that is given."""
    path = str(logdir.resolve())
    return next((s for s in running() if s.logdir == path and host in (None, s.host)), None)


def on_port(port: int) -> Server | None:
    """The live one that this package started on ``port``; never another program's."""
    return next((server for server in running() if server.port == port), None)


def stop(server: Server) -> None:
    """Ends it with all its processes."""
    end(lambda: members(server.mark, server.pid if server.is_alive() else None), STOP_PATIENCE)
    _children.pop(server.pid, None)
    Registry("tensorboard").remove(server.mark)


def _spawn(logdir: Path, host: str, wanted: int, survive: bool) -> Server:
    address = _address(host)
    registry = Registry("tensorboard")
    with registry.locked():
        try:
            port = free_port(address, wanted=wanted, avoid={server.port for server in running()})
        except OSError as error:
            why = f"TensorBoard cannot listen on '{host}' ({error.strerror})"
            raise ProcessError(f"host: {why}; use localhost") from None
        server = Server(str(logdir.resolve()), host, port, 0, 0.0, survive, time.time())
        with _log(server).open("wb") as log:
            child = subprocess.Popen(
                [sys.executable, "-P", str(SERVER), *([] if survive else ["--end-with", str(os.getpid())]),
                 "--logdir", server.logdir, "--host", address, "--port", str(port), "--reload_interval", "5"],
                cwd=registry.folder, env=dict(os.environ) | {MARK: server.mark}, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        _children[child.pid] = child
        server = Server(**asdict(server) | {"pid": child.pid, "created": create_time(child.pid)})
        registry.write(server.mark, asdict(server))
    if not survive:
        atexit.register(_stop_at_exit, server)
    return server


def _stop_at_exit(server: Server) -> None:
    """It notices the end of its parent by itself; this is only sooner."""
    with suppress(ProcessError):
        stop(server)


def _wait_ready(server: Server, timeout: float) -> bool:
    """Waits until it answers; False when it ended or took too long."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if server.answers() and server.is_alive():
            return True
        if not server.is_alive():
            return False
        time.sleep(0.1)
    return False


def _log(server: Server) -> Path:
    return Registry("tensorboard").folder / f"{server.port}.log"


def _address(host: str, *, connect: bool = False) -> str:
    """What to bind; with ``connect``, what to talk to."""
    host = host.strip().strip("[]")
    if connect and host in ("0.0.0.0", "::"):
        return "127.0.0.1" if host == "0.0.0.0" else "::1"
    return "127.0.0.1" if host in ("localhost", "") else host
