"""Eval sets: every sample once at each noise level, the same numbers however the run is cut, no trace in training."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusion_trainer.models.base import Example
from diffusion_trainer.utils.adapters import inject
from diffusion_trainer.utils.cache import View
from diffusion_trainer.utils.config import SettingsError, read_toml, write_toml
from diffusion_trainer.utils.randomness import generator
from diffusion_trainer.utils.run_folder import RunFolder
from diffusion_trainer.utils.settings import family_of, parse_train_settings
from diffusion_trainer.utils.trainer import Trainer
from training import Bench, Result, world, write_pictures

NAMES = [f"held-out/loss_quantile_{n / 10:.2f}" for n in range(1, 10)]


class EvalBench(Bench):
    """A bench with five held-out pictures of two shapes."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.held_out = write_pictures(root / "held-out", 5)

    def settings(self, **changes):
        config = {"resolutions": [64], "directory": [{"path": str(self.held_out)}]}
        sets = {"eval_datasets": [{"name": "held-out", "config": config}], "eval_every_n_steps": 3}
        return super().settings(**{"epochs": 2, **sets, **changes})


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> EvalBench:
    return EvalBench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def measured(bench: EvalBench) -> Result:
    """Two epochs of four steps, measured before the first step and after 3 and 6."""
    return bench.train()


def test_curves_and_status(measured: Result) -> None:
    assert measured.places("held-out/loss") == [0, 3, 6]
    for name in NAMES:
        assert measured.places(name) == [0, 3, 6]
    means = [sum(points) / 9 for points in zip(*(measured.points(name) for name in NAMES), strict=True)]
    assert measured.points("held-out/loss") == pytest.approx(means, rel=1e-6)
    assert measured.status.eval_losses == {"held-out": pytest.approx(measured.points("held-out/loss")[-1])}
    assert measured.status.eval_step == 6
    levels = [measured.points(name)[0] for name in NAMES]
    assert len(set(levels)) == 9, "each noise level has a loss of its own"


def test_training_is_the_same_without(bench: EvalBench, measured: Result) -> None:
    plain = bench.train(eval_datasets=[], adapter={"dropout": 0.1})
    with_dropout = bench.train(adapter={"dropout": 0.1})
    assert with_dropout.curve("loss") == plain.curve("loss")
    assert all(torch.equal(value, with_dropout.lora()[key]) for key, value in plain.lora().items())
    assert with_dropout.points("held-out/loss")[0] == measured.points("held-out/loss")[0], "no dropout in evaluation"


def test_the_first_numbers_depend_on_model_and_set_alone(bench: EvalBench, measured: Result) -> None:
    other = bench.train(
        seed=8, max_steps=1, micro_batch_size_per_gpu=3, gradient_accumulation_steps=2, eval_micro_batch_size_per_gpu=4
    )
    for name in ("held-out/loss", *NAMES):
        assert other.points(name)[0] == pytest.approx(measured.points(name)[0], rel=1e-5), name


def test_the_loss_is_that_of_every_sample(bench: EvalBench, measured: Result) -> None:
    settings = parse_train_settings(bench.settings())
    family = family_of(settings)
    denoiser = inject(family.load_denoiser(torch.device("cpu")), family, settings.adapter, 0)
    folder = RunFolder.create(bench.root / "out")
    trainer = Trainer(settings, bench.parsed_dataset(), world(), folder)
    cache = trainer.preparation.run().eval_sets["held-out"]
    assert len(cache.samples) == 5
    losses = []
    for sample in cache.samples:
        value = cache.load(sample, View(sample.captions[0]))
        noise = torch.randn(value.media["latents"].shape, generator=generator("evaluation", sample.key, 0.3))
        batch = family.collate([Example(value.media, value.text, noise, 0.3)])
        tensors = batch.inputs
        with torch.no_grad():
            for layer in family.layers(denoiser):
                tensors = layer.forward(SimpleNamespace(**layer.submodules), *tensors)
        losses.append(torch.nn.functional.mse_loss(tensors, batch.target).item())
    assert measured.points(NAMES[2])[0] == pytest.approx(sum(losses) / 5, rel=1e-5)


def test_intervals_in_epochs_and_examples(bench: EvalBench) -> None:
    result = bench.train(
        eval_every_n_steps=None, eval_every_n_epochs=2, eval_every_n_examples=5, eval_before_first_step=False,
        x_axis_examples=True,
    )  # fmt: skip
    # Four steps of 2, 1, 2 and 1 pictures in some order: the fillers of the halves do not count.
    places = result.places("held-out/loss")
    assert places[-1] == 12
    assert [place // 5 for place in places] == [1, 2, 2]
    assert result.places("train/loss")[-1] == 12


def test_files_of_settings(bench: EvalBench, tmp_path: Path) -> None:
    write_toml(tmp_path / "eval.toml", {"resolutions": [64], "directory": [{"path": str(bench.held_out)}]})
    result = bench.train(eval_datasets=[str(tmp_path / "eval.toml")], max_steps=1)
    assert result.places("eval/loss") == [0]
    (tmp_path / "eval.toml").unlink()
    kept = parse_train_settings(read_toml(result.folder.train_toml))
    assert kept.eval_datasets[0].config["directory"][0]["path"] == str(bench.held_out), "the folder needs no other file"


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ([{"name": "a", "config": {"directory": [{"pth": "/d"}]}}], "[0].config: directory[0].path: required"),
        ([{"name": "a", "config": "/nowhere.toml"}], "eval_datasets[0].config: /nowhere.toml: cannot be read"),
        ([{"name": "a", "config": {"directory": [{"path": "/nowhere"}]}}], "eval_datasets: a: directory[0].path"),
        ([{"config": "a.toml"}], "eval_datasets[0].name: required"),
    ],
)  # fmt: skip
def test_wrong_sets_are_refused(bench: EvalBench, sets: list, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        bench.train(eval_datasets=sets)
    assert message in str(caught.value)
