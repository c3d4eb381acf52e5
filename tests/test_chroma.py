"""Chroma's own parts: the mask, the approximator, its files, and what it says of wrong ones."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_chroma_transformer_checkpoint_to_diffusers
from diffusion_trainer.models.base import Example
from diffusion_trainer.models.chroma import Chroma, source_of
from diffusion_trainer.models.flux import Flux, read_bfl, to_bfl
from diffusion_trainer.utils.adapted import adapted_layers
from diffusion_trainer.utils.adapter_settings import Lora
from diffusion_trainer.utils.adapters import export_tensors, inject
from diffusion_trainer.utils.config import SettingsError, validate
from diffusion_trainer.utils.weights import Weights
from safetensors.torch import load_file, save_file
from training import Bench

CPU = torch.device("cpu")
CAPTIONS = ["a photo of a red cat", "a dog"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("chroma")
    Chroma.write_miniature(path)
    return path


@pytest.fixture(scope="module")
def single(folder: Path, tmp_path_factory) -> Path:
    """The transformer as a single file."""
    (file,) = (folder / "transformer").glob("*.safetensors")
    path = tmp_path_factory.mktemp("single") / "Chroma1-HD.safetensors"
    save_file({name: value.contiguous() for name, value in to_bfl(load_file(file), source_of).items()}, path)
    return path


def chroma(**options) -> Chroma:
    table = {"type": "chroma", "dtype": "float32", "max_sequence_length": 32, **options}
    return Chroma(
        validate(Chroma.Config, {key: str(v) if isinstance(v, Path) else v for key, v in table.items()}, "model")
    )


def library_pipeline(folder: Path, dtype: torch.dtype = torch.float32) -> diffusers.ChromaPipeline:
    pipeline = diffusers.ChromaPipeline.from_pretrained(folder, torch_dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def encoded(family: Chroma) -> list[dict[str, torch.Tensor]]:
    text = family.encode_text("t5", family.load_text_encoder("t5", CPU), CAPTIONS)
    return [{name: value[i] for name, value in text.items()} for i in range(len(CAPTIONS))]


def predict(family: Chroma, denoiser: torch.nn.Module, values: tuple) -> torch.Tensor:
    with torch.no_grad():
        for layer in family.layers(denoiser):
            values = layer.forward(SimpleNamespace(**layer.submodules), *values)
    return values


def batch_of(family: Chroma, texts: list[dict[str, torch.Tensor]]):
    generator = torch.Generator().manual_seed(3)
    latents, noise = (torch.randn(len(texts), 16, 8, 12, generator=generator) for _ in range(2))
    return family.collate(
        [Example({"latents": latents[i]}, text, noise[i], [0.2, 0.7][i]) for i, text in enumerate(texts)]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_equals_the_librarys_transformer_with_a_boolean_mask(folder, dtype):
    """Its own attention and embedder, and the pipeline's packing, ids and time."""
    family = chroma(diffusers_path=folder, dtype=str(dtype).removeprefix("torch."))
    pipeline, texts = library_pipeline(folder, dtype), encoded(family)
    batch = batch_of(family, texts)
    x_t, told, text, mask = batch.inputs
    assert text.shape[1] == mask.shape[1] < 32
    sigmas = torch.tensor([family.timestep(quantile, (8, 12)) for quantile in (0.2, 0.7)])
    with torch.no_grad():
        expected = pipeline.transformer(
            hidden_states=pipeline._pack_latents(x_t, 2, 16, 8, 12),
            timestep=(sigmas * 1000).to(dtype) / 1000,
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3),
            img_ids=pipeline._prepare_latent_image_ids(2, 4, 6, CPU, dtype),
            attention_mask=pipeline._prepare_attention_mask(2, 24, dtype, mask.bool()),
            return_dict=False,
        )[0]
    prediction = predict(family, family.load_denoiser(CPU), batch.inputs)
    assert torch.equal(told, ((sigmas * 1000).to(dtype) / 1000).float())
    assert torch.equal(prediction, expected)


def padded(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Captions as the pipeline has them, and its mask."""
    with torch.no_grad():
        embeds, _, mask, *_ = library_pipeline(folder).encode_prompt(
            CAPTIONS, do_classifier_free_guidance=False, max_sequence_length=32
        )
    return embeds, mask.bool()


def test_text_equals_the_pipelines(folder):
    lengths = []
    for text, embed, seen in zip(encoded(chroma(diffusers_path=folder)), *padded(folder), strict=True):
        assert torch.equal(text["t5_embeds"], embed[seen])
        lengths.append(len(text["t5_embeds"]))
    assert 2 < lengths[1] < lengths[0] < 32


def test_a_long_caption_is_cut_and_has_no_padding(folder):
    family = chroma(diffusers_path=folder, max_sequence_length=5)
    (embeds,) = family.encode_text("t5", family.load_text_encoder("t5", CPU), ["a photo of a red cat"])["t5_embeds"]
    assert embeds.shape == (5, 32)


def test_captions_in_their_own_length_are_captions_with_masked_padding(folder):
    """One by one, where nothing is masked, and together, where the shorter one has some padding."""
    family = chroma(diffusers_path=folder)
    denoiser, texts = family.load_denoiser(CPU), encoded(family)
    embeds, mask = padded(folder)
    x_t, told, *_ = batch_of(family, texts).inputs
    expected = predict(family, denoiser, (x_t, told, embeds, mask.to(torch.uint8)))
    together = predict(family, denoiser, batch_of(family, texts).inputs)
    torch.testing.assert_close(together, expected, atol=1e-5, rtol=1e-5)
    for row, text in enumerate(texts):
        one = text["t5_embeds"][None], torch.ones(1, 1, dtype=torch.uint8)
        found = predict(family, denoiser, (x_t[row : row + 1], told[row : row + 1], *one))
        torch.testing.assert_close(found[0], expected[row], atol=1e-5, rtol=1e-5)
        seen = predict(family, denoiser, (x_t, told, embeds, torch.ones(2, 1, dtype=torch.uint8)))
        assert not torch.allclose(seen[row], expected[row], atol=1e-3)


def test_what_is_masked_is_not_seen(folder):
    family = chroma(diffusers_path=folder)
    denoiser = family.load_denoiser(CPU)
    x_t, told, text, mask = batch_of(family, encoded(family)).inputs
    plain = predict(family, denoiser, (x_t, told, text, mask))
    assert mask[0].all()
    for place, changes in ((mask[1] == 0, False), (mask[1] == 1, True)):
        other = text.clone()
        other[1, place] += 3.0
        found = predict(family, denoiser, (x_t, told, other, mask))
        assert torch.equal(found[0], plain[0])
        assert torch.allclose(found[1], plain[1], atol=1e-5) is not changes


def test_single_file_equals_the_folder(folder, single):
    whole = chroma(diffusers_path=folder)
    family = chroma(diffusers_path=folder, transformer_path=single)
    family.check_files()
    ours, theirs = (f.load_denoiser(CPU) for f in (family, whole))
    assert ours.config.approximator_hidden_dim == 32
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name]), name
    assert family.comfyui_tensors(theirs.state_dict()).keys() == load_file(single).keys()


def test_a_folder_of_flux_gives_vae_and_t5(folder, single, tmp_path):
    Flux.write_miniature(tmp_path)
    family = chroma(diffusers_path=tmp_path, transformer_path=single)
    family.check_files()
    assert family._place("t5")[0] == tmp_path / "text_encoder_2"
    assert family._tokenizer_folder("t5") == tmp_path / "tokenizer_2"
    assert encoded(family)[0]["t5_embeds"].shape[1] == 32
    assert family.pipeline(family.load_denoiser(CPU), CPU).scheduler.config.shift == pytest.approx(3.158, abs=1e-3)


def test_names_and_slices_are_those_of_diffusers_converter(tmp_path):
    """Its converter knows width 3072 alone: so one column of each matrix, every row told apart."""
    with torch.device("meta"):
        names = list(diffusers.ChromaTransformer2DModel(num_layers=1, num_single_layers=1).state_dict())
    rows = {"qkv": 9216, "linear1": 9216 + 12288, "scale": 128}
    tensors = {}
    for index, name in enumerate(to_bfl({name: torch.zeros(6) for name in names}, source_of)):
        number = next((count for part, count in rows.items() if part in name.split(".")), 3072)
        shape = (number, 1) if name.endswith(".weight") else (number,)
        tensors[name] = (torch.arange(number, dtype=torch.float32) + 100_000 * index).reshape(shape)
    save_file(tensors, tmp_path / "one-column.safetensors")
    weights = Weights(tmp_path / "one-column.safetensors", "model.transformer_path")
    expected = convert_chroma_transformer_checkpoint_to_diffusers(dict(tensors))
    assert set(expected) == set(names)
    for name, value in expected.items():
        assert torch.equal(read_bfl(weights, name, source_of), value), name


def test_lora_moves_the_pipeline_as_in_training(folder, tmp_path):
    family = chroma(diffusers_path=folder)
    denoiser = inject(family.load_denoiser(CPU), family, validate(Lora, {"type": "lora", "rank": 4}), 0)
    layers = adapted_layers(denoiser)
    assert not any("distilled_guidance_layer" in name for name in layers)
    for layer in layers.values():
        torch.nn.init.normal_(layer.adapter.up, std=0.2)
    save_file(export_tensors(layers, family, torch.float32), tmp_path / "lora.safetensors")
    pipeline = library_pipeline(folder)
    pipeline.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    inputs = batch_of(family, encoded(family)).inputs
    bare, ours, theirs = (
        predict(family, network, inputs) for network in (family.load_denoiser(CPU), denoiser, pipeline.transformer)
    )
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
    assert (ours - bare).norm() > 0.05 * bare.norm()


def test_the_approximator_is_not_trained(folder):
    family = chroma(diffusers_path=folder)
    names = [name for name, _ in family.load_denoiser(CPU).named_parameters()]
    frozen = [n for n in names if any(rate == 0 and re.search(p, n) for p, rate in family.learning_rates().items())]
    assert frozen == [name for name in names if name.startswith("distilled_guidance_layer.")] != []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "model.transformer_path: give a Chroma transformer"),
        ({"transformer_path": "single"}, "model.vae_path: give the Flux VAE"),
        ({"diffusers_path": "flux"}, "holds a model FluxTransformer2DModel, not ChromaTransformer2DModel"),
        (
            {"diffusers_path": "folder", "transformer_path": "flux file"},
            "has no 'distilled_guidance_layer.in_proj.weight'",
        ),
    ],
)
def test_what_it_says_of_wrong_files(options, message, folder, single, tmp_path):
    if any("flux" in value for value in options.values()):
        Flux.write_miniature(tmp_path / "flux")
        (file,) = (tmp_path / "flux/transformer").glob("*.safetensors")
        save_file({n: v.contiguous() for n, v in to_bfl(load_file(file)).items()}, tmp_path / "flux.safetensors")
    places = {"folder": folder, "single": single, "flux": tmp_path / "flux", "flux file": tmp_path / "flux.safetensors"}
    with pytest.raises(SettingsError, match=re.escape(message)):
        chroma(**{key: places[value] for key, value in options.items()}).check_files()


def test_identity_tells_encoders_apart(folder, single, tmp_path):
    Flux.write_miniature(tmp_path)
    whole, of_flux = chroma(diffusers_path=folder), chroma(diffusers_path=tmp_path, transformer_path=single)
    assert json.loads(whole.identity("t5")) != json.loads(of_flux.identity("t5"))
    assert whole.identity("t5") == chroma(diffusers_path=folder, transformer_path=single).identity("t5")


def test_all_weights_and_samples(tmp_path):
    """What is trained moves, the approximator stays, and ComfyUI's file holds both."""
    bench = Bench(tmp_path, "chroma")
    result = bench.train(adapter=None, epochs=1, save_every_n_epochs=1, sample={"prompts": ["a dog"], "steps": 2})
    (file,) = result.folder.path.glob("epoch1/*.safetensors")
    trained, before = load_file(file), chroma(diffusers_path=bench.model["diffusers_path"])
    start = before.comfyui_tensors(before.load_denoiser(CPU).state_dict())
    assert trained.keys() == start.keys()
    moved = {name for name, value in trained.items() if not torch.equal(value.float(), start[name].float())}
    assert {name for name in start if name.startswith("distilled_guidance_layer.")} == start.keys() - moved
    assert list((result.folder.path / "samples").rglob("*.png"))
