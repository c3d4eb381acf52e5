"""Wan against diffusers' WanPipeline and WanImageToVideoPipeline, and trainings of its miniature."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusion_trainer.models.base import Example, SampleRequest
from diffusion_trainer.models.wan import Wan
from diffusion_trainer.utils.adapted import adapted_layers
from diffusion_trainer.utils.adapter_settings import Lora
from diffusion_trainer.utils.adapters import export_tensors, inject
from diffusion_trainer.utils.config import SettingsError, validate
from diffusion_trainer.utils.run_folder import RunFolder
from PIL import Image
from safetensors.torch import save_file
from test_training import assert_same
from training import Bench, Result, StopsAfter, write_clips
from transformers import CLIPVisionModel

CPU = torch.device("cpu")
CAPTIONS = ["a photo of a red cat", "a dog &amp; a  cat"]
VARIANTS = ("t2v", "i2v", "flf2v", "i2v_a14b", "ti2v_5b")


@pytest.fixture(scope="module", params=VARIANTS)
def folder(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("wan") / request.param
    Wan.write_miniature(path, request.param)
    return path


@pytest.fixture(scope="module")
def t2v(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("wan-t2v")
    Wan.write_miniature(path)
    return path


def wan(folder: Path, **options) -> Wan:
    family = Wan(validate(Wan.Config, {"type": "wan", "ckpt_path": str(folder), "dtype": "float32", **options}))
    family.check_files()
    return family


def library_pipeline(folder: Path, dtype: torch.dtype) -> Any:
    """As diffusers' documentation loads it; the VAE in the same precision as the rest."""
    if folder.name in ("t2v", "ti2v_5b"):
        pipeline = WanPipeline.from_pretrained(folder, dtype=dtype)
    else:
        clip = None
        if folder.name != "i2v_a14b":
            clip = CLIPVisionModel.from_pretrained(folder / "image_encoder", dtype=torch.float32)
        pipeline = WanImageToVideoPipeline.from_pretrained(folder, dtype=dtype, image_encoder=clip)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def prompt_embeds(pipeline: Any, captions: list[str]) -> torch.Tensor:
    """WanPipeline's; WanImageToVideoPipeline's is the same, but does not work without ftfy."""
    with torch.no_grad():
        return WanPipeline._get_t5_prompt_embeds(pipeline, captions, max_sequence_length=512)


def run(family: Wan, denoiser: Any, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    values: Any = inputs
    with torch.no_grad():
        for layer in family.layers(denoiser):
            values = layer.forward(SimpleNamespace(**layer.submodules), *values)
    return values


def sample(family: Wan, pixels_CFHW: torch.Tensor, caption: str = "a red cat", seed: int = 1) -> Example:
    media = family.encode_media(family.load_vae(CPU), pixels_CFHW[None], [])
    text = family.encode_text("umt5", family.load_text_encoder("umt5", CPU), [caption])
    noise = torch.randn(media["latents"][0].shape, generator=torch.Generator().manual_seed(seed))
    return Example(
        {name: value[0] for name, value in media.items()}, {name: value[0] for name, value in text.items()}, noise, 0.6
    )


class AtOneTime(FlowMatchEulerDiscreteScheduler):
    """diffusers' scheduler for flow matching, whose only step begins at `sigma`."""

    sigma = 1.0

    def set_timesteps(self, *arguments: Any, device: Any = None, **options: Any) -> None:
        super().set_timesteps(sigmas=[self.sigma], device=device)


# -- against the pipelines --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_step_equals_the_pipelines(folder, dtype):
    """What the pipeline's own call gives its transformer at a time, and what that answers: latents, given frames,
    mask, CLIP's view, text and time."""
    family = wan(folder, dtype=str(dtype).removeprefix("torch."))
    frames = 1 if family.takes_pictures else 9
    pixels = torch.randint(0, 256, (3, frames, 32, 64), generator=torch.Generator().manual_seed(2))
    example = sample(family, pixels / 127.5 - 1)
    batch = family.collate([example])
    prediction = run(family, family.load_denoiser(CPU), batch.inputs)

    pipeline = library_pipeline(folder, dtype)
    pipeline.scheduler = AtOneTime()
    pipeline.scheduler.sigma = family.timestep(example.quantile, (4, 8))
    pipeline.scheduler.set_timesteps()
    x0 = example.media["latents"][None].float()
    x_t = pipeline.scheduler.scale_noise(x0, pipeline.scheduler.timesteps, example.noise[None])
    seen = {}

    def see(_module, _arguments, given, answer):
        seen.update(given, answer=answer[0])

    pipeline.transformer.register_forward_hook(see, with_kwargs=True)
    pictures = [Image.fromarray(frame.permute(1, 2, 0).byte().numpy()) for frame in pixels[:, [0, -1]].unbind(1)]
    names = {"i2v": ("image",), "i2v_a14b": ("image",), "flf2v": ("image", "last_image")}.get(folder.name, ())
    arrived = pipeline(
        prompt_embeds=prompt_embeds(pipeline, ["a red cat"]), latents=x_t, width=64, height=32, num_frames=frames,
        num_inference_steps=1, guidance_scale=1.0, output_type="latent", **dict(zip(names, pictures, strict=False)),
    ).frames  # fmt: skip
    expected = [seen[name] for name in ("hidden_states", "timestep", "encoder_hidden_states")]
    if seen.get("encoder_hidden_states_image") is not None:
        expected.append(seen["encoder_hidden_states_image"].reshape(batch.inputs[3].shape))
    for ours, theirs in zip(batch.inputs, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(prediction, seen["answer"])
    assert torch.equal(batch.target, example.noise - x0)
    # its scheduler's step along our target arrives at the clean latents, and along the prediction where it arrived
    sigma = pipeline.scheduler.sigma
    torch.testing.assert_close(x_t - sigma * batch.target, x0)
    torch.testing.assert_close(x_t - sigma * prediction.float(), arrived.float(), atol=1e-2, rtol=1e-2)


@pytest.fixture(scope="module")
def ti2v(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("wan-ti2v") / "ti2v_5b"
    Wan.write_miniature(path, "ti2v_5b")
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_given_first_frame_equals_the_pipelines(ti2v, dtype):
    """Wan 2.2's 5B model, image-to-video: the clean frame in its place, the time of each token, the answer."""
    family = wan(ti2v, dtype=str(dtype).removeprefix("torch."), image_to_video=1.0)
    pixels = torch.randint(0, 256, (3, 9, 64, 64), generator=torch.Generator().manual_seed(2))
    example = sample(family, pixels / 127.5 - 1)
    batch = family.collate([example])
    prediction = run(family, family.load_denoiser(CPU), batch.inputs)

    parts = library_pipeline(ti2v, dtype).components
    pipeline = WanImageToVideoPipeline(**{**parts, "scheduler": AtOneTime()}, expand_timesteps=True)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler.sigma = family.timestep(example.quantile, (4, 4))
    pipeline.scheduler.set_timesteps()
    x0 = example.media["latents"][None].float()
    seen = {}
    pipeline.transformer.register_forward_hook(
        lambda _module, _arguments, given, answer: seen.update(given, answer=answer[0]), with_kwargs=True
    )
    pipeline(
        image=Image.fromarray(pixels[:, 0].permute(1, 2, 0).byte().numpy()),
        prompt_embeds=prompt_embeds(pipeline, ["a red cat"]),
        latents=pipeline.scheduler.scale_noise(x0, pipeline.scheduler.timesteps, example.noise[None]),
        width=64, height=64, num_frames=9, num_inference_steps=1, guidance_scale=1.0, output_type="latent",
    )  # fmt: skip
    for ours, name in zip(batch.inputs, ("hidden_states", "timestep", "encoder_hidden_states"), strict=True):
        assert torch.equal(ours, seen[name]), name
    assert torch.equal(prediction, seen["answer"])
    assert batch.inputs[1].unique().tolist() == [0.0, seen["timestep"].max().item()]


def test_a_share_of_the_clips_is_trained_from_the_first_frame(ti2v):
    family = wan(ti2v, image_to_video=0.5)
    example = sample(family, torch.zeros(3, 9, 32, 32))
    batch = family.collate([replace(example, seed=seed) for seed in range(40)])
    given = (batch.inputs[0][:, :, 0] == example.media["latents"][:, 0]).flatten(1).all(1)
    assert 10 < given.sum() < 30
    assert torch.equal(batch.weight[:, 0, 0].amax((1, 2)) == 0, given)
    assert torch.equal(batch.inputs[1].amin(1) == 0, given)
    torch.testing.assert_close(batch.weight.mean((1, 2, 3, 4)), torch.ones(40))
    plain = wan(ti2v).collate([example])
    assert (plain.inputs[1].ndim, plain.weight.numel()) == (1, 1)
    one = family.collate([sample(family, torch.zeros(3, 1, 32, 32))])
    assert one.inputs[1].ndim == 1, "of a picture nothing would be left to make"


def test_other_models_do_one_or_the_other(t2v):
    with pytest.raises(SettingsError, match=r"model\.image_to_video: this model does one or the other"):
        wan(t2v, image_to_video=0.5)


def test_the_5b_model_trains_and_draws_from_a_first_frame(tmp_path: Path) -> None:
    bench = VideoBench(tmp_path, "ti2v_5b")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "first.png")
    shown = {"prompts": ["a ball"], "width": 64, "height": 64, "frames": 5, "steps": 2, "before_first_step": False}
    shown |= {"images": [str(tmp_path / "first.png")], "every_n_epochs": 2}
    options = {"model": {"image_to_video": 0.5}, "epochs": 2, "seed": 3}
    result = bench.train(**options, sample=shown)
    with av.open(result.status.samples[-1]) as container:
        assert len(list(container.decode(video=0))) == 5
    plain = bench.train(**options, activation_checkpointing=False, micro_batch_size_per_gpu=2)
    assert plain.curve("loss") == pytest.approx(result.curve("loss"), rel=1e-5)
    assert plain.curve("loss") != bench.train(epochs=2, seed=3).curve("loss")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_text_equals_the_pipelines_and_is_as_long_as_the_caption(t2v, dtype):
    family = wan(t2v, dtype=dtype)
    pipeline = WanPipeline.from_pretrained(t2v, dtype=family.dtype)
    captions = [*CAPTIONS, "", "red " * 600]
    found = family.encode_text("umt5", family.load_text_encoder("umt5", CPU), captions)["umt5_embeds"]
    expected = prompt_embeds(pipeline, captions)
    lengths = [len(pipeline.tokenizer(text.replace("&amp;", "&").replace("  ", " ")).input_ids) for text in CAPTIONS]
    assert [len(text) for text in found] == [*lengths, 1, 512]
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs[: len(ours)])
        assert not theirs[len(ours) :].any()


def test_the_same_parameters_stay_in_float32(folder):
    ours = wan(folder, dtype="bfloat16").load_denoiser(CPU)
    theirs = WanTransformer3DModel.from_pretrained(folder, subfolder="transformer", dtype=torch.bfloat16)
    expected = {name: value.dtype for name, value in theirs.state_dict().items()}
    assert {name: value.dtype for name, value in ours.state_dict().items()} == expected
    assert set(expected.values()) == {torch.float32, torch.bfloat16}


def test_latents_are_the_normalised_mode(t2v):
    family = wan(t2v)
    pixels = torch.rand(2, 3, 9, 32, 48, generator=torch.Generator().manual_seed(4)) * 2 - 1
    vae = AutoencoderKLWan.from_pretrained(t2v, subfolder="vae")
    with torch.no_grad():
        mode = vae.encode(pixels).latent_dist.mean
    mean, std = (
        torch.tensor(values)[:, None, None, None] for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    found = family.encode_media(family.load_vae(CPU), pixels, [])["latents"]
    assert found.shape == (2, 16, 3, 4, 6)
    torch.testing.assert_close(found, (mode - mean) / std)


def test_what_comes_after_the_first_frame_does_not_show_in_the_condition(folder):
    family = wan(folder)
    if family.takes_pictures:
        pytest.skip("nothing is given")
    pixels = torch.rand(3, 9, 32, 32, generator=torch.Generator().manual_seed(4)) * 2 - 1
    other = pixels.clone()
    other[:, 1:8] = 0.5
    first, second = sample(family, pixels), sample(family, other)
    assert not torch.equal(first.media["latents"], second.media["latents"])
    assert torch.equal(first.media["condition"], second.media["condition"])
    other[:, 0] = 0.5
    assert not torch.equal(first.media["condition"], sample(family, other).media["condition"])


def test_pictures_to_start_from_are_asked_for(folder):
    family = wan(folder)
    text = {"umt5_embeds": torch.zeros(3, 32)}
    if family.takes_pictures:
        arguments = family.prompt_arguments(SampleRequest(text, text, 32, 32), CPU)
        assert arguments.keys() == {"prompt_embeds", "negative_prompt_embeds"}
        return
    with pytest.raises(SettingsError, match=r"draws from a first frame; give a picture$"):
        family.prompt_arguments(SampleRequest(text, text, 32, 32), CPU)
    request = SampleRequest(text, text, 32, 32, images=(Image.new("RGB", (64, 32), "red"),))
    arguments = family.prompt_arguments(request, CPU)
    shown = {name: value for name, value in arguments.items() if "embeds" not in name}
    assert shown.keys() == ({"image", "last_image"} if folder.name == "flf2v" else {"image"})
    assert all(image.size == (32, 32) for image in shown.values())


# -- LoRA -------------------------------------------------------------------------------------------------


def test_lora_loads_in_diffusers_and_moves_its_output_as_in_training(folder, tmp_path):
    """Every linear layer of the blocks has one, with alpha unlike the rank."""
    family = wan(folder)
    settings = Lora(type="lora", rank=4, alpha=6.0)
    denoiser = inject(family.load_denoiser(CPU), family, settings, seed=3)
    for parameter in denoiser.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    tensors = export_tensors(adapted_layers(denoiser), family, torch.float32)
    expected = {"cross_attn.k_img", "cross_attn.v_img"} if family.variant.has_clip else set()
    expected |= {f"{kind}.{part}" for kind in ("self_attn", "cross_attn") for part in "qkvo"} | {"ffn.0", "ffn.2"}
    keys = {re.sub(r"^diffusion_model\.blocks\.\d\.|\.(lora_[AB]\.weight|alpha)$", "", key) for key in tensors}
    assert keys == expected
    save_file(tensors, tmp_path / "lora.safetensors")
    pipeline = library_pipeline(folder, torch.float32)
    pipeline.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    pixels = torch.rand(3, 5, 32, 32, generator=torch.Generator().manual_seed(4)) * 2 - 1
    inputs = family.collate([sample(family, pixels)]).inputs
    plain = run(family, family.load_denoiser(CPU), inputs)
    trained = run(family, denoiser, inputs)
    torch.testing.assert_close(run(family, pipeline.transformer, inputs), trained, atol=1e-5, rtol=1e-4)
    assert (trained - plain).norm() > 0.1 * plain.norm()


# -- noise levels -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high"), [(0.875, 1.0), (0.0, 0.875)])
def test_experts_see_the_noise_of_the_whole_distribution_between_their_bounds(t2v, low, high):
    """The truncated distribution is the whole one, conditioned on lying between the bounds."""
    whole = wan(t2v, shift=5.0)
    drawn = [t for t in (whole.timestep((n + 0.5) / 4000, (60, 104)) for n in range(4000)) if low <= t <= high]
    part = wan(t2v, shift=5.0, min_t=low, max_t=high)
    times = [part.timestep((n + 0.5) / len(drawn), (60, 104)) for n in range(len(drawn))]
    torch.testing.assert_close(torch.tensor(times), torch.tensor(drawn), atol=2e-3, rtol=0)


def test_bounds_without_noise_between_them_are_refused(t2v):
    from diffusion_trainer.utils.settings import parse_train_settings

    model = {"type": "wan", "ckpt_path": str(t2v), "min_t": 0.9, "max_t": 0.875}
    with pytest.raises(SettingsError, match=r"model: min_t must be below max_t, got 0\.9 and 0\.875"):
        parse_train_settings({"output_dir": "/o", "epochs": 1, "model": model, "optimizer": {"type": "adamw"}})


# -- trainings --------------------------------------------------------------------------------------------


class VideoBench(Bench):
    """Pictures and clips of 5 frames; clips alone where pictures cannot be trained."""

    def __init__(self, root: Path, variant: str) -> None:
        super().__init__(root, "wan", variant=variant)
        if variant != "t2v":
            self.pictures = root / "clips"
        write_clips(self.pictures)

    def dataset(self, **changes: Any) -> dict[str, Any]:
        return super().dataset(frame_buckets=[1, 5], **changes)


@pytest.fixture(scope="module", params=["t2v", "i2v"])
def bench(request, tmp_path_factory) -> VideoBench:
    return VideoBench(tmp_path_factory.mktemp(f"bench-{request.param}"), request.param)


@pytest.fixture(scope="module")
def plain(bench: VideoBench) -> Result:
    """The training that all others must equal."""
    return bench.train(epochs=2)


def test_trains_pictures_and_clips(bench: VideoBench, plain: Result) -> None:
    assert plain.status.state == "finished"
    assert plain.status.step == plain.status.total_steps == (12 if "t2v" in bench.root.name else 4)
    lora = plain.lora()
    assert all(key.startswith("diffusion_model.blocks.") for key in lora)
    assert any(value.any() for key, value in lora.items() if "lora_B" in key)
    assert any("k_img" in key for key in lora) == ("i2v" in bench.root.name)


@pytest.mark.parametrize(
    "changes",
    [
        {"activation_checkpointing": False},
        {"activation_checkpointing": "selective"},
        {"blocks_to_swap": 1},
        {"micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2},
    ],
    ids=["no checkpointing", "selective checkpointing", "swapped", "accumulated"],
)
def test_micro_batches_and_memory_savers_change_nothing(bench: VideoBench, plain: Result, changes: dict) -> None:
    result = bench.train(epochs=2, **changes)
    assert result.curve("loss") == pytest.approx(plain.curve("loss"), rel=1e-5)
    assert_same(plain.lora(), result.lora(), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(
    ("bench", "stages"),
    [("t2v", 3), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("t2v", 2), ("i2v", 2), ("i2v", 3)))],
    indirect=["bench"],
)
def test_stages_change_nothing(bench: VideoBench, plain: Result, stages: int) -> None:
    """The tables of positions tell the last stage the shape, which changes from step to step."""
    result = bench.launch(
        stages, pipeline_stages=stages, micro_batch_size_per_gpu=1, gradient_accumulation_steps=2, epochs=2
    )
    assert result.curve("loss") == pytest.approx(plain.curve("loss"), rel=1e-5)
    assert_same(plain.lora(), result.lora(), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("step", [1, 3])
def test_stopped_and_resumed_equals_uninterrupted(bench: VideoBench, plain: Result, step: int) -> None:
    stopped = bench.train(StopsAfter(RunFolder.create(bench.root / "out").path, step), epochs=2)
    assert stopped.status.state == "stopped"
    resumed = bench.train(RunFolder(stopped.folder.path), resume=True, epochs=2)
    assert resumed.curve("loss") == plain.curve("loss")
    assert_same(plain.lora(), resumed.lora())


def test_clips_are_drawn_while_training(bench: VideoBench, tmp_path: Path) -> None:
    """From a first frame where the model wants one."""
    Image.new("RGB", (64, 64), "red").save(tmp_path / "first.png")
    sample = {"prompts": ["a ball"], "width": 64, "height": 32, "frames": 5, "steps": 2, "every_n_epochs": 1}
    if "i2v" in bench.root.name:
        with pytest.raises(SettingsError, match=r"sample\.images: this Wan model draws from a first frame"):
            bench.train(epochs=1, sample=sample)
        sample["images"] = [str(tmp_path / "first.png")]
    result = bench.train(epochs=1, sample=sample)
    assert result.status.state == "finished"
    assert result.status.samples
    with av.open(result.status.samples[-1]) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
    assert [frame.size for frame in frames] == [(64, 32)] * 5


def test_a_full_fine_tune_loads_in_diffusers(bench: VideoBench) -> None:
    """Weights, all trained, under original names."""
    result = bench.train(epochs=1, adapter=None)
    (file,) = Path(result.status.exports[-1]).glob("*.safetensors")
    folder = Path(bench.model["ckpt_path"])
    loaded = WanTransformer3DModel.from_single_file(file, config=str(folder), subfolder="transformer").state_dict()
    before = wan(folder).load_denoiser(CPU).state_dict()
    assert loaded.keys() == before.keys()
    assert all(not torch.equal(value, before[name]) for name, value in loaded.items() if name.endswith("weight"))


def test_overfits_one_clip(bench: VideoBench, tmp_path: Path) -> None:
    write_clips(tmp_path / "one", count=1)
    directory = {"path": str(tmp_path / "one"), "num_repeats": 4}
    result = bench.train(
        dataset={"resolutions": [64], "frame_buckets": [5], "directory": [directory]},
        epochs=60,
        micro_batch_size_per_gpu=4,
        adapter={"rank": 16, "target_modules": ["proj_out", "ffn.net.0.proj", "ffn.net.2", "to_v", "time_proj"]},
        optimizer={"lr": 2e-2},
        activation_checkpointing=False,
    )  # fmt: skip
    losses = result.curve("epoch_loss")
    assert sum(losses[-5:]) / 5 < 0.7 * losses[0]


def test_masks_of_clips_weigh_each_latent(bench: VideoBench, tmp_path: Path) -> None:
    write_clips(tmp_path / "set", count=2)
    (tmp_path / "masks").mkdir()
    for number in range(2):
        mask = Image.new("RGB", (64, 64))
        mask.paste((255, 255, 255), (0, 0, 64, 32))
        mask.save(tmp_path / f"masks/clip{number}.png")
    directory = {"path": str(tmp_path / "set"), "mask_path": str(tmp_path / "masks")}
    dataset = {"resolutions": [64], "frame_buckets": [5], "directory": [directory]}
    masked = bench.train(dataset=dataset, epochs=1)
    assert masked.status.state == "finished"
    whole = bench.train(dataset={**dataset, "directory": [{"path": directory["path"]}]}, epochs=1)
    assert masked.curve("loss") != whole.curve("loss")
    family = wan(Path(bench.model["ckpt_path"]))
    mask_NFHW = torch.zeros(1, 2, 4, 4)
    mask_NFHW[0, 1, :2] = 1
    weight = family.spread_mask(mask_NFHW, torch.zeros(1, 16, 2, 4, 4)).expand(1, 16, 2, 4, 4)
    assert all(torch.equal(weight[:, channel], mask_NFHW) for channel in range(16))
