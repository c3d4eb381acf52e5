"""ZeRO: what ranks share out changes nothing but who holds it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusion_trainer.models import families
from diffusion_trainer.utils.checkpoint import newest_checkpoint
from diffusion_trainer.utils.config import SettingsError
from diffusion_trainer.utils.run_folder import RunFolder
from PIL import Image
from safetensors.torch import load_file
from training import Bench, Result

FULL: dict[str, Any] = {"adapter": None, "optimizer": {"lr": 1e-3}, "epochs": 2}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("zero"))


SAMPLE: dict[str, Any] = {
    "sample": {"prompts": ["a ball", "a cat", "a dog"], "width": 64, "height": 64, "steps": 2, "every_n_steps": 2}
}


@pytest.fixture(scope="module")
def plain(bench: Bench) -> Result:
    return bench.train(**FULL, **SAMPLE)


def export(result: Result) -> dict[str, torch.Tensor]:
    return load_file(Path(result.status.exports[-1]) / "model.safetensors")


def assert_equal(result: Result, plain: Result) -> None:
    assert result.curve("loss") == pytest.approx(plain.curve("loss"), rel=1e-4)
    assert result.curve("grad_norm") == pytest.approx(plain.curve("grad_norm"), rel=1e-4)
    one, other = export(plain), export(result)
    assert one.keys() == other.keys()
    for name, value in one.items():
        # Adam's first steps go by a gradient's sign, which rounding decides where it is all but zero
        assert (other[name] - value).abs().mean() < 2e-5, name


def assert_drawn_alike(result: Result, plain: Result) -> None:
    """Before the first step, where weights are the same, to a rounding; later as nearly as weights are."""
    names = sorted(file.name for file in result.folder.samples.iterdir())
    assert {name[:10] for name in names} >= {"step000000", "step000002", "step000004"}
    assert len(names) % len(SAMPLE["sample"]["prompts"]) == 0
    for name in names:
        with Image.open(result.folder.samples / name) as ours, Image.open(plain.folder.samples / name) as theirs:
            difference = torch.tensor(list(ours.tobytes())).sub(torch.tensor(list(theirs.tobytes()))).abs()
        assert difference.max() <= (1 if name.startswith("step000000") else 8), name


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_one_process_is_a_group_of_one(bench: Bench, plain: Result, stage: int) -> None:
    result = bench.train(**FULL, **SAMPLE, zero_stage=stage)
    assert_equal(result, plain)
    assert_drawn_alike(result, plain)


def test_weights_kept_in_float32_are_not_shared_out(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families()["flux"], "float32", ("norm_q",))
    half: dict[str, Any] = {**FULL, "model": {"dtype": "bfloat16"}, "epochs": 1, "save_dtype": "bfloat16"}
    plain, shared = bench.train(**half), bench.train(**half, zero_stage=3)
    assert shared.curve("loss") == pytest.approx(plain.curve("loss"), rel=1e-3)
    for result in (plain, shared):
        kept = {name for name, value in export(result).items() if value.dtype == torch.float32}
        assert "double_blocks.0.img_attn.norm.query_norm.scale" in kept
        assert "final_layer.linear.weight" not in kept


@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_two_ranks_equal_one_and_go_on_as_one(bench: Bench, plain: Result, stage: int) -> None:
    """Stops after half of the steps; the checkpoint is taken up by one process."""
    settings = {**FULL, "zero_stage": stage, "micro_batch_size_per_gpu": 1}
    folder = RunFolder.create(bench.root / "out")
    first = bench.launch(2, folder=folder, **settings, **SAMPLE, max_steps=4)
    assert first.status.step == 4
    assert_drawn_alike(first, plain)
    parts = sorted(file.name for file in newest_checkpoint(folder).glob("weights-*"))
    assert parts == (
        ["weights-0-0.safetensors", "weights-0-1.safetensors"] if stage == 1 else ["weights-0-0.safetensors"]
    )
    assert_equal(bench.train(RunFolder(folder.path), resume=True, **FULL), plain)


@pytest.mark.parametrize("family", ["sdxl", "wan"])
def test_other_families_draw_with_shared_weights(tmp_path: Path, family: str) -> None:
    """Wan's own forward uses a parameter itself; SDXL's denoiser is several networks."""
    bench = Bench(tmp_path, family)
    options: dict[str, Any] = {**FULL, **SAMPLE, "epochs": 1, "max_steps": 1}
    plain, shared = bench.train(**options), bench.train(**options, zero_stage=3)
    for file in plain.folder.samples.iterdir():
        assert file.read_bytes() == (shared.folder.samples / file.name).read_bytes()


@pytest.mark.slow
def test_two_ranks_take_up_what_one_left(bench: Bench, plain: Result) -> None:
    """A checkpoint of one process is taken up by two ranks, of ZeRO 3 and bfloat16."""
    folder = RunFolder.create(bench.root / "out")
    half: dict[str, Any] = {**FULL, "model": {"dtype": "bfloat16"}}
    whole = bench.train(**half)
    bench.train(folder, **half, max_steps=4)
    resumed = bench.launch(2, folder=folder, resume=True, **half, zero_stage=3, micro_batch_size_per_gpu=1)
    assert resumed.curve("loss") == pytest.approx(whole.curve("loss"), rel=2e-2)
    assert export(resumed).keys() == export(plain).keys()


@pytest.mark.slow
def test_four_ranks_in_two_stages(bench: Bench, plain: Result) -> None:
    settings = {**FULL, "zero_stage": 1, "pipeline_stages": 2, "micro_batch_size_per_gpu": 1}
    assert_equal(bench.launch(4, **settings, timeout=300), plain)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": {"type": "lora"}}, "zero_stage: 3 does not go together with an adapter"),
        ({"pipeline_stages": 2}, "zero_stage: 3 does not go together with pipeline_stages"),
        ({"optimizer": {"type": "Adafactor"}}, "optimizer.type: Adafactor looks at whole matrices"),
    ],
)
def test_refusals(bench: Bench, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        bench.train(**{**FULL, **changes}, zero_stage=3)


@pytest.mark.parametrize("stage", [2, 3])
def test_eval_sets_see_the_average_of_shared_weights_and_leave_no_trace(bench: Bench, stage: int) -> None:
    config = {"resolutions": [64], "directory": [{"path": str(bench.pictures)}]}
    looks: dict[str, Any] = {
        "ema_decay": 0.5, "eval_datasets": [{"name": "all", "config": config}], "eval_every_n_steps": 2,
    }  # fmt: skip
    options: dict[str, Any] = {**FULL, "epochs": 1}
    plain, whole = bench.train(**options, zero_stage=stage), bench.train(**options, **looks)
    shared = bench.train(**options, **looks, zero_stage=stage)
    assert shared.curve("loss") == plain.curve("loss")
    assert shared.points("all/loss") == pytest.approx(whole.points("all/loss"), rel=1e-4)
