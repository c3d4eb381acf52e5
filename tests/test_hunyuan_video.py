"""HunyuanVideo against diffusers' HunyuanVideoPipeline, its files in every layout, and what it says of wrong ones."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_hunyuan_video_transformer_to_diffusers
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from diffusion_trainer.models import autoencoder, hunyuan_video_attention
from diffusion_trainer.models.base import Batch, Example, SampleRequest
from diffusion_trainer.models.hunyuan_video import HunyuanVideo
from diffusion_trainer.models.hunyuan_video_attention import as_original
from diffusion_trainer.models.hunyuan_video_files import (
    COMFYUI_BLOCKS,
    COMFYUI_EMBEDDERS,
    END,
    PROMPTS,
    RELEASE,
    llama_config,
    original_name,
    read_library,
    read_original,
    transformer_config,
    vae_config,
)
from diffusion_trainer.utils.adapted import adapted_layers
from diffusion_trainer.utils.adapter_files import fuse
from diffusion_trainer.utils.adapter_settings import Lora
from diffusion_trainer.utils.adapters import export_tensors, inject
from diffusion_trainer.utils.config import SettingsError, validate
from diffusion_trainer.utils.weights import Weights
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from training import Bench, write_clips
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

CPU = torch.device("cpu")
CAPTIONS = ["a photo of a red cat", "a dog"]
VIDEO, PICTURE = PROMPTS


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("hunyuan-video")
    HunyuanVideo.write_miniature(path)
    return path


def hunyuan(folder: Path | None = None, **options) -> HunyuanVideo:
    table: dict[str, Any] = {"type": "hunyuan-video", "dtype": "float32", **options}
    table |= {"diffusers_path": folder} if folder else {}
    table = {key: str(value) if isinstance(value, Path) else value for key, value in table.items()}
    return HunyuanVideo(validate(HunyuanVideo.Config, table, "model"))


def library_pipeline(folder: Path, dtype: torch.dtype = torch.float32) -> diffusers.HunyuanVideoPipeline:
    pipeline = diffusers.HunyuanVideoPipeline.from_pretrained(folder, torch_dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def encoded(family: HunyuanVideo, captions: list[str] = CAPTIONS) -> list[dict[str, torch.Tensor]]:
    found: dict[str, Any] = {}
    for name in family.text_encoders:
        found |= family.encode_text(name, family.load_text_encoder(name, CPU), captions)
    return [{name: value[i] for name, value in found.items()} for i in range(len(captions))]


def examples(texts: list[dict[str, torch.Tensor]], frames: int = 3) -> list[Example]:
    generator = torch.Generator().manual_seed(3)
    latents, noise = (torch.randn(len(texts), 16, frames, 4, 6, generator=generator) for _ in range(2))
    return [Example({"latents": latents[i]}, text, noise[i], [0.2, 0.7][i]) for i, text in enumerate(texts)]


def batch_of(family: HunyuanVideo, texts: list[dict[str, torch.Tensor]], frames: int = 3) -> Batch:
    return family.collate(examples(texts, frames))


def predict(family: HunyuanVideo, denoiser: Any, values: Any) -> torch.Tensor:
    with torch.no_grad():
        for layer in family.layers(denoiser):
            values = layer.forward(SimpleNamespace(**layer.submodules), *values)
    return values


def template(name: str) -> dict[str, Any]:
    """A prompt as the pipeline takes it."""
    prompt, start = PROMPTS[name]
    return {"template": prompt + "{}" + END, "crop_start": start}


# -- against the pipeline ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("frames", "asked"), [(3, VIDEO), (1, PICTURE)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_step_equals_the_pipelines_scheduler_and_transformer(folder, dtype, tolerance, frames, asked):
    """The library's own network, its 256 tokens with a mask, its times and guidance."""
    family = hunyuan(folder, dtype=str(dtype).removeprefix("torch."), shift=7.0, guidance=6.0)
    pipeline, texts = library_pipeline(folder, dtype), encoded(family)
    batch = batch_of(family, texts, frames)
    prediction = predict(family, family.load_denoiser(CPU), batch.inputs)
    assert max(len(text[asked]) for text in texts) == batch.inputs[2].shape[1] < 32

    latents = torch.stack([example.media["latents"] for example in examples(texts, frames)])
    noise = torch.stack([example.noise for example in examples(texts, frames)])
    scheduler: Any = pipeline.scheduler
    sigmas = torch.tensor([family.timestep(quantile, (4, 6)) for quantile in (0.2, 0.7)])
    scheduler.sigmas, scheduler.timesteps = sigmas, sigmas * 1000
    x_t = scheduler.scale_noise(latents, scheduler.timesteps, noise)
    with torch.no_grad():
        embeds, pooled, mask = pipeline.encode_prompt(CAPTIONS, prompt_template=template(asked))
        expected = pipeline.transformer(
            x_t.to(dtype), scheduler.timesteps, embeds, mask.to(dtype), pooled,
            torch.tensor([6.0, 6.0], dtype=dtype) * 1000.0, return_dict=False,
        )[0]  # fmt: skip
    assert embeds.shape[1] == 256
    assert torch.equal(batch.inputs[0], x_t.to(dtype))
    assert torch.equal(batch.inputs[1], scheduler.timesteps)
    assert torch.equal(batch.inputs[5], (torch.tensor([6.0, 6.0], dtype=dtype) * 1000.0).float())
    assert torch.equal(batch.target, noise - latents)
    assert prediction.shape == batch.target.shape
    assert (prediction - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("asked", PROMPTS)
def test_text_equals_encode_prompt(folder, dtype, asked):
    family = hunyuan(folder, dtype=str(dtype).removeprefix("torch."))
    captions = [*CAPTIONS, "", "red " * 400]
    with torch.no_grad():
        embeds, pooled, mask = library_pipeline(folder, dtype).encode_prompt(captions, prompt_template=template(asked))
    lengths = []
    for text, embed, pool, seen in zip(encoded(family, captions), embeds, pooled, mask, strict=True):
        assert torch.equal(text[asked], embed[seen.bool()])
        assert torch.equal(text["clip_pooled"], pool)
        assert text[asked].dtype == dtype
        lengths.append(len(text[asked]))
    assert lengths[2] == 1
    assert 2 < lengths[1] < lengths[0] < lengths[3] == 256


def test_the_prompt_for_videos_is_the_librarys():
    assert template(VIDEO) == DEFAULT_PROMPT_TEMPLATE
    assert (PROMPTS[VIDEO][1], PROMPTS[PICTURE][1]) == (95, 36)


def test_states_begin_with_the_caption(folder):
    """The token before it, and what the tokenizer makes of the caption."""
    tokenizer: Any = hunyuan(folder).load_text_encoder("llama", CPU).tokenizer
    for prompt, start in PROMPTS.values():
        ids = tokenizer(f"{prompt}a red cat{END}").input_ids
        assert tokenizer.decode(ids[start:]) == f"a red cat{END}"
        assert tokenizer.decode(ids[:start]).endswith("user<|end_header_id|>\n\n")


def test_pictures_and_clips_are_asked_for_in_their_own_ways(folder):
    family = hunyuan(folder)
    texts = encoded(family)
    assert not torch.equal(texts[0][VIDEO], texts[0][PICTURE])
    for frames, asked in ((1, PICTURE), (2, VIDEO), (9, VIDEO)):
        assert torch.equal(batch_of(family, texts[:1], frames).inputs[2][0], texts[0][asked])
    for frames, asked in ((1, PICTURE), (5, VIDEO)):
        request = SampleRequest(*texts, 64, 32, frames)  # type: ignore[misc]
        given = family.prompt_arguments(request, CPU)
        length = len(texts[0][asked])
        assert torch.equal(given["prompt_embeds"][0, :length], texts[0][asked])
        assert given["prompt_attention_mask"].sum() == length
        assert torch.equal(given["negative_prompt_embeds"][0, : len(texts[1][asked])], texts[1][asked])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latents_are_drawn_and_scaled_as_the_pipeline_divides_them(folder, dtype):
    family, library = hunyuan(folder, dtype=str(dtype).removeprefix("torch.")), library_pipeline(folder, dtype).vae
    pixels = torch.rand(2, 3, 5, 32, 48, generator=torch.Generator().manual_seed(5)) * 2 - 1
    generators, same = ([torch.Generator().manual_seed(n) for n in (7, 8)] for _ in range(2))
    latents = family.encode_media(family.load_vae(CPU), pixels, generators)["latents"]
    with torch.no_grad():
        drawn = [library.encode(pixels[i : i + 1].to(dtype)).latent_dist.sample(same[i]) for i in range(2)]
    assert torch.equal(latents, torch.cat(drawn) * 0.476986)
    assert latents.shape == (2, 16, 2, 4, 6)
    assert latents.dtype == dtype


def test_large_and_long_clips_are_encoded_in_tiles(folder, monkeypatch):
    """Of 256 pixels and 64 frames, as the original's; less is encoded whole, whose values differ."""
    vae: Any = hunyuan(folder).load_vae(CPU)
    seen: list[tuple[int, ...]] = []
    encode = vae.encoder.forward
    monkeypatch.setattr(vae.encoder, "forward", lambda x: seen.append(tuple(x.shape[2:])) or encode(x))
    for frames, height, width in ((61, 16, 16), (1, 256, 256), (1, 272, 16), (65, 16, 16)):
        with torch.no_grad():
            vae.encode(torch.zeros(1, 3, frames, height, width))
    assert seen == [(61, 16, 16), (1, 256, 256), (1, 256, 16), (1, 80, 16), (65, 16, 16), (17, 16, 16)]


def test_pipeline_has_the_schedule_of_the_folder_or_the_usual_one(folder, tmp_path):
    family = hunyuan(folder)
    assert family.pipeline(family.load_denoiser(CPU), CPU, text_encoders=False).scheduler.config.shift == 7.0
    single = hunyuan(**files_of(folder, tmp_path))
    assert single.pipeline(single.load_denoiser(CPU), CPU, text_encoders=False).scheduler.config.shift == 7.0


# -- captions in their own length ---------------------------------------------------------------------------


def test_what_fills_up_a_batch_is_not_seen(folder):
    family = hunyuan(folder)
    denoiser, texts = family.load_denoiser(CPU), encoded(family)
    x_t, told, text, seen, *rest = batch_of(family, texts).inputs
    plain = predict(family, denoiser, (x_t, told, text, seen, *rest))
    assert seen[0].all()
    for place, changes in ((seen[1] == 0, False), (seen[1] == 1, True)):
        other = text.clone()
        other[1, place] += 3.0
        found = predict(family, denoiser, (x_t, told, other, seen, *rest))
        assert torch.equal(found[0], plain[0])
        assert torch.allclose(found[1], plain[1], atol=1e-5) is not changes


def test_nothing_is_masked_where_captions_are_equally_long(folder, monkeypatch):
    family = hunyuan(folder)
    denoiser, texts = family.load_denoiser(CPU), encoded(family)
    attend, masks = F.scaled_dot_product_attention, []
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **k: masks.append(k.get("attn_mask")) or attend(*a, **k)
    )
    predict(family, denoiser, batch_of(family, [texts[0], texts[0]]).inputs)
    assert masks == [None] * 5
    predict(family, denoiser, batch_of(family, texts).inputs)
    assert all(mask is not None and mask.dtype == torch.bool for mask in masks[5:])


# -- files ------------------------------------------------------------------------------------------------


def originals(folder: Path) -> dict[str, torch.Tensor]:
    """The transformer under the original's names."""
    family = hunyuan(folder, dtype="bfloat16")
    return family.comfyui_tensors(family.load_denoiser(CPU).state_dict())


def comfyui_name(name: str) -> str:
    for ours, theirs in COMFYUI_EMBEDDERS + COMFYUI_BLOCKS:
        name = re.sub(ours, theirs, name)
    return name


def part_of(folder: Path, part: str) -> dict[str, torch.Tensor]:
    (file,) = (folder / part).glob("*.safetensors")
    return load_file(file)


def files_of(folder: Path, to: Path, change=lambda part, found: found) -> dict[str, str]:
    """Writes each part as a single file as ComfyUI's are; returns the options that name them."""
    parts = {
        "transformer_path": originals(folder),
        "vae_path": part_of(folder, "vae"),
        "llm_path": {f"model.{name}": value for name, value in part_of(folder, "text_encoder").items()},
        "clip_path": {f"text_model.{name.removeprefix('text_model.')}": value
                      for name, value in part_of(folder, "text_encoder_2").items()},
    }  # fmt: skip
    options = {"llm_tokenizer_path": str(folder / "tokenizer"), "clip_tokenizer_path": str(folder / "tokenizer_2")}
    for option, found in parts.items():
        file = to / f"{option}.safetensors"
        save_file({name: value.contiguous() for name, value in change(option, found).items()}, file)
        options[option] = str(file)
    return options


def networks(family: HunyuanVideo) -> dict[str, dict[str, torch.Tensor]]:
    family.check_files()
    models = {name: family.load_text_encoder(name, CPU).model for name in family.text_encoders}
    models |= {"transformer": family.load_denoiser(CPU), "vae": family.load_vae(CPU)}
    return {name: model.state_dict() for name, model in models.items()}


def assert_equal(found: HunyuanVideo, expected: HunyuanVideo) -> None:
    theirs = networks(expected)
    for part, state in networks(found).items():
        assert state.keys() == theirs[part].keys()
        for name, value in state.items():
            assert torch.equal(value, theirs[part][name]), f"{part}: {name}"


def whole_prefix(option: str, name: str) -> str:
    return {"transformer_path": "model.model.", "vae_path": "vae.", "llm_path": "text_encoders.llama.transformer.",
            "clip_path": "text_encoders.clip_l.transformer."}[option] + name  # fmt: skip


CHANGES = {
    "as they are": lambda option, found: found,
    "with prefixes": lambda option, found: {whole_prefix(option, name): value for name, value in found.items()},
    "diffusion_model": lambda option, found: {
        f"model.diffusion_model.{name}" if option == "transformer_path" else name: v for name, v in found.items()
    },
    "saved by ComfyUI": lambda option, found: (
        {comfyui_name(name): value for name, value in found.items()}
        if option == "transformer_path"
        else autoencoder.to_original(found)
        if option == "vae_path"
        else found
    ),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_single_files_equal_the_folder(kind, folder, tmp_path):
    family = hunyuan(**files_of(folder, tmp_path, CHANGES[kind]))
    assert_equal(family, hunyuan(folder))
    for ours, theirs in zip(encoded(family), encoded(hunyuan(folder)), strict=True):
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert family.load_vae(CPU).config.scaling_factor == 0.476986


def write_release(folder: Path, to: Path) -> None:
    """As Tencent's repository says to lay it out: Llama without Llava and the whole of CLIP, with their tokenizers."""
    for part, file in RELEASE.items():
        (to / file).parent.mkdir(parents=True, exist_ok=True)
        if part == "transformer":
            torch.save({"module": originals(folder)}, to / file)
        elif part == "vae":
            found = {f"vae.{name}": value for name, value in part_of(folder, "vae").items()}
            torch.save({"state_dict": found, "loss_weight": 1.0}, to / file)
    for name, part in (("text_encoder", "llama"), ("text_encoder_2", "clip")):
        shutil.copytree(folder / f"tokenizer{name.removeprefix('text_encoder')}", to / name)
        config = json.loads((folder / name / "config.json").read_text())
        found = part_of(folder, name)
        if part == "llama":
            found = {f"model.{key}": value for key, value in found.items()}
            config["architectures"] = ["LlamaForCausalLM"]
        else:
            found = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in found.items()}
            found["vision_model.embeddings.class_embedding"] = torch.zeros(8)
            config = {"architectures": ["CLIPModel"], "model_type": "clip", "text_config": config}
        save_file(found, to / name / "model.safetensors")
        (to / name / "config.json").write_text(json.dumps(config))


def test_the_original_release_equals_the_folder(folder, tmp_path):
    write_release(folder, tmp_path)
    family = hunyuan(ckpt_path=tmp_path)
    assert_equal(family, hunyuan(folder))
    for ours, theirs in zip(encoded(family), encoded(hunyuan(folder)), strict=True):
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    mixed = hunyuan(ckpt_path=tmp_path, vae_path=files_of(folder, tmp_path)["vae_path"])
    assert mixed._place("vae")[1] == "model.vae_path"
    mixed = hunyuan(ckpt_path=tmp_path, llm_path=files_of(folder, tmp_path)["llm_path"])
    assert mixed._tokenizer_folder("llama") == tmp_path / "text_encoder"
    assert_equal(mixed, hunyuan(folder))


def test_text_encoders_may_be_folders(folder, tmp_path):
    """Llava's has the language model below a prefix, and says of it what differs from the usual Llama."""
    options = files_of(folder, tmp_path)
    config = json.loads((folder / "text_encoder/config.json").read_text())
    text = {key: config[key] for key in ("model_type", "vocab_size", "rms_norm_eps")}
    text |= {"rope_theta": 500000.0, "torch_dtype": "float16"}
    (tmp_path / "llava").mkdir()
    found = {f"language_model.model.{key}": value for key, value in part_of(folder, "text_encoder").items()}
    save_file(found, tmp_path / "llava/model.safetensors")
    said = {"architectures": ["LlavaForConditionalGeneration"], "text_config": text}
    (tmp_path / "llava/config.json").write_text(json.dumps(said))
    family = hunyuan(**{**options, "llm_path": tmp_path / "llava", "clip_path": folder / "text_encoder_2"})
    for ours, theirs in zip(encoded(family), encoded(hunyuan(folder)), strict=True):
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize("suffix", [None, ".scale_weight", ".weight_scale"])
def test_fp8_files_come_close(folder, tmp_path, suffix):
    def change(option, found):
        out = {"scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn)} if suffix == ".scale_weight" else {}
        for name, value in found.items():
            if option not in ("transformer_path", "llm_path") or not name.endswith(".weight") or value.ndim != 2:
                out[name] = value
                continue
            scale = value.float().abs().max() / 448 if suffix else torch.tensor(1.0)
            out[name] = (value.float() / scale).to(torch.float8_e4m3fn)
            out |= {name.removesuffix(".weight") + suffix: scale} if suffix else {}
        return out

    found, expected = networks(hunyuan(**files_of(folder, tmp_path, change))), networks(hunyuan(folder))
    for part in ("transformer", "llama"):
        for name, value in expected[part].items():
            error = (found[part][name] - value).norm() / value.norm().clamp_min(1e-9)
            assert error < 0.06, (part, name)
            assert (error > 0) == (name.endswith(".weight") and value.ndim == 2), (part, name)


def published() -> Any:
    with torch.device("meta"):
        return as_original(diffusers.HunyuanVideoTransformer3DModel())


def declared(file: Path, shapes: dict[str, torch.Tensor]) -> Weights:
    header = {key: {"dtype": "BF16", "shape": [*v.shape], "data_offsets": [0, 0]} for key, v in shapes.items()}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    return Weights(file, "model.transformer_path")


def test_published_sizes_are_read_from_shapes(tmp_path):
    shapes = {original_name(name): value for name, value in published().state_dict().items()}
    found = transformer_config(declared(tmp_path / "t", shapes))
    config = diffusers.HunyuanVideoTransformer3DModel.from_config
    with torch.device("meta"):
        assert found.items() <= dict(config({}).config).items()
        vae, llama = diffusers.AutoencoderKLHunyuanVideo(), LlamaModel(LlamaConfig(vocab_size=128320, hidden_size=4096,
            intermediate_size=14336, num_key_value_heads=8))  # fmt: skip
    assert vae_config(declared(tmp_path / "v", vae.state_dict())).items() <= dict(vae.config).items()
    assert llama_config(declared(tmp_path / "l", llama.state_dict())).items() >= {
        "vocab_size": 128320, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 500000.0, "rms_norm_eps": 1e-5,
    }.items()  # fmt: skip


def test_names_and_rows_are_those_of_diffusers_converter(tmp_path):
    """Its converter knows width 3072 alone: so one column of each matrix, every row told apart."""
    with torch.device("meta"):
        library = diffusers.HunyuanVideoTransformer3DModel(num_layers=1, num_single_layers=1, num_refiner_layers=1)
        names = list(library.state_dict())
        ours = as_original(library)
    tensors = {}
    for index, (name, value) in enumerate(ours.state_dict().items()):
        shape = (value.shape[0], *[1] * (value.ndim - 1))
        rows = torch.arange(value.shape[0], dtype=torch.float32) + 100_000 * index
        tensors[original_name(name)] = rows.reshape(shape)
    converted = convert_hunyuan_video_transformer_to_diffusers(dict(tensors))
    assert set(converted) == set(names)
    save_file(tensors, tmp_path / "original.safetensors")
    (tmp_path / "library").mkdir()
    save_file({name: value.contiguous() for name, value in converted.items()}, tmp_path / "library/model.safetensors")
    single, whole = (Weights(tmp_path / name, "model.x") for name in ("original.safetensors", "library"))
    for name in ours.state_dict():
        assert torch.equal(read_original(single, name), read_library(whole, name)), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {},
            "model.transformer_path: give a HunyuanVideo transformer, such as",
        ),
        ({"vae_path": None}, "model.vae_path: give the HunyuanVideo VAE, such as"),
        ({"transformer_path": "llm_path"}, "is not a HunyuanVideo transformer"),
        ({"vae_path": "clip_path"}, "is not the HunyuanVideo VAE"),
        ({"llm_path": "clip_path"}, "is not Llava-Llama3"),
        ({"clip_path": "llm_path"}, "is not CLIP-L"),
        ({"clip_tokenizer_path": "/nowhere"}, "model.clip_tokenizer_path: '/nowhere' does not exist"),
        ({"vae_path": None, "ckpt_path": "folder"}, "has no 'hunyuan-video-t2v-720p/vae/pytorch_model.pt'"),
        ({"vae_path": None, "ckpt_path": "folder"}, "a folder in diffusers layout goes into model.diffusers_path"),
    ],
)
def test_what_it_says_of_wrong_files(change, message, folder, tmp_path):
    files = files_of(folder, tmp_path) | {"folder": str(folder)}
    options = {**files, **{key: files.get(value, value) for key, value in change.items()}} if change else {}
    options = {key: value for key, value in options.items() if value is not None and key != "folder"}
    with pytest.raises(SettingsError, match=re.escape(message)):
        hunyuan(**options).check_files()


def test_models_that_begin_with_a_picture_are_refused(folder, tmp_path):
    def wider(option, found):
        if option == "transformer_path":
            found = {**found, "img_in.proj.weight": torch.zeros(32, 33, 1, 2, 2)}
        return found

    with pytest.raises(SettingsError, match=r"takes 33 channels; image-to-video models cannot be trained"):
        hunyuan(**files_of(folder, tmp_path, wider)).check_files()
    shutil.copytree(folder, tmp_path / "copy")
    file = tmp_path / "copy/transformer/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "image_condition_type": "token_replace"}))
    with pytest.raises(SettingsError, match=r"is of kind 'token_replace'; image-to-video models cannot be trained"):
        hunyuan(tmp_path / "copy").check_files()


@pytest.mark.parametrize("foreign", ["byt5_in.fc1.weight", "vision_in.proj.0.weight", "clean_x_embedder.proj.weight"])
def test_other_models_of_its_kind_are_refused(foreign, folder, tmp_path):
    def change(option, found):
        return {**found, foreign: torch.zeros(1)} if option == "transformer_path" else found

    with pytest.raises(SettingsError, match=re.escape(f"is not a HunyuanVideo transformer, such as {NAMED}")):
        hunyuan(**files_of(folder, tmp_path, change)).check_files()


NAMED = "hunyuan_video_t2v_720p_bf16.safetensors (it has"


def test_another_tokenizer_is_refused(folder, tmp_path):
    """One that puts no start before a text, say."""
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(SettingsError, match=r"makes 94 tokens of a prompt that has 95; give the tokenizer of Llava"):
        hunyuan(folder, llm_tokenizer_path=tmp_path).load_text_encoder("llama", CPU)


def test_a_tokenizer_is_read_as_its_file_says(folder, tmp_path):
    """ComfyUI's and Llava's configurations name LlamaTokenizer, which splits texts in another way, and pad left."""
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    file = tmp_path / "tokenizer/tokenizer_config.json"
    said = {**json.loads(file.read_text()), "tokenizer_class": "LlamaTokenizer", "padding_side": "left"}
    file.write_text(json.dumps(said))
    ours, theirs = (encoded(f) for f in (hunyuan(folder, llm_tokenizer_path=tmp_path / "tokenizer"), hunyuan(folder)))
    assert all(torch.equal(text[name], other[name]) for text, other in zip(ours, theirs, strict=True) for name in text)


def test_identity_follows_what_the_values_depend_on(folder):
    first = hunyuan(folder)
    for part in ("vae", "llama", "clip"):
        assert hunyuan(folder, dtype="bfloat16").identity(part) != first.identity(part)
        assert hunyuan(folder, guidance=6.0).identity(part) == first.identity(part)
    stored = hunyuan(folder, text_encoder_dtype="float8")
    assert stored.identity("llama") != first.identity("llama")
    assert stored.identity("clip") == first.identity("clip")


# -- LoRA ---------------------------------------------------------------------------------------------------


def test_a_lora_has_the_originals_layers(folder):
    family = hunyuan(folder)
    denoiser = inject(family.load_denoiser(CPU), family, validate(Lora, {"type": "lora", "rank": 4}), 0)
    tensors = export_tensors(adapted_layers(denoiser), family, torch.float32)
    stems = {key.rpartition(".lora_")[0] for key in tensors}
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in tensors)
    double, single = ("transformer.double_blocks.1.", "transformer.single_blocks.1.")
    assert {stem.removeprefix(double) for stem in stems if stem.startswith(double)} == {
        "img_mod.linear", "txt_mod.linear", "img_attn_qkv", "txt_attn_qkv", "img_attn_proj", "txt_attn_proj",
        "img_mlp.fc1", "img_mlp.fc2", "txt_mlp.fc1", "txt_mlp.fc2",
    }  # fmt: skip
    assert {s.removeprefix(single) for s in stems if s.startswith(single)} == {
        "modulation.linear",
        "linear1",
        "linear2",
    }
    assert len(stems) == 2 * (10 + 3)


def test_a_lora_adds_the_same_in_diffusers(folder, tmp_path):
    """Its converter knows width 3072 alone: so the network there has shapes without memory."""
    config = {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1}
    family = hunyuan(folder)
    with torch.device("meta"):
        library = diffusers.HunyuanVideoTransformer3DModel(**config)
        ours = as_original(diffusers.HunyuanVideoTransformer3DModel(**config))
    generator, lora, added = torch.Generator().manual_seed(1), {}, {}
    for name, module in ours.named_modules():
        if isinstance(module, torch.nn.Linear) and "transformer_blocks" in name:
            down, up = matrices(module.weight, generator)
            key = family.lora_keys(name)
            lora |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
            added[original_name(f"{name}.weight")] = (up @ down)[:, :1]
    save_file(lora, tmp_path / "lora.safetensors")
    pipeline = diffusers.HunyuanVideoPipeline(*[None] * 2, library, *[None] * 4)
    pipeline.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    found = pipeline.lora_state_dict(str(tmp_path), weight_name="lora.safetensors")
    expected = convert_hunyuan_video_transformer_to_diffusers(added)
    layers = {name: layer for name, layer in library.named_modules() if hasattr(layer, "lora_A")}
    assert {f"{name}.weight" for name in layers} == set(expected)
    for name, layer in layers.items():
        down, up = (found[f"transformer.{name}.lora_{side}.weight"] for side in "AB")
        assert layer.scaling["default_0"] == 1.0
        torch.testing.assert_close((up @ down)[:, :1], expected[f"{name}.weight"], rtol=1e-4, atol=1e-4)


def matrices(weight: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a LoRA of rank 3, into the rank and out of it."""
    rows, columns = weight.shape
    return torch.randn(3, columns, generator=generator), torch.randn(rows, 3, generator=generator)


@pytest.mark.parametrize(
    "spelling", ["transformer.{}.lora_B.weight", "diffusion_model.{}.lora_B.weight", "lora_unet_{}.lora_up.weight"]
)
def test_a_lora_of_other_trainers_is_added(spelling, folder, tmp_path):
    family, generator = hunyuan(folder), torch.Generator().manual_seed(2)
    changed = {name: value.float() for name, value in originals(folder).items()}
    lora = {}
    for name, value in changed.items():
        if not name.endswith(".weight") or value.ndim != 2:
            continue
        down, up = matrices(value, generator)
        changed[name] = value + up @ down
        stem = name.removesuffix(".weight")
        key = spelling.format(stem.replace(".", "_") if "unet" in spelling else stem)
        lora |= {key: up, key.replace("lora_B", "lora_A").replace("lora_up", "lora_down"): down}
    save_file(lora, tmp_path / "lora.safetensors")
    denoiser = family.load_denoiser(CPU)
    fuse(denoiser, family, [(tmp_path / "lora.safetensors", 1.0)], "adapter.fuse_adapters")
    for name, value in family.comfyui_tensors(denoiser.state_dict()).items():
        torch.testing.assert_close(value, changed[name], rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


# -- trainings ------------------------------------------------------------------------------------------------


def test_all_weights_of_clips_and_pictures_and_samples(tmp_path):
    """What is trained is what ComfyUI reads, and a clip and a picture are drawn."""
    bench = Bench(tmp_path, "hunyuan-video")
    write_clips(bench.pictures, frames=9, fps=24)
    result = bench.train(
        adapter=None, epochs=1, save_every_n_epochs=1, dataset=bench.dataset(frame_buckets=[1, 5]),
        micro_batch_size_per_gpu=1, sample={"prompts": ["a dog"], "steps": 2, "frames": 5},
    )  # fmt: skip
    (file,) = result.folder.path.glob("epoch1/*.safetensors")
    family = hunyuan(Path(bench.model["diffusers_path"]))
    start, trained = family.comfyui_tensors(family.load_denoiser(CPU).state_dict()), load_file(file)
    assert trained.keys() == start.keys()
    for name in ("double_blocks.0.img_attn_qkv", "single_blocks.1.linear1", "txt_in.c_embedder.linear_1"):
        name += ".weight"
        assert not torch.equal(trained[name].float(), start[name]), name
    assert list((result.folder.path / "samples").rglob("*.mp4"))
    again = hunyuan(Path(bench.model["diffusers_path"]), transformer_path=file)
    again.check_files()
    for name, value in again.comfyui_tensors(again.load_denoiser(CPU).state_dict()).items():
        assert torch.equal(value, trained[name].float()), name


@pytest.mark.parametrize(
    ("stored", "adapter"),
    [("float8", {"type": "lokr"}), ("int8", {"type": "loha"}), ("nf4", {"use_dora": True}), ("nf4", {})],
)
def test_stored_weights_take_every_adapter(stored, adapter, tmp_path):
    """The loss is near that of plain weights, and refiner and embedders are not stored in less."""
    bench = Bench(tmp_path, "hunyuan-video")
    changes: dict[str, Any] = {"epochs": 1, "adapter": adapter}
    plain = bench.train(**changes).curve("loss")
    less = bench.train(**changes, model={"transformer_dtype": stored}).curve("loss")
    assert less != plain
    assert less == pytest.approx(plain, rel=0.05)
    family = hunyuan(Path(bench.model["diffusers_path"]), transformer_dtype=stored)
    dtypes = {name: value.dtype for name, value in family.load_denoiser(CPU).named_parameters()}
    assert all(dtype == torch.float32 for name, dtype in dtypes.items() if name.startswith(("context_", "x_", "time_")))
    assert dtypes.get("transformer_blocks.0.attn.to_qkv.weight") != torch.float32


# -- attention --------------------------------------------------------------------------------------------


def block_and_inputs(kind: str, dtype: torch.dtype = torch.float32) -> tuple[Any, list[torch.Tensor], list[Any]]:
    """A block as the original has it, video, text and conditions; mask and angles."""
    torch.manual_seed(0)
    denoiser = as_original(
        diffusers.HunyuanVideoTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, num_layers=1, num_single_layers=1, num_refiner_layers=1,
            text_embed_dim=32, pooled_projection_dim=16, rope_axes_dim=(4, 6, 6))
    )  # fmt: skip
    for name, parameter in denoiser.named_parameters():
        if "norm_" in name and parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    angles = hunyuan_video_attention.of_all(denoiser.rope(torch.zeros(1, 16, 2, 8, 4)), 16 + 5)
    mask = torch.ones(2, 1, 1, 21, dtype=torch.bool)
    mask[1, ..., -2:] = False
    tensors = [torch.randn(2, *size, 32).to(dtype) for size in ((16,), (5,), ())]
    return getattr(denoiser, kind)[0].to(dtype), tensors, [mask, angles]


def through(block: Any, tensors: list[torch.Tensor], rest: list[Any], compiled: bool = False) -> list[torch.Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    results = (torch.compile(block, fullgraph=True, backend="aot_eager") if compiled else block)(*leaves, *rest)
    torch.manual_seed(1)
    given = [torch.randn(result.shape).to(result) for result in results]
    return [*(result.detach() for result in results), *torch.autograd.grad(results, leaves, given)]


@pytest.mark.parametrize("kind", ["transformer_blocks", "single_transformer_blocks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_gives_what_plain_operations_give(kind, dtype, monkeypatch):
    block, tensors, rest = block_and_inputs(kind, dtype)
    plain, bare = through(block, tensors, rest), through(block, tensors, [None, rest[1]])
    assert not torch.equal(plain[0], bare[0])
    calls = []
    operator = hunyuan_video_attention.norm_rotate
    monkeypatch.setattr(hunyuan_video_attention, "norm_rotate", lambda *a: calls.append(1) or operator(*a))
    monkeypatch.setattr(hunyuan_video_attention, "is_fused", lambda *_: True)
    for ours, reference in zip(through(block, tensors, rest), plain, strict=True):
        assert (ours - reference).norm() < (1e-5 if dtype == torch.float32 else 2e-2) * reference.norm()
    assert len(calls) == 2


@pytest.mark.parametrize("kind", ["transformer_blocks", "single_transformer_blocks"])
def test_a_compiled_block_is_one_graph(kind, monkeypatch):
    block, tensors, rest = block_and_inputs(kind)
    plain = through(block, tensors, rest)
    for fused in (False, True):
        torch._dynamo.reset()
        monkeypatch.setattr(hunyuan_video_attention, "is_fused", lambda *_, fused=fused: fused)
        torch.testing.assert_close(through(block, tensors, rest, compiled=True), plain)
    torch._dynamo.reset()
