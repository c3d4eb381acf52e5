"""Weights & Biases: refused with the remedy where it cannot work; where installed, the same curves, and no key."""

import importlib.util
import sys
from pathlib import Path

import pytest
from diffusion_trainer.utils.config import SettingsError
from training import Bench

SECRET = "0123456789abcdef0123456789abcdef01234567"
MONITORING = {"enable_wandb": True, "wandb_tracker_name": "miniatures", "wandb_run_name": "one"}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_a_missing_package_is_said_with_its_remedy(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not there
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else find(name, *rest))
    with pytest.raises(SettingsError, match=r"the package wandb is not installed; install it with: .* -m pip"):
        bench.train(monitoring=MONITORING)


def test_a_missing_key_is_said_with_its_remedy(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", str(bench.root / "none"))
    monkeypatch.setenv("HOME", str(bench.root))
    with pytest.raises(SettingsError, match="put it into the environment variable WANDB_API_KEY"):
        bench.train(monitoring=MONITORING)


def test_curves_and_samples_arrive_and_no_file_holds_the_key(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    sample = {"prompts": ["a cat"], "width": 64, "height": 32, "steps": 1}
    result = bench.train(max_steps=3, monitoring=MONITORING, sample=sample)
    (log,) = (result.folder.path / "wandb").glob("offline-run-*/run-*.wandb")
    content = log.read_bytes()
    assert b"train/loss" in content and b"samples/00" in content and b"miniatures" in content
    assert f"{result.curve('loss')[-1]}"[:6].encode() in content
    assert list(log.parent.rglob("media/images/samples/*.png"))
    for file in result.folder.path.rglob("*"):
        assert not file.is_file() or SECRET.encode() not in file.read_bytes(), file
