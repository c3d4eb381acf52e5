"""The files of configs/ train: as they are but for paths, sizes and lengths, which a miniature has smaller."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from training import ROOT, Bench, write_clips, write_pictures

CONFIGS = {path.name: tomllib.loads(path.read_text("utf-8")) for path in sorted((ROOT / "configs").glob("*.toml"))}
TRAIN = [pytest.param(name, marks=pytest.mark.slow) if values.get("pipeline_stages", 1) > 1 else name
         for name, values in CONFIGS.items() if "model" in values]  # fmt: skip
DATASETS = [name for name, values in CONFIGS.items() if "directory" in values]
VARIANTS = {"wan_lora.toml": {"variant": "t2v"}, "wan22_high_noise_lora.toml": {"variant": "t2v"},
            "sdxl_lora.toml": {"checkpoint": True}, "sdxl_full.toml": {"checkpoint": True}}  # fmt: skip
"""What a file's model is like, where a miniature may be of several kinds."""


def is_path(key: str) -> bool:
    return key in ("path", "diffusion_model", "vae", "text_encoders") or key.endswith("_path")


def smaller(values: dict[str, Any]) -> dict[str, Any]:
    """A train.toml for a miniature: no paths, few steps, small samples."""
    sample = {"sample": {**values["sample"], "width": 64, "height": 64, "steps": 2}} if "sample" in values else {}
    model = {key: value for key, value in values["model"].items() if not is_path(key)}
    kept = {key: value for key, value in values.items() if key not in ("dataset", "output_dir")}
    return {**kept, **sample, "model": model, "max_steps": 2, "adapter": values.get("adapter")}


def pictures_for(root: Path, name: str) -> dict[str, Any]:
    """A dataset.toml for a miniature, with every folder that it names filled."""
    values = CONFIGS[name]
    sizes = {"size_buckets": [[64, 64, 1]]} if "size_buckets" in values else {"resolutions": [64]}
    tables = []
    for number, directory in enumerate(values["directory"]):
        table = {key: value for key, value in directory.items() if key != "resolutions"}
        for key in filter(is_path, directory):
            folder = root / f"{number} {key}"
            if not folder.exists():
                write_pictures(folder, 3)
            if "frame_buckets" in values:
                write_clips(folder, 2, 33)
            table[key] = str(folder)
        tables.append(table)
    return {**values, **sizes, "directory": tables}


@pytest.mark.parametrize("name", TRAIN)
def test_every_train_file_trains(name: str, tmp_path: Path) -> None:
    values = CONFIGS[name]
    bench = Bench(tmp_path, values["model"]["type"], **VARIANTS.get(name, {}))
    dataset = pictures_for(tmp_path, Path(values["dataset"]).name)
    changes = smaller(values)
    for entry in changes.get("eval_datasets", []):
        entry["config"] = bench.dataset()
    if values.get("pipeline_stages", 1) > 1:
        result = bench.launch(values["pipeline_stages"], **changes)
    else:
        result = bench.train(dataset=dataset, **changes)
    assert (result.status.state, result.status.step) == ("finished", 2)
    assert result.status.exports


@pytest.mark.parametrize("name", DATASETS)
def test_every_dataset_file_trains(name: str, tmp_path: Path) -> None:
    kind = "wan" if "frame_buckets" in CONFIGS[name] else "flux"
    result = Bench(tmp_path, kind).train(dataset=pictures_for(tmp_path, name), max_steps=1)
    assert result.status.state == "finished"
