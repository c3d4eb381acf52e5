"""Cosmos-Predict2's own parts: its pipeline's sigmas, text with zeros behind it, loss at half the size, its files."""

import json
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cosmos_stand_ins  # noqa: F401
import diffusers
import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_anima_lora_to_diffusers
from diffusers.loaders.single_file_utils import convert_cosmos_transformer_checkpoint_to_diffusers
from diffusers.utils import import_utils
from diffusion_trainer.models.base import Batch, Example
from diffusion_trainer.models.captions import filled_up
from diffusion_trainer.models.cosmos_predict2 import CosmosPredict2, original_name, transformer_config
from diffusion_trainer.models.wan_files import original_vae_name
from diffusion_trainer.utils.adapted import adapted_layers
from diffusion_trainer.utils.adapter_settings import Lora
from diffusion_trainer.utils.adapters import export_tensors, inject
from diffusion_trainer.utils.config import SettingsError, validate
from diffusion_trainer.utils.losses import weighted_mean
from diffusion_trainer.utils.observation_settings import Sampling
from diffusion_trainer.utils.samples import check_images
from diffusion_trainer.utils.weights import Weights
from safetensors.torch import load_file, save_file
from training import Bench

CPU = torch.device("cpu")
CAPTIONS = ["a red cat", "", "a photo of a dog " * 150]
"""The last is cut."""
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cosmos")
    CosmosPredict2.write_miniature(path)
    return path


def tensors(folder: Path, part: str) -> dict[str, torch.Tensor]:
    (file,) = (folder / part).glob("*.safetensors")
    return load_file(file)


@pytest.fixture(scope="module")
def files(folder: Path, tmp_path_factory) -> dict[str, str]:
    """The parts as single files, as ComfyUI has them."""
    path = tmp_path_factory.mktemp("single")
    named = {
        "dit": {f"net.{original_name(name)}": value for name, value in tensors(folder, "transformer").items()},
        "vae": {original_vae_name(name, 1, False): value for name, value in tensors(folder, "vae").items()},
        "t5": {n: v for n, v in tensors(folder, "text_encoder").items() if n != "encoder.embed_tokens.weight"},
    }
    for part, values in named.items():
        save_file(values, path / f"{part}.safetensors")
    return {part: str(path / f"{part}.safetensors") for part in named}


def cosmos(**options: Any) -> CosmosPredict2:
    table = {"type": "cosmos_predict2", "dtype": "float32", **options}
    table = {key: str(value) if isinstance(value, Path) else value for key, value in table.items()}
    return CosmosPredict2(validate(CosmosPredict2.Config, table, "model"))


def library_pipeline(folder: Path, dtype: torch.dtype = torch.float32) -> diffusers.Cosmos2TextToImagePipeline:
    pipeline = diffusers.Cosmos2TextToImagePipeline.from_pretrained(folder, torch_dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def encoded(family: CosmosPredict2, *captions: str) -> list[torch.Tensor]:
    return list(family.encode_text("t5", family.load_text_encoder("t5", CPU), captions)["t5_embeds"])


def batch_of(family: CosmosPredict2, texts: list[torch.Tensor], size: tuple[int, int] = (8, 12)) -> Batch:
    def example(number: int, text: torch.Tensor) -> Example:
        generator = torch.Generator().manual_seed(3 + number)
        latents, noise = (torch.randn(16, *size, generator=generator) for _ in range(2))
        return Example({"latents": latents.to(family.dtype)}, {"t5_embeds": text}, noise, 0.2 + 0.3 * number)

    return family.collate([example(*numbered) for numbered in enumerate(texts)])


def predict(family: CosmosPredict2, denoiser: torch.nn.Module, values: Any) -> Any:
    with torch.no_grad():
        for layer in family.layers(denoiser):
            values = layer.forward(SimpleNamespace(**layer.submodules), *values)
    return values


# -- against the pipeline ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_step_equals_the_pipelines(folder, dtype):
    """What its loop feeds the transformer at sigma = t / (1 - t), and what it makes of the answer."""
    family, pipeline = cosmos(diffusers_path=folder, dtype=str(dtype).removeprefix("torch.")), library_pipeline(
        folder, dtype
    )  # fmt: skip
    batch = batch_of(family, encoded(family, *CAPTIONS[:2]))
    for number in range(2):
        generator = torch.Generator().manual_seed(3 + number)
        clean, noise = (torch.randn(1, 16, 1, 8, 12, generator=generator) for _ in range(2))
        clean = clean.to(dtype).float()
        t = family.timestep(0.2 + 0.3 * number, (8, 12))
        sigma = torch.tensor(t / (1 - t))
        current = sigma / (sigma + 1)
        latents = clean + sigma * noise
        with torch.no_grad():
            text = pipeline.encode_prompt(CAPTIONS[number], do_classifier_free_guidance=False)[0]
            expected = pipeline.transformer(
                batch.inputs[0][number : number + 1, :, None], current.to(dtype)[None], text,
                padding_mask=torch.zeros(1, 1, 64, 96, dtype=dtype), return_dict=False,
            )[0]  # fmt: skip
        given = batch.inputs[0][number].float()
        within = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(given, ((1 - current) * latents)[0, :, 0], atol=within, rtol=within)
        assert batch.inputs[1][number] == current.to(dtype).float()
        ours = predict(family, family.load_denoiser(CPU), [value[number : number + 1] for value in batch.inputs])
        assert torch.equal(ours, expected[:, :, 0])
        # what it takes for the clean picture, if the network answers with the target
        made = (1 - current) * latents - current * batch.target[number][:, None]
        torch.testing.assert_close(made, clean, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_text_equals_encode_prompt(folder, dtype):
    """With the same zeros behind it, which are seen as the pipeline's are."""
    family = cosmos(diffusers_path=folder, dtype=str(dtype).removeprefix("torch."))
    texts = encoded(family, *CAPTIONS)
    with torch.no_grad():
        expected, _ = library_pipeline(folder, dtype).encode_prompt(CAPTIONS, do_classifier_free_guidance=False)
    assert torch.equal(filled_up(texts, 512), expected)
    assert [len(text) for text in texts[1:]] == [1, 512]
    assert len(texts[0]) < 20
    assert batch_of(family, texts).inputs[2].shape == (3, 512, 32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_latents_are_what_the_pipeline_decodes(folder, dtype):
    """Its own arithmetic before the decoder gives back the mode of the posterior."""
    family, pipeline = cosmos(diffusers_path=folder, dtype=str(dtype).removeprefix("torch.")), library_pipeline(folder)
    pixels = torch.rand(1, 3, 1, 48, 32, generator=torch.Generator().manual_seed(5)) * 2 - 1
    vae = family.load_vae(CPU)
    latents = family.encode_media(vae, pixels, [])["latents"]
    assert latents.shape == (1, 16, 6, 4)
    assert latents.dtype == dtype
    with torch.no_grad():
        mode = vae.encode(pixels.to(dtype)).latent_dist.mode().float()
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std))
    assert pipeline.sigma_data == 1
    decoded = latents.float() / (1 / std) + mean
    torch.testing.assert_close(decoded, mode[:, :, 0], atol=1e-5 if dtype == torch.float32 else 0.03, rtol=1e-5)


def test_pipeline_has_the_librarys_schedule(folder, files):
    theirs = library_pipeline(folder)
    single = {"transformer_path": files["dit"], "t5_path": files["t5"], "vae_path": files["vae"]}
    for family in (cosmos(diffusers_path=folder), cosmos(**single, t5_tokenizer_path=folder / "tokenizer")):
        ours = family.pipeline(family.load_denoiser(CPU), CPU, text_encoders=False)
        settings = [
            {k: v for k, v in scheduler.config.items() if k[0] != "_"}
            for scheduler in (ours.scheduler, theirs.scheduler)
        ]
        assert settings[0] == settings[1]
        ours.scheduler.set_timesteps(sigmas=torch.linspace(0, 1, 5).double())
        assert ours.scheduler.sigmas[0] == 80


def test_without_the_guardrail_no_samples_are_promised(folder, monkeypatch):
    settings = Sampling(prompts=["a cat"])
    check_images(settings, cosmos(diffusers_path=folder))
    monkeypatch.setattr(import_utils, "_cosmos_guardrail_available", False)
    with pytest.raises(SettingsError, match="sample: diffusers draws with Cosmos-Predict2 only beside"):
        check_images(settings, cosmos(diffusers_path=folder))
    check_images(Sampling(), cosmos(diffusers_path=folder))


def test_long_sides_are_turned_further(folder):
    """diffusers' table ends at 128 tokens, 2048 pixels; ComfyUI's has no end."""
    rope = cosmos(diffusers_path=folder).build_denoiser().rope
    cos, sin = rope(torch.zeros(1, 16, 1, 4, 320))
    short, _ = library_pipeline(folder).transformer.rope(torch.zeros(1, 16, 1, 4, 256))
    assert cos.shape == sin.shape == (320, 16)
    assert torch.equal(cos.view(2, 160, 16)[:, :128], short.view(2, 128, 16))
    assert len(cos.view(2, 160, 16)[1].unique(dim=0)) == 160


def test_a_compiled_block_is_one_graph(folder):
    family = cosmos(diffusers_path=folder)
    layers = family.layers(family.load_denoiser(CPU))
    values = layers[0].forward(
        SimpleNamespace(**layers[0].submodules), *batch_of(family, encoded(family, "a cat")).inputs
    )
    modules = SimpleNamespace(**layers[1].submodules)
    plain = layers[1].forward(modules, *values)[0]
    torch._dynamo.reset()
    compiled = torch.compile(modules.block, fullgraph=True, backend="aot_eager")
    found = layers[1].forward(SimpleNamespace(block=compiled), *values)[0]
    torch._dynamo.reset()
    torch.testing.assert_close(found, plain)


# -- the loss and its groups ------------------------------------------------------------------------------


def loss_of(prediction: torch.Tensor, batch: Batch) -> torch.Tensor:
    return weighted_mean(
        partial(torch.nn.functional.mse_loss, reduction="none"), prediction, (batch.target, batch.weight)
    )


@pytest.mark.parametrize(("size", "counts"), [((116, 116), True), ((64, 200), False), ((8, 12), False)])
def test_loss_at_half_the_size(folder, size, counts):
    options = {"diffusers_path": folder, "loss_weighting": "cosmap"}
    plain, both = cosmos(**options), cosmos(**options, multiscale_loss_weight=0.3)
    texts = encoded(plain, *CAPTIONS[:2])
    denoiser = plain.load_denoiser(CPU)
    batches = [batch_of(family, texts, size) for family in (plain, both)]
    predictions = [predict(family, denoiser, batches[0].inputs) for family in (plain, both)]
    error = (predictions[0] - batches[0].target) * batches[0].weight.sqrt()
    half = torch.nn.functional.avg_pool2d(error, 2)
    expected = error.square().mean() + (0.3 * half.square().mean() if counts else 0)
    torch.testing.assert_close(loss_of(predictions[1], batches[1]), expected)
    assert (predictions[1].ndim == 2) == counts
    mask = torch.rand(2, 1, *size)
    spread = both.spread_mask(mask, batches[1].target)
    assert torch.broadcast_shapes(spread.shape, batches[1].target.shape) == batches[1].target.shape
    if counts:
        assert torch.equal(spread[:, : 16 * 116 * 116].view(2, 16, 116, 116), mask.expand(-1, 16, -1, -1))
        # four numbers may be added in another order
        torch.testing.assert_close(
            spread[:, 16 * 116 * 116 :][:, 0], mask[:, 0, :2, :2].mean((1, 2)), rtol=1e-6, atol=0
        )


def test_rates_by_group(folder):
    family = cosmos(diffusers_path=folder, self_attn_lr=0, cross_attn_lr=1e-5, mlp_lr=0, mod_lr=0)
    assert sorted(family.learning_rates().values()) == [0, 0, 0, 1e-5]
    denoiser = inject(
        family.load_denoiser(CPU), family, validate(Lora, {"type": "lora", "rank": 2}), 0, family.learning_rates()
    )
    assert {name.split(".")[2] for name in adapted_layers(denoiser)} == {"attn2"}
    names = [name for name, _ in family.build_denoiser().named_parameters()]
    left = [n for n in names if not any(re.search(pattern, n) for pattern in family.learning_rates())]
    assert {name.split(".")[0] for name in left} == {"patch_embed", "time_embed", "proj_out"}


def test_older_options_say_how_the_text_encoder_is_held(folder):
    dtypes = [
        cosmos(diffusers_path=folder, **{name: True}).text_dtype for name in ("text_encoder_nf4", "text_encoder_fp8")
    ]
    assert dtypes == ["nf4", "float8"]
    assert cosmos(diffusers_path=folder, text_encoder_fp8=True, text_encoder_dtype="int8").text_dtype == "int8"
    exact, held = (encoded(cosmos(diffusers_path=folder, text_encoder_fp8=on), "a cat")[0] for on in (False, True))
    assert 0 < (exact - held).norm() < 0.2 * exact.norm()


# -- files ------------------------------------------------------------------------------------------------


def assert_same(ours: CosmosPredict2, theirs: CosmosPredict2) -> None:
    for first, second in (
        (ours.load_denoiser(CPU), theirs.load_denoiser(CPU)),
        (ours.load_vae(CPU), theirs.load_vae(CPU)),
        (ours.load_text_encoder("t5", CPU).model, theirs.load_text_encoder("t5", CPU).model),
    ):
        states = first.state_dict(), second.state_dict()
        assert states[0].keys() == states[1].keys()
        for name, value in states[1].items():
            assert torch.equal(value, states[0][name]), name


def test_single_files_equal_the_folder(folder, files):
    whole = cosmos(diffusers_path=folder)
    single = cosmos(
        transformer_path=files["dit"], vae_path=files["vae"], t5_path=files["t5"],
        t5_tokenizer_path=folder / "tokenizer")  # fmt: skip
    for family in (single, cosmos(diffusers_path=folder, transformer_path=files["dit"])):
        family.check_files()
        assert_same(family, whole)
    config, expected = single.build_denoiser().config, whole.build_denoiser().config
    for key in ("num_attention_heads", "num_layers", "mlp_ratio", "text_embed_dim", "adaln_lora_dim", "in_channels"):
        assert config[key] == expected[key], key
    assert tuple(expected["rope_scale"]) == config["rope_scale"] == (1.0, 4.0, 4.0)
    assert torch.equal(encoded(single, "a cat")[0], encoded(whole, "a cat")[0])


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_other_prefixes(prefix, folder, files, tmp_path):
    bare = {name.removeprefix("net."): value for name, value in load_file(files["dit"]).items()}
    save_file({prefix + name: value for name, value in bare.items()}, tmp_path / "dit.safetensors")
    family = cosmos(diffusers_path=folder, transformer_path=tmp_path / "dit.safetensors")
    family.check_files()
    assert_same(family, cosmos(diffusers_path=folder))


@pytest.mark.parametrize("suffix", [None, ".scale_weight", ".weight_scale"])
def test_fp8_files(suffix, folder, files, tmp_path):
    scale, exact = torch.tensor(0.01), load_file(files["dit"])
    stored = {}
    for name, value in exact.items():
        if value.ndim == 2:
            stored[name] = (value.float() / (scale if suffix else 1)).to(torch.float8_e4m3fn)
            stored |= {name.removesuffix(".weight") + suffix: scale.clone()} if suffix else {}
        else:
            stored[name] = value
    save_file(stored, tmp_path / "dit.safetensors")
    family = cosmos(diffusers_path=folder, transformer_path=tmp_path / "dit.safetensors")
    family.check_files()
    for name, value in family.load_denoiser(CPU).state_dict().items():
        expected = exact[f"net.{original_name(name)}"].float()
        assert (value - expected).norm() <= 0.05 * expected.norm() + 1e-3, name


def test_names_are_those_of_diffusers_converter(folder, files):
    converted = convert_cosmos_transformer_checkpoint_to_diffusers(load_file(files["dit"]))
    expected = tensors(folder, "transformer")
    assert converted.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in converted.items())
    assert original_name("transformer_blocks.3.attn2.to_out.0") == "blocks.3.cross_attn.output_proj"


@pytest.mark.parametrize(
    ("heads", "layers"), [(16, 28), (40, 36)], ids=["2B", "14B"]
)  # fmt: skip
def test_published_transformers_are_known_by_their_shapes(heads, layers, tmp_path):
    published = {"num_attention_heads": heads, "num_layers": layers, "rope_scale": (1.0, 4.0, 4.0),
                 "extra_pos_embed_type": None}  # fmt: skip
    with torch.device("meta"):
        model = diffusers.CosmosTransformer3DModel(**published)
    header = {
        f"net.{original_name(name)}": {"dtype": "BF16", "shape": [*value.shape], "data_offsets": [0, 0]}
        for name, value in model.state_dict().items()
    }
    text = json.dumps(header).encode()
    (tmp_path / "dit.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    found = transformer_config(
        Weights(tmp_path / "dit.safetensors", "model.transformer_path", ("net.",), "x_embedder.proj.1.weight")
    )
    assert {key: value for key, value in found.items() if value != model.config[key]} == {}


def test_lora_moves_diffusers_as_in_training(folder):
    family = cosmos(diffusers_path=folder)
    denoiser = inject(family.load_denoiser(CPU), family, validate(Lora, {"type": "lora", "rank": 4, "alpha": 2.0}), 0)
    layers = adapted_layers(denoiser)
    assert {name.split(".")[0] for name in layers} == {"transformer_blocks"}
    for layer in layers.values():
        torch.nn.init.normal_(layer.adapter.up, std=0.2)
    exported = export_tensors(layers, family, torch.float32)
    assert all(name.startswith("diffusion_model.blocks.") for name in exported)
    transformer = library_pipeline(folder).transformer
    transformer.load_lora_adapter(_convert_non_diffusers_anima_lora_to_diffusers(exported), prefix="transformer")
    batch = batch_of(family, encoded(family, "a cat"))
    bare, ours = (predict(family, network, batch.inputs) for network in (family.load_denoiser(CPU), denoiser))
    with torch.no_grad():
        theirs = transformer(
            batch.inputs[0][:, :, None], *batch.inputs[1:], padding_mask=torch.zeros(1, 1, 64, 96), return_dict=False
        )[0][:, :, 0]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
    assert (ours - bare).norm() > 0.05 * bare.norm()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"t5_path": "t5", "vae_path": "vae"}, "model.transformer_path: give a Cosmos-Predict2 text-to-image"),
        ({"transformer_path": "t5", "t5_path": "t5", "vae_path": "vae"}, "is not a Cosmos-Predict2 text-to-image"),
        ({"transformer_path": "dit", "t5_path": "t5", "vae_path": "t5"}, "is not the Wan VAE"),
        ({"transformer_path": "dit", "t5_path": "new_t5", "vae_path": "vae"}, "is not T5-XXL of version 1.0"),
        ({"transformer_path": "anima", "t5_path": "t5", "vae_path": "vae"}, "(it has 'llm_adapter.out_proj.weight')"),
        ({"transformer_path": "video", "t5_path": "t5", "vae_path": "vae"}, "is another Cosmos model"),
        ({"llm_path": "t5", "transformer_path": "dit", "vae_path": "vae"}, "model.t5_path: give T5-XXL of version 1.0"),
        ({"transformer_path": "dit", "t5_path": "t5", "vae_path": "vae"}, "model.t5_tokenizer_path: no tokenizer"),
        ({"transformer_path": "dit", "t5_path": "t5", "vae_path": "vae", "dtype": "float16",
          "t5_tokenizer_path": "tokenizer"}, "model.dtype: float16 cannot hold"),
    ],
)  # fmt: skip
def test_what_it_says_of_wrong_files(options, message, folder, files, tmp_path):
    def write(name: str, values: dict[str, torch.Tensor]) -> str:
        save_file(values, tmp_path / f"{name}.safetensors")
        return str(tmp_path / f"{name}.safetensors")

    dit, t5 = load_file(files["dit"]), load_file(files["t5"])
    patch = dit["net.x_embedder.proj.1.weight"]
    made = {
        "new_t5": lambda: write("new", {n.replace("Dense.wi.", "Dense.wi_0."): v for n, v in t5.items()}),
        "anima": lambda: write("anima", {**dit, "net.llm_adapter.out_proj.weight": torch.zeros(2, 2)}),
        "video": lambda: write("video", {**dit, "net.x_embedder.proj.1.weight": torch.cat([patch, patch[:, :4]], 1)}),
        "tokenizer": lambda: str(folder / "tokenizer"),
    }
    given = {key: made[value]() if value in made else files.get(value, value) for key, value in options.items()}
    with pytest.raises(SettingsError, match=re.escape(message)):
        cosmos(**given).check_files()


def test_two_ways_to_hold_the_text_encoder_are_refused(folder):
    with pytest.raises(SettingsError, match="or text_encoder_fp8"):
        cosmos(diffusers_path=folder, text_encoder_nf4=True, text_encoder_fp8=True)


def test_all_weights_and_samples(tmp_path):
    """What is trained moves, and is what ComfyUI reads."""
    bench = Bench(tmp_path, "cosmos_predict2")
    result = bench.train(
        adapter=None,
        epochs=1,
        save_every_n_epochs=1,
        sample={"prompts": ["a dog"], "steps": 2, "width": 64, "height": 32},
    )
    (file,) = result.folder.path.glob("epoch1/*.safetensors")
    family = cosmos(diffusers_path=bench.model["diffusers_path"])
    start = family.comfyui_tensors(family.load_denoiser(CPU).state_dict())
    trained = load_file(file)
    assert trained.keys() == start.keys()
    name = "net.blocks.0.self_attn.q_proj.weight"
    assert not torch.equal(trained[name].float(), start[name])
    again = cosmos(diffusers_path=bench.model["diffusers_path"], transformer_path=file)
    again.check_files()
    assert torch.equal(
        again.load_denoiser(CPU).state_dict()["proj_out.weight"], trained["net.final_layer.linear.weight"]
    )
    assert list((result.folder.path / "samples").rglob("*.png"))
