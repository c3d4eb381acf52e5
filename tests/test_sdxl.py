"""SDXL against diffusers' StableDiffusionXLPipeline, its files in both layouts, its losses, and what is refused."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from diffusion_trainer.models import unet
from diffusion_trainer.models.base import Example, SampleRequest
from diffusion_trainer.models.sdxl import SDXL, SDXLConfig
from diffusion_trainer.utils.config import SettingsError, validate
from diffusion_trainer.utils.weights import Weights, build
from safetensors.torch import load_file, save_file

CPU = torch.device("cpu")
CAPTIONS = ["a photo of a red cat", "a dog"]
LONG = "red " * 100
FROZEN = {"text_encoder_1_lr": 0.0, "text_encoder_2_lr": 0.0}
FOLDERS = {"unet": "unet", "vae": "vae", "clip_l": "text_encoder", "clip_g": "text_encoder_2"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sdxl")
    SDXL.write_miniature(path, checkpoint=True)
    return path


def sdxl(folder: Path | None = None, **options) -> SDXL:
    options = {"dtype": "float32", **options}
    if folder:
        options["diffusers_path"] = str(folder)
    return SDXL(validate(SDXLConfig, {"type": "sdxl", **options}, "model"))


def single(folder: Path, path: Path | None = None, **options) -> SDXL:
    """The family on the checkpoint file."""
    path = path or folder / "checkpoint.safetensors"
    return sdxl(checkpoint_path=str(path), tokenizer_path=str(folder / "tokenizer"), **options)


def library_pipeline(folder: Path, dtype: torch.dtype = torch.float32) -> StableDiffusionXLPipeline:
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, dtype=dtype, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def texts(family: SDXL, captions: list[str]) -> list[dict[str, torch.Tensor]]:
    """What is cached of captions."""
    found: dict = {}
    for name in family.text_encoders:
        found |= family.encode_text(name, family.load_text_encoder(name, CPU), captions)
    return [{key: value[i] for key, value in found.items()} for i in range(len(captions))]


def examples(family: SDXL, captions: list[str], size=(4, 8), quantiles=(0.2, 0.7, 0.4)) -> list[Example]:
    generator = torch.Generator().manual_seed(3)
    return [
        Example(
            {"latents": torch.randn(4, *size, generator=generator).to(family.dtype)}, text,
            torch.randn(4, *size, generator=generator), quantile, seed=17,
        )
        for text, quantile in zip(texts(family, captions), quantiles, strict=False)
    ]  # fmt: skip


def predict(family: SDXL, denoiser, values) -> torch.Tensor:
    for layer in family.layers(denoiser):
        values = layer.forward(SimpleNamespace(**layer.submodules), *values)
    return values


# -- against the pipeline ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "rates", "v_pred"),
    [
        (torch.float32, {}, False),
        (torch.bfloat16, {}, True),
        (torch.float32, FROZEN, True),
        (torch.bfloat16, FROZEN, False),
        (torch.float32, {"text_encoder_1_lr": 0.0}, False),
        (torch.bfloat16, {"text_encoder_2_lr": 0.0}, False),
    ],
)
def test_step_equals_the_pipelines_parts_and_the_ddpm_scheduler(folder, dtype, rates, v_pred):
    family = sdxl(folder, dtype=str(dtype).removeprefix("torch."), v_pred=v_pred, **rates)
    pipeline = library_pipeline(folder, dtype)
    batch_examples = examples(family, CAPTIONS)
    batch = family.collate(batch_examples)
    with torch.no_grad():
        prediction = predict(family, family.load_denoiser(CPU), batch.inputs)
        embeds, _, pooled, _ = pipeline.encode_prompt(CAPTIONS, do_classifier_free_guidance=False)

    scheduler = DDPMScheduler.from_config(
        pipeline.scheduler.config, prediction_type="v_prediction" if v_pred else "epsilon",
        rescale_betas_zero_snr=v_pred,
    )  # fmt: skip
    latents = torch.stack([e.media["latents"] for e in batch_examples]).float()
    noise = torch.stack([e.noise for e in batch_examples])
    times = torch.tensor([200, 700])
    x_t = scheduler.add_noise(latents, noise, times).to(dtype)
    sizes = pipeline._get_add_time_ids((32, 64), (0, 0), (32, 64), dtype, pipeline.text_encoder_2.config.projection_dim)
    with torch.no_grad():
        expected = pipeline.unet(
            x_t, times, embeds,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes.expand(2, -1)}, return_dict=False,
        )[0]  # fmt: skip
    assert torch.equal(prediction, expected)
    assert torch.equal(batch.target, scheduler.get_velocity(latents, noise, times) if v_pred else noise)
    assert batch.weight.shape == (2, 1, 1, 1)
    assert (batch.weight == 1).all()


def test_odd_sizes_equal_the_librarys(folder):
    """Latents of 6 x 10 become 3 x 5 and then 2 x 3, which does not double to what waits on the way up."""
    family = sdxl(folder, **FROZEN)
    batch, denoiser = family.collate(examples(family, CAPTIONS, size=(6, 10))), family.load_denoiser(CPU)
    x_t, times, sizes, _, first, second, pooled = batch.inputs
    conditions = {"text_embeds": pooled, "time_ids": sizes}
    with torch.no_grad():
        expected = denoiser["unet"](x_t, times, torch.cat([first, second], -1), added_cond_kwargs=conditions)[0]
        assert torch.equal(predict(family, denoiser, batch.inputs), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_text_equals_encode_prompt(folder, dtype):
    family = sdxl(folder, dtype=str(dtype).removeprefix("torch."), **FROZEN)
    captions = [*CAPTIONS, ""]
    with torch.no_grad():
        embeds, _, pooled, _ = library_pipeline(folder, dtype).encode_prompt(
            captions, do_classifier_free_guidance=False
        )
    for i, text in enumerate(texts(family, captions)):
        assert torch.equal(torch.cat([text["clip_l_embeds"], text["clip_g_embeds"]], -1), embeds[i])
        assert torch.equal(text["clip_g_pooled"], pooled[i])


def test_long_captions_are_encoded_in_pieces(folder):
    family, pipeline = sdxl(folder, **FROZEN), library_pipeline(folder)
    words = [LONG[: 75 * 4], LONG[75 * 4 :]]
    with torch.no_grad():
        pieces = [pipeline.encode_prompt(part, do_classifier_free_guidance=False) for part in words]
    (text,) = texts(family, [LONG])
    embeds = torch.cat([text["clip_l_embeds"], text["clip_g_embeds"]], -1)
    torch.testing.assert_close(embeds, torch.cat([piece[0][0] for piece in pieces]))
    torch.testing.assert_close(text["clip_g_pooled"], pieces[0][2][0])
    assert embeds.shape == (154, 24)


@pytest.mark.parametrize("rates", [{}, FROZEN, {"text_encoder_1_lr": 0.0}])
def test_captions_of_other_lengths_beside_it_change_nothing(folder, rates):
    family = sdxl(folder, **rates)
    denoiser = family.load_denoiser(CPU)
    several = examples(family, ["a red cat", LONG, LONG + LONG])
    batch = family.collate(several)
    assert batch.inputs[3].shape == (3, 3 * 77)
    with torch.no_grad():
        together = predict(family, denoiser, batch.inputs)
        alone = [predict(family, denoiser, family.collate([example]).inputs) for example in several]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(together[1], together[0], atol=1e-2)


def test_latents_equal_the_pipelines(folder):
    family = sdxl(folder, dtype="bfloat16")
    pixels = torch.rand(1, 3, 1, 48, 32, generator=torch.Generator().manual_seed(5)) * 2 - 1
    vae = family.load_vae(CPU)
    assert next(vae.parameters()).dtype == torch.float32
    latents = family.encode_media(vae, pixels, [torch.Generator().manual_seed(7)])["latents"]
    pipeline = StableDiffusionXLImg2ImgPipeline.from_pipe(library_pipeline(folder))
    expected = pipeline.prepare_latents(
        pixels[:, :, 0], None, 1, 1, torch.float32, CPU, [torch.Generator().manual_seed(7)], add_noise=False
    )
    assert torch.equal(latents, expected.bfloat16())


@pytest.mark.parametrize("rates", [{}, FROZEN])
def test_pipeline_draws_the_librarys_picture(folder, rates):
    family = sdxl(folder, **rates)
    ours, theirs = family.pipeline(family.load_denoiser(CPU), CPU), library_pipeline(folder)
    assert {**ours.scheduler.config} == {**theirs.scheduler.config}
    ours.set_progress_bar_config(disable=True)
    pictures = [
        pipeline(
            CAPTIONS[0], height=32, width=64, num_inference_steps=3, output_type="np",
            generator=torch.Generator().manual_seed(0),
        ).images
        for pipeline in (ours, theirs)
    ]  # fmt: skip
    assert (pictures[0] == pictures[1]).all()


@pytest.mark.parametrize("rates", [{}, FROZEN])
def test_a_sample_of_a_long_prompt_looks_like_one_with_a_long_negative_prompt(folder, rates):
    """The shorter of the two texts is repeated, which changes nothing."""
    family = sdxl(folder, **rates)
    pipeline = family.pipeline(family.load_denoiser(CPU), CPU, text_encoders=False)
    pipeline.set_progress_bar_config(disable=True)
    short, empty = texts(family, ["a cat", ""])
    (doubled,) = (
        {key: value if "pooled" in key else value.repeat(2, 1) for key, value in text.items()} for text in [empty]
    )
    pictures = [
        family.sample(pipeline, SampleRequest(short, negative, 64, 32, steps=2, guidance=4.0))[0]
        for negative in (empty, doubled)
    ]
    difference = torch.tensor(list(pictures[0].tobytes())).int() - torch.tensor(list(pictures[1].tobytes())).int()
    assert difference.abs().max() <= 2


# -- noise and loss ---------------------------------------------------------------------------------------


def test_times_are_uniform_between_their_bounds():
    family = sdxl(min_t=0.25, max_t=0.5, timestep_sample_method="logit_normal")
    assert [family._discrete_time(q, (8, 8)) for q in (1e-6, 0.5, 1 - 1e-6)] == [250, 375, 499]
    whole = [sdxl()._discrete_time((i + 0.5) / 1000, (8, 8)) for i in range(1000)]
    assert whole == list(range(1000))
    assert sdxl(shift=3.0)._discrete_time(0.5, (8, 8)) == 750


def test_min_snr_weights(folder):
    alphas = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod.double()
    times = torch.tensor([0, 100, 500, 999])
    snr = (alphas / (1 - alphas))[times]
    capped = torch.minimum(snr, torch.tensor(5.0))
    torch.testing.assert_close(
        sdxl(folder, min_snr_gamma=5).loss_weight(times).double(), capped / snr, rtol=1e-4, atol=0
    )
    family = sdxl(folder, min_snr_gamma=5, v_pred=True)
    torch.testing.assert_close(family.loss_weight(times).double(), capped / (snr + 1), rtol=1e-4, atol=0)
    assert (sdxl(folder, min_snr_gamma=0).loss_weight(times) == 1).all()


def test_debiased_weights_and_off_means_off(folder):
    times = torch.tensor([0, 500, 999])
    alphas = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod[times]
    snr = (alphas / (1 - alphas)).clamp(max=1000)
    torch.testing.assert_close(sdxl(folder, debiased_estimation_loss=True).loss_weight(times), snr**-0.5)
    torch.testing.assert_close(
        sdxl(folder, debiased_estimation_loss=True, v_pred=True).loss_weight(times), 1 / (snr + 1)
    )
    assert (sdxl(folder, debiased_estimation_loss=False).loss_weight(times) == 1).all()


def test_v_prediction_ends_in_pure_noise(folder):
    scheduler = sdxl(folder, v_pred=True).noise_scheduler
    assert scheduler.alphas_cumprod[-1] == 0
    assert sdxl(folder).noise_scheduler.alphas_cumprod[-1] > 0.004


def test_noise_offset_moves_each_channel_and_depends_on_the_sample_alone(folder):
    plain, moved = (sdxl(folder, noise_offset=offset, **FROZEN) for offset in (0.0, 0.1))
    several = examples(plain, CAPTIONS)
    several[1].seed = 18
    shift = moved.collate(several).target - plain.collate(several).target
    torch.testing.assert_close(shift, shift.mean((2, 3), keepdim=True).expand_as(shift), atol=1e-6, rtol=0)
    assert len(shift.mean((2, 3)).flatten().unique()) == 8
    assert torch.equal(moved.collate(several[1:]).target[0], moved.collate(several).target[1])


# -- files ------------------------------------------------------------------------------------------------


def components(family: SDXL) -> dict[str, torch.nn.Module]:
    pipeline = family.pipeline(family.load_denoiser(CPU), CPU)
    return {name: getattr(pipeline, folder) for name, folder in FOLDERS.items()}


@pytest.mark.parametrize("rates", [{}, FROZEN])
def test_a_checkpoint_equals_the_folder_and_diffusers_own_reading(folder, rates):
    family = single(folder, **rates)
    family.check_files()
    library = StableDiffusionXLPipeline.from_single_file(
        str(folder / "checkpoint.safetensors"), config=str(folder), local_files_only=True, torch_dtype=torch.float32
    )
    found, expected = components(family), components(sdxl(folder, **rates))
    for name, model in found.items():
        state = model.state_dict()
        for other in (expected[name].state_dict(), getattr(library, FOLDERS[name]).state_dict()):
            assert state.keys() == other.keys()
            assert all(torch.equal(value, other[key]) for key, value in state.items()), name


def test_a_checkpoint_gives_the_folders_configuration(folder):
    found, expected = single(folder)._unet_config, dict(sdxl(folder).build_denoiser()["unet"].config)
    assert all(_plain(found[key]) == _plain(expected[key]) for key in found), found
    for name in ("clip_l", "clip_g"):
        found, expected = single(folder)._text_config(name), sdxl(folder)._text_config(name)
        assert {key: expected.get(key) for key in found} == found


def _plain(value):
    return list(value) if isinstance(value, tuple) else value


def test_published_sizes_are_read_from_shapes(tmp_path):
    """SDXL's own configuration comes out of a file that declares its tensors (and holds no data)."""
    from diffusers import UNet2DConditionModel

    config = {
        "in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280), "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048,
        "norm_num_groups": 32, "use_linear_projection": True, "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
    }  # fmt: skip
    network = build(lambda: UNet2DConditionModel(**config))
    header, at = {}, 0
    for name, value in network.state_dict().items():
        header[unet.original_name(name, config)] = {
            "dtype": "F16",
            "shape": list(value.shape),
            "data_offsets": [at, at],
        }
    assert len(header) == len(network.state_dict()) == 1680
    text = json.dumps(header).encode()
    path = tmp_path / "unet.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    assert unet.config_of(Weights(path, "model.checkpoint_path"), 1280) == config


@pytest.mark.parametrize("rates", [{}, FROZEN, {"text_encoder_1_lr": 0.0}])
@pytest.mark.parametrize("source", [sdxl, single])
def test_a_trained_model_is_written_as_a_whole_checkpoint(folder, tmp_path, source, rates):
    """As it was, name for name, where nothing is trained; and read back with the trained values."""
    family = source(folder, **rates)
    trained = dict(family.load_denoiser(CPU).named_parameters())
    tensors = {**family.comfyui_tensors(trained), **family.other_tensors(trained.keys())}
    original = load_file(folder / "checkpoint.safetensors")
    assert tensors.keys() == original.keys()
    assert all(torch.equal(tensors[name].float(), value.float()) for name, value in original.items())

    changed = {name: value.detach() + 1 for name, value in trained.items()}
    tensors = {**family.comfyui_tensors(changed), **family.other_tensors(changed.keys())}
    save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "new.safetensors")
    again = dict(single(folder, tmp_path / "new.safetensors", **rates).load_denoiser(CPU).named_parameters())
    assert all(torch.equal(again[name], value) for name, value in changed.items())


def test_v_prediction_is_read_from_a_checkpoint_and_written(folder, tmp_path):
    family = sdxl(folder, v_pred=True, **FROZEN)
    tensors = {**load_file(folder / "checkpoint.safetensors"), **family.other_tensors(())}
    assert {"v_pred", "ztsnr"} <= tensors.keys()
    save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "v.safetensors")
    family = single(folder, tmp_path / "v.safetensors")
    family.check_files()
    assert family.predicts_v
    assert not single(folder).predicts_v
    pipeline = family.pipeline(family.load_denoiser(CPU), CPU, text_encoders=False)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.scheduler.config.rescale_betas_zero_snr


def test_v_prediction_is_read_from_a_folder(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "v")
    file = tmp_path / "v/scheduler/scheduler_config.json"
    file.write_text(file.read_text().replace('"epsilon"', '"v_prediction"'))
    assert sdxl(tmp_path / "v").predicts_v


def test_another_vae(folder, tmp_path):
    tensors = {
        name.removeprefix("first_stage_model."): value.float() + 1
        for name, value in load_file(folder / "checkpoint.safetensors").items()
        if name.startswith("first_stage_model.")
    }
    save_file(tensors, tmp_path / "vae.safetensors")
    family = sdxl(folder, vae_path=str(tmp_path / "vae.safetensors"))
    family.check_files()
    assert family.identity("vae") != sdxl(folder).identity("vae")
    assert family.identity("clip_g") == sdxl(folder).identity("clip_g")
    assert torch.equal(family.load_vae(CPU).encoder.conv_in.weight, tensors["encoder.conv_in.weight"])
    assert sdxl(folder, vae_path=str(folder / "vae")).load_vae(CPU).config.scaling_factor == 0.13025


def test_identity_follows_what_the_values_depend_on(folder):
    trained, frozen = sdxl(folder), sdxl(folder, **FROZEN)
    assert trained.identity("vae") == frozen.identity("vae")
    assert trained.identity("clip_l") != frozen.identity("clip_l")
    assert sdxl(folder, dtype="bfloat16").identity("clip_l") == trained.identity("clip_l")  # tokens have no precision
    assert sdxl(folder, dtype="bfloat16", **FROZEN).identity("clip_l") != frozen.identity("clip_l")


# -- refusals ---------------------------------------------------------------------------------------------


def refusal(make=lambda **options: sdxl(**options), **options) -> str:
    with pytest.raises(SettingsError) as error:
        make(**options).check_files()
    return str(error.value)


def test_nothing_given():
    assert refusal() == (
        "model.checkpoint_path: give an SDXL checkpoint, such as sd_xl_base_1.0.safetensors; or give "
        "model.diffusers_path"
    )


def test_nothing_trained():
    message = refusal(unet_lr=0, text_encoder_1_lr=0, text_encoder_2_lr=0, diffusers_path="x")
    assert message == "model.unet_lr: nothing would be trained; give a learning rate to at least one part"


def test_a_folder_as_checkpoint(folder):
    assert "is a folder; name it in model.diffusers_path" in refusal(checkpoint_path=str(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if "embedders.1" not in k}, "has no 'conditioner.embedders.1.model."),
        (lambda t: {k: v for k, v in t.items() if "label_emb" not in k}, "has no 'model.diffusion_model.label_emb"),
        (lambda t: t | {"edm_mean": torch.zeros(4)}, "continuous noise levels (EDM)"),
        (
            lambda t: t | {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 9, 3, 3)},
            "inpainting models",
        ),
    ],
)
def test_checkpoints_of_other_models(folder, tmp_path, change, message):
    save_file(change(load_file(folder / "checkpoint.safetensors")), tmp_path / "other.safetensors")
    found = refusal(lambda: single(folder, tmp_path / "other.safetensors"))
    assert found.startswith(f"model.checkpoint_path: '{tmp_path / 'other.safetensors'}' ")
    assert message in found


def test_a_tokenizer_that_was_fetched_before_is_found(folder, tmp_path, monkeypatch):
    """In Hugging Face's cache, as ``hf download`` leaves it."""
    repository = tmp_path / "models--openai--clip-vit-large-patch14"
    snapshot = repository / "snapshots" / ("0" * 40)
    shutil.copytree(folder / "tokenizer", snapshot)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    family = sdxl(checkpoint_path=str(folder / "checkpoint.safetensors"))
    family.check_files()
    found = family.encode_text("clip_g", family.load_text_encoder("clip_g", CPU), CAPTIONS)["clip_g_tokens"]
    for pieces, text in zip(found, texts(sdxl(folder), CAPTIONS), strict=True):
        assert torch.equal(pieces, text["clip_g_tokens"])


def test_no_tokenizer(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    message = refusal(checkpoint_path=str(folder / "checkpoint.safetensors"))
    assert re.match(r"model\.tokenizer_path: no tokenizer found; give the folder 'tokenizer'", message)
    assert "hf download openai/clip-vit-large-patch14 vocab.json merges.txt" in message


def test_lora_keys_are_kohyas(folder):
    """Which ComfyUI maps by these very patterns."""
    family = sdxl(folder)
    denoiser = family.build_denoiser()
    keys = {family.lora_keys(name) for name, module in denoiser.named_modules() if isinstance(module, torch.nn.Linear)}
    part = r"(self_attn_(q|k|v|out)_proj|mlp_fc[12])"
    pattern = rf"lora_te[12]_text_model_encoder_layers_\d+_{part}|lora_te2_text_projection|lora_unet_\w+"
    assert all(re.fullmatch(pattern, key) for key in keys), keys
    for key in ("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0",
                "lora_unet_mid_block_attentions_0_proj_in", "lora_te1_text_model_encoder_layers_0_mlp_fc1",
                "lora_te2_text_model_encoder_layers_1_self_attn_q_proj"):  # fmt: skip
        assert key in keys
