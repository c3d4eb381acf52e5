"""Training all weights: precision, freezing, export and resume."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from diffusion_trainer.models import families
from diffusion_trainer.models.base import Family
from diffusion_trainer.models.flux import to_bfl
from diffusion_trainer.utils.checkpoint import newest_checkpoint
from diffusion_trainer.utils.config import SettingsError
from diffusion_trainer.utils.run_folder import RunFolder
from diffusion_trainer.utils.settings import family_of, parse_train_settings
from safetensors.torch import load_file
from torch import nn
from training import Bench, Result, StopsAfter

CPU = torch.device("cpu")
EXPORTED_AS = {
    "flux": "transformer_path",
    "flux2": "diffusion_model",
    "ltx-video": "single_file_path",
    "sdxl": "checkpoint_path",
    "z_image": "diffusion_model",
}
"""The option of each family that takes an exported model; others call it transformer_path, too."""
FULL: dict[str, Any] = {"adapter": None, "optimizer": {"lr": 1e-3}, "epochs": 2}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def plain(bench: Bench) -> Result:
    return bench.train(**FULL)


def masters(result: Result) -> dict[str, torch.Tensor]:
    """What the last checkpoint holds, by name."""
    parts = [load_file(file) for file in newest_checkpoint(result.folder).glob("weights-*.safetensors")]
    return {name: value for part in parts for name, value in part.items()}


def untrained(bench: Bench) -> nn.Module:
    return family_of(parse_train_settings(bench.settings(**FULL))).load_denoiser(CPU)


def test_all_weights_move_and_the_loss_falls(bench: Bench, plain: Result) -> None:
    trained, before = masters(plain), dict(untrained(bench).named_parameters())
    assert trained.keys() == before.keys()
    moved = [name for name, value in trained.items() if not torch.equal(value, before[name])]
    assert len(moved) > 0.95 * len(before)  # biases that softmax cancels may stay
    losses = bench.train(**{**FULL, "epochs": 20}).curve("epoch_loss")
    assert sum(losses[-4:]) < 0.97 * sum(losses[:4])


@pytest.mark.parametrize("kind", ["adamw", "adamw_optimi"], ids=["float32 masters", "Kahan sums"])
def test_bfloat16_weights_keep_what_single_steps_would_lose(bench: Bench, kind: str) -> None:
    """Many steps far below bfloat16's resolution add up as they do in float32."""
    small: dict[str, Any] = {
        "adapter": None,
        "epochs": 12,
        "optimizer": {"type": kind, "lr": 2e-6, "weight_decay": 0.0},
    }
    exact, rounded = bench.train(**small), bench.train(**small, model={"dtype": "bfloat16"}, save_dtype="bfloat16")
    before = dict(untrained(bench).named_parameters())
    export = load_file(newest_export(rounded))
    assert {value.dtype for value in export.values()} == {torch.bfloat16}
    far = {name: (value - before[name]).norm().item() for name, value in masters(exact).items()}
    ours = masters(rounded)
    if kind == "adamw_optimi":  # the checkpoint's weights are bfloat16, the rest is in the optimizer's state
        rest = load_file(next(newest_checkpoint(rounded.folder).glob("optimizer-*.safetensors")))
        ours = {name: value.float() + rest[f"{name}|kahan_comp"].float() for name, value in ours.items()}
    moves = torch.tensor(
        [(ours[name].float() - before[name]).norm().item() / far[name] for name in far if far[name] > 1e-6]
    )
    assert 0.8 < moves.median() < 1.2


def newest_export(result: Result) -> Path:
    return Path(result.status.exports[-1]) / "model.safetensors"


@pytest.mark.parametrize("changes", [{}, {"model": {"dtype": "bfloat16"}}, {"optimizer": {"type": "adamw_optimi"},
                         "model": {"dtype": "bfloat16"}}], ids=["float32", "masters", "Kahan"])  # fmt: skip
def test_resumed_equals_uninterrupted(bench: Bench, changes: dict[str, Any]) -> None:
    settings = {**FULL, **changes, "optimizer": {**FULL["optimizer"], **changes.get("optimizer", {})}}
    whole = bench.train(**settings)
    folder = StopsAfter(RunFolder.create(bench.root / "out").path, 3)
    assert bench.train(folder, **settings).status.state == "stopped"
    resumed = bench.train(RunFolder(folder.path), resume=True, **settings)
    assert resumed.curve("loss") == whole.curve("loss")
    one, other = load_file(newest_export(whole)), load_file(newest_export(resumed))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_accumulated_micro_batches_equal_one_batch(bench: Bench, plain: Result) -> None:
    result = bench.train(**FULL, micro_batch_size_per_gpu=1, gradient_accumulation_steps=2)
    assert result.curve("loss") == pytest.approx(plain.curve("loss"), rel=1e-4)


def test_stages_and_ranks_change_nothing_and_export_the_same_file(bench: Bench, plain: Result) -> None:
    cut = bench.launch(2, **FULL, pipeline_stages=2, micro_batch_size_per_gpu=1, gradient_accumulation_steps=2)
    assert cut.curve("loss") == pytest.approx(plain.curve("loss"), rel=1e-4)
    assert cut.curve("grad_norm") == pytest.approx(plain.curve("grad_norm"), rel=1e-4)
    one, other = load_file(newest_export(plain)), load_file(newest_export(cut))
    assert one.keys() == other.keys()


@pytest.mark.parametrize("name", sorted(families()))
def test_export_reproduces_the_trainers_prediction(name: str, tmp_path: Path) -> None:
    bench = Bench(tmp_path, name)
    result = bench.train(**{**FULL, "epochs": 1})
    settings = parse_train_settings(bench.settings(**FULL))
    trained = family_of(settings).load_denoiser(CPU)
    ours = masters(result)
    for parameter_name, parameter in trained.named_parameters():
        if parameter_name in ours:  # the others are never trained
            parameter.data.copy_(ours[parameter_name])
    option = EXPORTED_AS.get(name, "transformer_path")
    exported = parse_train_settings(bench.settings(**FULL, model={option: str(newest_export(result))}))
    loaded = family_of(exported).load_denoiser(CPU)
    for parameter_name, parameter in loaded.named_parameters():
        torch.testing.assert_close(
            parameter.data, dict(trained.named_parameters())[parameter_name].data, rtol=0, atol=0
        )


def test_flux_export_has_the_names_that_diffusers_reads() -> None:
    """At the real width, which diffusers' conversion takes for granted, without memory."""
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    expected = dict(model.named_parameters())
    read = convert_flux_transformer_checkpoint_to_diffusers(to_bfl(expected))
    assert {name: value.shape for name, value in read.items()} == {n: p.shape for n, p in expected.items()}


def test_patterns_choose_what_is_trained(bench: Bench) -> None:
    result = bench.train(**{**FULL, "epochs": 1}, train_only=[r"^transformer_blocks\."], freeze=["norm", "to_k"])
    assert masters(result)
    assert all(
        name.startswith("transformer_blocks.") and "norm" not in name and "to_k" not in name for name in masters(result)
    )
    assert (
        load_file(newest_export(result)).keys() == load_file(newest_export(bench.train(**{**FULL, "epochs": 1}))).keys()
    )


def test_learning_rates_by_pattern(bench: Bench) -> None:
    rates = {r"\.to_q\.": 0.0, "^transformer_blocks": 1e-8}
    result = bench.train(**{**FULL, "epochs": 1}, learning_rates=rates)
    trained, before = masters(result), dict(untrained(bench).named_parameters())
    assert not any(".to_q." in name for name in trained)
    moved = {name: (value - before[name]).abs().max().item() for name, value in trained.items()}
    assert max(move for name, move in moved.items() if name.startswith("transformer_blocks")) < 1e-6
    assert max(move for name, move in moved.items() if name.startswith("single_transformer_blocks")) > 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"freeze": ["nowhere"]}, "freeze: 'nowhere' is found in no weight's name"),
        ({"freeze": ["("]}, r"freeze: '\(' is not a regular expression"),
        ({"freeze": ["."]}, "nothing is left to train"),
        ({"model": {"dtype": "float16"}}, "model.dtype: float16"),
        ({"model": {"transformer_dtype": "float8"}}, "model.transformer_dtype: all weights are trained"),
        ({"adapter": {"type": "lora"}, "freeze": ["norm"]}, "freeze: chooses among all weights"),
    ],
)
def test_refusals(bench: Bench, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        bench.train(**{**FULL, **changes})


def test_other_tensors_lie_in_the_same_file(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    kind: type[Family] = families()["flux"]
    monkeypatch.setattr(kind, "other_tensors", lambda self, names: {"vae.some": torch.arange(3)})
    result = bench.train(**{**FULL, "max_steps": 1})
    assert load_file(newest_export(result))["vae.some"].tolist() == [0, 1, 2]
