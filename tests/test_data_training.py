"""Trainings over all that a dataset can hold, and the cache's switches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import hostile, picture
from diffusion_trainer.utils.config import write_toml
from PIL import Image
from training import ROOT, Bench


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


def test_masks_variants_sizes_and_the_report(bench: Bench, tmp_path: Path) -> None:
    mask = Image.new("L", (96, 64), 255)
    mask.paste(0, (0, 0, 48, 64))
    (tmp_path / "masks").mkdir()
    mask.save(tmp_path / "masks/1.png")
    picture(tmp_path / "masks/orphan.png")
    dataset = {
        "resolutions": [64, 96], "horizontal_flip": True, "cache_shuffle_num": 2, "cache_shuffle_delimiter": " ",
        "directory": [{"path": str(bench.pictures), "mask_path": str(tmp_path / "masks")}],
    }  # fmt: skip
    options = {"epochs": 1, "micro_batch_size_per_gpu": [[64, 2], [96, 1]], "uncond_fraction": 0.3}
    first = bench.train(dataset=dataset, **options)
    assert first.status.state == "finished"
    assert first.status.total_steps == 4 + 6  # buckets 64x64, 80x48 by two; 96x96, 112x80 one by one
    report = json.loads((first.folder.path / "dataset_report.json").read_text("utf-8"))
    assert report["steps_per_epoch"] == report["total_steps"] == 10
    assert report["masks"] == 2 and report["cache_bytes"] > 0
    assert [Path(path).name for path in report["orphans"]] == ["orphan.png"]
    again = bench.train(dataset=dataset, trust_cache=True, **options)
    assert again.curve("loss") == first.curve("loss")


def test_cache_only_and_pruning_from_the_command_line(bench: Bench, tmp_path: Path) -> None:
    write_toml(tmp_path / "train.toml", bench.settings(cache_dir=str(tmp_path / "cache")))
    write_toml(tmp_path / "dataset.toml", bench.dataset())
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(tmp_path / "train.toml")]
    own = {key: value for key, value in os.environ.items() if key != "MASTER_PORT"}  # that of this process
    subprocess.run([*command, "--cache_only", "--run_dir", str(tmp_path / "run")], check=True, timeout=300, env=own)
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "finished"
    assert not list((tmp_path / "run").glob("*step*"))
    assert len(list((tmp_path / "cache/flux/media").rglob("*.safetensors"))) == 6
    assert b"0 files removed" in subprocess.check_output([*command, "--prune_cache"], timeout=300)


def test_training_goes_on_with_what_is_good_in_a_hostile_folder(bench: Bench, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    hostile(folder)
    half = picture(folder / "half.png", (64, 64), 9)
    half.write_bytes(half.read_bytes()[:3000])  # its head is whole
    before = sorted((path.name, path.lstat().st_mtime_ns) for path in folder.iterdir())
    result = bench.train(dataset=bench.dataset(directory=[{"path": str(folder)}]), epochs=1)
    assert result.status.state == "finished"
    report = json.loads((result.folder.path / "dataset_report.json").read_text("utf-8"))
    assert report["samples"] == 3
    assert len(report["left_out"]) == 18 and all(report["left_out"].values())
    assert "cannot be decoded" in report["left_out"][str(half)]
    assert sorted((path.name, path.lstat().st_mtime_ns) for path in folder.iterdir()) == before
    assert {path.name for path in tmp_path.iterdir()} == {"data"}
