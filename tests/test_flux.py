"""Flux against diffusers' FluxPipeline, its files in every layout, and what is refused."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline, FluxPipeline
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_ldm_vae_checkpoint,
)
from diffusion_trainer.models import autoencoder
from diffusion_trainer.models.base import Example
from diffusion_trainer.models.clip import clip_config
from diffusion_trainer.models.flux import Flux, read_bfl, to_bfl, transformer_config
from diffusion_trainer.models.t5 import t5_config
from diffusion_trainer.utils.config import SettingsError, validate
from diffusion_trainer.utils.weights import Weights
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
CAPTIONS = ["a photo of a red cat", "a dog"]
PARTS = {"transformer": "transformer_path", "vae": "vae_path", "text_encoder": "clip_path", "text_encoder_2": "t5_path"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("flux-dev")
    Flux.write_miniature(path)
    return path


@pytest.fixture(scope="module")
def schnell(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("flux-schnell")
    Flux.write_miniature(path, guidance=False)
    return path


def flux(folder: Path | None = None, **options) -> Flux:
    options = {"dtype": "float32", "max_sequence_length": 32, **options}
    if folder:
        options["diffusers_path"] = str(folder)
    return Flux(validate(Flux.Config, {"type": "flux", **options}, "model"))


def folder_tensors(folder: Path, part: str) -> dict[str, torch.Tensor]:
    (file,) = (folder / part).glob("*.safetensors")
    return load_file(file)


def single_tensors(folder: Path, part: str) -> dict[str, torch.Tensor]:
    """The tensors of a part under the names of ComfyUI's single files."""
    tensors = folder_tensors(folder, part)
    if part == "transformer":
        return to_bfl(tensors)
    if part == "vae":
        return autoencoder.to_original(tensors)
    if part == "text_encoder":
        return {f"text_model.{name.removeprefix('text_model.')}": value for name, value in tensors.items()}
    return tensors


def fp8(tensors: dict[str, torch.Tensor], scale_suffix: str | None, per_row: bool = False) -> dict[str, torch.Tensor]:
    """Matrices in float8: merely cast, or with scales called ``<module><scale_suffix>``."""
    out = {"scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn)} if scale_suffix == ".scale_weight" else {}
    for name, value in tensors.items():
        if not name.endswith("weight") or value.ndim != 2:
            out[name] = value
        elif scale_suffix is None:
            out[name] = value.to(torch.float8_e4m3fn)
        else:
            scale = (value.float().abs().amax(1, keepdim=True) if per_row else value.float().abs().max()) / 448
            out[name] = (value.float() / scale).to(torch.float8_e4m3fn)
            out[name.removesuffix(".weight") + scale_suffix] = scale
    return out


def write_single(folder: Path, to: Path, change=lambda tensors: tensors, prefix: str = "") -> dict[str, str]:
    """Writes each part as a single file; returns the options that name them."""
    options = {"clip_tokenizer_path": str(folder / "tokenizer"), "t5_tokenizer_path": str(folder / "tokenizer_2")}
    for part, option in PARTS.items():
        tensors = single_tensors(folder, part)
        if part != "vae":
            tensors = change(tensors)
        if part == "transformer":
            tensors = {prefix + name: value for name, value in tensors.items()}
        save_file({name: value.contiguous() for name, value in tensors.items()}, to / f"{part}.safetensors")
        options[option] = str(to / f"{part}.safetensors")
    return options


def models(family: Flux) -> dict[str, torch.nn.Module]:
    return {
        "transformer": family.load_denoiser(CPU),
        "vae": family.load_vae(CPU),
        "clip": family.load_text_encoder("clip", CPU).model,
        "t5": family.load_text_encoder("t5", CPU).model,
    }


def library_pipeline(folder: Path, dtype: torch.dtype) -> FluxPipeline:
    pipeline = FluxPipeline.from_pretrained(folder, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# -- against the pipeline ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["folder", "schnell"])
def test_step_equals_the_pipelines_scheduler_and_transformer(kind, dtype, request):
    """x_t by the scheduler's own scale_noise; packing, ids, time and guidance as the pipeline passes them."""
    folder = request.getfixturevalue(kind)
    family = flux(folder, dtype=str(dtype).removeprefix("torch."), guidance=3.5, flux_shift=True)
    pipeline = library_pipeline(folder, dtype)
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, 16, 8, 12, generator=generator).to(dtype)
    noise = torch.randn(2, 16, 8, 12, generator=generator)
    with torch.no_grad():
        embeds, pooled, text_ids = pipeline.encode_prompt(CAPTIONS, max_sequence_length=32)
    quantiles = [0.2, 0.7]
    batch = family.collate(
        [
            Example({"latents": latents[i]}, {"clip_pooled": pooled[i], "t5_embeds": embeds[i]}, noise[i], quantiles[i])
            for i in range(2)
        ]
    )
    values = batch.inputs
    denoiser = family.load_denoiser(CPU)
    with torch.no_grad():
        for layer in family.layers(denoiser):
            values = layer.forward(SimpleNamespace(**layer.submodules), *values)
    prediction = values

    scheduler = FlowMatchEulerDiscreteScheduler()
    sigmas = torch.tensor([family.timestep(quantile, (8, 12)) for quantile in quantiles])
    scheduler.sigmas, scheduler.timesteps = sigmas, sigmas * scheduler.config.num_train_timesteps
    x_t = scheduler.scale_noise(latents.float(), scheduler.timesteps, noise).to(dtype)
    packed, image_ids = pipeline.prepare_latents(
        2, 16, 64, 96, dtype, CPU, None, pipeline._pack_latents(x_t, 2, 16, 8, 12)
    )
    with torch.no_grad():
        expected = pipeline.transformer(
            hidden_states=packed,
            timestep=scheduler.timesteps.to(dtype) / 1000,
            guidance=torch.full([2], 3.5) if kind == "folder" else None,
            pooled_projections=pooled,
            encoder_hidden_states=embeds,
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]
    assert torch.equal(prediction, expected)
    assert torch.equal(batch.target, pipeline._pack_latents(noise - latents.float(), 2, 16, 8, 12))
    # One Euler step from x_t along the target arrives at the clean latents.
    clean = x_t.float() - sigmas[:, None, None, None] * pipeline._unpack_latents(batch.target, 64, 96, 8)
    torch.testing.assert_close(clean, latents.float(), atol=0.05 if dtype == torch.bfloat16 else 5e-3, rtol=0)


def test_compiled_single_blocks_join_gradients_themselves(folder):
    """Of two slices of one tensor autograd would join them, outside of compiled code."""
    family = flux(folder)
    denoiser = family.load_denoiser(CPU)
    family.layers(denoiser)
    block, config = denoiser.single_transformer_blocks[0], denoiser.config
    width = config.num_attention_heads * config.attention_head_dim
    image, text, temb = (torch.randn(1, *size, width) for size in ((6,), (4,), ()))
    cos, sin = denoiser.pos_embed(torch.zeros(10, 3))
    torch._dynamo.reset()
    outputs = torch.compile(block, backend="aot_eager")(image, text, temb, (cos, sin))
    nodes = {output.grad_fn for output in outputs}
    assert len(nodes) == 1
    assert "CompiledFunctionBackward" in str(nodes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_text_equals_encode_prompt(folder, dtype):
    family = flux(folder, dtype=str(dtype).removeprefix("torch."))
    captions = [*CAPTIONS, "", "red " * 200]
    with torch.no_grad():  # as the pipeline's own call; torch computes otherwise with gradients
        embeds, pooled, _ = library_pipeline(folder, dtype).encode_prompt(captions, max_sequence_length=32)
    clip = family.encode_text("clip", family.load_text_encoder("clip", CPU), captions)
    t5 = family.encode_text("t5", family.load_text_encoder("t5", CPU), captions)
    assert torch.equal(clip["clip_pooled"], pooled)
    assert torch.equal(t5["t5_embeds"], embeds)
    assert clip["clip_pooled"].dtype == t5["t5_embeds"].dtype == dtype
    assert t5["t5_embeds"].shape == (4, 32, 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latents_equal_the_pipelines(folder, dtype):
    family = flux(folder, dtype=str(dtype).removeprefix("torch."))
    pixels = torch.rand(2, 3, 1, 48, 32, generator=torch.Generator().manual_seed(5)) * 2 - 1
    vae = family.load_vae(CPU)

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(i) for i in (7, 8)]

    # One by one, as the pipeline encodes when it has several generators
    latents = torch.cat([
        family.encode_media(vae, pixels[i : i + 1], [generator])["latents"] for i, generator in enumerate(generators())
    ])  # fmt: skip
    together = family.encode_media(vae, pixels, generators())["latents"]
    pipeline = FluxImg2ImgPipeline.from_pipe(library_pipeline(folder, dtype), torch_dtype=dtype)
    with torch.no_grad():
        expected = pipeline._encode_vae_image(pixels[:, :, 0].to(dtype), generators())
    assert torch.equal(latents, expected)
    torch.testing.assert_close(together, latents)
    assert latents.shape == (2, 16, 6, 4)
    assert latents.dtype == dtype


def test_pipeline_draws_the_librarys_picture(folder):
    family = flux(folder)
    ours, theirs = family.pipeline(family.load_denoiser(CPU), CPU), library_pipeline(folder, torch.float32)
    assert dict(ours.scheduler.config) == dict(theirs.scheduler.config)
    ours.set_progress_bar_config(disable=True)
    pictures = [
        pipeline(
            CAPTIONS[0], height=32, width=64, num_inference_steps=3, max_sequence_length=32, output_type="np",
            generator=torch.Generator().manual_seed(0),
        ).images
        for pipeline in (ours, theirs)
    ]  # fmt: skip
    assert (pictures[0] == pictures[1]).all()


def test_lora_of_the_live_denoiser_loads_in_the_pipeline(folder, tmp_path):
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

    family = flux(folder)
    denoiser = family.load_denoiser(CPU)
    denoiser = inject_adapter_in_model(
        LoraConfig(r=4, lora_alpha=4, target_modules=["attn.to_q", "proj_mlp"], init_lora_weights=False), denoiser
    )
    state = {}
    for key, value in get_peft_model_state_dict(denoiser).items():
        module, leaf, _ = re.split(r"\.(lora_[AB])\.", key)
        state[f"{family.lora_keys(module)}.{leaf}.weight"] = value
    save_file(state, tmp_path / "lora.safetensors")
    pipeline = library_pipeline(folder, torch.float32)
    pipeline.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    batch = family.collate([Example(
        {"latents": torch.ones(16, 4, 4)}, {"clip_pooled": torch.ones(16), "t5_embeds": torch.ones(32, 32)},
        torch.ones(16, 4, 4), 0.5,
    )])  # fmt: skip
    outputs = []
    for network in (denoiser, pipeline.transformer, family.load_denoiser(CPU)):
        values = batch.inputs
        with torch.no_grad():
            for layer in family.layers(network):
                values = layer.forward(SimpleNamespace(**layer.submodules), *values)
        outputs.append(values)
    torch.testing.assert_close(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2])


# -- files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "schnell"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_single_files_equal_the_folder(kind, precision, prefix, request, tmp_path):
    folder = request.getfixturevalue(kind)
    change = (lambda tensors: {k: v.half() for k, v in tensors.items()}) if precision == "fp16" else dict
    family = flux(**write_single(folder, tmp_path, change, prefix))
    family.check_files()
    expected, found = models(flux(folder)), models(family)
    assert found["transformer"].config.guidance_embeds == (kind == "folder")
    for part, model in found.items():
        state = expected[part].state_dict()
        assert model.state_dict().keys() == state.keys()
        for name, value in model.state_dict().items():
            wanted = state[name].half().float() if precision == "fp16" and part != "vae" else state[name]
            assert torch.equal(value, wanted), f"{part} {name}"


def test_single_files_give_the_folders_configurations(folder, tmp_path):
    """Whatever a folder's config.json says and the network reads is found in the shapes too."""
    expected, found = models(flux(folder)), models(flux(**write_single(folder, tmp_path)))
    for part in found:
        wanted, config = expected[part].config, found[part].config
        wanted, config = (dict(c) if part in ("transformer", "vae") else c.to_dict() for c in (wanted, config))
        ignored = {"sample_size", "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version",
                   "_attn_implementation_autoset", "tie_word_embeddings", "force_upcast", "out_channels"}  # fmt: skip
        differing = {
            key for key in wanted.keys() | config.keys()
            if key not in ignored and not key.startswith("_") and _plain(wanted.get(key)) != _plain(config.get(key))
        }  # fmt: skip
        assert not differing, {key: (wanted.get(key), config.get(key)) for key in differing}


def test_published_sizes_are_read_from_shapes(tmp_path):
    """FLUX.1-dev's own configuration comes out of files that declare its tensors (and hold no data)."""
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    clip = {"vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
            "num_attention_heads": 12, "max_position_embeddings": 77, "hidden_act": "quick_gelu"}  # fmt: skip
    t5 = {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
          "relative_attention_num_buckets": 32, "feed_forward_proj": "gated-gelu"}  # fmt: skip
    vae = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16,
           "norm_num_groups": 32, "use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 0.3611,
           "shift_factor": 0.1159, "mid_block_add_attention": True, "in_channels": 3, "out_channels": 3,
           "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}  # fmt: skip
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True)
        files = {
            "transformer": to_bfl(transformer.state_dict()),
            "vae": {
                autoencoder.original_name(name, 4): value for name, value in AutoencoderKL(**vae).state_dict().items()
            },
            "clip": {
                f"text_model.{name.removeprefix('text_model.')}": value
                for name, value in CLIPTextModel(CLIPTextConfig(**clip)).state_dict().items()
            },
            "t5": T5EncoderModel(T5Config(**t5)).state_dict(),
        }
    weights = {}
    for name, tensors in files.items():
        header = {key: {"dtype": "BF16", "shape": [*v.shape], "data_offsets": [0, 0]} for key, v in tensors.items()}
        text = json.dumps(header).encode()
        (tmp_path / name).write_bytes(len(text).to_bytes(8, "little") + text)
        weights[name] = Weights(tmp_path / name, name)
    found = transformer_config(weights["transformer"])
    assert {key: found[key] for key in found if found[key] != transformer.config[key]} == {"out_channels": 64}
    assert autoencoder.config_of(weights["vae"]) | {"scaling_factor": 0.3611, "shift_factor": 0.1159} == vae
    assert clip_config(weights["clip"]).items() >= clip.items()
    assert t5_config(weights["t5"]) == t5


def _plain(value):
    return list(value) if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize(
    ("suffix", "per_row"),
    [(None, False), (".scale_weight", False), (".weight_scale", False), (".weight_scale", True)],
)
def test_fp8_files_come_close(folder, tmp_path, suffix, per_row):
    family = flux(**write_single(folder, tmp_path, lambda tensors: fp8(tensors, suffix, per_row)))
    family.check_files()
    expected, found = models(flux(folder)), models(family)
    for part, model in found.items():
        state = expected[part].state_dict()
        for name, value in model.state_dict().items():
            assert value.dtype == torch.float32
            error = (value - state[name]).norm() / state[name].norm().clamp_min(1e-9)
            assert error < 0.04, f"{part} {name}: {error}"


def test_bfl_names_and_slices_are_those_of_diffusers_converter(tmp_path):
    """Its converter knows width 3072 alone: so one column of each matrix, every row told apart."""
    rows = {
        "qkv": 9216,
        "linear1": 9216 + 12288,
        "lin": 18432,
        "modulation": 9216,
        "adaLN_modulation": 6144,
        "scale": 128,
    }
    names = list(to_bfl({name: torch.zeros(6) for name in _transformer_names()}))
    tensors = {}
    for index, name in enumerate(names):
        number = next((count for part, count in rows.items() if part in name.split(".")), 3072)
        shape = (number, 1) if name.endswith(".weight") else (number,)
        tensors[name] = (torch.arange(number, dtype=torch.float32) + 100_000 * index).reshape(shape)
    save_file(tensors, tmp_path / "one-column.safetensors")
    weights = Weights(tmp_path / "one-column.safetensors", "model.transformer_path")
    expected = convert_flux_transformer_checkpoint_to_diffusers(dict(tensors))
    assert set(expected) == set(_transformer_names())
    for name, value in expected.items():
        assert torch.equal(read_bfl(weights, name), value), name
    back = to_bfl(expected)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], value) for name, value in tensors.items())


def _transformer_names() -> list[str]:
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    return list(model.state_dict())


def test_vae_names_are_those_of_diffusers_converter(folder):
    vae = flux(folder).load_vae(CPU)
    tensors = single_tensors(folder, "vae")
    expected = convert_ldm_vae_checkpoint(tensors, vae.config)
    found = folder_tensors(folder, "vae")
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_all_in_one_checkpoint_serves_every_part(folder, tmp_path):
    prefixes = {"transformer": "model.diffusion_model.", "vae": "vae.",
                "text_encoder": "text_encoders.clip_l.transformer.",
                "text_encoder_2": "text_encoders.t5xxl.transformer."}  # fmt: skip
    tensors = {
        f"{prefixes[part]}{k}": v.contiguous() for part in PARTS for k, v in single_tensors(folder, part).items()
    }
    save_file(tensors, tmp_path / "all.safetensors")
    options = dict.fromkeys(PARTS.values(), str(tmp_path / "all.safetensors"))
    options |= {"clip_tokenizer_path": str(folder / "tokenizer"), "t5_tokenizer_path": str(folder / "tokenizer_2")}
    family = flux(**options)
    family.check_files()
    expected = models(flux(folder))
    for part, model in models(family).items():
        state = expected[part].state_dict()
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_single_path_wins_over_the_folder(folder, schnell, tmp_path):
    path = write_single(schnell, tmp_path)["transformer_path"]
    family = flux(folder, transformer_path=path)
    family.check_files()
    assert not family.load_denoiser(CPU).config.guidance_embeds


def test_shards_equal_one_file(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "sharded")
    (tmp_path / "sharded/transformer/diffusion_pytorch_model.safetensors").unlink()
    flux(folder).load_denoiser(CPU).save_pretrained(tmp_path / "sharded/transformer", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded/transformer").glob("*.safetensors"))) > 1
    state = flux(tmp_path / "sharded").load_denoiser(CPU).state_dict()
    assert all(torch.equal(v, state[k]) for k, v in flux(folder).load_denoiser(CPU).state_dict().items())


def test_bypass_leaves_the_guidance_input_out(folder):
    denoiser = flux(folder, bypass_guidance_embedding=True).load_denoiser(CPU)
    assert not denoiser.config.guidance_embeds
    assert not any("guidance" in name for name, _ in denoiser.named_parameters())


def test_loaded_weights_do_not_follow_the_file(folder, tmp_path):
    """They are copies, so a file that is replaced while training changes nothing."""
    path = Path(write_single(folder, tmp_path)["transformer_path"])
    denoiser = flux(folder, transformer_path=str(path), dtype="bfloat16").load_denoiser(CPU)
    before = denoiser.proj_out.weight.clone()
    data = path.read_bytes()
    with path.open("r+b") as file:
        file.write(bytes(len(data)))
    assert torch.equal(denoiser.proj_out.weight, before)


def test_tokenizers_of_comfyui_are_found(folder, tmp_path):
    """A package linked into custom_nodes, in a process of its own as its place decides; and no torch is loaded."""
    comfy, options = tmp_path / "ComfyUI", write_single(folder, tmp_path)
    (comfy / "custom_nodes").mkdir(parents=True)
    (comfy / "custom_nodes/diffusion_trainer").symlink_to(ROOT)
    shutil.copytree(folder / "tokenizer", comfy / "comfy/sd1_tokenizer")
    shutil.copytree(folder / "tokenizer_2", comfy / "comfy/text_encoders/t5_tokenizer")
    options = {key: value for key, value in options.items() if "tokenizer" not in key}
    with pytest.raises(SettingsError, match=r"model\.clip_tokenizer_path: no tokenizer found; give the folder"):
        flux(**options).check_files()
    code = (
        "import json, sys\n"
        "from diffusion_trainer.models.flux import Flux\n"
        "Flux(Flux.Config(**json.loads(sys.argv[1]))).check_files()\n"
        "assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", code, json.dumps(options)]
    result = subprocess.run(command, cwd=comfy / "custom_nodes", capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_identity_follows_what_the_values_depend_on(folder, tmp_path):
    first = flux(folder)
    shutil.copytree(folder, tmp_path / "copy")
    same = flux(tmp_path / "copy")
    assert [first.identity(part) for part in ("vae", "clip", "t5")] == [
        same.identity(part) for part in ("vae", "clip", "t5")
    ]
    longer = flux(folder, max_sequence_length=64)
    assert longer.identity("t5") != first.identity("t5")
    assert longer.identity("clip") == first.identity("clip")
    assert flux(folder, dtype="bfloat16").identity("vae") != first.identity("vae")


# -- refusals ---------------------------------------------------------------------------------------------


def refusal(**options) -> str:
    with pytest.raises(SettingsError) as error:
        flux(**options).check_files()
    return str(error.value)


def test_nothing_given():
    assert refusal() == (
        "model.transformer_path: give a Flux transformer, such as flux1-dev.safetensors; or give model.diffusers_path"
    )


def test_missing_folder(tmp_path):
    message = refusal(diffusers_path=str(tmp_path / "gone"))
    assert message.startswith(f"model.diffusers_path: '{tmp_path / 'gone'}' does not exist; give ")


def test_folder_without_transformer(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "flux")
    shutil.rmtree(tmp_path / "flux/transformer")
    message = refusal(diffusers_path=str(tmp_path / "flux"))
    assert message.startswith("model.diffusers_path: ")
    assert "has no folder 'transformer'" in message
    assert "model.transformer_path" in message


def test_folder_of_another_model(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "other")
    config = tmp_path / "other/transformer/config.json"
    config.write_text(config.read_text().replace("FluxTransformer2DModel", "SD3Transformer2DModel"))
    assert "holds a model SD3Transformer2DModel, not FluxTransformer2DModel" in refusal(
        diffusers_path=str(tmp_path / "other")
    )


@pytest.mark.parametrize("option", list(PARTS.values()))
def test_file_of_another_part(folder, tmp_path, option):
    options = write_single(folder, tmp_path)
    other = options["t5_path" if option != "t5_path" else "clip_path"]
    message = refusal(**{**options, option: other})
    assert message.startswith(f"model.{option}: '{other}' is not ")
    assert "such as" in message


def test_text_encoder_of_another_width(folder, tmp_path):
    options = write_single(folder, tmp_path)
    tensors = load_file(options["clip_path"])
    name = "text_model.embeddings.token_embedding.weight"
    save_file({**tensors, name: torch.zeros(10, 24)}, options["clip_path"])
    assert "has 24 features, but the transformer works with 16; give CLIP-L" in refusal(**options)


def test_umt5_is_not_t5(folder, tmp_path):
    options = write_single(folder, tmp_path)
    bias = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"
    tensors = load_file(options["t5_path"])
    save_file({**tensors, bias.format(1): tensors[bias.format(0)].clone()}, options["t5_path"])
    assert refusal(**options).startswith(f"model.t5_path: '{options['t5_path']}' is not T5-XXL")


def test_transformer_with_further_picture_inputs(folder, tmp_path):
    options = write_single(folder, tmp_path)
    tensors = load_file(options["transformer_path"])
    save_file({**tensors, "img_in.weight": torch.zeros(32, 384)}, options["transformer_path"])
    assert "takes 96 channels, not the 16 of a picture alone" in refusal(**options)


@pytest.mark.parametrize("content", [b"", b"GGUF\x03\x00\x00\x00 and so on", b"\xff" * 64])
def test_not_a_safetensors_file(folder, tmp_path, content):
    path = tmp_path / "flux.gguf"
    path.write_bytes(content)
    assert refusal(diffusers_path=str(folder), transformer_path=str(path)) == (
        f"model.transformer_path: '{path}' is not a safetensors file"
    )


def test_cut_off_file(folder, tmp_path):
    path = Path(write_single(folder, tmp_path)["transformer_path"])
    path.write_bytes(path.read_bytes()[:-10])
    assert "is cut off" in refusal(diffusers_path=str(folder), transformer_path=str(path))


def test_incomplete_and_quantised_files_are_refused_when_loaded(folder, tmp_path):
    path = Path(write_single(folder, tmp_path)["transformer_path"])
    tensors = load_file(path)
    name = "single_blocks.1.linear2.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, path)
    with pytest.raises(SettingsError, match=f"lacks the tensor '{re.escape(name)}'"):
        flux(folder, transformer_path=str(path)).load_denoiser(CPU)
    save_file({**tensors, name: tensors[name].to(torch.uint8)}, path)
    with pytest.raises(SettingsError, match="quantised in a way that cannot be trained on"):
        flux(folder, transformer_path=str(path)).load_denoiser(CPU)


# -- noise levels -----------------------------------------------------------------------------------------


def test_shift_follows_the_resolution():
    family = flux(flux_shift=True)
    for pixels, shift in ((512, 1.88), (768, 2.33), (1024, 3.16), (1280, 4.67)):
        assert family.timestep_shift((pixels // 8, pixels // 8)) == pytest.approx(shift, abs=0.006)
    assert flux(flux_shift=True, shift=3.0).timestep_shift((64, 64)) == 3.0
    assert flux().timestep_shift((64, 64)) == 1.0


def test_shift_is_the_pipelines():
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    assert flux(flux_shift=True).timestep_shift((96, 40)) == pytest.approx(math.exp(calculate_shift(96 * 40 // 4)))


@pytest.mark.parametrize("method", ["logit_normal", "uniform"])
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.25, 0.875), (0.9, 1.0)])
def test_noise_levels_rise_between_their_bounds(method, low, high):
    family = flux(timestep_sample_method=method, min_t=low, max_t=high, flux_shift=True, sigmoid_scale=1.3)
    times = [family.timestep(quantile, (64, 64)) for quantile in (1e-6, *(i / 50 for i in range(1, 50)), 1 - 1e-6)]
    assert times == sorted(set(times))
    assert low <= times[0]
    assert times[-1] <= high
    if low:
        assert times[0] == pytest.approx(low, abs=1e-3)
    if high < 1:
        assert times[-1] == pytest.approx(high, abs=1e-3)


def test_noise_levels_are_the_shifted_logit_normal():
    family = flux(shift=3.0, sigmoid_scale=0.7)
    for normal, quantile in ((-1.0, 0.15865525), (0.0, 0.5), (2.0, 0.97724987)):
        t = 1 / (1 + math.exp(-0.7 * normal))
        assert family.timestep(quantile, (64, 64)) == pytest.approx(3 * t / (1 + 2 * t), abs=1e-6)
