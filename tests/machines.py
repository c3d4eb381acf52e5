"""Machines to train on that are all this one: an ssh server of the tests' own on several loopback addresses."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from training import free_port

ADDRESSES = {"alpha": "127.0.0.1", "beta": "127.0.0.2", "gone": "127.0.0.3"}
"""Names of machines; nobody listens at the last."""
SSHD = shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin")


class Machines:
    """An ssh server for alpha and beta, and an ``ssh`` and ``pdsh`` that know them by these names alone."""

    def __init__(self, root: Path) -> None:
        if not (SSHD and shutil.which("ssh")):
            pytest.skip("needs ssh and sshd (apt-get install openssh-server)")
        self.root, self.port = root, free_port()
        self._servers: list[subprocess.Popen[bytes]] = []
        (root / "bin").mkdir(parents=True)
        for name in ("key", "hostkey"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", root / name], check=True)
        hosts = [f"Host {name}\n  HostName {address}" for name, address in ADDRESSES.items()]
        options = [f"IdentityFile {root}/key", f"UserKnownHostsFile {root}/known_hosts", f"Port {self.port}",
                   "IdentitiesOnly yes", "StrictHostKeyChecking accept-new", "LogLevel ERROR"]  # fmt: skip
        (root / "config").write_text("\n".join([*hosts, "Host *", *(f"  {option}" for option in options)]) + "\n")
        ssh = root / "bin" / "ssh"
        ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F "{root}/config" "$@"\n')
        ssh.chmod(0o755)
        self.serve("alpha")

    def serve(self, name: str, without: Sequence[Path] = ()) -> None:
        """Starts the server of a machine, on which the folders ``without`` are empty; needs root for such."""
        settings = self.root / f"sshd_{name}"
        settings.write_text(
            f"Port {self.port}\nListenAddress {ADDRESSES[name]}\nHostKey {self.root}/hostkey\nPidFile none\n"
            f"AuthorizedKeysFile {self.root}/key.pub\nUsePAM no\nStrictModes no\nPasswordAuthentication no\n"
        )
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        command = [str(SSHD), "-D", "-f", str(settings)]
        if without:
            if os.getuid() or subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode:
                pytest.skip("needs root and unshare, for a machine with another file system")
            mounts = "".join(f"mount -t tmpfs none '{folder}' && " for folder in without)
            command = ["unshare", "-m", "sh", "-c", f'{mounts}exec "$@"', "sh", *command]
        self._servers.append(subprocess.Popen(command, stderr=subprocess.DEVNULL))
        until_open(ADDRESSES[name], self.port)

    def hostfile(self, *names: str, slots: int = 1) -> Path:
        """A list of machines."""
        path = self.root / f"hosts_{'_'.join(names)}"
        path.write_text("# the machines\n" + "".join(f"{name} slots={slots}\n" for name in names))
        return path

    def close(self) -> None:
        """Ends the servers."""
        for server in self._servers:
            server.terminate()
            server.wait()


def until_open(address: str, port: int) -> None:
    """Waits until somebody listens there."""
    for _ in range(200):
        with socket.socket() as probe:
            if probe.connect_ex((address, port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError(f"nobody listens on {address}:{port}")
