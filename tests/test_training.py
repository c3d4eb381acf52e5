"""One training, however it is cut: into ranks, stages, micro-batches, or by stopping and resuming."""

from pathlib import Path

import pytest
import torch
from diffusion_trainer.utils.adapted import adapted_layers
from diffusion_trainer.utils.adapters import inject
from diffusion_trainer.utils.config import SettingsError
from diffusion_trainer.utils.run_folder import RunFolder
from diffusion_trainer.utils.settings import family_of, parse_train_settings
from training import Bench, Result, StopsAfter


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def plain(bench: Bench) -> Result:
    """The training that all others must equal: 4 epochs of 4 steps, one process."""
    return bench.train()


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], **tolerance: float) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        torch.testing.assert_close(
            other[key], value, msg=lambda text, key=key: f"{key}: {text}", **(tolerance or {"rtol": 0, "atol": 0})
        )


def test_loss_falls_and_everything_is_there(plain: Result) -> None:
    assert plain.status.state == "finished"
    assert plain.status.step == plain.status.total_steps == 16
    assert len(plain.curve("loss")) == 16
    assert len(plain.curve("epoch_loss")) == 4
    for name in ("lr", "grad_norm", "step_seconds", "samples_per_second"):
        assert len(plain.curve(name)) == 16, name
    folder = Path(plain.status.exports[-1])
    assert {p.name for p in folder.iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "train.toml",
        "dataset.toml",
    }
    assert plain.folder.latest.read_text() == "global_step16"


def test_overfits_one_picture(bench: Bench, tmp_path: Path) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    for name in ("0.png", "0.txt"):
        (folder / name).write_bytes((bench.pictures / name).read_bytes())
    result = bench.train(
        dataset={"resolutions": [64], "directory": [{"path": str(folder), "num_repeats": 8}]},
        epochs=60,
        micro_batch_size_per_gpu=8,
        adapter={"rank": 16, "target_modules": ["x_embedder", "proj_out", "ff.net.0.proj", "ff.net.2", "to_v"]},
        optimizer={"lr": 2e-2},
        activation_checkpointing=False,
    )
    losses = result.curve("epoch_loss")
    assert sum(losses[-5:]) / 5 < 0.7 * losses[0]


def test_same_seed_same_bits_other_seed_not(bench: Bench, plain: Result) -> None:
    assert_same(plain.lora(), bench.train().lora())
    assert bench.train(seed=8).curve("loss") != plain.curve("loss")


@pytest.mark.parametrize(
    "changes",
    [
        {"micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2},
        {"activation_checkpointing": False},
    ],
    ids=["accumulated", "no checkpointing"],
)
def test_micro_batches_and_checkpointing_change_nothing(bench: Bench, plain: Result, changes: dict) -> None:
    result = bench.train(**changes)
    assert result.curve("loss") == pytest.approx(plain.curve("loss"), rel=1e-5)
    assert_same(plain.lora(), result.lora(), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(
    ("processes", "changes"),
    [
        (2, {"micro_batch_size_per_gpu": 1}),
        (2, {"pipeline_stages": 2, "micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2}),
        (
            3,
            {
                "pipeline_stages": 3,
                "partition_method": "manual",
                "partition_split": [1, 5],
                "micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 2,
            },
        ),
    ],
    ids=["two ranks", "two stages", "three stages, the first without trainable weights"],
)
def test_ranks_and_stages_change_nothing(bench: Bench, plain: Result, processes: int, changes: dict) -> None:
    result = bench.launch(processes, **changes)
    assert result.curve("loss") == pytest.approx(plain.curve("loss"), rel=1e-5)
    assert result.curve("grad_norm") == pytest.approx(plain.curve("grad_norm"), rel=1e-4)
    assert_same(plain.lora(), result.lora(), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("family", ["flux", pytest.param("sdxl", marks=pytest.mark.slow), "wan"])
def test_bfloat16_learns_what_float32_does(tmp_path: Path, family: str) -> None:
    """The loss of each step depends on what the steps before it have learned."""
    bench = Bench(tmp_path, family)

    def mean_loss(dtype: str, rate: float) -> float:
        losses = bench.train(epochs=8, model={"dtype": dtype}, optimizer={"lr": rate}).curve("loss")[12:]
        return sum(losses) / len(losses)

    exact, rounded, none = mean_loss("float32", 0.02), mean_loss("bfloat16", 0.02), mean_loss("float32", 1e-9)
    assert exact < 0.97 * none
    assert abs(rounded - exact) < 0.2 * (none - exact)


@pytest.mark.parametrize("step", range(1, 16))
def test_stopped_and_resumed_equals_uninterrupted(bench: Bench, plain: Result, step: int) -> None:
    folder = StopsAfter(RunFolder.create(bench.root / "out").path, step, by_signal=step % 2 == 0 and step < 15)
    stopped = bench.train(folder)
    assert stopped.status.state == "stopped"
    assert stopped.status.checkpoint
    assert stopped.status.exports
    resumed = bench.train(RunFolder(folder.path), resume=True)
    assert resumed.status.state == "finished"
    assert resumed.curve("loss") == plain.curve("loss")
    assert resumed.curve("epoch_loss") == plain.curve("epoch_loss")
    assert_same(plain.lora(), resumed.lora())


def test_checkpoint_of_two_stages_resumes_in_one_process(bench: Bench, plain: Result) -> None:
    folder = RunFolder.create(bench.root / "out")
    first = bench.launch(2, folder=folder, pipeline_stages=2, max_steps=9)
    assert first.status.step == 9
    resumed = bench.train(RunFolder(folder.path), resume=True)
    assert resumed.curve("loss")[9:] == pytest.approx(plain.curve("loss")[9:], rel=1e-4)
    assert_same(plain.lora(), resumed.lora(), rtol=1e-3, atol=5e-5)


def test_save_command_leaves_lora_and_checkpoint_and_goes_on(bench: Bench) -> None:
    folder = StopsAfter(RunFolder.create(bench.root / "out").path, 3, commands=("save",))
    result = bench.train(folder)
    assert result.status.state == "finished"
    assert [Path(e).name for e in result.status.exports] == ["step3", "epoch4"]
    assert [c.name for c in folder.checkpoints()] == ["global_step3", "global_step16"]


def test_old_checkpoints_are_removed(bench: Bench) -> None:
    result = bench.train(checkpoint_every_n_epochs=1, checkpoints_to_keep=2)
    assert [c.name for c in result.folder.checkpoints()] == ["global_step12", "global_step16"]


def test_resume_refuses_another_rank(bench: Bench, plain: Result) -> None:
    with pytest.raises(SettingsError, match=r"adapter\.rank: the checkpoint was made with 4, not 8"):
        bench.train(RunFolder(plain.folder.path), resume=True, adapter={"rank": 8})


def test_starts_from_an_existing_lora(bench: Bench, plain: Result) -> None:
    result = bench.train(adapter={"init_from_existing": plain.status.exports[-1]}, optimizer={"lr": 0.0}, epochs=1)
    assert_same(plain.lora(), result.lora(), rtol=1e-6, atol=1e-8)


def test_lora_in_diffusers_predicts_as_in_training(bench: Bench, plain: Result) -> None:
    settings = parse_train_settings(bench.settings(adapter={"alpha": 2.0}))
    result = bench.train(adapter={"alpha": 2.0})
    family = family_of(settings)
    ours = inject(family.load_denoiser(torch.device("cpu")), family, settings.adapter, 0)
    for name, layer in adapted_layers(ours).items():
        for side, parameter in (("lora_A", layer.adapter.down), ("lora_B", layer.adapter.up)):
            parameter.data.copy_(result.lora()[f"{family.lora_keys(name)}.{side}.weight"])
    pipe = family.pipeline(family.load_denoiser(torch.device("cpu")), torch.device("cpu"))
    arguments = {"prompt": "a ball", "height": 64, "width": 64, "num_inference_steps": 2, "output_type": "pt"}
    before = pipe(**arguments, generator=torch.Generator().manual_seed(0)).images
    pipe.load_lora_weights(result.status.exports[-1], weight_name="adapter_model.safetensors")
    after = pipe(**arguments, generator=torch.Generator().manual_seed(0)).images
    trained = family.pipeline(ours, torch.device("cpu"))(**arguments, generator=torch.Generator().manual_seed(0)).images
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(after, trained, rtol=1e-4, atol=1e-5)
