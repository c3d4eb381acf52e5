"""FLUX.2's own parts: text of three hidden states, controls at times of their own, the VAE's statistics, its files."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers
from diffusers.models.transformers.transformer_flux2 import Flux2SingleTransformerBlock, Flux2TransformerBlock
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from diffusion_trainer.models import flux2_attention, flux2_vae, flux_attention
from diffusion_trainer.models.base import Example, SampleRequest
from diffusion_trainer.models.flux2 import (
    MISTRAL_TEMPLATE,
    QWEN_TEMPLATE,
    Flux2,
    position_ids,
    read_single,
    source_of,
    tokens_of,
)
from diffusion_trainer.models.flux2_attention import use_fast_forms
from diffusion_trainer.models.mistral import EMBEDDED_TOKENIZER, miniature_tekken, tekken_tokenizer
from diffusion_trainer.utils.adapted import adapted_layers
from diffusion_trainer.utils.adapter_settings import Lora
from diffusion_trainer.utils.adapters import export_tensors, inject
from diffusion_trainer.utils.config import SettingsError, validate
from diffusion_trainer.utils.dataset_settings import parse_dataset_settings
from diffusion_trainer.utils.planning import plan_lines
from diffusion_trainer.utils.settings import parse_train_settings
from diffusion_trainer.utils.weights import Weights
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from test_kontext import AtOneTime, EditBench
from test_rotary import needs_compiler
from training import Bench

CPU = torch.device("cpu")
CAPTIONS = ["a red cat", "a photo of a red cat on a roof at night, far longer than the others are [IMG] " * 3]
"""The second is cut."""
QUANTILE = 0.68
"""At which rounding the time to 16 bits differs from rounding a thousand times it."""


@pytest.fixture(scope="module", params=["klein", "dev"])
def variant(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(variant, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp(variant)
    Flux2.write_miniature(path, variant)
    return path


def tensors(folder: Path, part: str) -> dict[str, torch.Tensor]:
    (file,) = (folder / part).glob("*.safetensors")
    return load_file(file)


def flux2(**options) -> Flux2:
    table = {"type": "flux2", "dtype": "float32", "max_sequence_length": 320, "guidance": 2.5, **options}
    return Flux2(validate(Flux2.Config, {k: str(v) if isinstance(v, Path) else v for k, v in table.items()}, "model"))


@pytest.fixture(scope="module")
def files(folder: Path, variant: str, tmp_path_factory) -> dict[str, str]:
    """The parts as single files."""
    path = tmp_path_factory.mktemp("single")
    family = flux2(diffusers_path=folder)
    vae = flux2_vae.to_original(tensors(folder, "vae"))
    moved = {"quant_conv.": "encoder.quant_conv.", "post_quant_conv.": "decoder.post_quant_conv."}
    for old, new in moved.items():  # as Black Forest Labs' file has them
        vae = {new + name.removeprefix(old) if name.startswith(old) else name: v for name, v in vae.items()}
    text = tensors(folder, "text_encoder")
    if variant == "dev":
        kept = {n: v for n, v in text.items() if "language_model." in n and not n.startswith("lm_head")}
        text = {f"model.{n.partition('language_model.')[2].removeprefix('model.')}": v for n, v in kept.items()}
        text[EMBEDDED_TOKENIZER] = torch.frombuffer(bytearray(miniature_tekken()), dtype=torch.uint8)
    parts = {"dit": family.comfyui_tensors(tensors(folder, "transformer")), "vae": vae, "text": text}
    for name, part in parts.items():
        save_file({n: v.contiguous() for n, v in part.items()}, path / f"{name}.safetensors")
    return {name: str(path / f"{name}.safetensors") for name in parts}


def single(files: dict[str, str], **options) -> Flux2:
    entry = {"path": files["text"], "type": "flux2"}
    return flux2(diffusion_model=files["dit"], vae=files["vae"], text_encoders=[entry], **options)


def library_pipeline(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def encoded(family: Flux2, *captions: str) -> torch.Tensor:
    return family.encode_text("text", family.load_text_encoder("text", CPU), captions)["text_embeds"]


def predict(family: Flux2, denoiser: torch.nn.Module, values: Any) -> torch.Tensor:
    with torch.no_grad():
        for layer in family.layers(denoiser):
            values = layer.forward(SimpleNamespace(**layer.submodules), *values)
    return values


def pictures(number: int, size: tuple[int, int] = (96, 64)) -> list[Image.Image]:
    chance = np.random.default_rng(number)
    return [Image.fromarray(chance.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)) for _ in range(number)]


def latents_of(family: Flux2, picture: Image.Image) -> torch.Tensor:
    """Of pixels that lie in memory as pipelines have them: their places decide how sums are rounded."""
    pixels_HWC = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255) * 2 - 1
    pixels_NCHW = torch.empty(1, 3, *pixels_HWC.shape[:2], memory_format=torch.channels_last)
    pixels_NCHW[0] = pixels_HWC.permute(2, 0, 1)
    return family.encode_media(family.load_vae(CPU), pixels_NCHW.unsqueeze(2), [])["latents"][0]


# -- against the pipelines --------------------------------------------------------------------------------


@pytest.mark.parametrize("num_controls", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_step_equals_the_pipelines(folder, variant, dtype, num_controls):
    """What the pipeline's own call gives its transformer at a time, and what that answers; and the VAE's latents."""
    family, pipeline = flux2(diffusers_path=folder, dtype=str(dtype)[6:]), library_pipeline(folder, dtype)
    source = torch.Generator().manual_seed(3)
    latents, noise = (torch.randn(2, 32, 4, 6, generator=source) for _ in range(2))
    latents, starts = latents.to(dtype), pictures(num_controls)
    controls = tuple({"latents": latents_of(family, start)} for start in starts)
    with torch.no_grad():
        embeds, _ = pipeline.encode_prompt(CAPTIONS, max_sequence_length=320)
    batch = family.collate([
        Example({"latents": latents[n]}, {"text_embeds": embeds[n]}, noise[n], QUANTILE, controls) for n in range(2)
    ])  # fmt: skip
    prediction = predict(family, family.load_denoiser(CPU), batch.inputs)

    pipeline.scheduler = AtOneTime()
    pipeline.scheduler.sigma = family.timestep(QUANTILE, (4, 6))
    pipeline.scheduler.set_timesteps()
    x_t = pipeline.scheduler.scale_noise(latents.float(), pipeline.scheduler.timesteps, noise)
    seen: dict[str, Any] = {}

    def see(_module, _arguments, given, answer):
        seen.update(given, answer=answer[0])

    pipeline.transformer.register_forward_hook(see, with_kwargs=True)
    pipeline(
        image=starts or None, latents=x_t, prompt_embeds=embeds, width=96, height=64, num_inference_steps=1,
        guidance_scale=2.5 if variant == "dev" else 1.0, output_type="latent",
    )  # fmt: skip
    ours, told, our_embeds, guidance, *our_controls = batch.inputs
    assert torch.equal(torch.cat([tokens_of(part) for part in (ours, *our_controls)], 1), seen["hidden_states"])
    assert torch.equal(told.to(dtype), seen["timestep"])
    assert torch.equal(our_embeds, seen["encoder_hidden_states"])
    assert (seen["guidance"] is None) == (variant == "klein")
    assert seen["guidance"] is None or torch.equal(guidance, seen["guidance"])
    ids = position_ids(320, 4, 6, num_controls, CPU)
    assert torch.equal(ids, torch.cat([seen["txt_ids"][0], seen["img_ids"][0]]).float())
    assert seen["answer"].shape == (2, 24 * (1 + num_controls), 32)
    assert torch.equal(prediction, seen["answer"][:, :24])
    assert torch.equal(batch.target, tokens_of(noise - latents.float()))


def test_target_is_what_the_pipeline_steps_by(folder):
    """An Euler step of its scheduler along the target arrives at the clean latents."""
    family = flux2(diffusers_path=folder)
    latents, noise = torch.randn(2, 32, 4, 6, generator=torch.Generator().manual_seed(3))
    text = torch.zeros(320, 48)
    batch = family.collate([Example({"latents": latents}, {"text_embeds": text}, noise, 0.6)])
    scheduler = AtOneTime()
    scheduler.sigma = family.timestep(0.6, (4, 6))
    scheduler.set_timesteps()
    stepped = scheduler.step(batch.target, scheduler.timesteps[0], tokens_of(batch.inputs[0]), return_dict=False)[0]
    torch.testing.assert_close(stepped, tokens_of(latents[None]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_text_equals_the_pipelines(folder, variant, dtype):
    """Our encoders lack the layers that nothing is taken from."""
    family, pipeline = flux2(diffusers_path=folder, dtype=dtype), library_pipeline(folder, getattr(torch, dtype))
    with torch.no_grad():
        expected, _ = pipeline.encode_prompt(CAPTIONS, max_sequence_length=320)
    assert torch.equal(encoded(family, *CAPTIONS), expected)
    assert torch.equal(encoded(family, CAPTIONS[0]), expected[:1])
    encoder = family.load_text_encoder("text", CPU).model
    assert len(encoder.layers) == (30 if variant == "dev" else 27)
    assert not any("norm" in name.split(".")[0] for name, _ in encoder.named_parameters())


def test_templates_are_those_of_the_chat(folder, variant):
    tokenizer = library_pipeline(folder).tokenizer
    if variant == "klein":
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": "a cat"}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        assert asked == QWEN_TEMPLATE.format("a cat")
    else:
        from diffusers.pipelines.flux2.pipeline_flux2 import format_input

        asked = tokenizer.apply_chat_template(format_input(["a cat"])[0], tokenize=False)
        assert asked == MISTRAL_TEMPLATE.format("a cat")


@pytest.mark.parametrize(("width", "height"), [(512, 512), (1024, 1024), (1280, 1024), (2048, 1024)])
@pytest.mark.parametrize("variant", ["klein"], indirect=True)
def test_shift_by_size_is_the_pipelines(width, height, variant):
    family = flux2(diffusers_path="/nowhere", flux_shift=True)
    size = family.latent_size(width, height)[1:]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    scheduler.set_timesteps(sigmas=[0.4], mu=compute_empirical_mu(width * height // 256, 50))
    shift = family.timestep_shift(size)
    assert shift * 0.4 / (1 + (shift - 1) * 0.4) == pytest.approx(scheduler.sigmas[0].item(), rel=1e-5)
    assert flux2(diffusers_path="/nowhere", flux_shift=True, shift=2.0).timestep_shift(size) == 2.0
    assert flux2(diffusers_path="/nowhere").timestep_shift(size) == 1.0


def test_draws_what_the_pipeline_draws_from_pictures(folder, variant):
    """Pictures of another shape are cropped to what is drawn, as in training."""
    family, theirs = flux2(diffusers_path=folder), library_pipeline(folder)
    text, negative = ({"text_embeds": embeds} for embeds in encoded(family, "a red cat", ""))
    starts = pictures(2, (100, 90))
    ours = family.pipeline(family.load_denoiser(CPU), CPU, text_encoders=False)
    ours.set_progress_bar_config(disable=True)
    request = SampleRequest(text, negative, width=96, height=64, steps=2, guidance=3.0, seed=5, images=tuple(starts))
    (drawn,) = family.sample(ours, request)
    (expected,) = theirs(
        image=[ImageOps.fit(start, (96, 64)) for start in starts], prompt="a red cat", width=96, height=64,
        num_inference_steps=2, guidance_scale=3.0, max_sequence_length=320, generator=torch.Generator().manual_seed(5),
    ).images  # fmt: skip
    assert drawn.tobytes() == expected.tobytes()
    (plain,) = family.sample(ours, SampleRequest(text, negative, width=96, height=64, steps=2, guidance=3.0, seed=5))
    assert plain.tobytes() != drawn.tobytes()


def test_a_distilled_folder_is_drawn_without_negative_prompt(tmp_path):
    Flux2.write_miniature(tmp_path)
    family = flux2(diffusers_path=tmp_path)
    denoiser = family.load_denoiser(CPU)
    assert not family.pipeline(denoiser, CPU, text_encoders=False).config.is_distilled
    file = tmp_path / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "is_distilled": True}))
    assert family.pipeline(denoiser, CPU, text_encoders=False).config.is_distilled


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
@pytest.mark.parametrize("kind", ["double", "single"])
@pytest.mark.parametrize("variant", ["klein"], indirect=True)
def test_blocks_with_the_operator_are_the_librarys(kind, compiled, variant, monkeypatch):
    """Forward bit for bit, and one graph; gradients but for rounding."""
    dim, of = 32, {"generator": torch.Generator().manual_seed(1)}
    torch.manual_seed(0)
    made = {"double": Flux2TransformerBlock, "single": Flux2SingleTransformerBlock}
    block = made[kind](dim, 2, 16)
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(False).add_(0.2 * torch.randn(parameter.shape, **of) if "norm" in name else 0)
    parts = [torch.randn(2, number, dim, **of) for number in (24, 40)]
    mods = [torch.randn(2, 6 * dim, **of) for _ in parts]
    inputs = [*parts, *mods] if kind == "double" else [torch.cat(parts, 1), mods[0][:, : 3 * dim].contiguous()]
    angles = torch.randn(64, 8, **of).repeat_interleave(2, dim=1)

    def through(network: Any) -> list[torch.Tensor]:
        leaves = [value.clone().requires_grad_() for value in inputs]
        given = leaves if kind == "double" else [leaves[0], None, leaves[1]]
        results = network(*given, (angles.cos(), angles.sin()))
        results = results if kind == "double" else (results,)
        loss = sum((result * torch.linspace(-1, 1, result.numel()).view_as(result)).sum() for result in results)
        return [*(result.detach() for result in results), *torch.autograd.grad(loss, leaves)]

    plain = through(block)
    use_fast_forms(block)
    for ours, theirs in zip(through(block), plain, strict=True):
        assert torch.equal(ours, theirs)
    for module in (flux_attention, flux2_attention):
        monkeypatch.setattr(module, "is_fused", lambda *_: True)
    torch._dynamo.reset()
    fused = through(torch.compile(block, fullgraph=True) if compiled else block)
    for number, (ours, theirs) in enumerate(zip(fused, plain, strict=True)):
        if compiled or number >= len(plain) - len(inputs):
            assert (ours - theirs).norm() < 1e-5 * theirs.norm()
        else:
            assert torch.equal(ours, theirs)
    torch._dynamo.reset()


def test_masks_are_laid_as_tokens(folder):
    family = flux2(diffusers_path=folder)
    example = family.blank_example(96, 64)
    mask = torch.arange(24.0).reshape(1, 1, 4, 6)
    weights = family.spread_mask(mask, family.collate([example]).target)
    assert torch.equal(weights, torch.arange(24.0).reshape(1, 24, 1))


# -- files ------------------------------------------------------------------------------------------------


def test_single_files_equal_the_folder(folder, files):
    tokenizer = {"tokenizer_path": folder / "tokenizer"}
    whole = flux2(diffusers_path=folder)
    family = single(files, **({} if whole._is_dev else tokenizer))
    for each in (whole, family):
        each.check_files()
    ours, theirs = (f.load_denoiser(CPU) for f in (family, whole))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name]), name
    left_out = {"out_channels", "_use_default_values"}
    assert {k: v for k, v in ours.config.items() if k[0] != "_" and k not in left_out} == {
        k: tuple(v) if isinstance(v, list) else v for k, v in theirs.config.items() if k[0] != "_" and k not in left_out
    }
    assert torch.equal(encoded(family, *CAPTIONS), encoded(whole, *CAPTIONS))
    (picture,) = pictures(1)
    assert torch.equal(latents_of(family, picture), latents_of(whole, picture))
    assert family.load_vae(CPU).config.decoder_block_out_channels is None


@pytest.mark.parametrize("variant", ["klein"], indirect=True)
def test_files_with_other_names(folder, files, tmp_path):
    """Norms as ComfyUI writes them; a VAE in diffusers' names, or with convolutions beside its networks."""
    dit = {f"model.diffusion_model.{re.sub('scale$', 'weight', n)}": v for n, v in load_file(files["dit"]).items()}
    save_file(dit, tmp_path / "dit.safetensors")
    names = {"diffusers": tensors(folder, "vae"), "original": flux2_vae.to_original(tensors(folder, "vae"))}
    whole, (picture,) = flux2(diffusers_path=folder), pictures(1)
    for name, vae in names.items():
        save_file({n: v.contiguous() for n, v in vae.items()}, tmp_path / f"{name}.safetensors")
        family = flux2(diffusers_path=folder, vae=tmp_path / f"{name}.safetensors",
                       diffusion_model=tmp_path / "dit.safetensors")  # fmt: skip
        family.check_files()
        assert torch.equal(latents_of(family, picture), latents_of(whole, picture))
    ours, theirs = (f.load_denoiser(CPU).state_dict() for f in (family, whole))
    assert all(torch.equal(value, ours[name]) for name, value in theirs.items())


@pytest.mark.parametrize("variant", ["klein"], indirect=True)
def test_a_vae_with_a_smaller_decoder(variant, tmp_path):
    vae = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1,
        block_out_channels=(64, 128), decoder_block_out_channels=(32, 64), latent_channels=8)  # fmt: skip
    save_file(
        {n: v.contiguous() for n, v in flux2_vae.to_original(vae.state_dict()).items()}, tmp_path / "v.safetensors"
    )
    loaded = flux2_vae.load_vae(Weights(tmp_path / "v.safetensors", "model.vae"), torch.float32, CPU)
    assert loaded.config.decoder_block_out_channels == (32, 64)
    for name, value in vae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_names_and_slices_are_those_of_diffusers_converter(folder, files):
    weights = Weights(Path(files["dit"]), "model.diffusion_model")
    expected = convert_flux2_transformer_checkpoint_to_diffusers(load_file(files["dit"]))
    assert set(expected) == set(tensors(folder, "transformer"))
    for name, value in expected.items():
        assert torch.equal(read_single(weights, name), value), name


@pytest.mark.parametrize("variant", ["klein"], indirect=True)
def test_fp8_with_scales(folder, files, tmp_path):
    """As ComfyUI's and Black Forest Labs' own: a factor for each weight, and one for its inputs, which is not used."""
    scaled = dict(load_file(files["dit"]))
    for name in [name for name in scaled if "_blocks." in name and scaled[name].ndim == 2]:
        value = scaled[name].float()
        scale = value.abs().max() / 448
        scaled[name] = (value / scale).to(torch.float8_e4m3fn)
        scaled[name + "_scale"] = scale
        scaled[name.replace(".weight", ".input_scale")] = torch.ones(())
    save_file(scaled, tmp_path / "dit.safetensors")
    family = flux2(diffusers_path=folder, diffusion_model=tmp_path / "dit.safetensors")
    family.check_files()
    ours, theirs = (f.load_denoiser(CPU).state_dict() for f in (family, flux2(diffusers_path=folder)))
    for name, value in theirs.items():
        largest = value.abs().max().item()
        torch.testing.assert_close(ours[name], value, atol=0.04 * largest, rtol=0.07, msg=name)


def test_tekken_gives_the_tokens_of_transformers(tmp_path):
    converter = pytest.importorskip("transformers.integrations.mistral.tokenizer").MistralConverter
    (tmp_path / "tekken.json").write_bytes(miniature_tekken())
    theirs, ours = converter(str(tmp_path / "tekken.json")).converted(), tekken_tokenizer(miniature_tekken())
    text = MISTRAL_TEMPLATE.format("a red cat, 猫 🐈\n\tcats'   are 12 redder")
    assert ours(text, add_special_tokens=False).input_ids == theirs.encode(text, add_special_tokens=False).ids
    assert ours.decode(ours(text).input_ids) == text
    assert ours("x", padding="max_length", max_length=4).input_ids[:3] == [ours.pad_token_id] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "model.diffusion_model: give a FLUX.2 transformer"),
        ({"diffusion_model": "text"}, "is not a FLUX.2 transformer"),
        ({"diffusion_model": "dit"}, "model.vae: give the FLUX.2 VAE"),
        ({"diffusion_model": "dit", "vae": "dit"}, "is not the FLUX.2 VAE"),
        ({"diffusion_model": "dit", "vae": "vae"}, "model.text_encoders.path: give {text}"),
        ({"diffusion_model": "dit", "vae": "vae", "text_encoders": [{"paths": ["a"]}]}, "FLUX.2 has one; give {text}"),
        ({"diffusion_model": "dit", "vae": "vae", "text_encoders": [{"path": "vae"}]}, "is not {text}"),
        ({"diffusion_model": "dit", "vae": "vae", "text_encoders": [{"path": "short"}]}, "has 20 layers"),
        ({"diffusion_model": "dit", "vae": "vae", "text_encoders": [{"path": "wide"}]}, "has 96 features"),
        ({"diffusion_model": "dit", "vae": "vae", "text_encoders": [{"path": "bare"}]}, "no tokenizer found"),
    ],
)
def test_what_it_says_of_wrong_files(options, message, files, variant, tmp_path):
    text = load_file(files["text"])
    bare = {name: value for name, value in text.items() if name != EMBEDDED_TOKENIZER}
    short = {name: value for name, value in text.items() if not re.search(r"layers\.[2-9]\d\.", name)}
    wide = {**text, "model.embed_tokens.weight": torch.zeros(300, 32)}
    named = dict(files)
    for name, found in {"short": short, "wide": wide, "bare": bare}.items():
        named[name] = str(tmp_path / f"{name}.safetensors")
        save_file(found, named[name])

    def path(value: Any) -> Any:
        if isinstance(value, list):
            return [path(entry) for entry in value]
        if isinstance(value, dict):
            return {key: path(entry) for key, entry in value.items()}
        return named.get(value, value)

    if variant == "klein" and "bare" not in str(options):
        (tmp_path / "tokenizer.json").write_text('"<think>"')
        options = {**options, "tokenizer_path": str(tmp_path)}
    title = "Mistral Small 3" if variant == "dev" else "Qwen3 4B"
    with pytest.raises(SettingsError, match=re.escape(message.format(text=title))):
        flux2(**{key: path(value) for key, value in options.items()}).check_files()


@pytest.mark.parametrize("variant", ["klein"], indirect=True)
def test_the_wider_klein_asks_for_the_larger_encoder(folder, files, tmp_path):
    dit = {**load_file(files["dit"]), "txt_in.weight": torch.zeros(32, 3 * 4096)}
    save_file(dit, tmp_path / "dit.safetensors")
    with pytest.raises(SettingsError, match="has 48 features, but the transformer works with 12288; give Qwen3 8B"):
        flux2(diffusers_path=folder, diffusion_model=tmp_path / "dit.safetensors").check_files()


@pytest.mark.parametrize("variant", ["klein"], indirect=True)
def test_a_tokenizer_of_qwen_2_is_refused(folder, files, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('"<|im_start|>"')
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(SettingsError, match=r"model\.tokenizer_path: the tokenizer in .* is not Qwen3's"):
        single(files, tokenizer_path=tmp_path).check_files()


# -- LoRAs and trainings ----------------------------------------------------------------------------------


def test_lora_moves_the_pipeline_as_in_training(folder, tmp_path):
    family = flux2(diffusers_path=folder)
    denoiser = inject(family.load_denoiser(CPU), family, validate(Lora, {"type": "lora", "rank": 4, "alpha": 6}), 0)
    layers = adapted_layers(denoiser)
    assert {name.split(".", 2)[2] for name in layers if name.startswith("single")} == {
        "attn.to_qkv_mlp_proj", "attn.to_out"
    }  # fmt: skip
    for layer in layers.values():
        torch.nn.init.normal_(layer.adapter.up, std=0.2)
    exported = export_tensors(layers, family, torch.float32)
    assert not any("alpha" in key for key in exported)  # diffusers refuses such files of FLUX.2
    save_file(exported, tmp_path / "lora.safetensors")
    pipeline = library_pipeline(folder)
    pipeline.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    example = family.blank_example(64, 64)
    example.noise = torch.randn(32, 4, 4, generator=torch.Generator().manual_seed(1))
    inputs = family.collate([example]).inputs
    bare, ours, theirs = (
        predict(family, network, inputs) for network in (family.load_denoiser(CPU), denoiser, pipeline.transformer)
    )
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
    assert (ours - bare).norm() > 0.05 * bare.norm()
    settings = {"type": "lora", "rank": 4, "init_from_existing": str(tmp_path / "lora.safetensors")}
    again = inject(family.load_denoiser(CPU), family, validate(Lora, settings), 0)
    torch.testing.assert_close(predict(family, again, inputs), ours, atol=1e-5, rtol=1e-4)


def test_a_lora_on_all_layers_loads_in_diffusers(folder, tmp_path):
    """But for what ComfyUI calls otherwise."""
    family = flux2(diffusers_path=folder)
    settings = validate(Lora, {"type": "lora", "rank": 2, "target_modules": ["."]})
    layers = adapted_layers(inject(family.load_denoiser(CPU), family, settings, 0))
    save_file(export_tensors(layers, family, torch.float32), tmp_path / "lora.safetensors")
    pipeline = library_pipeline(folder)
    pipeline.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    loaded = {name.partition(".lora_A")[0] for name, _ in pipeline.transformer.named_modules() if ".lora_A." in name}
    assert loaded == {name for name in layers if family.lora_keys(name).startswith("transformer.")}
    assert {"x_embedder", "context_embedder", "norm_out.linear", "proj_out"} <= loaded


def test_every_module_has_a_key_of_its_own(folder):
    """Outside of blocks in the single file's names, where ComfyUI knows no others."""
    family = flux2(diffusers_path=folder)
    modules = [name for name, m in family.build_denoiser().named_modules() if isinstance(m, torch.nn.Linear)]
    keys = {name: family.lora_keys(name) for name in modules}
    assert len(set(keys.values())) == len(modules)
    assert keys["single_stream_modulation.linear"] == "lora_unet_single_stream_modulation_lin"
    assert keys["time_guidance_embed.timestep_embedder.linear_1"] == "lora_unet_time_in_in_layer"
    assert keys["transformer_blocks.0.ff.linear_in"] == "transformer.transformer_blocks.0.ff.linear_in"
    assert source_of("norm_out.linear.weight") == ("final_layer.adaLN_modulation.1.weight", "swapped")


def test_drawing_is_planned(folder, tmp_path):
    """The VAE decodes latents that are not patched."""
    latents = torch.randn(1, 8, 6, 4)
    assert torch.equal(flux2_vae.unpatched(flux2_vae.patched(latents)), latents)
    table = {"type": "flux2", "diffusers_path": str(folder)}
    settings = parse_train_settings(
        {"output_dir": str(tmp_path), "model": table, "adapter": {"type": "lora"}, "optimizer": {"type": "adamw"},
         "sample": {"prompts": ["a ball"], "width": 64, "height": 64}}
    )  # fmt: skip
    dataset = parse_dataset_settings({"resolutions": [64], "directory": [{"path": str(tmp_path)}]})
    lines = [line.split(",")[0] for line in plan_lines(settings, dataset, 1, 2 << 30)]
    assert lines[-3:] == ["fits: training", "fits: drawing samples", "fits: encoding captions with text"]


def test_edits_and_pictures_alone_train_together(tmp_path):
    bench = EditBench(tmp_path, "flux2")
    drawn = {"prompts": ["a cat"], "images": [str(bench.before / "0.png")], "width": 64, "height": 64, "steps": 2,
             "every_n_epochs": 2}  # fmt: skip
    plain = bench.train(epochs=2, sample=drawn)
    assert plain.status.state == "finished"
    assert plain.status.step == 2 * (4 + 4)  # two buckets of three, by two, with and without
    with Image.open(plain.status.samples[-1]) as picture:
        assert picture.size == (64, 64)
    swapped = bench.train(epochs=2, blocks_to_swap=2, activation_checkpointing="unsloth")
    assert swapped.curve("loss") == pytest.approx(plain.curve("loss"), rel=1e-5)
    staged = bench.launch(2, pipeline_stages=2, epochs=2)
    assert staged.curve("loss") == pytest.approx(plain.curve("loss"), rel=1e-5)


def test_what_lies_beside_a_lora_says_that_it_is_scaled(tmp_path):
    adapter = {"alpha": 8, "rank_pattern": {"attn.to_q": 2}}
    result = Bench(tmp_path, "flux2").train(epochs=1, save_every_n_epochs=1, adapter=adapter)
    assert not any("alpha" in key for key in result.lora())
    config = json.loads((Path(result.status.exports[-1]) / "adapter_config.json").read_text("utf-8"))
    assert (config["r"], config["lora_alpha"]) == (4, 4.0)
    assert set(config["rank_pattern"].values()) == {2}
    assert config["alpha_pattern"] == config["rank_pattern"]


def test_all_weights_and_samples(tmp_path):
    """What is trained moves, and is what ComfyUI reads."""
    bench = Bench(tmp_path, "flux2")
    result = bench.train(adapter=None, epochs=1, save_every_n_epochs=1, sample={"prompts": ["a dog"], "steps": 2})
    (file,) = result.folder.path.glob("epoch1/*.safetensors")
    family = flux2(diffusers_path=bench.model["diffusers_path"])
    start = family.comfyui_tensors(family.load_denoiser(CPU).state_dict())
    trained = load_file(file)
    assert trained.keys() == start.keys()
    for name in (
        "double_blocks.0.img_attn.qkv.weight",
        "single_stream_modulation.lin.weight",
        "time_in.in_layer.weight",
    ):
        assert not torch.equal(trained[name].float(), start[name]), name
    assert list((result.folder.path / "samples").rglob("*.png"))
