"""Going on from a checkpoint: after a kill, with other settings where that is safe, and refusals where it is not."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusion_trainer.utils.config import SettingsError, write_toml
from diffusion_trainer.utils.run_folder import RunFolder
from training import ROOT, Bench, Result, StopsAfter


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def plain(bench: Bench) -> Result:
    """Two epochs of four steps."""
    return bench.train(epochs=2)


def stopped(bench: Bench, step: int, **changes) -> Result:
    folder = StopsAfter(RunFolder.create(bench.root / "out").path, step)
    result = bench.train(folder, **{"epochs": 2, **changes})
    assert result.status.state == "stopped"
    assert result.status.step == step
    return result


def resume(bench: Bench, run: Result, **changes) -> Result:
    return bench.train(RunFolder(run.folder.path), resume=True, **{"epochs": 2, **changes})


def progress(result: Result) -> dict:
    return json.loads((result.folder.path / result.folder.latest.read_text() / "progress.json").read_text("utf-8"))


def test_killed_and_resumed_equals_uninterrupted(bench: Bench) -> None:
    options = {"epochs": 12, "checkpoint_every_n_steps": 3, "ema_decay": 0.9, "lr_scheduler": "cosine"}
    whole = bench.train(**options)
    folder = RunFolder.create(bench.root / "out")
    write_toml(folder.train_toml, bench.settings(**options))
    write_toml(folder.dataset_toml, bench.dataset())
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        "--config",
        str(folder.train_toml),
        "--run_dir",
        str(folder.path),
    ]
    ours = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # this process is a world by now
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    deadline = time.monotonic() + 120
    while len(folder.checkpoints()) < 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it had not ended by itself"
    resumed = bench.train(RunFolder(folder.path), resume=True, **options)
    assert resumed.curve("loss") == whole.curve("loss")
    assert all(torch.equal(value, resumed.lora()[key]) for key, value in whole.lora().items())


def test_epochs_and_learning_rate_may_change(bench: Bench, plain: Result) -> None:
    resumed = resume(bench, stopped(bench, 3), epochs=3, optimizer={"lr": 1e-4})
    assert resumed.status.step == resumed.status.total_steps == 12
    assert resumed.curve("loss")[:3] == plain.curve("loss")[:3]
    assert resumed.curve("lr") == pytest.approx([2e-3] * 3 + [1e-4] * 9)


def test_fewer_epochs_than_are_done_end_at_once(bench: Bench) -> None:
    resumed = resume(bench, stopped(bench, 6), epochs=1)
    assert resumed.status.state == "finished"
    assert resumed.status.step == 6


@pytest.mark.parametrize("first", [1, 3])
def test_other_batches_in_mid_epoch_still_train_every_item_once(bench: Bench, first: int) -> None:
    half = stopped(bench, 2, micro_batch_size_per_gpu=first)
    resumed = resume(bench, half, micro_batch_size_per_gpu=2)
    position = progress(resumed)["position"]
    assert position["examples"] == 12, "six pictures, two epochs"
    assert position["epoch"] == 2
    assert resumed.status.step == resumed.status.total_steps
    assert len(resumed.curve("epoch_loss")) == 2


def test_a_changed_dataset_begins_the_epoch_again(bench: Bench, tmp_path: Path) -> None:
    run = stopped(bench, 6)
    for name in ("0.png", "0.txt"):
        (tmp_path / f"more-{name}").write_bytes((bench.pictures / name).read_bytes())
    dataset = {"resolutions": [64], "directory": [{"path": str(bench.pictures)}, {"path": str(tmp_path)}]}
    resumed = resume(bench, run, dataset=dataset)
    position = progress(resumed)["position"]
    assert position["examples"] > 6 + 7, "the second epoch's first half, and all of it with the new picture"
    assert resumed.status.step == 6 + 4


def test_what_makes_it_another_training_is_refused_by_name(bench: Bench, plain: Result, tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        resume(bench, plain, seed=8, adapter={"rank": 8, "alpha": 2.0}, optimizer={"type": "sgd"})
    text = str(caught.value)
    for line in (
        "seed: the checkpoint was made with 7, not 8; set that to resume",
        "adapter.rank: the checkpoint was made with 4, not 8; set that to resume",
        "adapter.alpha: the checkpoint was made with None, not 2.0; set that to resume",
        "optimizer.type: the checkpoint was made with 'adamw', not 'sgd'; set that to resume",
    ):
        assert line in text.split("\n")
    assert plain.folder.read_status().state == "failed"


def test_another_model_is_refused(bench: Bench, tmp_path: Path) -> None:
    run = stopped(bench, 1)
    other = Bench(tmp_path)
    file = next((tmp_path / "model/transformer").glob("*.safetensors"))
    from safetensors.torch import load_file, save_file

    save_file({name: value + 0.01 for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(SettingsError, match="model: these are not the weights"):
        resume(bench, run, model={"diffusers_path": str(tmp_path / "model")}, cache_dir=str(other.root / "cache"))


def test_whoever_knows_may_go_on(bench: Bench) -> None:
    run = stopped(bench, 1)
    resumed = resume(bench, run, adapter={"alpha": 2.0}, i_know_what_i_am_doing=True)
    assert resumed.status.state == "finished"
    other = resume(bench, stopped(bench, 1), optimizer={"type": "sgd"}, reset_optimizer=True)
    assert other.status.state == "finished"


def test_resetting_the_dataloader_trains_the_epoch_from_its_start(bench: Bench) -> None:
    resumed = resume(bench, stopped(bench, 6), reset_dataloader=True)
    position = progress(resumed)["position"]
    assert (position["step"], position["epoch"]) == (10, 2)
