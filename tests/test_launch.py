"""Runs as real processes: started, watched, stopped, killed, found again; none is left over."""

import base64
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from diffusion_trainer.utils import failure, launch
from diffusion_trainer.utils.processes import MARK, ProcessError
from diffusion_trainer.utils.run_folder import RunFolder, Status

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = Path(__file__).with_name("trainer_script.py")
Start = Callable[..., launch.Run]


@pytest.fixture(autouse=True)
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A registry of this test's own; whatever the test leaves running is ended."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    yield
    for process in marked(tmp_path):
        process.kill()


def marked(below: Path) -> list[psutil.Process]:
    """Live processes of runs below a folder."""
    found = []
    for process in psutil.process_iter():
        try:
            mine = process.environ().get(MARK, "").startswith(str(below))
            if mine and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Starts the script with a behaviour, without DeepSpeed's launcher unless it is asked for."""

    def call(behaviour: dict, *, folder: RunFolder | None = None, identity: str = "a", **options: object) -> launch.Run:
        folder = folder or RunFolder.create(tmp_path / "it's 图 output")
        (folder.path / "behaviour.json").write_text(json.dumps({"steps": 5, **behaviour}))
        options = {"num_gpus": 1, "script": SCRIPT, "launcher": ()} | options
        return launch.start(folder, identity=identity, **options)  # type: ignore[arg-type]

    return call


def until(condition: Callable[[], object], seconds: float = 20) -> None:
    """Waits for something that a process does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


def training(run: launch.Run) -> Callable[[], bool]:
    return lambda: run.status().state == "training"


def test_what_the_launcher_is_told(start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The command line for chosen GPUs, a port and several machines, seen by one that only writes it down."""
    note = tmp_path / "note.py"
    note.write_text("import json, sys\njson.dump(sys.argv[1:], open('argv.json', 'w'))")
    cases = [({"gpus": [1, 3], "num_gpus": 2}, {"localhost": [1, 3]}), ({"num_gpus": 2}, {"localhost": [0, 1]}),
             ({"num_gpus": 2, "machines": ["--hostfile=/h", "--num_nodes=2"]}, "--hostfile=/h")]  # fmt: skip
    for options, first in cases:  # over several machines the script starts itself, and the launcher is not asked
        run = start({}, launcher=(str(note),), script=note, master_port=29777, **options)
        run.wait(20)
        arguments = json.loads((run.folder.path / "argv.json").read_text())
        name, _, world = arguments[0].partition("=")
        told = json.loads(base64.urlsafe_b64decode(world)) if name == "--world_info" else arguments[0]
        assert told == first
        assert "--master_port=29777" in arguments
        assert arguments[arguments.index("--run_dir") + 1] == str(run.folder.path)
        if "machines" in options:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")  # of this machine alone
            start({}, script=note, **options).wait(20)
            assert arguments[1:3] == ["--num_nodes=2", "--num_gpus=2"]
            assert str(note) not in arguments


def test_finishes(start: Start, tmp_path: Path) -> None:
    run = start({})
    assert run.poll() is None
    assert [other.path for other in launch.running()] == [run.path]
    assert run.wait(20) == "finished"
    assert run.status().step == 5
    assert not launch.running()
    assert "resume=None" in run.folder.log.read_text()


def test_megabytes_of_binary_stderr_do_not_block(start: Start) -> None:
    run = start({"stderr_bytes": 5 * 2**20, "raise_at": 2})
    assert run.wait(20) == "failed"
    assert run.folder.log.stat().st_size > 5 * 2**20
    text = run.failure_text()
    assert "a file is missing: '/models/missing.safetensors'" in text
    assert len(text) < 20_000
    assert all(character.isprintable() or character == "\n" or character == "\ufffd" for character in text)


def test_stop_saves(start: Start) -> None:
    run = start({"steps": 100000})
    until(training(run))
    assert run.stop(grace=20) == "stopped"
    assert run.status().exports
    assert not list(run.folder.take_requests())


def test_stubborn_is_killed_with_its_grandchildren(start: Start, tmp_path: Path) -> None:
    run = start({"steps": 100000, "stubborn": True})
    until(training(run))
    pids = [int(pid) for pid in (run.folder.path / "grandchildren").read_text().split()]
    assert len(marked(tmp_path)) == 3
    launch_patience, launch.TERM_PATIENCE = launch.TERM_PATIENCE, 0.5
    try:
        assert run.stop(grace=0.3) == "stopped"
    finally:
        launch.TERM_PATIENCE = launch_patience
    assert not marked(tmp_path)
    assert not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids)
    assert not (run.folder.path / "save_quit").exists()


def test_vanished_and_killed(start: Start) -> None:
    run = start({"steps": 100000})
    until(training(run))
    os.kill(run.pid, signal.SIGKILL)
    assert run.wait(10) == "failed"
    assert "killed" in run.failure_text()
    run = start({"steps": 3, "fail_at": 2, "error": "RuntimeError: CUDA out of memory. Tried to allocate"})
    assert run.wait(10) == "failed"
    assert "lower resolutions" in run.failure_text()


def test_second_start_is_refused(start: Start) -> None:
    first = start({"steps": 100000})
    until(training(first))
    with pytest.raises(ProcessError, match=f"GPU 0 is used by the run '{first.name}'.*share_gpu"):
        start({}, identity="b")
    with pytest.raises(ProcessError, match="still going on"):
        start({}, folder=first.folder, allow_shared=True)
    other = start({}, identity="b", gpus=[1])
    shared = start({}, identity="c", allow_shared=True)
    assert len({first.port, other.port, shared.port}) == 3
    assert launch.find("a").path == first.path  # type: ignore[union-attr]
    assert launch.find("nothing") is None
    assert (other.wait(20), shared.wait(20)) == ("finished", "finished")
    first.stop(20)
    assert start({}, identity="b").wait(20) == "finished"


def in_new_python(code: str, *arguments: str, wait: bool = True) -> subprocess.Popen[str]:
    prelude = f"import importlib.util, sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\nimport conftest\n"
    prelude += "from diffusion_trainer.utils import launch\nfrom diffusion_trainer.utils.run_folder import RunFolder\n"
    prelude += "from pathlib import Path\n"
    child = subprocess.Popen(
        [sys.executable, "-c", prelude + code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if wait:
        child.wait(60)
    return child


def test_found_after_restart_and_outlives_its_starter(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "output")
    (folder.path / "behaviour.json").write_text(json.dumps({"steps": 100000}))
    starting = (
        "launch.start(RunFolder(Path(sys.argv[1])), num_gpus=1, identity='x', script=Path(sys.argv[2]), launcher=())"
    )
    assert in_new_python(starting, str(folder.path), str(SCRIPT)).returncode == 0
    run = launch.find("x")
    assert run is not None
    until(training(run))
    assert run.poll() is None
    with pytest.raises(ProcessError):
        launch.start(RunFolder.create(tmp_path / "output"), num_gpus=1, identity="y", script=SCRIPT, launcher=())
    stopping = in_new_python("print(launch.find('x').stop(20))")
    assert stopping.returncode == 0
    assert stopping.stdout is not None
    assert stopping.stdout.read().strip().endswith("stopped")
    assert run.wait(5) == "stopped"
    assert not marked(tmp_path)


def test_vanished_without_exit_code(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "output")
    (folder.path / "behaviour.json").write_text(json.dumps({"steps": 100000}))
    starting = (
        "launch.start(RunFolder(Path(sys.argv[1])), num_gpus=1, identity='x', script=Path(sys.argv[2]), launcher=())"
    )
    in_new_python(starting, str(folder.path), str(SCRIPT))
    run = launch.find("x")
    assert run is not None
    until(training(run))
    os.kill(run.pid, signal.SIGKILL)
    assert run.wait(10) == "vanished"
    assert "ended without saying why" in run.failure_text()
    assert launch.find("x") is None


def test_two_starts_at_once_have_one_winner(tmp_path: Path) -> None:
    code = (
        "from diffusion_trainer.utils.processes import ProcessError\n"
        "try:\n    launch.start(RunFolder(Path(sys.argv[1])), num_gpus=1, identity=sys.argv[1], "
        "script=Path(sys.argv[2]), launcher=())\n    print('won')\n"
        "except ProcessError:\n    print('refused')"
    )
    children = []
    for _ in range(4):
        folder = RunFolder.create(tmp_path / "output")
        (folder.path / "behaviour.json").write_text(json.dumps({"steps": 100000}))
        children.append(in_new_python(code, str(folder.path), str(SCRIPT), wait=False))
    said = sorted(child.communicate(timeout=60)[0].strip() for child in children)
    assert said == ["refused"] * 3 + ["won"]
    assert len(launch.running()) == 1


def test_resumed_run_starts_anew_in_its_folder(start: Start) -> None:
    first = start({"steps": 3, "raise_at": 1})
    assert first.wait(20) == "failed"
    first.folder.request("save_quit")  # came too late for the first; must not stop the second
    second = start({"steps": 3}, folder=first.folder, resume=first.name)
    assert second.status().state == "starting" or second.status().updated > second.started
    assert second.wait(20) == "finished"
    assert f"resume={first.name}" in failure.log_tail(second.folder.log, since=second.log_start)
    assert "missing" not in second.failure_text()


# -- through DeepSpeed's launcher ---------------------------------------------------------------------


def test_killed_rank_fails_the_run(start: Start, tmp_path: Path) -> None:
    run = start({"steps": 100000, "seconds": 0.05, "kill_rank_at": {"1": 3}}, num_gpus=2, launcher=launch.DEEPSPEED)
    assert run.wait(60) == "failed"
    assert "signal 9" in run.failure_text()
    assert not marked(tmp_path)


def test_killed_launcher_leaves_no_orphan(start: Start, tmp_path: Path) -> None:
    run = start({"steps": 100000}, num_gpus=2, launcher=launch.DEEPSPEED)
    until(training(run), 60)
    psutil.Process(run.pid).kill()
    assert run.wait(30) == "failed"
    assert "launcher was killed" in run.failure_text()
    assert run.status().exports, "the trainers had the time to save"
    assert not marked(tmp_path)
    assert not launch.running()


def test_cancel_through_deepspeed(start: Start, tmp_path: Path) -> None:
    run = start({"steps": 100000}, launcher=launch.DEEPSPEED)
    until(training(run), 60)
    assert run.stop(grace=30) == "stopped"
    assert run.status().state == "stopped"
    assert run.exit_code == 0
    assert not marked(tmp_path)


# -- causes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB", "GPU ran out of memory"),
        ("OSError: [Errno 28] No space left on device", "disk is full"),
        ("RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory", "main memory"),
        ("[launch.py:325:sigkill_handler] ['python'] exits with return code = -9", "signal 9"),
        ("torch.distributed.DistNetworkError: EADDRINUSE, port: 29500", "port"),
        ("ModuleNotFoundError: No module named 'peft'", "'peft' is not installed"),
        ("diffusion_trainer.utils.config.SettingsError: optimizer.lr: must be", "optimizer.lr"),
        ("Traceback\n[rank1]: ValueError: something else", "ValueError: something else"),
    ],
)
def test_causes(log: str, words: str, tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path)
    folder.log.write_text(f"starting\n{log}\nmore\n")
    text = launch.failure_text(folder)
    assert words in text.splitlines()[0]
    assert log.splitlines()[-1] in text


def test_log_tail_of_gigabytes(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    with log.open("wb") as file:
        file.truncate(3 * 2**30)  # sparse
        file.seek(0, 2)
        file.write(b"\n\x1b[32mgreen\x1b[0m\n" + b"".join(b"\r%d%%" % n for n in range(101)) + b"\nlast \xff\xfe\n")
    began = time.monotonic()
    assert failure.log_tail(log, lines=3).splitlines() == ["green", "100%", "last \ufffd\ufffd"]
    assert time.monotonic() - began < 2


def test_unknown_error_and_empty_log(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path)
    assert "log is empty" in launch.failure_text(folder)
    folder.write_status(Status(state="failed", error="dataset.toml: directory[0].path: '/x' does not exist"))
    assert "'/x' does not exist" in launch.failure_text(folder)


# -- environment ---------------------------------------------------------------------------------------


def test_environment_keeps_comfyui_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ComfyUI" / "comfy").mkdir(parents=True)
    (tmp_path / "mine").mkdir()
    kept = str(tmp_path / "mine")
    paths = [str(tmp_path / "ComfyUI"), kept, str(tmp_path / "ComfyUI" / "comfy")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    environment = launch._environment({"EXTRA": "1"})
    assert environment["PYTHONPATH"] == kept
    assert environment["PYTHONUNBUFFERED"] == environment["EXTRA"] == "1"


def test_visible_gpus_are_handed_on(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    run = start({})
    assert run.gpus == (2,)
    assert run.wait(20) == "finished"
    with pytest.raises(ProcessError, match="only 2 are visible"):
        start({}, num_gpus=3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8f2")
    with pytest.raises(ProcessError, match="must be numbers"):
        start({})
