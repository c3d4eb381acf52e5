"""Previews: the pipeline's own pictures, the same however the run is cut, no trace in training."""

import io
from pathlib import Path

import av
import pytest
import torch
from diffusion_trainer.models import families
from diffusion_trainer.train import main
from diffusion_trainer.utils.config import SettingsError, write_toml
from diffusion_trainer.utils.run_folder import RunFolder
from diffusion_trainer.utils.samples import save
from diffusion_trainer.utils.settings import family_of, parse_train_settings
from PIL import Image
from training import Bench, Result, StopsAfter

CPU = torch.device("cpu")
SAMPLE = {"prompts": ["a red cat", "a dog"], "width": 62, "height": 32, "steps": 2, "seed": 5, "guidance": 3.0}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def drawn(bench: Bench) -> Result:
    """Two epochs of four steps with dropout, drawn before the first step, after 3 and 6, and after each epoch."""
    return bench.train(
        epochs=2, adapter={"dropout": 0.1}, sample={**SAMPLE, "every_n_steps": 3, "every_n_epochs": 1},
        save_every_n_steps=6,
    )  # fmt: skip


def test_pictures_are_everywhere(drawn: Result) -> None:
    files = sorted(file.name for file in drawn.folder.samples.iterdir())
    assert files == [f"step{step:06d}_{n:02d}.png" for step in (0, 3, 4, 6, 8) for n in (0, 1)]
    assert drawn.status.samples == [str(drawn.folder.samples / name) for name in files[-2:]]
    assert drawn.status.samples_step == 8
    for number in (0, 1):
        images = drawn.events().Images(f"samples/{number:02d}")
        assert [image.step for image in images] == [0, 3, 4, 6, 8]
        with (
            Image.open(io.BytesIO(images[-1].encoded_image_string)) as shown,
            Image.open(drawn.status.samples[number]) as kept,
        ):
            assert shown.size == kept.size == (64, 32)
            assert shown.tobytes() == kept.tobytes()
    texts = [Path(file).read_bytes() for file in sorted(drawn.folder.samples.iterdir())]
    assert texts[0] != texts[1], "two prompts, two pictures"
    assert texts[0] != texts[-2], "training changes what is drawn"


def test_training_is_the_same_without(bench: Bench, drawn: Result) -> None:
    plain = bench.train(epochs=2, adapter={"dropout": 0.1})
    assert plain.curve("loss") == drawn.curve("loss")
    assert all(torch.equal(value, drawn.lora()[key]) for key, value in plain.lora().items())
    assert not plain.folder.samples.exists()


def test_a_preview_is_what_diffusers_draws_with_the_exported_lora(bench: Bench, drawn: Result) -> None:
    family = family_of(parse_train_settings(bench.settings()))
    pipeline = family.pipeline(family.load_denoiser(CPU), CPU)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(drawn.folder.path / "step6", weight_name="adapter_model.safetensors")
    for number, prompt in enumerate(SAMPLE["prompts"]):
        expected = pipeline(
            prompt, width=64, height=32, num_inference_steps=2, guidance_scale=3.0, max_sequence_length=32,
            generator=torch.Generator().manual_seed(5),
        ).images[0]  # fmt: skip
        with Image.open(drawn.folder.samples / f"step000006_{number:02d}.png") as picture:
            difference = torch.tensor(list(picture.tobytes())).sub(torch.tensor(list(expected.tobytes()))).abs()
        assert difference.max() <= 1, "a rounding, as the LoRA is added in another order"


def test_stages_and_ranks_draw_and_measure_the_same(bench: Bench, drawn: Result) -> None:
    config = {"resolutions": [64], "directory": [{"path": str(bench.pictures)}]}
    sets = {"eval_datasets": [{"name": "all", "config": config}]}
    changes = {"epochs": 2, "max_steps": 3, "adapter": {"target_modules": ["to_q", "x_embedder", "proj_out"]}}
    changes |= {"sample": {**SAMPLE, "every_n_steps": 3}, "eval_every_n_steps": 3, **sets}
    alone = bench.train(**changes)
    spread = bench.launch(
        4, pipeline_stages=2, micro_batch_size_per_gpu=1, gradient_accumulation_steps=1, timeout=240, **changes
    )
    assert spread.points("all/loss") == pytest.approx(alone.points("all/loss"), rel=1e-5)
    assert spread.places("all/loss") == [0, 3]
    for file in sorted(alone.folder.samples.iterdir()):
        with Image.open(file) as one, Image.open(spread.folder.samples / file.name) as other:
            difference = torch.tensor(list(one.tobytes())).sub(torch.tensor(list(other.tobytes()))).abs()
        assert difference.max() <= 1, file.name


def test_drawn_on_demand(bench: Bench) -> None:
    folder = StopsAfter(RunFolder.create(bench.root / "out").path, 2, commands=("sample",))
    result = bench.train(folder, max_steps=4, sample={**SAMPLE, "before_first_step": False})
    assert [Path(file).name for file in result.status.samples] == ["step000002_00.png", "step000002_01.png"]
    assert result.status.state == "finished"


def test_float8_weights_draw_in_their_models_precision(bench: Bench) -> None:
    result = bench.train(
        max_steps=1, model={"dtype": "bfloat16", "transformer_dtype": "float8"}, sample={**SAMPLE, "every_n_steps": 1}
    )
    assert len(list(result.folder.samples.iterdir())) == 4


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (
            {"images": ["/a.png", "/b.png", "/c.png"]},
            "sample.images: give one for all prompts or one for each of the 2",
        ),
        ({"images": ["/nowhere.png"]}, "sample.images: '/nowhere.png' is not a file"),
        ({"steps": 0}, "sample.steps: must be at least 1, got 0"),
    ],
)
def test_wrong_tables_are_refused(bench: Bench, sample: dict, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        bench.train(sample={**SAMPLE, **sample})
    assert message in str(caught.value)


@pytest.mark.parametrize(("kind", "takes"), [("flux", True), ("sdxl", False), ("wan", False)])
def test_pictures_that_a_model_would_ignore_are_refused_with_the_settings(
    kind: str, takes: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"model": families()[kind].write_miniature(tmp_path / "model"), "adapter": {"type": "lora"},
              "optimizer": {"type": "adamw", "lr": 1e-4},
              "sample": {"prompts": ["a ball"], "images": ["/first.png"], "every_n_epochs": 1}}  # fmt: skip
    write_toml(tmp_path / "train.toml", values)
    assert main(["--config", str(tmp_path / "train.toml"), "--check_config"]) == (0 if takes else 2)
    said = capsys.readouterr().err
    assert ("draws from prompts alone and starts from no picture; leave images out" in said) != takes


def test_clips_are_videos(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (64, 32), (20 * n, 200 - 10 * n, 30)) for n in range(9)]
    (file,) = save([frames], tmp_path / "samples", "step000001", 16.0)
    assert file.name == "step000001_00.mp4"
    with av.open(str(file)) as container:
        decoded = list(container.decode(video=0))
        assert float(container.streams.video[0].average_rate) == 16.0
    assert len(decoded) == 9
    colour = decoded[6].to_ndarray(format="rgb24").mean(axis=(0, 1))
    assert colour == pytest.approx([120, 140, 30], abs=6)


def test_swapped_blocks_draw_and_measure_the_same(bench: Bench, drawn: Result) -> None:
    config = {"resolutions": [64], "directory": [{"path": str(bench.pictures)}]}
    changes = {
        "epochs": 1, "adapter": {"dropout": 0.1}, "sample": {**SAMPLE, "every_n_steps": 3}, "blocks_to_swap": 4,
        "eval_datasets": [{"name": "all", "config": config}], "eval_every_n_steps": 2,
    }  # fmt: skip
    swapped, stays = bench.train(**changes), bench.train(**changes, disable_block_swap_for_eval=True)
    assert swapped.curve("loss") == stays.curve("loss") == drawn.curve("loss")[:4]
    assert swapped.points("all/loss") == stays.points("all/loss")
    for file in swapped.folder.samples.iterdir():
        assert file.read_bytes() == (drawn.folder.samples / file.name).read_bytes()
