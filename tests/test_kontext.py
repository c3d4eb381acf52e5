"""Flux Kontext against diffusers' FluxKontextPipeline, and trainings with edit datasets."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxPipeline
from diffusion_trainer.models.base import Example, SampleRequest
from diffusion_trainer.models.flux import Flux, pack, position_ids
from diffusion_trainer.nodes import NODE_CLASS_MAPPINGS as NODES
from diffusion_trainer.utils.buckets import Bucket
from diffusion_trainer.utils.config import validate
from diffusion_trainer.utils.dataset import Sample
from diffusion_trainer.utils.dataset_settings import parse_dataset_settings
from diffusion_trainer.utils.index import Media
from diffusion_trainer.utils.media import Properties, Source
from diffusion_trainer.utils.planning import make_plan
from diffusion_trainer.utils.sampler import Sampler
from diffusion_trainer.utils.settings import parse_train_settings
from PIL import Image, ImageOps
from test_training import assert_same
from training import Bench, Result

CPU = torch.device("cpu")
CAPTIONS = ["a photo of a red cat", "a dog"]
LEARN_MUCH: dict[str, Any] = {
    "adapter": {"rank": 16, "target_modules": ["x_embedder", "proj_out", "ff.net.0.proj", "ff.net.2", "to_v"]},
    "optimizer": {"lr": 2e-2},
    "activation_checkpointing": False,
}


class AtOneTime(FlowMatchEulerDiscreteScheduler):
    """diffusers' scheduler for flow matching, whose only step begins at `sigma`."""

    sigma = 1.0

    def set_timesteps(
        self, num_inference_steps: Any = None, device: Any = None, sigmas: Any = None, mu: Any = None
    ) -> None:
        super().set_timesteps(sigmas=[self.sigma], device=device)


@pytest.fixture(scope="module", params=[True, False], ids=["guidance", "no guidance"])
def folder(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("kontext")
    Flux.write_miniature(path, guidance=request.param)
    return path


def flux(folder: Path, dtype: torch.dtype = torch.float32) -> Flux:
    table = {"type": "flux", "diffusers_path": str(folder), "dtype": str(dtype).removeprefix("torch."),
             "max_sequence_length": 32, "guidance": 2.5}  # fmt: skip
    return Flux(validate(Flux.Config, table))


def kontext(folder: Path, dtype: torch.dtype = torch.float32) -> FluxKontextPipeline:
    pipeline = FluxKontextPipeline(**FluxPipeline.from_pretrained(folder, dtype=dtype).components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run(family: Flux, denoiser: Any, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    values: Any = inputs
    with torch.no_grad():
        for layer in family.layers(denoiser):
            values = layer.forward(SimpleNamespace(**layer.submodules), *values)
    return values


# -- against the pipeline ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_step_equals_the_pipelines(folder, dtype):
    """What the pipeline's own call gives its transformer at a time, and what that answers."""
    family, pipeline = flux(folder, dtype), kontext(folder, dtype)
    source = torch.Generator().manual_seed(3)
    latents, controls, noise = (torch.randn(2, 16, 8, 12, generator=source) for _ in range(3))
    latents, controls = latents.to(dtype), controls.to(dtype)
    with torch.no_grad():
        embeds, pooled, _ = pipeline.encode_prompt(CAPTIONS, max_sequence_length=32)
    batch = family.collate([
        Example({"latents": latents[n]}, {"clip_pooled": pooled[n], "t5_embeds": embeds[n]}, noise[n], 0.6,
                ({"latents": controls[n]},))
        for n in range(2)
    ])  # fmt: skip
    prediction = run(family, family.load_denoiser(CPU), batch.inputs)

    pipeline.scheduler = AtOneTime()
    pipeline.scheduler.sigma = family.timestep(0.6, (8, 12))
    pipeline.scheduler.set_timesteps()
    x_t = pipeline.scheduler.scale_noise(latents.float(), pipeline.scheduler.timesteps, noise)
    seen: dict[str, Any] = {}

    def see(_module, _arguments, given, answer):
        seen.update(given, answer=answer[0])

    pipeline.transformer.register_forward_hook(see, with_kwargs=True)
    pipeline(
        image=controls, latents=pack(x_t), prompt_embeds=embeds, pooled_prompt_embeds=pooled, width=96, height=64,
        max_area=96 * 64, num_inference_steps=1, guidance_scale=2.5, output_type="latent",
    )  # fmt: skip
    ours, told, our_pooled, our_embeds, guidance, control = batch.inputs
    assert torch.equal(torch.cat([pack(ours), pack(control)], 1), seen["hidden_states"])
    assert torch.equal(told.to(dtype), seen["timestep"])
    assert torch.equal(our_pooled, seen["pooled_projections"])
    assert torch.equal(our_embeds, seen["encoder_hidden_states"])
    assert seen["guidance"] is None or torch.equal(guidance, seen["guidance"])
    ids = position_ids(32, 4, 6, CPU, num_pictures=2)
    assert torch.equal(ids, torch.cat([seen["txt_ids"], seen["img_ids"]]).float())
    assert seen["answer"].shape == (2, 48, 64)
    assert torch.equal(prediction, seen["answer"][:, :24])
    assert torch.equal(batch.target, pack(noise - latents.float()))


def test_the_control_is_seen_and_the_order_of_pictures_counts(folder):
    family = flux(folder)
    denoiser = family.load_denoiser(CPU)
    example = family.blank_example(64, 32)
    first, second = torch.randn(2, 16, 4, 8, generator=torch.Generator().manual_seed(1))
    example.noise = first

    def predict(*controls: torch.Tensor) -> torch.Tensor:
        example.controls = tuple({"latents": control} for control in controls)
        return run(family, denoiser, family.collate([example]).inputs)

    assert predict().shape == predict(first).shape == (1, 8, 64)
    assert len({predict(*given).sum().item() for given in ((), (first,), (second,))}) == 3


def test_draws_what_the_pipeline_draws(folder):
    """A picture of another shape is cropped to what is drawn, as in training."""
    family, theirs = flux(folder), kontext(folder)
    texts: list[dict[str, torch.Tensor]] = [{}, {}]
    for name in family.text_encoders:
        encoded = family.encode_text(name, family.load_text_encoder(name, CPU), ["a red cat", ""])
        for n, text in enumerate(texts):
            text |= {key: value[n] for key, value in encoded.items()}
    start = Image.linear_gradient("L").convert("RGB").resize((70, 50))
    ours = family.pipeline(family.load_denoiser(CPU), CPU, text_encoders=False)
    ours.set_progress_bar_config(disable=True)
    request = SampleRequest(*texts, width=64, height=32, steps=2, guidance=3.0, true_cfg=2.0, seed=5, images=(start,))
    (drawn,) = family.sample(ours, request)
    expected = theirs(
        image=ImageOps.fit(start, (64, 32)), prompt="a red cat", negative_prompt="", true_cfg_scale=2.0, width=64,
        height=32, max_area=64 * 32, _auto_resize=False, num_inference_steps=2, guidance_scale=3.0,
        max_sequence_length=32, generator=torch.Generator().manual_seed(5),
    ).images[0]  # fmt: skip
    assert drawn.size == (64, 32)
    assert drawn.tobytes() == expected.tobytes()
    (plain,) = family.sample(ours, SampleRequest(*texts, width=64, height=32, steps=2, guidance=3.0, seed=5))
    assert plain.tobytes() != drawn.tobytes()


# -- order ------------------------------------------------------------------------------------------------


def test_a_step_never_mixes_samples_with_and_without_controls():
    def media(name: str) -> Media:
        return Media(Source(name), name, Properties(64, 64))

    samples = [Sample(media(f"{n}"), Bucket(64, 64), controls=(media(f"c{n}"),) * (n % 3 == 0)) for n in range(13)]
    sampler = Sampler(samples, 4, 0)
    plan = sampler.epoch(0)
    assert sorted({draw.sample for step in plan for draw in step}) == list(range(13))
    assert all(len({len(samples[draw.sample].controls) for draw in step}) == 1 for step in plan)
    assert len(plan) == sampler.num_steps(0) == 2 + 2  # 5 with a control, 8 without


# -- trainings --------------------------------------------------------------------------------------------


class EditBench(Bench):
    """Pictures, those to start from (mirrored and inverted), and pictures without any to start from."""

    def __init__(self, root: Path, family: str = "flux", **variant: Any) -> None:
        super().__init__(root, family, **variant)
        self.before = root / "before"
        self.before.mkdir()
        for file in sorted(self.pictures.glob("*.png")):
            with Image.open(file) as picture:
                ImageOps.invert(ImageOps.mirror(picture)).resize((120, 100)).save(self.before / file.name)
        self.alone = root / "alone"
        shutil.copytree(self.pictures, self.alone)

    def dataset(self, **changes: Any) -> dict[str, Any]:
        edits = {"path": str(self.pictures), "control_path": str(self.before)}
        return super().dataset(**{"directory": [edits, {"path": str(self.alone)}], **changes})


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> EditBench:
    return EditBench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def plain(bench: EditBench) -> Result:
    """The training that all others must equal: edits and pictures alone in turn, drawn and measured."""
    config = {"resolutions": [64], "directory": [{"path": str(bench.pictures), "control_path": str(bench.before)}]}
    drawn = {"prompts": ["a cat"], "images": [str(bench.before / "0.png")], "width": 64, "height": 32, "steps": 2,
             "every_n_epochs": 2}  # fmt: skip
    return bench.train(
        epochs=2, sample=drawn, eval_datasets=[{"name": "edits", "config": config}], eval_every_n_epochs=2
    )


def test_edits_and_pictures_alone_train_together(bench: EditBench, plain: Result) -> None:
    assert plain.status.state == "finished"
    assert plain.status.step == 2 * (4 + 4)  # two buckets of three, by two, with and without
    assert any(value.any() for key, value in plain.lora().items() if "lora_B" in key)
    with Image.open(plain.status.samples[-1]) as picture:
        assert picture.size == (64, 32)
    assert len(plain.points("edits/loss")) == 2
    report = json.loads((plain.folder.path / "dataset_report.json").read_text("utf-8"))
    assert (report["samples"], report["controls"]) == (12, 6)
    alone = bench.train(epochs=2, dataset={"resolutions": [64], "directory": [{"path": str(bench.alone)}]})
    assert not set(alone.curve("loss")) & set(plain.curve("loss"))


def test_a_plan_counts_the_controls_tokens(bench: EditBench, tmp_path: Path) -> None:
    (tmp_path / "edit_instructions.jsonl").write_text("", "utf-8")
    settings = parse_train_settings(bench.settings(activation_checkpointing=False))

    def activations(**directory: Any) -> float:
        dataset = parse_dataset_settings({"resolutions": [256], "directory": [directory]})
        return make_plan(settings, dataset, 1).stages[0].memory.activations

    alone = activations(path=str(bench.alone))
    edits = activations(path=str(bench.pictures), control_path=str(bench.before))
    assert 1.6 < edits / alone < 2  # 256 tokens of pictures become 512, beside 32 of text
    assert activations(path=str(tmp_path)) == edits


def test_swapped_blocks_and_checkpoints_change_nothing(bench: EditBench, plain: Result) -> None:
    result = bench.train(epochs=2, blocks_to_swap=2, activation_checkpointing="unsloth")
    assert result.curve("loss") == pytest.approx(plain.curve("loss"), rel=1e-5)
    assert_same(plain.lora(), result.lora(), rtol=1e-3, atol=2e-5)


def test_stages_change_nothing(bench: EditBench, plain: Result) -> None:
    """The number of tensors between the stages changes from step to step."""
    result = bench.launch(
        2, pipeline_stages=2, micro_batch_size_per_gpu=1, gradient_accumulation_steps=2, epochs=2, max_steps=6
    )
    assert result.curve("loss") == pytest.approx(plain.curve("loss")[:6], rel=1e-5)


@pytest.mark.parametrize("layout", ["two folders", "list"])
def test_overfits_one_edit(bench: EditBench, tmp_path: Path, layout: str) -> None:
    """From the tables of the Kontext node and the edit dataset's."""
    for name, source in (("target_images", bench.pictures), ("source_images", bench.before)):
        (tmp_path / name).mkdir()
        shutil.copy(source / "0.png", tmp_path / name / "0.png")
    if layout == "list":
        line = {"source_image": "0.png", "target_image": "0.png", "instruction": "turn it over"}
        (tmp_path / "edit_instructions.jsonl").write_text(json.dumps(line), "utf-8")
        paths = {"target_path": str(tmp_path)}
    else:
        (tmp_path / "target_images/0.txt").write_text("turn it over", "utf-8")
        paths = {"target_path": str(tmp_path / "target_images"), "control_path": str(tmp_path / "source_images")}
    directory = NODES["EditModelDatasetPathNode"]().get_edit_dataset_paths(**paths)[0]
    model = NODES["FluxKontextModelNode"]().get_flux_kontext_config(diffusers_path=bench.model["diffusers_path"])[0]
    result = bench.train(
        dataset={"resolutions": [64], "directory": [{**directory, "num_repeats": 8}]}, epochs=40,
        micro_batch_size_per_gpu=8, model=model | {"shift": None, "flux_shift": False, "dtype": "float32"},
        **LEARN_MUCH,
    )  # fmt: skip
    losses = result.curve("epoch_loss")
    assert sum(losses[-5:]) / 5 < 0.7 * losses[0]
