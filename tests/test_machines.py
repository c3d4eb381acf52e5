"""Trainings over several machines: the list of them, what they must have, and that they begin and end together.

Those marked ``ssh`` go through a real ssh server: ``pytest -m ssh tests/test_machines.py``.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from diffusion_trainer.utils import launch
from diffusion_trainer.utils.config import SettingsError, write_toml
from diffusion_trainer.utils.machines import paths_in, read_hostfile
from diffusion_trainer.utils.run_folder import RunFolder
from machines import Machines
from training import ROOT, Bench, Result, free_port

SCRIPT = Path(__file__).with_name("trainer_script.py")
STARTER = """
import sys; sys.path.insert(0, sys.argv[1]); import conftest
from pathlib import Path
from diffusion_trainer.utils import machines
sys.exit(machines.run(machines.read_hostfile(Path(sys.argv[2])), Path(sys.argv[3]), sys.argv[4:]))
"""


@pytest.fixture(autouse=True)
def own_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machines]:
    made = Machines(tmp_path / "ssh")
    monkeypatch.setenv("PATH", str(made.root / "bin"), prepend=os.pathsep)
    yield made
    made.close()


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "it's $HOME 图")


def behave(folder: RunFolder, **behaviour: object) -> None:
    (folder.path / "behaviour.json").write_text(json.dumps({"steps": 100000, **behaviour}))


def until(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.05)


def trainers(folder: RunFolder) -> list[psutil.Process]:
    """Live processes of the run, on whichever machine."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and str(folder.path) in process.cmdline():
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_what_all_machines_must_have(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    settings = {"model": {"path": str(tmp_path / "model"), "name": "flux"}, "directory": [{"path": "/nowhere/at all"}],
                "prompts": ["/", str(tmp_path)], "steps": 3}  # fmt: skip
    assert paths_in(settings) == [str(tmp_path / "model"), "/", str(tmp_path)]


def test_the_list_of_machines(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# two\nuser@node1 slots=4\n\nnode2  slots=2  # slow\n")
    assert read_hostfile(path) == {"user@node1": 4, "node2": 2}
    assert read_hostfile(path, num_nodes=1) == {"user@node1": 4}
    assert read_hostfile(path, num_gpus=2) == {"user@node1": 2, "node2": 2}


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [("node1", {}, r"line 1: must be 'name slots=GPUs', such as 'node2 slots=8', got 'node1'"),
     ("a slots=1\na slots=2", {}, "line 2: 'a' is there twice"), ("# nothing", {}, "is empty"),
     ("-oProxyCommand=x slots=1", {}, "line 1: must be"), ("a slots=0", {}, "line 1: must be"),
     ("a slots=1", {"num_nodes": 2}, "environment.num_nodes: 2 asked for, but .* has 1"),
     ("a slots=2\nb slots=1", {"num_gpus": 2}, "number_of_gpus: 2 for each machine, but .* gives 'b' 1")],
)  # fmt: skip
def test_a_list_that_cannot_be(tmp_path: Path, text: str, options: dict[str, int], message: str) -> None:
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(SettingsError, match=message):
        read_hostfile(tmp_path / "hosts", **options)


def start(folder: RunFolder, hostfile: Path) -> subprocess.Popen[str]:
    """The script of misbehaviours on all machines, from a process that is the starter alone."""
    command = [
        sys.executable,
        "-c",
        STARTER,
        str(ROOT / "tests"),
        str(hostfile),
        str(SCRIPT),
        "--run_dir",
        str(folder.path),
    ]
    return subprocess.Popen(command, cwd=folder.path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_both_begin_and_end_together(folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a command in ssh's place that runs everything here; the tests below have the real one."""
    (tmp_path / "bin").mkdir()
    stand_in = tmp_path / "bin" / "ssh"
    stand_in.write_text('#!/bin/sh\nfor last; do :; done\nexec sh -c "$last"\n')
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    hostfile = tmp_path / "hosts"
    hostfile.write_text("alpha slots=1\nbeta slots=1\n")
    behave(folder, kill_rank_at={"1": 5})
    said = start(folder, hostfile).communicate(timeout=60)[0]
    assert "[beta]" in said and "exits with return code = -9" in said
    assert "beta ended with code" in said
    assert folder.read_status().state == "stopped", "the trainer of the other machine had the time to save"
    assert not trainers(folder)


@pytest.mark.ssh
def test_the_starter_is_interrupted_or_killed(machines: Machines, folder: RunFolder) -> None:
    machines.serve("beta")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        behave(folder)
        starter = start(folder, machines.hostfile("alpha", "beta"))
        until(lambda: folder.read_status().state == "training")
        assert len([process for process in trainers(folder) if SCRIPT.name in " ".join(process.cmdline())]) >= 4
        starter.send_signal(number)
        starter.wait(30)
        until(lambda: not trainers(folder))
        assert folder.read_status().state == "stopped", number
        (folder.path / "status.json").unlink()


@pytest.mark.ssh
def test_a_connection_breaks(machines: Machines, folder: RunFolder) -> None:
    machines.serve("beta")
    behave(folder)
    starter = start(folder, machines.hostfile("alpha", "beta"))
    until(lambda: folder.read_status().state == "training")
    connections = [child for child in psutil.Process(starter.pid).children() if "beta" in child.cmdline()]
    assert len(connections) == 1
    connections[0].kill()
    said = starter.communicate(timeout=60)[0]
    assert starter.returncode != 0
    assert "beta ended with code" in said
    assert folder.read_status().state == "stopped"
    until(lambda: not trainers(folder))


@pytest.mark.ssh
def test_a_second_interrupt_kills(machines: Machines, folder: RunFolder) -> None:
    machines.serve("beta")
    behave(folder, stubborn=True)
    starter = start(folder, machines.hostfile("alpha", "beta"))
    until(lambda: folder.read_status().state == "training")
    starter.send_signal(signal.SIGINT)
    time.sleep(1)
    assert trainers(folder)
    starter.send_signal(signal.SIGINT)
    starter.wait(20)
    until(lambda: not trainers(folder))
    left = [int(pid) for pid in (folder.path / "grandchildren").read_text().split()]
    assert not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in left[:1])


@pytest.mark.ssh
def test_one_of_two_trainings_on_the_same_machines_ends(machines: Machines, tmp_path: Path) -> None:
    machines.serve("beta")
    folders = [RunFolder.create(tmp_path / "out") for _ in range(2)]
    for folder in folders:
        behave(folder)
    starters = [start(folder, machines.hostfile("alpha", "beta")) for folder in folders]
    until(lambda: all(folder.read_status().state == "training" for folder in folders))
    starters[0].send_signal(signal.SIGINT)
    starters[0].wait(30)
    step = folders[1].read_status().step
    until(lambda: folders[1].read_status().step > step + 20)
    assert folders[1].read_status().state == "training"
    starters[1].send_signal(signal.SIGINT)
    starters[1].wait(30)


@pytest.mark.ssh
def test_variables_reach_the_machines(
    machines: Machines, folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the starter, and those of DeepSpeed's file in the home folder; no visible GPUs of this machine."""
    machines.serve("beta")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".deepspeed_env").write_text("NCCL_SOCKET_IFNAME=eth7\n")
    monkeypatch.setenv("NCCL_DEBUG", "a b'$c")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    behave(folder, steps=3)
    assert start(folder, machines.hostfile("alpha", "beta")).wait(60) == 0
    for rank in range(2):
        seen = json.loads((folder.path / f"environment{rank}.json").read_text())
        assert (seen["NCCL_DEBUG"], seen["NCCL_SOCKET_IFNAME"]) == ("a b'$c", "eth7")
        assert seen["GLOO_SOCKET_IFNAME"] == "lo"
        assert (seen["RANK"], seen["WORLD_SIZE"], seen["LOCAL_RANK"]) == (str(rank), "2", "0")
        assert seen["MASTER_ADDR"] == "127.0.0.1"
        assert seen.get("CUDA_VISIBLE_DEVICES") != "5"
        assert seen["SSH_CONNECTION"].split()[2] == f"127.0.0.{rank + 1}"


def run_by_node(folder: RunFolder, hostfile: Path, resume: str | None = None) -> launch.Run:
    """As the Train node starts it."""
    return launch.start(folder, num_gpus=1, identity="x", machines=[f"--hostfile={hostfile}"], resume=resume)


def from_command_line(machines: Machines, bench: Bench, folder: Path, **changes: Any) -> str:
    """What train.py says that cannot train on alpha and beta."""
    write_toml(folder / "train.toml", bench.settings(**changes))
    write_toml(folder / "dataset.toml", bench.dataset())
    command = [sys.executable, str(ROOT / "train.py"), f"--hostfile={machines.hostfile('alpha', 'beta')}", "--config",
               "train.toml"]  # fmt: skip
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    return done.stdout + done.stderr


@pytest.mark.ssh
def test_machines_that_are_not_ready(machines: Machines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is started, and the run says which machine lacks what."""
    (tmp_path / "python").mkdir()
    (tmp_path / "python" / "env").symlink_to(Path(sys.prefix))
    bench = Bench(tmp_path / "bench")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "flux").symlink_to(bench.root / "model")
    folder = RunFolder.create(bench.root / "out")
    write_toml(folder.train_toml, bench.settings())
    write_toml(folder.dataset_toml, bench.dataset())
    run = run_by_node(folder, machines.hostfile("alpha", "gone"))
    assert run.wait(60) == "failed"
    assert "environment.hostfile: gone cannot be reached by ssh (ssh: connect to host" in run.failure_text()
    assert "'ssh -o BatchMode=yes gone true' must work" in run.failure_text()
    machines.serve("beta", without=[bench.root / "out", tmp_path / "python", tmp_path / "models"])
    said = from_command_line(machines, bench, tmp_path, model={"diffusers_path": str(tmp_path / "models" / "flux")})
    assert f"environment.hostfile: beta has not '{tmp_path / 'models' / 'flux'}', which the settings name" in said
    said = from_command_line(machines, bench, tmp_path)
    assert f"output_dir: {socket.gethostname()} cannot see '{bench.root / 'out'}/" in said
    run = run_by_node(folder, machines.hostfile("alpha", "beta"))
    assert run.wait(60) == "failed"
    assert f"environment.hostfile: beta cannot use the working folder '{folder.path}'" in run.failure_text()
    assert "share under the same path" in run.failure_text()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python" / "env" / "bin" / "python"))
    run = run_by_node(folder, machines.hostfile("alpha", "beta"))
    assert run.wait(60) == "failed"
    assert "beta has not the Python that trains" in run.failure_text()
    assert f"under the same path as here, '{sys.executable}'" in run.failure_text()
    assert "loading the model" not in folder.log.read_text()
    assert not trainers(folder)


@pytest.mark.ssh
@pytest.mark.parametrize("stop", ["control file", "cancel", "kill"])
def test_the_node_s_run_ends_on_all_machines(machines: Machines, tmp_path: Path, stop: str) -> None:
    machines.serve("beta")
    bench = Bench(tmp_path / "bench")
    folder = RunFolder.create(tmp_path / "it's out")
    write_toml(folder.train_toml, bench.settings(epochs=4000))
    write_toml(folder.dataset_toml, bench.dataset())
    run = run_by_node(folder, machines.hostfile("alpha", "beta"))
    until(lambda: run.poll() or run.status().step > 2, 120)
    assert run.status().state == "training", run.failure_text()
    assert len({process.ppid() for process in trainers(folder) if "--local_rank=0" in process.cmdline()}) >= 2
    if stop == "control file":
        folder.request("save_quit")
        assert run.wait(60) == "stopped"
        before = folder.read_status().step
        resumed = run_by_node(folder, machines.hostfile("alpha", "beta"), resume=folder.path.name)
        until(lambda: resumed.poll() or resumed.status().step > before, 120)
        assert resumed.stop(grace=60) == "stopped", resumed.failure_text()
        assert folder.read_status().step > before
    elif stop == "cancel":
        assert run.stop(grace=60) == "stopped"
    else:
        psutil.Process(run.pid).kill()
        assert run.wait(90) == "failed"
        assert "launcher was killed" in run.failure_text()
    status = folder.read_status()
    assert status.state == "stopped" and status.exports and status.checkpoint
    assert not trainers(folder)


@pytest.mark.ssh
@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("starter", ["train.py", "deepspeed"])
def test_the_losses_are_those_of_one_machine(machines: Machines, tmp_path: Path, starter: str, stages: int) -> None:
    machines.serve("beta")
    if starter == "deepspeed" and not shutil.which("pdsh"):
        pytest.skip("needs pdsh (apt-get install pdsh)")
    bench = Bench(tmp_path / "bench")
    plain = bench.train(epochs=2, micro_batch_size_per_gpu=2)
    folder = RunFolder.create(bench.root / "out")
    changes = {"pipeline_stages": 2, "gradient_accumulation_steps": 2} if stages == 2 else {}
    write_toml(folder.train_toml, bench.settings(epochs=2, micro_batch_size_per_gpu=1, **changes))
    write_toml(folder.dataset_toml, bench.dataset())
    hosts = [f"--hostfile={machines.hostfile('alpha', 'beta')}"]
    deepspeed = ["-m", "deepspeed.launcher.runner", *hosts, f"--master_port={free_port()}", "--master_addr=127.0.0.1"]
    command = [sys.executable, *(deepspeed if starter == "deepspeed" else []), str(ROOT / "train.py"), "--deepspeed"]
    command += [
        *(hosts if starter == "train.py" else []),
        "--config",
        str(folder.train_toml),
        "--run_dir",
        str(folder.path),
    ]
    done = subprocess.run(command, cwd=folder.path, capture_output=True, timeout=200, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr).decode("utf-8", "replace")[-3000:]
    assert Result(folder).curve("loss") == pytest.approx(plain.curve("loss"), rel=1e-5)
    assert Result(folder).lora().keys() == plain.lora().keys()
