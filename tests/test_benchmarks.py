"""The commands of ``benchmarks/`` run: they are needed rarely, and then at once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SLOW = (
    "anima",
    "chroma",
    "cosmos-predict2-2b",
    "flux2-klein-4b",
    "hunyuan-video",
    "ltx-video-2b",
    "lumina2",
    "qwen-image",
    "sd3.5-medium",
    "sdxl",
    "z-image",
)


@pytest.mark.parametrize(
    "family",
    ["flux", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)],
)
def test_train_step_measures_a_small_model(family: str) -> None:
    settings = ["blocks_to_swap=1"]
    command = [
        sys.executable,
        str(ROOT / "benchmarks/train_step.py"),
        f"--family={family}",
        "--small",
        "--steps=8",
        "--width=64",
        "--height=64",
    ]
    done = subprocess.run([*command, *settings], capture_output=True, text=True, timeout=300, check=False)
    rows = done.stdout.splitlines()[1:]
    assert done.returncode == 0, done.stderr
    assert [row.split()[-1] for row in rows] == settings, done.stdout
    assert all(float(row.split()[0]) > 0 for row in rows)


@pytest.mark.slow
def test_start_measures_a_small_model(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/start.py"), str(tmp_path), "--small"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["second_start"] > 0
