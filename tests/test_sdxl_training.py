"""Trainings of SDXL: cut into stages, stopped and resumed, with and without its text encoders."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusion_trainer.models import unet
from diffusion_trainer.utils.adapters import inject
from diffusion_trainer.utils.run_folder import RunFolder
from diffusion_trainer.utils.settings import family_of, parse_train_settings
from PIL import Image
from safetensors.torch import load_file, save_file
from training import Bench, Result, StopsAfter

CPU = torch.device("cpu")
FROZEN = {"text_encoder_1_lr": 0.0, "text_encoder_2_lr": 0.0}
LONG = "red " * 90
SAMPLE = {"prompts": ["a red cat"], "every_n_epochs": 2, "width": 64, "height": 64, "steps": 2, "guidance": 4.0}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """With one caption of two pieces among the others."""
    bench = Bench(tmp_path_factory.mktemp("sdxl"), "sdxl")
    (bench.pictures / "1.txt").write_text(LONG)
    return bench


@pytest.fixture(scope="module")
def plain(bench: Bench) -> Result:
    """The training that others must equal: 2 epochs of 4 steps, all three networks adapted."""
    return bench.train(epochs=2, sample=SAMPLE)


def test_all_three_networks_learn(plain: Result) -> None:
    lora = plain.lora()
    for prefix in ("lora_unet_", "lora_te1_", "lora_te2_"):
        ups = {key: value for key, value in lora.items() if key.startswith(prefix) and key.endswith(".lora_up.weight")}
        assert ups, prefix
        moved = [key for key, value in ups.items() if value.abs().max() > 0]
        assert len(moved) == len(ups), sorted(ups.keys() - moved)


@pytest.mark.parametrize("stages", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_stages_change_nothing(bench: Bench, plain: Result, stages: int) -> None:
    """The states that wait for the way up travel between stages, and the text encoders are in the first; all draw."""
    changes = {"pipeline_stages": stages, "micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2}
    result = bench.launch(stages, epochs=2, sample=SAMPLE, **changes)
    assert result.curve("loss") == pytest.approx(plain.curve("loss"), rel=1e-4)
    assert result.curve("grad_norm") == pytest.approx(plain.curve("grad_norm"), rel=1e-3)
    ours, theirs = plain.lora(), result.lora()
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        torch.testing.assert_close(theirs[key], value, rtol=1e-2, atol=2e-4, msg=lambda text, key=key: f"{key}: {text}")

    pixels = [
        np.asarray(Image.open(run.folder.path / "samples/step000008_00.png")).astype(int) for run in (plain, result)
    ]
    assert abs(pixels[0] - pixels[1]).max() <= 2
    first = np.asarray(Image.open(plain.folder.path / "samples/step000000_00.png")).astype(int)
    assert abs(pixels[0] - first).max() > 2


@pytest.mark.parametrize("step", [1, 5])
def test_stopped_and_resumed_equals_uninterrupted(bench: Bench, plain: Result, step: int) -> None:
    folder = StopsAfter(RunFolder.create(bench.root / "out").path, step)
    assert bench.train(folder, epochs=2).status.state == "stopped"
    resumed = bench.train(RunFolder(folder.path), resume=True, epochs=2)
    assert resumed.curve("loss") == plain.curve("loss")
    ours, theirs = plain.lora(), resumed.lora()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_checkpointing_changes_nothing(bench: Bench, plain: Result) -> None:
    result = bench.train(epochs=2, activation_checkpointing=False)
    assert result.curve("loss") == pytest.approx(plain.curve("loss"), rel=1e-5)


def test_frozen_text_encoders_are_not_adapted_and_give_the_same_first_loss(bench: Bench, plain: Result) -> None:
    result = bench.train(epochs=2, model=FROZEN)
    assert all(key.startswith("lora_unet_") for key in result.lora())
    assert result.curve("loss")[0] == pytest.approx(plain.curve("loss")[0], rel=1e-5)
    assert result.curve("loss")[-1] != pytest.approx(plain.curve("loss")[-1], rel=1e-5)


def test_each_network_has_its_learning_rate(bench: Bench) -> None:
    lora = bench.train(
        max_steps=1, model={"unet_lr": 1e-3, "text_encoder_1_lr": 1e-4, "text_encoder_2_lr": 1e-5}
    ).lora()
    for prefix, rate in (("lora_unet_", 1e-3), ("lora_te1_", 1e-4), ("lora_te2_", 1e-5)):
        ups = [v.abs().max().item() for k, v in lora.items() if k.startswith(prefix) and k.endswith("lora_up.weight")]
        assert max(ups) == pytest.approx(rate, rel=1e-3)  # Adam's first step


def test_a_unet_that_is_frozen_gets_no_adapter(bench: Bench) -> None:
    result = bench.train(max_steps=4, model={"unet_lr": 0.0})
    assert {key.split("_")[1] for key in result.lora()} == {"te1", "te2"}
    ups = [value for key, value in result.lora().items() if key.endswith("lora_up.weight")]
    assert all(value.abs().max() > 0 for value in ups)


def test_swapped_blocks_change_nothing(bench: Bench, plain: Result) -> None:
    assert bench.train(epochs=2, blocks_to_swap=6).curve("loss") == pytest.approx(plain.curve("loss"), rel=1e-5)


def test_lora_in_diffusers_predicts_as_in_training(bench: Bench, plain: Result) -> None:
    settings = parse_train_settings(bench.settings(adapter={"init_from_existing": plain.status.exports[-1]}))
    family = family_of(settings)
    ours = inject(family.load_denoiser(CPU), family, settings.adapter, 0)
    pipe = family.pipeline(family.load_denoiser(CPU), CPU)
    before = picture(pipe)
    pipe.load_lora_weights(plain.status.exports[-1], weight_name="adapter_model.safetensors")
    after, trained = picture(pipe), picture(family.pipeline(ours, CPU))
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(after, trained, rtol=1e-4, atol=1e-5)


def picture(pipeline: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"prompt": "a ball", "height": 64, "width": 64, "num_inference_steps": 2, "output_type": "pt"}
    return pipeline(**arguments, generator=torch.Generator().manual_seed(0)).images


@pytest.mark.parametrize("spelling", ["as exported", "original names"])
def test_starts_from_kohyas_files(bench: Bench, plain: Result, tmp_path: Path, spelling: str) -> None:
    """kohya-ss names the layers of SDXL's U-Net as the original file does."""
    family = family_of(parse_train_settings(bench.settings()))
    names = [name for name, _ in family.build_denoiser()["unet"].named_modules()]
    lora = plain.lora()
    if spelling == "original names":
        renamed = {}
        for name in names:
            for key in [key for key in lora if key.startswith(f"lora_unet_{name.replace('.', '_')}.")]:
                ending = key.split(".", 1)[1]
                flat = unet.original_name(name, family._unet_config).replace(".", "_")
                renamed[f"lora_unet_{flat}.{ending}"] = lora[key]
        assert len(renamed) == len([key for key in lora if key.startswith("lora_unet_")])
        lora = renamed | {key: value for key, value in lora.items() if not key.startswith("lora_unet_")}
    save_file(lora, tmp_path / "lora.safetensors")
    again = bench.train(
        adapter={"init_from_existing": str(tmp_path / "lora.safetensors")}, max_steps=1, optimizer={"lr": 0.0}
    ).lora()
    assert again.keys() == plain.lora().keys()
    for key, value in plain.lora().items():
        torch.testing.assert_close(again[key], value)


@pytest.mark.parametrize("v_pred", [False, True])
def test_overfits_one_picture(bench: Bench, tmp_path: Path, v_pred: bool) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    for name in ("0.png", "0.txt"):
        (folder / name).write_bytes((bench.pictures / name).read_bytes())
    losses = bench.train(
        dataset={"resolutions": [64], "directory": [{"path": str(folder), "num_repeats": 8}]},
        epochs=60, micro_batch_size_per_gpu=8, adapter=None, optimizer={"lr": 1e-2}, activation_checkpointing=False,
        model={**FROZEN, "v_pred": v_pred, "min_snr_gamma": 5.0},
    ).curve("epoch_loss")  # fmt: skip
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])


def test_a_model_with_trained_text_encoders_draws_in_diffusers(bench: Bench) -> None:
    result = bench.train(adapter=None, max_steps=2, optimizer={"lr": 1e-3})
    file = Path(result.status.exports[-1]) / "model.safetensors"
    pipeline = StableDiffusionXLPipeline.from_single_file(
        str(file),
        config=str(bench.root / "model"),
        local_files_only=True,
        add_watermarker=False,
        torch_dtype=torch.float32,
    )
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a cat", height=32, width=32, num_inference_steps=1).images[0].size == (32, 32)
    before = StableDiffusionXLPipeline.from_pretrained(bench.root / "model", add_watermarker=False)
    for part in ("unet", "text_encoder", "text_encoder_2"):
        states = [getattr(one, part).state_dict() for one in (pipeline, before)]
        same = [name for name, value in states[0].items() if torch.equal(value.float(), states[1][name].float())]
        unused = ("layers.1.", "final_layer_norm") if part == "text_encoder" else ()
        assert len(same) == sum(any(name in key for name in unused) for key in states[0]), part
    unused = "conditioner.embedders.0.transformer.text_model.encoder.layers.1.mlp.fc1.weight"
    assert unused in load_file(file)
