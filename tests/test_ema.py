"""The moving average of the weights: its numbers, its exports, its place in checkpoints, no trace in training."""

from pathlib import Path

import pytest
import torch
from diffusion_trainer.utils.ema import Ema
from diffusion_trainer.utils.run_folder import RunFolder
from safetensors.torch import load_file
from torch import nn
from training import Bench, Result, StopsAfter

EMA = {"epochs": 2, "ema_decay": 0.9, "save_every_n_steps": 1, "adapter": {"type": "lora", "rank": 4}}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def averaged(bench: Bench) -> Result:
    """Eight steps, all exported."""
    return bench.train(**EMA)


def exported(result: Result, name: str) -> dict[str, torch.Tensor]:
    tensors = load_file(result.folder.path / name / "adapter_model.safetensors")
    return {key: value for key, value in tensors.items() if not key.endswith(".alpha")}


def test_exports_hold_the_average_of_the_exported_weights(averaged: Result) -> None:
    value = exported(averaged, "step1_ema")
    first = exported(averaged, "step1")
    begun = {key: torch.zeros_like(v) if "lora_B" in key else first[key] for key, v in value.items()}
    for key, start in begun.items():
        if "lora_B" in key:  # begins at zero; the first update keeps 2/11 of that
            torch.testing.assert_close(value[key], start.lerp(first[key], 1 - 2 / 11))
    for step in range(2, 9):
        keep = min(0.9, (1 + step) / (10 + step))
        new = exported(averaged, f"step{step}")
        value = {key: old * keep + new[key] * (1 - keep) for key, old in value.items()}
        for key, tensor in exported(averaged, f"step{step}_ema").items():
            torch.testing.assert_close(tensor, value[key], rtol=1e-5, atol=1e-8, msg=key)
    assert Path(averaged.status.exports[-1]).name == "step8_ema"


def test_training_is_the_same_without(bench: Bench, averaged: Result) -> None:
    plain = bench.train(**{**EMA, "ema_decay": None})
    assert plain.curve("loss") == averaged.curve("loss")
    last = exported(averaged, "step8")
    assert all(torch.equal(value, last[key]) for key, value in exported(plain, "step8").items())


@pytest.mark.parametrize("step", [3, 6])
def test_stopped_and_resumed_equals_uninterrupted(bench: Bench, averaged: Result, step: int) -> None:
    folder = StopsAfter(RunFolder.create(bench.root / "out").path, step)
    stopped = bench.train(folder, **EMA)
    assert stopped.status.state == "stopped"
    resumed = bench.train(RunFolder(folder.path), resume=True, **EMA)
    for name in ("step8", "step8_ema"):
        expected = exported(averaged, name)
        assert all(torch.equal(value, expected[key]) for key, value in exported(resumed, name).items()), name


def test_only_the_average_from_a_step_on_in_main_memory(bench: Bench, averaged: Result) -> None:
    result = bench.train(**{**EMA, "ema_export": "ema", "ema_start_step": 7, "ema_on_cpu": True})
    assert not list(result.folder.path.glob("*_ema"))
    six, seven = exported(averaged, "step6"), exported(averaged, "step7")
    for key, value in exported(result, "step6").items():
        assert torch.equal(value, six[key]), "before it begins, the weights themselves"
    for key, value in exported(result, "step7").items():
        assert torch.equal(value, seven[key])
    for key, value in exported(result, "step8").items():
        torch.testing.assert_close(value, seven[key].lerp(exported(averaged, "step8")[key], 1 - 2 / 11))


def test_samples_and_eval_sets_use_it(bench: Bench) -> None:
    config = {"resolutions": [64], "directory": [{"path": str(bench.pictures)}]}
    changes = {
        "max_steps": 2, "optimizer": {"lr": 0.05},
        "sample": {"prompts": ["a cat"], "width": 64, "height": 32, "steps": 2, "every_n_steps": 2},
        "eval_datasets": [{"name": "all", "config": config}], "eval_every_n_steps": 2,
    }  # fmt: skip
    last = bench.train(**{**EMA, **changes, "ema_for_samples": False})
    average = bench.train(**{**EMA, **changes})
    assert last.points("all/loss")[0] == average.points("all/loss")[0]
    assert last.points("all/loss")[1] != average.points("all/loss")[1]
    pictures = [(r.folder.samples / "step000002_00.png").read_bytes() for r in (last, average)]
    assert pictures[0] != pictures[1]
    assert last.curve("loss") == average.curve("loss")


def test_bfloat16_weights_are_averaged_in_float32() -> None:
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    ema = Ema({"weight": weight}, 0.9999)
    ema.step = 10**9
    for _ in range(100):
        weight.data.fill_(1.0078125)  # the next bfloat16 after 1
        ema.update()
    expected = 1.0078125 - 0.0078125 * 0.9999**100
    assert ema.values["weight"].tolist() == pytest.approx([expected] * 4, abs=5e-6)
