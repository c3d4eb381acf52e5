"""What goes wrong for users, as they meet it: train.py as a process, a clear message, and nothing lost."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from diffusion_trainer.train import main
from diffusion_trainer.utils.config import write_toml
from diffusion_trainer.utils.run_folder import RunFolder
from training import ROOT, Bench, Result, free_port

DEEPSPEED = ["-m", "deepspeed.launcher.runner", "--num_gpus=1"]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bad input"))


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """An output folder whose processes do not outlive the test."""
    yield tmp_path / "out"
    for process in trainers(tmp_path):
        process.kill()


def trainers(folder: Path) -> list[psutil.Process]:
    """Live processes whose command line names ``folder``."""
    return [p for p in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(p.info["cmdline"] or [])]


def write(bench: Bench, out: Path, dataset: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A train.toml with its dataset.toml, beside ``out``."""
    write_toml(out.parent / "dataset.toml", dataset or bench.dataset())
    write_toml(out.parent / "train.toml", bench.settings(**{"output_dir": str(out)} | changes))
    return out.parent / "train.toml"


def environment() -> dict[str, str]:
    """Ours without what this process, a world of one by now, would tell another."""
    ours = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in ours}


def run(*arguments: object, launcher: list[str] | None = None) -> subprocess.CompletedProcess[str]:
    """train.py with arguments, to its end."""
    return subprocess.run(
        [sys.executable, *(launcher or []), str(ROOT / "train.py"), *map(str, arguments)],
        capture_output=True, text=True, timeout=120, check=False, cwd="/", env=environment())  # fmt: skip


def start(config: Path, launcher: list[str] | None = None, *arguments: str) -> subprocess.Popen[bytes]:
    """train.py in a process group of its own, as a shell starts it; its output goes to a file."""
    command = [sys.executable, *(launcher or []), str(ROOT / "train.py"), "--config", str(config), *arguments]
    with config.with_name("terminal.log").open("wb") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environment()
        )


def training(out: Path, process: subprocess.Popen[bytes], step: int = 2) -> RunFolder:
    """The run in ``out`` once it has done some steps."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for folder in RunFolder.all(out):
            if folder.read_status().step >= step:
                return folder
        assert process.poll() is None, (out.parent / "terminal.log").read_text("utf-8", "replace")[-2000:]
        time.sleep(0.05)
    raise AssertionError("no step in time")


# -- settings ------------------------------------------------------------------------------------------


def test_check_config_says_good_and_touches_nothing(bench: Bench, out: Path) -> None:
    config = write(bench, out, model={"diffusers_path": "/not/there"})
    done = run("--config", config, "--check_config")
    assert done.returncode == 0
    assert done.stderr == (
        "the settings are right, but cannot be trained with here: model.diffusers_path: '/not/there' does not exist; "
        "give a Flux folder in diffusers layout\n"
    )
    assert 'diffusers_path = "/not/there"' in done.stdout
    assert str(bench.pictures) in done.stdout
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'epocs = 3\n[model]\ntype = "flux"\n', "epocs: unknown option; did you mean 'epochs'?"),
        (b'[model]\ntype = "flucks"\n', "model.type: 'flucks' is unknown; known are anima, auraflow"),
        (b'epochs = 0\n[model]\ntype = "flux"\n', "epochs: must be at least 1, got 0"),
        (b"epochs = = 3\n", "not valid TOML"),
        (b"# \xff\xfe\n", "not valid TOML"),
        (None, "cannot be read"),
    ],
)
def test_check_config_refuses(tmp_path: Path, text: bytes | None, message: str) -> None:
    config = tmp_path / "train.toml"
    if text is not None:
        config.write_bytes(text)
    done = run("--config", config, "--check_config")
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_unknown_key_of_the_dataset(bench: Bench, out: Path) -> None:
    config = write(bench, out, dataset=bench.dataset(resolution=[64]))
    done = run("--config", config, "--check_config")
    assert done.returncode == 2
    assert "resolution: unknown option; did you mean 'resolutions'?" in done.stderr


# -- a training that cannot begin ------------------------------------------------------------------------


Refused = Callable[..., str]


@pytest.fixture
def refused(bench: Bench, out: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Refused]:
    """Runs train.py, in this process to save its start, and gives the message with which it must end."""
    root = logging.getLogger()
    before = root.handlers[:], root.level

    def call(*arguments: str, **changes: Any) -> str:
        assert main(["--config", str(write(bench, out, **changes)), *arguments]) == 2
        message = capsys.readouterr().err
        assert "Traceback" not in message
        for folder in RunFolder.all(out):
            status = folder.read_status()
            assert status.state == "failed"
            assert status.error
            assert status.error in message
        return message

    yield call
    root.handlers[:], root.level = before


def test_refusal_as_a_process(bench: Bench, out: Path) -> None:
    done = run("--config", write(bench, out, model={"diffusers_path": "/no/such/flux"}))
    assert done.returncode == 2
    assert "model.diffusers_path: '/no/such/flux' does not exist" in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_folder(refused: Refused) -> None:
    message = refused(dataset={"directory": [{"path": "/no/such/folder"}]})
    assert "directory[0].path: '/no/such/folder' is not a folder; give the folder that holds the pictures" in message


def test_folder_without_pictures(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no picture here")
    message = refused(dataset={"directory": [{"path": str(tmp_path / "empty")}]})
    assert "no usable picture in" in message


def test_wrong_model_path(refused: Refused) -> None:
    message = refused(model={"diffusers_path": "/no/such/flux"})
    assert "model.diffusers_path: '/no/such/flux' does not exist" in message


def test_unwritable_output(refused: Refused) -> None:
    assert "output_dir: '/proc/training' cannot be written" in refused(output_dir="/proc/training")


def test_resume_of_a_missing_run(refused: Refused, out: Path) -> None:
    message = refused("--resume_from_checkpoint", "20260101_00-00-00")
    assert "resume_from_checkpoint: no run '20260101_00-00-00' with a checkpoint" in message
    assert not RunFolder.all(out)


def test_unreadable_picture_and_caption_are_left_out_and_said(bench: Bench, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    shutil.copytree(bench.pictures, pictures)
    (pictures / "broken.png").write_bytes(b"this is no picture")
    whole = (pictures / "0.png").read_bytes()
    (pictures / "cut.png").write_bytes(whole[: len(whole) // 2])
    (pictures / "1.txt").write_bytes("Käse".encode("latin-1"))
    folder = RunFolder.create(tmp_path / "out")
    bench.train(folder, dataset=bench.dataset(directory=[{"path": str(pictures)}]), max_steps=2)
    report = json.loads((folder.path / "dataset_report.json").read_text("utf-8"))
    said = json.dumps(report, ensure_ascii=False)
    assert "broken.png" in said
    assert "1.txt" in said or "1.png" in said
    assert folder.read_status().state == "finished"


# -- a training that is ended from outside -----------------------------------------------------------------


def resumes(bench: Bench, folder: RunFolder) -> Result:
    """Two steps more from the newest checkpoint."""
    step = int(folder.checkpoints()[-1].name.removeprefix("global_step"))
    return bench.train(folder, resume=True, epochs=1000, max_steps=step + 2, checkpoint_every_n_epochs=1)


def test_killed_trainer_keeps_its_checkpoint(bench: Bench, out: Path) -> None:
    process = start(write(bench, out, epochs=100000, checkpoint_every_n_epochs=1))
    folder = training(out, process, 7)
    process.kill()
    process.wait()
    assert resumes(bench, folder).status.state == "finished"


@pytest.mark.parametrize("launcher", [[], DEEPSPEED], ids=["python", "deepspeed"])
def test_ctrl_c_saves(bench: Bench, out: Path, launcher: list[str]) -> None:
    """A terminal's Ctrl-C reaches launcher and trainer alike."""
    port = [f"--master_port={free_port()}"] if launcher else []
    process = start(write(bench, out, epochs=100000), launcher + port)
    folder = training(out, process)
    os.killpg(process.pid, signal.SIGINT)
    process.wait(60)
    deadline = time.monotonic() + 60
    while trainers(out.parent) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not trainers(out.parent)
    status = folder.read_status()
    assert status.state == "stopped"
    assert (Path(status.exports[-1]) / "adapter_model.safetensors").exists()
    assert folder.checkpoints()[-1].name == f"global_step{status.step}"


IN_A_SMALL_DISK = """
mount -t tmpfs -o size=$1 tmpfs "$2" && shift || exit 77
disk=$1; kept=$2; shift 2
"$@"; code=$?
cp -r "$disk"/. "$kept"
exit $code
"""


def test_full_disk_keeps_the_earlier_checkpoint(bench: Bench, out: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    out.mkdir()
    kept.mkdir()
    config = write(bench, out, epochs=100000, checkpoint_every_n_epochs=1, save_every_n_steps=1)
    namespace = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"])]
    done = subprocess.run(
        [*namespace, "sh", "-c", IN_A_SMALL_DISK, "sh", "3m", str(out), str(kept),
         sys.executable, str(ROOT / "train.py"), "--config", str(config)],
        capture_output=True, text=True, timeout=180, check=False, env=environment())  # fmt: skip
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
    assert done.returncode == 1, done.stderr[-3000:]
    assert "space left" in done.stderr
    (folder,) = RunFolder.all(kept)
    status = folder.read_status()
    assert status.state in ("failed", "training"), "the last word may not fit, but is never half a word"
    if status.state == "failed":
        assert "no space left" in (status.error or "")
    assert resumes(bench, folder).status.state == "finished"
