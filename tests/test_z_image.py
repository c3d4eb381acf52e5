"""Z-Image's own parts: captions of their own lengths, padding, real rotary embedding, its files."""

import re
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers
from diffusion_trainer.models.base import Example
from diffusion_trainer.models.z_image import TEMPLATE, ZImage, patches, read_single, to_single
from diffusion_trainer.utils.adapted import adapted_layers
from diffusion_trainer.utils.adapter_settings import Lora
from diffusion_trainer.utils.adapters import export_tensors, inject
from diffusion_trainer.utils.config import SettingsError, validate
from diffusion_trainer.utils.weights import Weights
from safetensors.torch import load_file, save_file
from training import Bench

CPU = torch.device("cpu")
SHORT, LONG = "a red cat", "a photo of a red cat on a roof at night"
"""Padded to 32 and to 64 tokens."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("z-image")
    ZImage.write_miniature(path)
    return path


def tensors(folder: Path, part: str) -> dict[str, torch.Tensor]:
    (file,) = (folder / part).glob("*.safetensors")
    return load_file(file)


@pytest.fixture(scope="module")
def files(folder: Path, tmp_path_factory) -> dict[str, str]:
    """The parts as single files."""
    path = tmp_path_factory.mktemp("single")
    save_file(
        {n: v.contiguous() for n, v in to_single(tensors(folder, "transformer")).items()}, path / "dit.safetensors"
    )
    qwen = {f"model.{name.removeprefix('model.')}": value for name, value in tensors(folder, "text_encoder").items()}
    save_file(qwen, path / "qwen.safetensors")
    return {part: str(path / f"{part}.safetensors") for part in ("dit", "qwen")}


def z_image(**options) -> ZImage:
    table = {"type": "z_image", "dtype": "float32", "max_sequence_length": 64, **options}
    return ZImage(validate(ZImage.Config, {k: str(v) if isinstance(v, Path) else v for k, v in table.items()}, "model"))


def library_pipeline(folder: Path, dtype: torch.dtype = torch.float32) -> diffusers.ZImagePipeline:
    pipeline = diffusers.ZImagePipeline.from_pretrained(folder, torch_dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def encoded(family: ZImage, *captions: str) -> list[torch.Tensor]:
    return list(family.encode_text("qwen", family.load_text_encoder("qwen", CPU), captions)["qwen_embeds"])


def batch_of(family: ZImage, texts: list[torch.Tensor], size: tuple[int, int] = (8, 12)):
    def example(number: int, text: torch.Tensor) -> Example:
        generator = torch.Generator().manual_seed(3 + number)
        latents, noise = (torch.randn(16, *size, generator=generator) for _ in range(2))
        return Example({"latents": latents}, {"qwen_embeds": text}, noise, 0.2 + 0.3 * number)

    return family.collate([example(*numbered) for numbered in enumerate(texts)])


def predict(family: ZImage, denoiser: torch.nn.Module, values: tuple) -> torch.Tensor:
    with torch.no_grad():
        for layer in family.layers(denoiser):
            values = layer.forward(SimpleNamespace(**layer.submodules), *values)
    return values


@pytest.mark.parametrize("captions", [[SHORT, SHORT], [SHORT, LONG], [LONG]], ids=["alike", "ragged", "one"])
@pytest.mark.parametrize("size", [(8, 16), (8, 12)], ids=["whole", "padded"])
def test_step_equals_the_librarys_transformer(folder, captions, size):
    """With diffusers' own attention in complex numbers, and its pipeline's time and sign."""
    family, pipeline = z_image(diffusers_path=folder), library_pipeline(folder)
    texts = encoded(family, *captions)
    batch = batch_of(family, texts, size)
    sigmas = [family.timestep(0.2 + 0.3 * i, size) for i in range(len(texts))]
    timesteps = torch.tensor(sigmas) * 1000
    with torch.no_grad():
        expected = pipeline.transformer(
            list(batch.inputs[0].unsqueeze(2)), (1000 - timesteps) / 1000, texts, return_dict=False
        )[0]
    prediction = predict(family, family.load_denoiser(CPU), batch.inputs)
    torch.testing.assert_close(prediction, patches(torch.stack(expected)[:, :, 0]), atol=2e-6, rtol=1e-5)
    assert batch.inputs[4].shape[1] == (64 if len(set(captions)) > 1 else 1)


def test_target_is_what_the_pipeline_steps_by(folder):
    """An Euler step of its scheduler along the negated target arrives at the clean latents."""
    family = z_image(diffusers_path=folder)
    batch = batch_of(family, encoded(family, SHORT))
    t = family.timestep(0.2, (8, 12))
    clean = patches(batch.inputs[0].float()) + t * batch.target
    generator = torch.Generator().manual_seed(3)
    torch.testing.assert_close(clean, patches(torch.randn(16, 8, 12, generator=generator)[None]), atol=1e-5, rtol=1e-4)


def test_neighbours_in_a_batch_change_nothing(folder):
    family = z_image(diffusers_path=folder)
    denoiser, texts = family.load_denoiser(CPU), encoded(family, SHORT, LONG)
    together = predict(family, denoiser, batch_of(family, texts).inputs)
    alone = predict(family, denoiser, batch_of(family, texts[:1]).inputs)
    torch.testing.assert_close(together[:1], alone, atol=2e-6, rtol=1e-5)


def test_text_equals_the_pipelines(folder):
    family, pipeline = z_image(diffusers_path=folder), library_pipeline(folder)
    with torch.no_grad():
        expected, _ = pipeline.encode_prompt([SHORT, LONG], do_classifier_free_guidance=False, max_sequence_length=64)
    for ours, theirs in zip(encoded(family, SHORT, LONG), expected, strict=True):
        assert torch.equal(ours, theirs)
    messages = [{"role": "user", "content": SHORT}]
    asked = pipeline.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=True
    )
    assert asked == TEMPLATE.format(SHORT)


def test_single_files_equal_the_folder(folder, files):
    whole = z_image(diffusers_path=folder)
    family = z_image(
        diffusers_path=folder, diffusion_model=files["dit"], text_encoders=[{"path": files["qwen"], "type": "lumina2"}]
    )
    family.check_files()
    ours, theirs = (f.load_denoiser(CPU) for f in (family, whole))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name]), name
    config = {key: ours.config[key] for key in ("n_heads", "axes_dims", "rope_theta", "t_scale")}
    assert config == {key: theirs.config[key] for key in config}
    assert torch.equal(encoded(family, SHORT)[0], encoded(whole, SHORT)[0])


def test_one_file_may_hold_all(folder, files, tmp_path):
    parts = {"model.diffusion_model.": load_file(files["dit"])}
    parts["text_encoders.qwen3_4b.transformer."] = load_file(files["qwen"])
    everything = {f"{prefix}{name}": value for prefix, part in parts.items() for name, value in part.items()}
    save_file(everything, tmp_path / "all.safetensors")
    family = z_image(checkpoint_path=tmp_path / "all.safetensors", tokenizer_path=folder / "tokenizer")
    assert family._weights("transformer").shape("cap_embedder.1.weight") == (32, 32)
    assert encoded(family, SHORT)[0].shape[1] == 32
    with pytest.raises(SettingsError, match="is not the Flux VAE"):
        family.check_files()


def test_names_and_slices_are_those_of_diffusers_converter(folder, tmp_path):
    original = to_single(tensors(folder, "transformer"))
    save_file({name: value.contiguous() for name, value in original.items()}, tmp_path / "dit.safetensors")
    weights = Weights(tmp_path / "dit.safetensors", "model.diffusion_model")
    expected = convert_z_image_transformer_checkpoint_to_diffusers(dict(original))
    assert set(expected) == set(tensors(folder, "transformer"))
    for name, value in expected.items():
        assert torch.equal(read_single(weights, name), value), name


def test_lora_moves_the_pipeline_as_in_training(folder, tmp_path):
    family = z_image(diffusers_path=folder)
    denoiser = inject(family.load_denoiser(CPU), family, validate(Lora, {"type": "lora", "rank": 4}), 0)
    layers = adapted_layers(denoiser)
    assert {name.split(".")[0] for name in layers} == {"noise_refiner", "context_refiner", "layers"}
    for layer in layers.values():
        torch.nn.init.normal_(layer.adapter.up, std=0.2)
    save_file(export_tensors(layers, family, torch.float32), tmp_path / "lora.safetensors")
    pipeline = library_pipeline(folder)
    pipeline.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    inputs = batch_of(family, encoded(family, SHORT)).inputs
    bare, ours, theirs = (
        predict(family, network, inputs) for network in (family.load_denoiser(CPU), denoiser, pipeline.transformer)
    )
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
    assert (ours - bare).norm() > 0.05 * bare.norm()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "model.diffusion_model: give a Z-Image transformer"),
        ({"diffusion_model": "qwen"}, "is not a Z-Image transformer"),
        ({"text_encoders": [{"paths": ["/a", "/b"]}]}, "model.text_encoders: Z-Image has one"),
        ({"diffusion_model": "dit", "diffusers_path": "flux"}, "has no folder 'text_encoder'"),
    ],
)
def test_what_it_says_of_wrong_files(options, message, files, tmp_path):
    (tmp_path / "vae").mkdir()
    given = {key: files.get(str(value), value) for key, value in options.items()}
    given |= {"diffusers_path": tmp_path} if "diffusers_path" in options else {}
    with pytest.raises(SettingsError, match=re.escape(message) if "flux" not in options.values() else "has no"):
        z_image(**given).check_files()


def test_all_weights_and_samples(tmp_path):
    """What is trained moves, and is what ComfyUI reads."""
    bench = Bench(tmp_path, "z_image")
    result = bench.train(adapter=None, epochs=1, save_every_n_epochs=1, sample={"prompts": ["a dog"], "steps": 2})
    (file,) = result.folder.path.glob("epoch1/*.safetensors")
    family = z_image(diffusers_path=bench.model["diffusers_path"])
    start = family.comfyui_tensors(family.load_denoiser(CPU).state_dict())
    trained = load_file(file)
    assert trained.keys() == start.keys()
    assert not torch.equal(trained["layers.0.attention.qkv.weight"].float(), start["layers.0.attention.qkv.weight"])
    assert list((result.folder.path / "samples").rglob("*.png"))
