"""Stable Diffusion 3 and 3.5 against diffusers' StableDiffusion3Pipeline, their files in every layout, and refusals."""

import copy
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.attention_processor import JointAttnProcessor2_0
from diffusion_trainer.models import autoencoder, sd3_attention
from diffusion_trainer.models.base import Batch, Example
from diffusion_trainer.models.clip import projected_config
from diffusion_trainer.models.sd3 import SD3, joined_text, read_original, to_original, transformer_config
from diffusion_trainer.models.sd3_attention import FusedJointAttention
from diffusion_trainer.utils.adapted import adapted_layers
from diffusion_trainer.utils.adapter_files import fuse
from diffusion_trainer.utils.adapter_settings import Lora
from diffusion_trainer.utils.adapters import export_tensors, inject
from diffusion_trainer.utils.config import SettingsError, validate
from diffusion_trainer.utils.weights import Weights
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from training import Bench

CPU = torch.device("cpu")
CAPTIONS = ["a photo of a red cat", "", "red " * 200]
VARIANTS = ("sd3", "sd35_medium", "sd35_large")
FILES = {"transformer": "transformer_path", "vae": "vae_path", "text_encoder": "clip_l_path",
         "text_encoder_2": "clip_g_path", "text_encoder_3": "t5_path"}  # fmt: skip
PREFIXES = {"transformer": "model.diffusion_model.", "vae": "first_stage_model.",
            "text_encoder": "text_encoders.clip_l.transformer.", "text_encoder_2": "text_encoders.clip_g.transformer.",
            "text_encoder_3": "text_encoders.t5xxl.transformer."}  # fmt: skip
"""In Stability AI's files that hold all."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A miniature of each variant."""
    found = {variant: tmp_path_factory.mktemp(variant) for variant in VARIANTS}
    for variant, path in found.items():
        SD3.write_miniature(path, variant)
    return found


@pytest.fixture(scope="module")
def folder(folders) -> Path:
    return folders["sd35_medium"]


def sd3(folder: Path | None = None, **options) -> SD3:
    table: dict[str, Any] = {"type": "sd3", "dtype": "float32", "max_sequence_length": 32, **options}
    table |= {"diffusers_path": str(folder)} if folder else {}
    return SD3(validate(SD3.Config, {k: str(v) if isinstance(v, Path) else v for k, v in table.items()}, "model"))


def library_pipeline(folder: Path, dtype: torch.dtype = torch.float32) -> diffusers.StableDiffusion3Pipeline:
    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(folder, torch_dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def encoded(family: SD3, captions: list[str]) -> list[dict[str, torch.Tensor]]:
    found: dict[str, torch.Tensor] = {}
    for name in family.text_encoders:
        found |= family.encode_text(name, family.load_text_encoder(name, CPU), captions)
    return [{name: value[i] for name, value in found.items()} for i in range(len(captions))]


def batch_of(family: SD3, texts: list[dict[str, torch.Tensor]], dtype: torch.dtype = torch.float32) -> Batch:
    generator = torch.Generator().manual_seed(3)
    latents, noise = (torch.randn(len(texts), 16, 8, 12, generator=generator) for _ in range(2))
    return family.collate(
        [Example({"latents": latents[i].to(dtype)}, text, noise[i], 0.2 + 0.3 * i) for i, text in enumerate(texts)]
    )


def predict(family: SD3, denoiser: torch.nn.Module, values: tuple) -> torch.Tensor:
    with torch.no_grad():
        for layer in family.layers(denoiser):
            values = layer.forward(SimpleNamespace(**layer.submodules), *values)
    return values


def tensors(folder: Path, part: str) -> dict[str, torch.Tensor]:
    """Of a part under the names of single files."""
    (file,) = (folder / part).glob("*.safetensors")
    found = load_file(file)
    if part == "transformer":
        return to_original(found, 3)
    return autoencoder.to_original(found) if part == "vae" else found


def write_files(folder: Path, to: Path, change=lambda part, found: found) -> dict[str, str]:
    """Writes each part as a file of its own; returns the options that name them."""
    options = {"clip_tokenizer_path": str(folder / "tokenizer"), "t5_tokenizer_path": str(folder / "tokenizer_3")}
    for part, option in FILES.items():
        found = change(part, tensors(folder, part))
        save_file({name: value.contiguous() for name, value in found.items()}, to / f"{part}.safetensors")
        options[option] = str(to / f"{part}.safetensors")
    return options


def write_checkpoint(folder: Path, file: Path, parts=tuple(FILES)) -> dict[str, str]:
    """Writes ``parts`` into one file; returns options without those for the others."""
    everything = {PREFIXES[part] + name: value.contiguous() for part in parts
                  for name, value in tensors(folder, part).items()}  # fmt: skip
    save_file(everything, file)
    return {"checkpoint_path": str(file), "clip_tokenizer_path": str(folder / "tokenizer"),
            "t5_tokenizer_path": str(folder / "tokenizer_3")}  # fmt: skip


def models(family: SD3) -> dict[str, torch.nn.Module]:
    encoders = {name: family.load_text_encoder(name, CPU).model for name in family.text_encoders}
    return {"transformer": family.load_denoiser(CPU), "vae": family.load_vae(CPU), **encoders}


# -- against the pipeline ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_step_equals_the_pipelines_scheduler_and_transformer(variant, dtype, folders):
    """x_t by the scheduler's own scale_noise; attention, time and text as the pipeline has them."""
    family = sd3(folders[variant], dtype=str(dtype).removeprefix("torch."), shift=3.0)
    pipeline = library_pipeline(folders[variant], dtype)
    with torch.no_grad():
        embeds, _, pooled, _ = pipeline.encode_prompt(
            CAPTIONS[:2], None, None, do_classifier_free_guidance=False, max_sequence_length=32
        )
    batch = batch_of(family, encoded(family, CAPTIONS[:2]), dtype)
    prediction = predict(family, family.load_denoiser(CPU), batch.inputs)

    generator = torch.Generator().manual_seed(3)
    latents, noise = (torch.randn(2, 16, 8, 12, generator=generator) for _ in range(2))
    latents = latents.to(dtype).float()
    scheduler: Any = pipeline.scheduler
    sigmas = torch.tensor([family.timestep(quantile, (8, 12)) for quantile in (0.2, 0.5)])
    scheduler.sigmas, scheduler.timesteps = sigmas, sigmas * scheduler.config.num_train_timesteps
    x_t = scheduler.scale_noise(latents, scheduler.timesteps, noise).to(dtype)
    with torch.no_grad():
        expected = pipeline.transformer(
            hidden_states=x_t, timestep=scheduler.timesteps, encoder_hidden_states=embeds, pooled_projections=pooled,
            return_dict=False,
        )[0]  # fmt: skip
    assert torch.equal(batch.inputs[1], scheduler.timesteps)
    assert torch.equal(prediction, expected)
    assert prediction.shape == batch.target.shape
    assert torch.equal(batch.target, noise - latents)
    # One Euler step from x_t along the target arrives at the clean latents
    clean = x_t.float() - sigmas[:, None, None, None] * batch.target
    torch.testing.assert_close(clean, latents, atol=0.05 if dtype == torch.bfloat16 else 5e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_text_equals_encode_prompt(folder, dtype):
    family = sd3(folder, dtype=str(dtype).removeprefix("torch."))
    with torch.no_grad():
        embeds, _, pooled, _ = library_pipeline(folder, dtype).encode_prompt(
            CAPTIONS, None, None, do_classifier_free_guidance=False, max_sequence_length=32
        )
    for text, embed, pool in zip(encoded(family, CAPTIONS), embeds, pooled, strict=True):
        joined_LD, pooled_D = joined_text(text)
        assert torch.equal(joined_LD, embed)
        assert torch.equal(pooled_D, pool)
        assert joined_LD.dtype == dtype
        assert joined_LD.shape == (77 + 32, 32)


def test_the_projection_of_a_folders_clip_l_is_used(folder, tmp_path):
    """Published folders have one that changes nothing, as the miniature has; others may not."""
    shutil.copytree(folder, tmp_path / "other")
    (file,) = (tmp_path / "other/text_encoder").glob("*.safetensors")
    save_file({**load_file(file), "text_projection.weight": torch.randn(8, 8)}, file, {"format": "pt"})
    with torch.no_grad():
        _, _, pooled, _ = library_pipeline(tmp_path / "other").encode_prompt(
            CAPTIONS, None, None, do_classifier_free_guidance=False, max_sequence_length=32
        )
    found = torch.stack([joined_text(text)[1] for text in encoded(sd3(tmp_path / "other"), CAPTIONS)])
    assert torch.equal(found, pooled)
    assert not torch.equal(found[0], joined_text(encoded(sd3(folder), CAPTIONS)[0])[1])


def test_a_tokenizer_that_fills_up_with_the_end_serves_both_clips(folder):
    """ComfyUI ships one; bigG's texts are filled up with token 0 all the same."""
    family = sd3(folder, clip_tokenizer_path=str(folder / "tokenizer"))
    for name in ("clip_l", "clip_g"):
        found, expected = (f.encode_text(name, f.load_text_encoder(name, CPU), CAPTIONS) for f in (family, sd3(folder)))
        assert all(torch.equal(value, expected[key]) for key, value in found.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latents_equal_the_pipelines(folder, dtype):
    family = sd3(folder, dtype=str(dtype).removeprefix("torch."))
    pixels = torch.rand(1, 3, 1, 48, 32, generator=torch.Generator().manual_seed(5)) * 2 - 1
    latents = family.encode_media(family.load_vae(CPU), pixels, [torch.Generator().manual_seed(7)])["latents"]
    pipeline = diffusers.StableDiffusion3Img2ImgPipeline.from_pipe(library_pipeline(folder, dtype), torch_dtype=dtype)
    pipeline.scheduler.set_begin_index(0)
    pipeline.scheduler.set_timesteps(2)
    pipeline.scheduler.sigmas = torch.zeros(3)  # at which the pipeline adds no noise
    with torch.no_grad():
        expected = pipeline.prepare_latents(
            pixels[:, :, 0], pipeline.scheduler.timesteps[:1], 1, 1, dtype, CPU, torch.Generator().manual_seed(7)
        )
    assert torch.equal(latents, expected)
    assert latents.shape == (1, 16, 6, 4)


def test_pictures_without_places_are_refused_before_they_are_trained(folder):
    """64 patches of 16 pixels are as many as diffusers' transformer takes."""
    family = sd3(folder)
    vae = family.load_vae(CPU)
    wide = torch.zeros(1, 3, 1, 16, 1040)
    with pytest.raises(
        SettingsError, match="pictures of 1040x16 are too long for this model, which has places for 1024"
    ):
        family.encode_media(vae, wide, [torch.Generator()])
    assert family.encode_media(vae, wide[..., :1024], [torch.Generator()])["latents"].shape == (1, 16, 2, 128)


def test_pipeline_has_the_librarys_schedule(folder):
    family = sd3(folder)
    ours, theirs = family.pipeline(family.load_denoiser(CPU), CPU, text_encoders=False), library_pipeline(folder)
    assert dict(ours.scheduler.config) == dict(theirs.scheduler.config)
    assert ours.scheduler.config.shift == 3.0
    assert (ours.vae.config.scaling_factor, ours.vae.config.shift_factor) == (1.5305, 0.0609)


# -- the table of places ----------------------------------------------------------------------------------


def test_places_are_the_files(folder, tmp_path):
    """Files may have others than diffusers would compute; they are rounded as the rest is."""
    table = torch.randn(1, 64 * 64, 32, generator=torch.Generator().manual_seed(1))

    def change(part, found):
        return {**found, "pos_embed": table} if part == "transformer" else found

    options = write_files(folder, tmp_path, change)
    for dtype in ("float32", "bfloat16"):
        denoiser = sd3(**options, dtype=dtype).load_denoiser(CPU)
        assert torch.equal(denoiser.pos_embed.pos_embed, table.to(getattr(torch, dtype)))
    assert torch.equal(sd3(**options).other_tensors(())["pos_embed"], table)
    whole = sd3(folder).load_denoiser(CPU)
    (file,) = (folder / "transformer").glob("*.safetensors")
    assert torch.equal(whole.pos_embed.pos_embed, load_file(file)["pos_embed.pos_embed"].float())


def test_only_the_first_stage_holds_places(folder):
    family = sd3(folder)
    denoiser = family.build_denoiser()
    assert denoiser.pos_embed.pos_embed.shape == (1, 64 * 64, 32)
    assert denoiser.pos_embed.pos_embed.untyped_storage().nbytes() == 4
    blocks = set(denoiser.transformer_blocks.parameters())
    family.load_denoiser(CPU, denoiser, blocks)
    assert denoiser.pos_embed.pos_embed.untyped_storage().nbytes() == 4
    family.load_denoiser(CPU, denoiser, {denoiser.pos_embed.proj.weight, denoiser.pos_embed.proj.bias})
    loaded = denoiser.pos_embed.pos_embed
    assert torch.equal(loaded, family.load_denoiser(CPU).pos_embed.pos_embed)
    family.load_denoiser(CPU, denoiser, set(denoiser.norm_out.parameters()))
    assert denoiser.pos_embed.pos_embed is loaded
    assert "pos_embed" in denoiser.pos_embed.state_dict()
    assert family.load_denoiser(torch.device("meta")).pos_embed.pos_embed.is_meta


# -- files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_single_files_equal_the_folder(variant, folders, tmp_path):
    whole, family = sd3(folders[variant]), sd3(**write_files(folders[variant], tmp_path))
    family.check_files()
    expected, found = models(whole), models(family)
    for part, model in found.items():
        state = expected[part].state_dict()
        assert model.state_dict().keys() == state.keys()
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[name]), f"{part} {name}"
    configs = [dict(parts["transformer"].config) for parts in (expected, found)]
    assert all(_plain(value) == _plain(configs[0][k]) for k, value in configs[1].items() if not k.startswith("_"))
    assert found["vae"].config.scaling_factor == 1.5305
    assert found["vae"].config.shift_factor == 0.0609
    assert (
        whole.comfyui_tensors(expected["transformer"].state_dict()).keys()
        == load_file(tmp_path / "transformer.safetensors").keys()
    )
    text = [joined_text(encoded(f, CAPTIONS)[0]) for f in (whole, family)]
    assert all(torch.equal(a, b) for a, b in zip(*text, strict=True))


def test_a_checkpoint_serves_every_part(folder, tmp_path):
    family = sd3(**write_checkpoint(folder, tmp_path / "all.safetensors"))
    family.check_files()
    expected = models(sd3(folder))
    for part, model in models(family).items():
        state = expected[part].state_dict()
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items()), part


def test_what_a_checkpoint_lacks_comes_from_elsewhere(folder, folders, tmp_path):
    """As of sd3_medium_incl_clips.safetensors, which has no T5; what a path names wins."""
    options = write_checkpoint(folder, tmp_path / "some.safetensors", [part for part in FILES if part[-1] != "3"])
    with pytest.raises(SettingsError, match=r"^model\.t5_path: give T5-XXL.*, or model\.diffusers_path; '.*' has none"):
        sd3(**options).check_files()
    files = write_files(folder, tmp_path)
    for more in ({"t5_path": files["t5_path"]}, {"diffusers_path": str(folders["sd3"])}):
        family = sd3(**options, **more)
        family.check_files()
        assert family._place("transformer")[1] == "model.checkpoint_path"
        assert family._place("t5")[1] == f"model.{next(iter(more))}"
        assert len(family.load_denoiser(CPU).config.dual_attention_layers) == 2
    family = sd3(**options, t5_path=files["t5_path"], vae_path=files["vae_path"])
    assert family._place("vae")[1] == "model.vae_path"


def test_clip_ls_projection_in_a_file_is_not_used(folder, tmp_path):
    """As ComfyUI and diffusers' converter have it; a folder's is."""

    def change(part, found):
        return {**found, "text_projection.weight": torch.randn(8, 8)} if part == "text_encoder" else found

    family = sd3(**write_files(folder, tmp_path, change))
    assert torch.equal(
        encoded(family, CAPTIONS)[0]["clip_l_pooled"], encoded(sd3(folder), CAPTIONS)[0]["clip_l_pooled"]
    )
    file = tmp_path / "text_encoder.safetensors"
    save_file({n: v for n, v in load_file(file).items() if not n.startswith("text_projection")}, file)
    assert encoded(family, CAPTIONS)[0]["clip_l_pooled"].shape == (8,)
    family.check_files()


@pytest.mark.parametrize("suffix", [None, ".scale_weight", ".weight_scale"])
def test_fp8_files_come_close(folder, tmp_path, suffix):
    def change(part, found):
        if part not in ("transformer", "text_encoder_3"):
            return found
        out = {"scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn)} if suffix == ".scale_weight" else {}
        for name, value in found.items():
            if not name.endswith(".weight") or value.ndim != 2:
                out[name] = value
                continue
            scale = value.float().abs().max() / 448 if suffix else torch.tensor(1.0)
            out[name] = (value.float() / scale).to(torch.float8_e4m3fn)
            out |= {name.removesuffix(".weight") + suffix: scale} if suffix else {}
        return out

    family = sd3(**write_files(folder, tmp_path, change))
    family.check_files()
    expected, found = models(sd3(folder)), models(family)
    for part in ("transformer", "t5"):
        state = expected[part].state_dict()
        for name, value in found[part].state_dict().items():
            assert value.dtype == torch.float32
            error = (value - state[name]).norm() / state[name].norm().clamp_min(1e-9)
            assert error < 0.04, f"{part} {name}: {error}"


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_and_slices_are_those_of_diffusers_converter(variant, folders, tmp_path):
    names = diffusers.SD3Transformer2DModel.from_pretrained(folders[variant] / "transformer").state_dict().keys()
    original = tensors(folders[variant], "transformer")
    for index, (name, value) in enumerate(sorted(original.items())):  # all rows told apart
        rows = torch.arange(value.shape[0], dtype=torch.float32).view(-1, *[1] * (value.ndim - 1))
        original[name] = (rows + 10_000 * index).expand(value.shape).contiguous()
    save_file(original, tmp_path / "model.safetensors")
    weights = Weights(tmp_path / "model.safetensors", "model.transformer_path")
    expected = convert_sd3_transformer_checkpoint_to_diffusers(dict(original))
    assert set(expected) == set(names)
    for name, value in expected.items():
        assert torch.equal(read_original(weights, name), value), name
    back = to_original(expected, 3)
    assert back.keys() == original.keys()
    assert all(torch.equal(value, original[name]) for name, value in back.items())


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


PUBLISHED: dict[str, dict[str, Any]] = {
    "medium": {"num_layers": 24, "num_attention_heads": 24, "pos_embed_max_size": 192},
    "3.5 medium": {"num_layers": 24, "num_attention_heads": 24, "pos_embed_max_size": 384, "qk_norm": "rms_norm",
                   "dual_attention_layers": tuple(range(13))},
    "3.5 large": {"num_layers": 38, "num_attention_heads": 38, "pos_embed_max_size": 192, "qk_norm": "rms_norm"},
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_are_read_from_shapes(name, tmp_path):
    """From files that declare the tensors of the published models (and hold no data)."""
    given = PUBLISHED[name]
    width = 64 * given["num_attention_heads"]
    settings = {"caption_projection_dim": width, "qk_norm": None, "dual_attention_layers": (), **given}
    with torch.device("meta"):
        small = {**settings, "pos_embed_max_size": 1}
        found = diffusers.SD3Transformer2DModel(
            **small, joint_attention_dim=4096, pooled_projection_dim=2048
        ).state_dict()
    found["pos_embed.pos_embed"] = torch.empty(1, given["pos_embed_max_size"] ** 2, width, device="meta")
    weights = declared(tmp_path / "transformer", to_original(found, given["num_layers"]))
    assert transformer_config(weights) == {
        **settings, "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16,
        "attention_head_dim": 64, "joint_attention_dim": 4096, "pooled_projection_dim": 2048,
    }  # fmt: skip


def test_published_text_encoders_are_read_from_shapes(tmp_path):
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    published = {
        "quick_gelu": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
                       "num_attention_heads": 12, "projection_dim": 768},
        "gelu": {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
                 "projection_dim": 1280},
    }  # fmt: skip
    for act, config in published.items():
        with torch.device("meta"):
            model = CLIPTextModelWithProjection(CLIPTextConfig(vocab_size=49408, **config))
        found = projected_config(declared(tmp_path / act, model.state_dict()), act)
        assert found.items() >= {**config, "vocab_size": 49408, "hidden_act": act, "eos_token_id": 2}.items()


def declared(file: Path, shapes: dict[str, torch.Tensor]) -> Weights:
    header = {key: {"dtype": "BF16", "shape": [*v.shape], "data_offsets": [0, 0]} for key, v in shapes.items()}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    return Weights(file, "model.transformer_path")


def test_identity_follows_what_the_values_depend_on(folder, tmp_path):
    first, longer = sd3(folder), sd3(folder, max_sequence_length=64)
    assert longer.identity("t5") != first.identity("t5")
    for part in ("vae", "clip_l", "clip_g"):
        assert longer.identity(part) == first.identity(part)
        assert sd3(folder, dtype="bfloat16").identity(part) != first.identity(part)
    stored = sd3(folder, text_encoder_dtype="float8")
    assert stored.identity("t5") != first.identity("t5")
    assert stored.identity("clip_g") == first.identity("clip_g")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "model.transformer_path: give a Stable Diffusion 3 transformer, such as"),
        ({"transformer_path": "t5_path"}, "is not a Stable Diffusion 3 transformer"),
        ({"t5_path": "clip_l_path"}, "is not T5-XXL"),
        ({"vae_path": "t5_path"}, "is not the VAE of Stable Diffusion 3"),
        ({"clip_l_path": "clip_g_path", "clip_g_path": "clip_l_path"}, "exchange clip_l_path and clip_g_path"),
        ({"clip_l_path": "clip_g_path"}, "have 32 features together, but the transformer works with 24"),
        ({"checkpoint_path": "t5_path", "transformer_path": ""}, "model.transformer_path: give a Stable Diffusion 3"),
        ({"checkpoint_path": "folder", "transformer_path": ""}, "is a folder; name it in model.diffusers_path"),
        ({"clip_tokenizer_path": "/nowhere"}, "model.clip_tokenizer_path: '/nowhere' does not exist"),
    ],
)
def test_what_it_says_of_wrong_files(change, message, folder, tmp_path):
    files = write_files(folder, tmp_path) | {"folder": str(folder)}
    given = {key: files.get(value, value) for key, value in change.items()}
    options = {key: value for key, value in {**files, **given}.items() if key != "folder"} if change else {}
    with pytest.raises(SettingsError, match=re.escape(message)):
        sd3(**options).check_files()


def test_a_folder_of_another_model_is_refused(folder, tmp_path):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer/config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    with pytest.raises(SettingsError, match="holds a model FluxTransformer2DModel, not SD3Transformer2DModel"):
        sd3(tmp_path).check_files()


# -- results ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_lora_moves_the_pipeline_as_in_training(variant, folders, tmp_path):
    family = sd3(folders[variant])
    targets = ["transformer_blocks", "norm_out"]
    settings = validate(Lora, {"type": "lora", "rank": 4, "alpha": 6.0, "target_modules": targets})
    denoiser = inject(family.load_denoiser(CPU), family, settings, 0)
    layers = adapted_layers(denoiser)
    assert any(".attn2.to_q" in name for name in layers) == (variant == "sd35_medium")
    for layer in layers.values():
        torch.nn.init.normal_(layer.adapter.up, std=0.2)
    save_file(export_tensors(layers, family, torch.float32), tmp_path / "lora.safetensors")
    pipeline = library_pipeline(folders[variant])
    pipeline.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    inputs = batch_of(family, encoded(family, CAPTIONS[:1])).inputs
    bare, ours, theirs = (
        predict(family, network, inputs) for network in (family.load_denoiser(CPU), denoiser, pipeline.transformer)
    )
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
    assert (ours - bare).norm() > 0.05 * bare.norm()


@pytest.mark.parametrize("spelling", ["diffusion_model.{}.lora_B.weight", "lora_unet_{}.lora_up.weight"])
def test_a_lora_of_comfyuis_layers_is_added(spelling, folder, tmp_path):
    """Its layers are several of diffusers', or have other rows."""
    family, generator = sd3(folder), torch.Generator().manual_seed(2)
    changed = {name: value.float() for name, value in tensors(folder, "transformer").items()}
    lora = {}
    for name, value in changed.items():
        if not name.endswith(".weight") or value.ndim < 2:
            continue
        up, down = (torch.randn(n, 3, generator=generator) * 0.1 for n in (value.shape[0], value[0].numel()))
        changed[name] = value + (up @ down.T).view_as(value)
        key, stem = spelling.split("{}"), name.removesuffix(".weight")
        key = key[0] + (stem.replace(".", "_") if key[0].endswith("_") else stem) + key[1]
        lora |= {key: up, key.replace("lora_B", "lora_A").replace("lora_up", "lora_down"): down.T.contiguous()}
    save_file(changed, tmp_path / "changed.safetensors")
    save_file(lora, tmp_path / "lora.safetensors")
    expected = sd3(folder, transformer_path=tmp_path / "changed.safetensors").load_denoiser(CPU).state_dict()
    denoiser = family.load_denoiser(CPU)
    fuse(denoiser, family, [(tmp_path / "lora.safetensors", 1.0)], "adapter.fuse_adapters")
    for name, value in denoiser.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def test_rows_of_a_dora_lie_as_in_comfyuis_weights(folder):
    """Where the original file has shift before scale: the last modulation, and the caption's in the last block."""
    family, rows = sd3(folder), torch.arange(6.0)[:, None]
    swapped = torch.tensor([3.0, 4, 5, 0, 1, 2])[:, None]
    for name in ("norm_out.linear", "transformer_blocks.2.norm1_context.linear"):
        assert torch.equal(family.comfyui_rows(name, rows), swapped)
    for name in ("transformer_blocks.1.norm1_context.linear", "transformer_blocks.2.norm1.linear",
                 "transformer_blocks.2.attn.to_k", "context_embedder"):  # fmt: skip
        assert torch.equal(family.comfyui_rows(name, rows), rows)


def test_all_weights_and_samples(tmp_path):
    """What is trained moves, and is what ComfyUI reads, with the table of places as it was."""
    bench = Bench(tmp_path, "sd3")
    result = bench.train(adapter=None, epochs=1, save_every_n_epochs=1, sample={"prompts": ["a dog"], "steps": 2})
    (file,) = result.folder.path.glob("epoch1/*.safetensors")
    family = sd3(Path(bench.model["diffusers_path"]))
    start = family.comfyui_tensors(family.load_denoiser(CPU).state_dict())
    trained = load_file(file)
    assert trained.keys() == start.keys()
    assert torch.equal(trained["pos_embed"].float(), start["pos_embed"])
    for name in ("joint_blocks.0.x_block.attn2.qkv.weight", "joint_blocks.2.context_block.adaLN_modulation.1.weight"):
        assert not torch.equal(trained[name].float(), start[name]), name
    assert list((result.folder.path / "samples").rglob("*.png"))


# -- attention --------------------------------------------------------------------------------------------


def block_and_inputs(dtype: torch.dtype, last: bool = False) -> tuple[Any, list[torch.Tensor]]:
    """A block with norms and two attentions, or one that drops the text."""
    torch.manual_seed(0)
    block = JointTransformerBlock(32, 2, 16, context_pre_only=last, qk_norm="rms_norm", use_dual_attention=not last)
    block = block.to(dtype).requires_grad_(False)
    for name, parameter in block.named_parameters():
        if "norm_" in name and parameter.ndim == 1:
            parameter.add_(0.2 * torch.randn_like(parameter))
    return block, [torch.randn(2, *size, 32).to(dtype) for size in ((40,), (24,), ())]


def through(block: Any, inputs: list[torch.Tensor], processor: Any, compiled: bool = False) -> list[torch.Tensor]:
    """What comes out, text before image, and the gradients of the inputs."""
    for attention in (block.attn, block.attn2):
        if attention is not None:
            attention.set_processor(processor)
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    run = torch.compile(block, fullgraph=True, backend="aot_eager") if compiled else block
    results = [result for result in run(*leaves) if result is not None]
    torch.manual_seed(1)
    given = [torch.randn(result.shape).to(result) for result in results]
    grads = torch.autograd.grad(results, leaves, given)
    return [*(result.detach() for result in results), *grads]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_are_the_librarys(dtype, last, monkeypatch):
    """Bit for bit without kernels; with the operator's plain operations within rounding."""
    block, inputs = block_and_inputs(dtype, last)
    plain = through(block, inputs, JointAttnProcessor2_0())
    assert all(map(torch.equal, through(block, inputs, FusedJointAttention()), plain))
    monkeypatch.setattr(sd3_attention, "is_fused", lambda *_: True)
    monkeypatch.setattr(JointAttnProcessor2_0, "__call__", None)  # is not asked
    for ours, reference in zip(through(block, inputs, FusedJointAttention()), plain, strict=True):
        assert (ours - reference).norm() < (1e-5 if dtype == torch.float32 else 2e-2) * reference.norm()


def test_a_compiled_block_is_one_graph(monkeypatch):
    block, inputs = block_and_inputs(torch.float32)
    plain = through(block, inputs, JointAttnProcessor2_0())
    for fused in (False, True):
        torch._dynamo.reset()
        monkeypatch.setattr(sd3_attention, "is_fused", lambda *_, fused=fused: fused)
        torch.testing.assert_close(through(block, inputs, FusedJointAttention(), compiled=True), plain)
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("last", [False, True])
def test_fused_blocks_are_as_good_as_the_librarys(last):
    block, inputs = block_and_inputs(torch.bfloat16, last)
    exact = through(copy.deepcopy(block).double(), [x.double() for x in inputs], JointAttnProcessor2_0())
    block, inputs = block.cuda(), [x.cuda() for x in inputs]
    plain, ours = (through(block, inputs, kind()) for kind in (JointAttnProcessor2_0, FusedJointAttention))
    for found, reference, value in zip(ours, plain, exact, strict=True):
        errors = [(x.double().cpu() - value).norm() for x in (found, reference)]
        assert errors[0] < 1.2 * errors[1] + 1e-3 * value.norm()


def test_a_model_without_norms_has_the_librarys_attention(folders, monkeypatch):
    family, asked = sd3(folders["sd3"]), list[int]()
    attend = JointAttnProcessor2_0.__call__
    monkeypatch.setattr(JointAttnProcessor2_0, "__call__", lambda *a, **k: asked.append(1) or attend(*a, **k))
    monkeypatch.setattr(sd3_attention, "is_fused", lambda *_: pytest.fail("there are no norms"))
    denoiser = family.load_denoiser(CPU)
    predict(family, denoiser, batch_of(family, encoded(family, CAPTIONS[:1])).inputs)
    assert len(asked) == len(denoiser.transformer_blocks)


def test_the_chosen_attention_is_used(folder, monkeypatch):
    """The trainer replaces torch's function; it must be looked up when it is called."""
    family, calls = sd3(folder), []
    attend = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or attend(*a, **k))
    for fused in (False, True):
        monkeypatch.setattr(sd3_attention, "is_fused", lambda *_, fused=fused: fused)
        calls.clear()
        inputs = batch_of(family, [{**example} for example in blank(family)]).inputs
        predict(family, family.load_denoiser(CPU), inputs)
        assert len(calls) == 3 + 2


def blank(family: SD3) -> list[dict[str, torch.Tensor]]:
    return [family.blank_example(64, 64).text]
