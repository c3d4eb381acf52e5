"""Trainings of Qwen-Image with edit datasets: control pictures are seen twice, and nothing that saves memory changes
what is learned."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusion_trainer.utils.dataset_settings import parse_dataset_settings
from diffusion_trainer.utils.planning import make_plan
from diffusion_trainer.utils.settings import parse_train_settings
from PIL import Image
from safetensors.torch import load_file
from test_kontext import EditBench
from test_training import assert_same
from training import Result

KINDS: dict[str, dict[str, Any]] = {"qwen_image": {"edit": "Edit"}, "qwen2511": {}}


class QwenBench(EditBench):
    """Edits of one picture or, with 2511, of two, and pictures alone."""

    def dataset(self, **changes: Any) -> dict[str, Any]:
        edits: dict[str, Any] = {"path": str(self.pictures), "control_path": str(self.before)}
        if self.model["type"] == "qwen2511":
            edits = {"path": str(self.pictures), "control_paths": [str(self.before), str(self.alone)]}
        return super().dataset(**{"directory": [edits, {"path": str(self.alone)}], **changes})


@pytest.fixture(scope="module", params=KINDS)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> QwenBench:
    return QwenBench(tmp_path_factory.mktemp(request.param), request.param, **KINDS[request.param])


@pytest.fixture(scope="module")
def plain(bench: QwenBench) -> Result:
    """The training that all others must equal: edits and pictures alone in turn, drawn and measured."""
    drawn = {"prompts": ["a cat"], "images": [str(bench.before / "0.png")], "width": 64, "height": 32, "steps": 2,
             "every_n_epochs": 2}  # fmt: skip
    return bench.train(epochs=2, sample=drawn, uncond_fraction=0.2)


def test_edits_and_pictures_alone_train_together(bench: QwenBench, plain: Result) -> None:
    assert plain.status.state == "finished"
    assert plain.status.step == 2 * (4 + 4)  # two buckets of three, by two, with and without
    assert any(value.any() for key, value in plain.lora().items() if "lora_B" in key)
    with Image.open(plain.status.samples[-1]) as picture:
        assert picture.size == (64, 32)


def test_captions_are_kept_as_seen_with_their_pictures(bench: QwenBench, plain: Result) -> None:
    """Once alone and once with the control pictures, dropped ones too, and those of the sample."""
    kept = [load_file(file)["qwen_embeds"] for file in (bench.root / "cache").glob("*/text-qwen/**/*.safetensors")]
    lengths = sorted(len(text_LD) for text_LD in kept if text_LD.dtype == torch.float32)
    several = bench.model["type"] == "qwen2511"
    seen = [length for length in lengths if length > 150]  # a picture is 196 tokens or more
    # with one control picture the dropped caption of the sample's picture is its negative prompt
    assert (len(lengths) - len(seen), len(seen)) == (6 + 1, 6 + 6 + (2 if several else 1))
    assert (max(lengths) > 1200) != several


def test_swapped_blocks_and_checkpoints_change_nothing(bench: QwenBench, plain: Result) -> None:
    result = bench.train(epochs=2, blocks_to_swap=2, activation_checkpointing="unsloth", uncond_fraction=0.2)
    assert result.curve("loss") == pytest.approx(plain.curve("loss"), rel=1e-5)
    assert_same(plain.lora(), result.lora(), rtol=1e-3, atol=2e-5)


def test_stages_change_nothing(bench: QwenBench, plain: Result) -> None:
    """The number of tensors between the stages changes from step to step."""
    result = bench.launch(
        2, pipeline_stages=2, micro_batch_size_per_gpu=1, gradient_accumulation_steps=2, epochs=2, max_steps=6,
        uncond_fraction=0.2,
    )  # fmt: skip
    assert result.curve("loss") == pytest.approx(plain.curve("loss")[:6], rel=1e-5)


@pytest.mark.parametrize("storage", ["float8", "int8", "nf4"])
def test_a_quantised_base_learns(bench: QwenBench, storage: str) -> None:
    result = bench.train(epochs=1, model={**bench.model, "transformer_dtype": storage, "dtype": "bfloat16"})
    assert result.status.state == "finished"
    assert all(0 < loss < 10 for loss in result.curve("loss"))


def test_all_weights_are_written_as_comfyui_reads_them(bench: QwenBench) -> None:
    result = bench.train(adapter=None, epochs=1, save_every_n_epochs=1)
    (file,) = result.folder.path.glob("epoch1/*.safetensors")
    trained = load_file(file)
    assert ("__index_timestep_zero__" in trained) == (bench.model["type"] == "qwen2511")
    assert trained["transformer_blocks.1.attn.to_add_out.weight"].any()
    start = load_file(next(Path(bench.model["diffusers_path"], "transformer").glob("*.safetensors")))
    assert trained.keys() - {"__index_timestep_zero__"} == start.keys()
    name = "transformer_blocks.0.img_mod.1.weight"
    assert not (trained[name].float() == start[name].float()).all()
    again = bench.train(
        epochs=1, max_steps=1, model={**bench.model, "transformer_path": str(file)}, adapter={"type": "lora", "rank": 2}
    )
    assert again.status.state == "finished"


def test_a_plan_counts_the_controls_tokens(bench: QwenBench) -> None:
    settings = parse_train_settings(bench.settings(activation_checkpointing=False))

    def activations(**directory: Any) -> float:
        dataset = parse_dataset_settings({"resolutions": [256], "directory": [directory]})
        return make_plan(settings, dataset, 1).stages[0].memory.activations

    alone = activations(path=str(bench.alone))
    edits = activations(path=str(bench.pictures), control_path=str(bench.before))
    if bench.model["type"] == "qwen2511":
        assert 1.7 < edits / alone < 2.5  # 256 tokens of pictures become 512, 128 of text 316
    else:
        assert 4.5 < edits / alone < 5.5  # and 1465
