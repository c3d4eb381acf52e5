"""LTX-Video against diffusers' LTXPipeline, LTXImageToVideoPipeline and LTXConditionPipeline, its files in every
layout, first frames, and refusals."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.loaders.single_file_utils import (
    convert_ltx_transformer_checkpoint_to_diffusers,
    convert_ltx_vae_checkpoint_to_diffusers,
)
from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift
from diffusion_trainer.models.base import Example, SampleRequest
from diffusion_trainer.models.files import file_metadata
from diffusion_trainer.models.ltx_video import SCHEDULES, LTXVideo, pack
from diffusion_trainer.utils.adapted import adapted_layers
from diffusion_trainer.utils.adapter_settings import Lora
from diffusion_trainer.utils.adapters import export_tensors, inject
from diffusion_trainer.utils.config import SettingsError, validate
from PIL import Image
from safetensors.torch import load_file, save_file
from training import Bench, write_clips

CPU = torch.device("cpu")
VARIANTS = ("0.9", "0.9.1", "0.9.5")
CAPTIONS = ["a photo of a red cat", "", "red " * 200]
HEADS = {"num_attention_heads": 2}
"""Of the miniature, which its shapes do not tell."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A miniature of each variant."""
    found = {variant: tmp_path_factory.mktemp("ltx") / variant for variant in VARIANTS}
    for variant, path in found.items():
        LTXVideo.write_miniature(path, variant)
    return found


@pytest.fixture(scope="module")
def folder(folders) -> Path:
    return folders["0.9.5"]


def ltx(folder: Path | None = None, **options) -> LTXVideo:
    table: dict[str, Any] = {"type": "ltx-video", "dtype": "float32", "max_sequence_length": 32, **options}
    table |= {"diffusers_path": str(folder)} if folder else {}
    family = LTXVideo(
        validate(LTXVideo.Config, {k: str(v) if isinstance(v, Path) else v for k, v in table.items()}, "model")
    )
    family.check_files()
    return family


def encoded(family: LTXVideo, *captions: str) -> list[torch.Tensor]:
    return list(family.encode_text("t5", family.load_text_encoder("t5", CPU), captions)["t5_embeds"])


def example_of(text: torch.Tensor, number: int = 0, frames: int = 3, **more: Any) -> Example:
    generator = torch.Generator().manual_seed(3 + number)
    latents, noise = (torch.randn(128, frames, 2, 3, generator=generator) for _ in range(2))
    return Example({"latents": latents.to(text)}, {"t5_embeds": text}, noise, 0.2 + 0.3 * number, **more)


def predict(family: LTXVideo, denoiser: torch.nn.Module, values: tuple) -> torch.Tensor:
    with torch.no_grad():
        for layer in family.layers(denoiser):
            values = layer.forward(SimpleNamespace(**layer.submodules), *values)
    return values


class AtOneTime(FlowMatchEulerDiscreteScheduler):
    """diffusers' scheduler for flow matching, whose only step begins at `sigma`."""

    sigma = 1.0

    def set_timesteps(  # the pipelines look for these names
        self, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None
    ) -> None:
        super().set_timesteps(sigmas=[self.sigma], device=device)


def library_pipeline(folder: Path, kind: str, dtype: torch.dtype, sigma: float = 1.0) -> tuple[Any, dict[str, Any]]:
    """With what its transformer is given and answers, once it was called."""
    seen: dict[str, Any] = {}
    pipeline = getattr(diffusers, kind).from_pretrained(folder, torch_dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = AtOneTime()
    pipeline.scheduler.sigma = sigma
    pipeline.scheduler.set_timesteps()
    pipeline.transformer.register_forward_hook(
        lambda _module, _arguments, given, answer: seen.update(given, answer=answer[0]), with_kwargs=True
    )
    return pipeline, seen


def prompt(batch: Any) -> dict[str, torch.Tensor]:
    text_NLD, seen_NL = batch.inputs[2:]
    return {"prompt_embeds": text_NLD, "prompt_attention_mask": seen_NL.bool().expand(text_NLD.shape[:2])}


SHAPE = {"width": 96, "height": 64, "num_frames": 17, "num_inference_steps": 1, "guidance_scale": 1.0,
         "output_type": "latent"}  # fmt: skip


# -- against the pipelines --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_step_equals_the_pipelines(folders, dtype):
    """What LTXPipeline gives its transformer at a time, and what that answers. It takes 8 / 25 for the places of
    frames where Lightricks' code takes 8 * (1 / 25), so answers are equal within rounding."""
    family = ltx(folders["0.9"], dtype=str(dtype).removeprefix("torch."))
    example = example_of(encoded(family, CAPTIONS[0])[0])
    batch = family.collate([example])
    pipeline, seen = library_pipeline(folders["0.9"], "LTXPipeline", dtype, family.timestep(example.quantile, (2, 3)))
    x0 = example.media["latents"][None].float()
    x_t = pipeline.scheduler.scale_noise(x0, pipeline.scheduler.timesteps, example.noise[None])
    arrived = pipeline(**prompt(batch), latents=pack(x_t), **SHAPE).frames
    assert torch.equal(pack(batch.inputs[0]), seen["hidden_states"])
    assert torch.equal(batch.inputs[1][:, 0], seen["timestep"])
    prediction = predict(family, family.load_denoiser(CPU), batch.inputs)
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(prediction, seen["answer"], atol=tolerance, rtol=tolerance)
    assert torch.equal(batch.target, pack(example.noise - x0))
    sigma = pipeline.scheduler.sigma
    torch.testing.assert_close(pack(x_t) - sigma * batch.target, pack(x0))
    torch.testing.assert_close(pack(x_t) - sigma * prediction.float(), arrived, atol=tolerance, rtol=tolerance)


def test_one_step_since_0_9_5_equals_the_pipelines(folder):
    """LTXConditionPipeline, bit for bit, from the noise that it draws."""
    family = ltx(folder)
    example = example_of(encoded(family, CAPTIONS[0])[0])
    batch = family.collate([example])
    sigma = family.timestep(example.quantile, (2, 3))
    pipeline, seen = library_pipeline(folder, "LTXConditionPipeline", torch.float32, sigma)
    arrived = pipeline(**prompt(batch), **SHAPE, generator=torch.Generator().manual_seed(1)).frames
    x_t = seen["hidden_states"].transpose(1, 2).unflatten(2, (3, 2, 3))
    assert torch.equal(batch.inputs[1], seen["timestep"])
    prediction = predict(family, family.load_denoiser(CPU), (x_t, *batch.inputs[1:]))
    assert torch.equal(prediction, seen["answer"])
    torch.testing.assert_close(seen["hidden_states"] - sigma * prediction, pack(arrived))


def test_where_the_first_latent_ends_depends_on_the_version(folders):
    both = [ltx(folders[variant]) for variant in ("0.9.1", "0.9.5")]
    assert [family.is_causal for family in both] == [False, True]
    batch = both[0].collate([example_of(encoded(both[0], CAPTIONS[0])[0])])
    old, new = (predict(family, both[0].load_denoiser(CPU), batch.inputs) for family in both)
    assert (old - new).norm() > 1e-3 * old.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_given_first_frame_equals_the_pipelines(folders, dtype):
    """LTXImageToVideoPipeline: the clean frame in its place, the time of each token, the answer."""
    folder = folders["0.9.1"]
    family = ltx(folder, dtype=str(dtype).removeprefix("torch."), first_frame_conditioning_p=1.0)
    example = example_of(encoded(family, CAPTIONS[0])[0])
    batch = family.collate([example])
    kind, sigma = "LTXImageToVideoPipeline", family.timestep(example.quantile, (2, 3))
    pipeline, seen = library_pipeline(folder, kind, dtype, sigma)
    arrived = pipeline(**prompt(batch), latents=pack(batch.inputs[0].float()), **SHAPE).frames
    assert torch.equal(pack(batch.inputs[0]), seen["hidden_states"])
    assert torch.equal(batch.inputs[0][0, :, 0], example.media["latents"][:, 0])
    assert torch.equal(batch.inputs[1].repeat_interleave(torch.tensor([6, 12]), dim=1), seen["timestep"])
    assert batch.inputs[1].tolist() == [[0.0, pytest.approx(sigma * 1000)]]
    prediction = predict(family, family.load_denoiser(CPU), batch.inputs)
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(prediction, seen["answer"], atol=tolerance, rtol=tolerance)
    made = (pack(batch.inputs[0].float()) - sigma * prediction.float())[:, 6:]
    torch.testing.assert_close(made, arrived[:, 6:], atol=tolerance, rtol=tolerance)
    assert torch.equal(arrived[:, :6], pack(batch.inputs[0].float())[:, :6])


def test_a_given_first_frame_since_0_9_5_equals_the_pipelines(folder):
    family = ltx(folder, first_frame_conditioning_p=1.0)
    example = example_of(encoded(family, CAPTIONS[0])[0])
    batch = family.collate([example])
    sigma = family.timestep(example.quantile, (2, 3))
    pipeline, seen = library_pipeline(folder, "LTXConditionPipeline", torch.float32, sigma)
    pipeline(image=Image.new("RGB", (96, 64), "red"), **prompt(batch), **SHAPE)
    x_t = seen["hidden_states"].transpose(1, 2).unflatten(2, (3, 2, 3))
    assert torch.equal(batch.inputs[1].repeat_interleave(torch.tensor([6, 12]), dim=1), seen["timestep"])
    prediction = predict(family, family.load_denoiser(CPU), (x_t, *batch.inputs[1:]))
    torch.testing.assert_close(prediction, seen["answer"], atol=2e-5, rtol=2e-5)


def test_a_share_of_the_clips_is_trained_from_the_first_frame(folder):
    family = ltx(folder, first_frame_conditioning_p=0.5)
    example = example_of(encoded(family, CAPTIONS[0])[0])
    batch = family.collate([replace(example, seed=seed) for seed in range(40)])
    given = (batch.inputs[0][:, :, 0] == example.media["latents"][:, 0]).flatten(1).all(1)
    assert 10 < given.sum() < 30
    assert torch.equal(batch.weight[:, :6].amax((1, 2)) == 0, given)
    assert batch.weight[:, 6:].min() > 0
    assert torch.equal(batch.inputs[1][:, 0] == 0, given)
    torch.testing.assert_close(batch.weight.mean((1, 2)), torch.ones(40))
    for seed in range(40):
        alone = family.collate([replace(example, seed=seed)])
        assert torch.equal(alone.inputs[0][0], batch.inputs[0][seed]), "it depends on the sample alone"
    whole, plain = (
        predict(one, family.load_denoiser(CPU), one.collate([replace(example, seed=int(seed))]).inputs)
        for one, seed in ((family, (~given).nonzero()[0]), (ltx(folder), 0))
    )
    torch.testing.assert_close(whole, plain, atol=2e-6, rtol=1e-5)
    picture = family.collate([example_of(example.text["t5_embeds"], frames=1)])
    assert picture.inputs[1].shape == (1, 1), "of a picture nothing would be left to make"
    assert picture.weight.numel() == 1


def test_masks_lie_on_their_tokens(folder):
    family = ltx(folder)
    mask_NFHW = torch.arange(18.0).view(1, 3, 2, 3)
    target = pack(mask_NFHW[:, None].expand(-1, 128, -1, -1, -1))
    assert torch.equal(family.spread_mask(mask_NFHW, target).expand_as(target), target)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_text_equals_the_pipelines_and_is_as_long_as_the_caption(folder, dtype):
    """Bit for bit as LTXConditionPipeline's; LTXPipeline, alone, shows T5 the padding."""
    family = ltx(folder, dtype=dtype)
    found = encoded(family, *CAPTIONS)
    padded = []
    for kind in (diffusers.LTXConditionPipeline, diffusers.LTXPipeline):
        pipeline = kind.from_pretrained(folder, torch_dtype=family.dtype)
        with torch.no_grad():
            embeds, mask, _, _ = pipeline.encode_prompt(
                CAPTIONS, max_sequence_length=32, do_classifier_free_guidance=False
            )
        padded.append(embeds)
    assert [len(text) for text in found] == mask.sum(1).tolist()
    assert [len(text) for text in found[1:]] == [1, 32]
    for number, ours in enumerate(found):
        assert torch.equal(ours, padded[0][number, : len(ours)])
    assert torch.equal(found[2], padded[1][2])
    assert (padded[1][0, : len(found[0])] - found[0]).norm() > 1e-2 * found[0].norm()


def test_neighbours_in_a_batch_change_nothing(folder):
    family = ltx(folder)
    denoiser = family.load_denoiser(CPU)
    both = [example_of(text, number) for number, text in enumerate(encoded(family, *CAPTIONS[::2]))]
    batch, alone = family.collate(both), family.collate(both[:1])
    assert batch.inputs[3].shape == (2, 32)
    assert alone.inputs[3].shape == (1, 1)
    together, single = (predict(family, denoiser, inputs.inputs) for inputs in (batch, alone))
    torch.testing.assert_close(together[:1], single, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_latents_are_the_pipelines(folders, variant):
    family = ltx(folders[variant])
    pipeline = diffusers.LTXPipeline.from_pretrained(folders[variant])
    pixels = torch.rand(2, 3, 9, 32, 64, generator=torch.Generator().manual_seed(4)) * 2 - 1
    generators = [[torch.Generator().manual_seed(seed) for seed in (5, 6)] for _ in range(2)]
    with torch.no_grad():
        drawn = pipeline.vae.encode(pixels).latent_dist.sample(generators[0])
    expected = pipeline._normalize_latents(drawn, pipeline.vae.latents_mean, pipeline.vae.latents_std)
    found = family.encode_media(family.load_vae(CPU), pixels, generators[1])["latents"]
    assert found.shape == (2, 128, 2, 1, 2)
    assert torch.equal(found, expected)
    assert (drawn - expected).norm() > 0.1 * drawn.norm()


def test_the_shift_by_size_is_the_pipelines(folder):
    """By the tokens of all frames."""
    family, schedule = ltx(folder, flux_shift=True), SCHEDULES[False]
    for size in ((21, 16, 24), (1, 16, 22), (16, 22)):
        mu = calculate_shift(
            math.prod(size), schedule["base_image_seq_len"], schedule["max_image_seq_len"], schedule["base_shift"],
            schedule["max_shift"])  # fmt: skip
        assert family.timestep_shift(size) == pytest.approx(math.exp(mu))
    assert ltx(folder, flux_shift=True, shift=3.0).timestep_shift((21, 16, 24)) == 3.0
    text = encoded(family, CAPTIONS[0])[0]
    told = [family.collate([example_of(text, frames=frames)]).inputs[1].item() for frames in (1, 9)]
    assert told[1] == pytest.approx(1000 * family.timestep(0.2, (9, 2, 3)))
    assert told[0] < told[1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_draws_from_text_and_from_a_first_frame(folders, variant):
    """With a picture it is the pipeline for it that draws, and the first frame stays what was given."""
    family = ltx(folders[variant])
    pipeline = family.pipeline(family.load_denoiser(CPU), CPU, text_encoders=False)
    pipeline.set_progress_bar_config(disable=True)
    text, negative = ({"t5_embeds": value} for value in encoded(family, *CAPTIONS[:2]))
    request = SampleRequest(text, negative, 64, 32, frames=9, steps=2, guidance=3.0, seed=5)
    started = replace(request, images=(Image.new("RGB", (100, 60), "red"),))
    drawn, other = family.sample(pipeline, request), family.sample(pipeline, started)
    assert [len(drawn), len(other)] == [9, 9]
    assert drawn[0].size == other[0].size == (64, 32)
    assert drawn[0].tobytes() != other[0].tobytes()
    kind = diffusers.LTXConditionPipeline if variant == "0.9.5" else diffusers.LTXImageToVideoPipeline
    whole = kind(**pipeline.components)
    whole.set_progress_bar_config(disable=True)
    decoding = {} if variant == "0.9" else {"decode_timestep": 0.05, "decode_noise_scale": 0.025}
    expected = whole(
        **family.prompt_arguments(started, CPU), width=64, height=32, num_frames=9, num_inference_steps=2,
        guidance_scale=3.0, generator=torch.Generator().manual_seed(5), **decoding,
    ).frames[0]  # fmt: skip
    assert [frame.tobytes() for frame in other] == [frame.tobytes() for frame in expected]


# -- files --------------------------------------------------------------------------------------------------


def tensors(folder: Path, part: str) -> dict[str, torch.Tensor]:
    (file,) = (folder / part).glob("*.safetensors")
    return load_file(file)


def original(family: LTXVideo, folder: Path) -> dict[str, torch.Tensor]:
    """The model as Lightricks' file has it."""
    found = {**family.comfyui_tensors(tensors(folder, "transformer")), **family.other_tensors(())}
    return {name: value.contiguous() for name, value in found.items()}


def write_single(folder: Path, file: Path, change=lambda found: found, **told: Any) -> dict[str, Path]:
    """Writes transformer and VAE into one file; returns the options that name it and the rest."""
    config = {"config": json.dumps({"transformer": {**HEADS, **told}})}
    save_file(change(original(ltx(folder), folder)), file, metadata=config)
    return {
        "single_file_path": file,
        "t5_path": next((folder / "text_encoder").glob("*.safetensors")),
        "t5_tokenizer_path": folder / "tokenizer",
    }


def arguments_of(model: Any) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value
            for name, value in model.config.items() if not name.startswith("_")}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_single_file_equals_the_folder(folders, variant, tmp_path):
    folder, causal = folders[variant], variant == "0.9.5"
    family = ltx(**write_single(folder, tmp_path / "ltx.safetensors", causal_temporal_positioning=causal))
    whole = ltx(folder)
    assert family.is_causal == whole.is_causal == causal
    ours, theirs = (one.load_denoiser(CPU) for one in (family, whole))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())
    assert arguments_of(ours) == arguments_of(theirs)
    vaes: list[Any] = [one.load_vae(CPU) for one in (family, whole)]
    states = [vae.state_dict() for vae in vaes]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert {**arguments_of(vaes[0]), "decoder_inject_noise": 0} == {**arguments_of(vaes[1]), "decoder_inject_noise": 0}
    latents = torch.randn(1, 128, 2, 1, 2, generator=torch.Generator().manual_seed(1))
    time = None if variant == "0.9" else torch.tensor([0.05])
    with torch.no_grad():
        torch.manual_seed(0)
        first = vaes[0].decode(latents, time).sample
        torch.manual_seed(0)
        assert torch.equal(first, vaes[1].decode(latents, time).sample)
    assert torch.equal(*(encoded(one, CAPTIONS[0])[0] for one in (family, whole)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_are_those_of_diffusers_converters(folders, variant):
    found = original(ltx(folders[variant]), folders[variant])
    if variant != "0.9":  # the converter takes diffusers' names as well
        last = {name for name in found if name.startswith("vae.decoder.last_")}
        assert "vae.decoder.last_scale_shift_table" in last
        assert len(last) == 5
    transformer = convert_ltx_transformer_checkpoint_to_diffusers(dict(found))
    expected = tensors(folders[variant], "transformer")
    assert transformer.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in transformer.items())
    if variant == "0.9.5":  # known by its width
        found["vae.encoder.conv_out.conv.weight"] = torch.zeros(1, 2048)
    vae, expected = convert_ltx_vae_checkpoint_to_diffusers(dict(found)), tensors(folders[variant], "vae")
    assert vae.keys() == expected.keys()
    for name, value in vae.items():
        assert name == "encoder.conv_out.conv.weight" or torch.equal(value, expected[name]), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_file_that_says_nothing_is_known_by_its_vae(folders, variant, tmp_path):
    folder = folders[variant]
    options = write_single(folder, tmp_path / "ltx.safetensors")
    save_file(load_file(tmp_path / "ltx.safetensors"), tmp_path / "ltx.safetensors")
    family = ltx(**options)
    assert family.is_causal == (variant == "0.9.5")
    assert family._network["num_attention_heads"] == 32, "as in every published model"


def test_parts_may_come_from_here_and_there(folder, tmp_path):
    write_single(folder, tmp_path / "ltx.safetensors", causal_temporal_positioning=True)
    found = load_file(tmp_path / "ltx.safetensors")
    config = file_metadata(tmp_path / "ltx.safetensors")
    alone = {n.removeprefix("model.diffusion_model."): v + 1 for n, v in found.items() if not n.startswith("vae.")}
    save_file(alone, tmp_path / "transformer.safetensors", metadata=config)
    vae = {n.removeprefix("vae."): v for n, v in found.items() if n.startswith("vae.")}
    vae["per_channel_statistics.mean-of-means"] = vae["per_channel_statistics.mean-of-means"] + 1
    save_file(vae, tmp_path / "vae.safetensors")
    family = ltx(folder, single_file_path=tmp_path / "transformer.safetensors")
    bias = family.load_denoiser(CPU).state_dict()["proj_in.bias"]
    assert torch.equal(bias, alone["patchify_proj.bias"].float())
    mean = tensors(folder, "vae")["latents_mean"].float()
    assert torch.equal(family.load_vae(CPU).latents_mean, mean)
    family = ltx(folder, single_file_path=tmp_path / "ltx.safetensors", vae_path=tmp_path / "vae.safetensors")
    torch.testing.assert_close(family.load_vae(CPU).latents_mean, mean + 1, atol=1e-2, rtol=0)
    assert family.is_causal
    old = ltx(folder, single_file_path=tmp_path / "ltx.safetensors")
    assert old._place("vae")[0] == tmp_path / "ltx.safetensors"


@pytest.mark.parametrize("suffix", ["", ".scale_weight", ".weight_scale"])
def test_fp8_files_come_close(folder, tmp_path, suffix):
    def stored(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        out = {}
        for name, value in found.items():
            if not re.search(r"transformer_blocks.*(to_|net).*\.weight", name):
                out[name] = value
                continue
            scale = value.float().abs().max() / 448 if suffix else torch.tensor(1.0)
            out[name] = (value.float() / scale).to(torch.float8_e4m3fn)
            if suffix:
                out[name.removesuffix(".weight") + suffix] = scale
        return out

    family = ltx(**write_single(folder, tmp_path / "ltx.safetensors", stored))
    ours, theirs = (one.load_denoiser(CPU).state_dict() for one in (family, ltx(folder)))
    for name, value in ours.items():
        assert (value - theirs[name]).norm() <= 0.04 * theirs[name].norm() + 1e-3, name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "model.single_file_path: give an LTX-Video 0.9 transformer, such as"),
        ({"single_file_path": "nowhere"}, "model.single_file_path: 'nowhere' does not exist"),
        ({"single_file_path": "t5"}, "is not an LTX-Video 0.9 transformer"),
        ({"single_file_path": "ltx2"}, "is not an LTX-Video 0.9 transformer, such as ltx-video-2b-v0.9.5.safetensors "
                                       "(it has 'audio_adaln_single.linear.weight')"),
        ({"single_file_path": "transformer"}, "model.vae_path: give the VAE of LTX-Video 0.9"),
        ({"single_file_path": "whole"}, "model.t5_path: give T5-XXL"),
        ({"single_file_path": "whole", "t5_path": "t5"}, "model.t5_tokenizer_path: no tokenizer found"),
        ({"single_file_path": "whole", "t5_path": "wide"}, "has 48 features, but the transformer works with 32"),
        ({"single_file_path": "whole", "vae_path": "t5", "t5_path": "t5"}, "is not the VAE of LTX-Video 0.9"),
    ],
)  # fmt: skip
def test_what_it_says_of_wrong_files(options, message, folder, tmp_path):
    write_single(folder, tmp_path / "whole.safetensors")
    found = load_file(tmp_path / "whole.safetensors")
    alone = {name: value for name, value in found.items() if not name.startswith("vae.")}
    save_file(alone, tmp_path / "transformer.safetensors")
    save_file({**alone, "model.diffusion_model.audio_adaln_single.linear.weight": torch.zeros(1)},
              tmp_path / "ltx2.safetensors")  # fmt: skip
    t5 = tensors(folder, "text_encoder")
    save_file(t5, tmp_path / "t5.safetensors")
    save_file({**t5, "shared.weight": torch.zeros(len(t5["shared.weight"]), 48)}, tmp_path / "wide.safetensors")
    given = {key: str(tmp_path / f"{value}.safetensors") if value != "nowhere" else value
             for key, value in options.items()}  # fmt: skip
    if options.get("t5_path") == "wide":
        given["t5_tokenizer_path"] = str(folder / "tokenizer")
    with pytest.raises(SettingsError, match=re.escape(message)):
        ltx(**given)


# -- results ------------------------------------------------------------------------------------------------


def test_lora_moves_the_pipeline_as_in_training(folder, tmp_path):
    """Every linear layer of the blocks has one, with alpha unlike the rank."""
    family = ltx(folder)
    settings = validate(Lora, {"type": "lora", "rank": 4, "alpha": 6.0})
    denoiser = inject(family.load_denoiser(CPU), family, settings, 0)
    layers = adapted_layers(denoiser)
    for layer in layers.values():
        torch.nn.init.normal_(layer.adapter.up, std=0.2)
    exported = export_tensors(layers, family, torch.float32)
    keys = {re.sub(r"^diffusion_model\.transformer_blocks\.\d\.|\.lora_[AB]\.weight$", "", key) for key in exported}
    assert keys == {f"attn{n}.{part}" for n in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0")} | {
        "ff.net.0.proj", "ff.net.2"}  # fmt: skip
    save_file(exported, tmp_path / "lora.safetensors")
    pipeline = diffusers.LTXPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    inputs = family.collate([example_of(encoded(family, CAPTIONS[0])[0])]).inputs
    bare, ours, theirs = (
        predict(family, network, inputs) for network in (family.load_denoiser(CPU), denoiser, pipeline.transformer)
    )
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
    assert (ours - bare).norm() > 0.05 * bare.norm()


def test_names_of_layers_outside_the_blocks_are_lightricks():
    family = LTXVideo(validate(LTXVideo.Config, {"type": "ltx-video"}))
    assert family.lora_keys("proj_in") == "diffusion_model.patchify_proj"
    assert family.lora_keys("time_embed.linear") == "diffusion_model.adaln_single.linear"
    assert family.lora_keys("caption_projection.linear_1") == "diffusion_model.caption_projection.linear_1"


class ClipBench(Bench):
    """Pictures and clips of 9 frames."""

    def __init__(self, root: Path, variant: str = "0.9.5") -> None:
        super().__init__(root, "ltx-video", variant=variant)
        write_clips(self.pictures, frames=20, fps=25)

    def dataset(self, **changes: Any) -> dict[str, Any]:
        return super().dataset(frame_buckets=[1, 9], **changes)


def test_all_weights_are_a_checkpoint_like_lightricks(tmp_path):
    """What is trained moves, the file has all but the text encoder, and says what it is: here and in diffusers."""
    bench = ClipBench(tmp_path)
    result = bench.train(adapter=None, epochs=1, save_every_n_epochs=1)
    (file,) = result.folder.path.glob("epoch1/*.safetensors")
    folder = Path(bench.model["diffusers_path"])
    start, trained = original(ltx(folder), folder), load_file(file)
    assert trained.keys() == start.keys()
    name = "model.diffusion_model.transformer_blocks.0.attn1.to_q.weight"
    assert not torch.equal(trained[name].float(), start[name].float())
    assert torch.equal(trained["vae.encoder.conv_in.conv.weight"], start["vae.encoder.conv_in.conv.weight"])
    told = json.loads(file_metadata(file)["config"])["transformer"]
    assert told["causal_temporal_positioning"] is True
    assert told["num_attention_heads"] == 2
    again = ltx(folder, single_file_path=file)
    assert again.is_causal
    found = again.load_denoiser(CPU).state_dict()
    network = diffusers.LTXVideoTransformer3DModel.from_single_file(
        str(file), config=str(folder / "transformer"), torch_dtype=torch.float32
    )
    for name, value in network.state_dict().items():
        assert torch.equal(value, found[name]), name
    assert torch.equal(found["proj_in.weight"], trained["model.diffusion_model.patchify_proj.weight"].float())


def test_trains_clips_and_pictures_and_draws_from_a_first_frame(tmp_path):
    bench = ClipBench(tmp_path)
    Image.new("RGB", (64, 64), "red").save(tmp_path / "first.png")
    shown = {"prompts": ["a ball"], "width": 64, "height": 64, "frames": 9, "steps": 2, "before_first_step": False}
    shown |= {"images": [str(tmp_path / "first.png")], "every_n_epochs": 2}
    options = {"model": {"first_frame_conditioning_p": 0.5}, "epochs": 2}
    result = bench.train(**options, sample=shown)
    with av.open(result.status.samples[-1]) as container:
        assert len(list(container.decode(video=0))) == 9
    plain = bench.train(**options, activation_checkpointing=False)
    assert plain.curve("loss") == pytest.approx(result.curve("loss"), rel=1e-5)
    assert plain.curve("loss") != bench.train(epochs=2).curve("loss")
    two = bench.launch(2, **options, pipeline_stages=2)
    assert two.curve("loss") == pytest.approx(plain.curve("loss"), rel=1e-5)


# -- speed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [0.0, 1.0])
def test_a_compiled_block_is_one_graph(folder, given):
    """With captions of unlike lengths; one caption has no mask."""
    family = ltx(folder, first_frame_conditioning_p=given)
    denoiser: Any = family.load_denoiser(CPU)
    texts = encoded(family, *CAPTIONS[:2])
    for count in (1, 2):
        torch._dynamo.reset()
        inputs = family.collate([example_of(text, number) for number, text in enumerate(texts[:count])]).inputs
        plain = predict(family, denoiser, inputs)
        compiled = [torch.compile(block, fullgraph=True, backend="aot_eager") for block in denoiser.transformer_blocks]
        values: Any = inputs
        with torch.no_grad():
            for layer in family.layers(denoiser):
                modules = dict(layer.submodules)
                if layer.is_block:
                    modules["block"] = compiled[int(layer.name.rsplit(".", 1)[-1])]
                values = layer.forward(SimpleNamespace(**modules), *values)
        torch.testing.assert_close(values, plain, atol=2e-6, rtol=1e-5)
    torch._dynamo.reset()
