"""Anima's own parts: the adapter, captions read by two tokenizers, its files."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cosmos_stand_ins  # noqa: F401
import diffusers
import numpy as np
import pytest
import torch
from diffusers.modular_pipelines.anima.encoders import AnimaTextEncoderStep
from diffusion_trainer.models.anima import Anima, adapter_config
from diffusion_trainer.models.base import Batch, Example
from diffusion_trainer.models.cosmos_predict2 import original_name
from diffusion_trainer.models.wan_files import original_vae_name
from diffusion_trainer.utils.adapted import adapted_layers
from diffusion_trainer.utils.adapter_settings import Lora
from diffusion_trainer.utils.adapters import export_tensors, inject
from diffusion_trainer.utils.config import SettingsError, validate
from diffusion_trainer.utils.weights import Weights
from PIL import Image
from safetensors.torch import load_file, save_file
from training import Bench

CPU = torch.device("cpu")
SHORT, LONG = "a red cat", "a photo of a red cat on a roof, 1girl, masterpiece"
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("anima")
    Anima.write_miniature(path)
    return path


def tensors(folder: Path, part: str) -> dict[str, torch.Tensor]:
    (file,) = (folder / part).glob("*.safetensors")
    return load_file(file)


@pytest.fixture(scope="module")
def files(folder: Path, tmp_path_factory) -> dict[str, str]:
    """The parts as single files, as ComfyUI has them; the transformer's also without the adapter."""
    path = tmp_path_factory.mktemp("single")
    bare = {f"net.{original_name(name)}": value for name, value in tensors(folder, "transformer").items()}
    adapter = tensors(folder, "text_conditioner")
    named = {
        "dit": bare | {f"net.llm_adapter.{name}": value for name, value in adapter.items()},
        "bare": bare,
        "adapter": {f"llm_adapter.{name}": value for name, value in adapter.items()},
        "vae": {original_vae_name(name, 1, False): value for name, value in tensors(folder, "vae").items()},
        "qwen": {f"model.{n.removeprefix('model.')}": v for n, v in tensors(folder, "text_encoder").items()},
    }
    for part, values in named.items():
        save_file(values, path / f"{part}.safetensors")
    return {part: str(path / f"{part}.safetensors") for part in named}


def anima(**options: Any) -> Anima:
    table = {"type": "anima", "dtype": "float32", **options}
    table = {key: str(value) if isinstance(value, Path) else value for key, value in table.items()}
    return Anima(validate(Anima.Config, table, "model"))


def encoded(family: Anima, *captions: str) -> list[dict[str, torch.Tensor]]:
    values = family.encode_text("qwen", family.load_text_encoder("qwen", CPU), captions)
    return [{name: value[i] for name, value in values.items()} for i in range(len(captions))]


def batch_of(family: Anima, texts: list[dict[str, torch.Tensor]], size: tuple[int, int] = (8, 12)) -> Batch:
    def example(number: int, text: dict[str, torch.Tensor]) -> Example:
        generator = torch.Generator().manual_seed(3 + number)
        latents, noise = (torch.randn(16, *size, generator=generator) for _ in range(2))
        return Example({"latents": latents.to(family.dtype)}, text, noise, 0.2 + 0.3 * number)

    return family.collate([example(*numbered) for numbered in enumerate(texts)])


def predict(family: Anima, denoiser: torch.nn.Module, values: Any) -> Any:
    with torch.no_grad():
        for layer in family.layers(denoiser):
            values = layer.forward(SimpleNamespace(**layer.submodules), *values)
    return values


def library_parts(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """diffusers' own transformer and adapter."""
    return (
        diffusers.CosmosTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=dtype),
        diffusers.AnimaTextConditioner.from_pretrained(folder / "text_conditioner", torch_dtype=dtype),
    )


@pytest.mark.parametrize("captions", [[SHORT, SHORT], [SHORT, LONG], [LONG]], ids=["alike", "ragged", "one"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_step_equals_the_librarys(folder, captions, dtype):
    """The scheduler's noise; adapter and transformer as its modular pipeline runs them, with masks."""
    family = anima(diffusers_path=folder, dtype=str(dtype).removeprefix("torch."))
    batch = batch_of(family, encoded(family, *captions))
    x_t, told, ids, seen, states, read = batch.inputs
    transformer, adapter = library_parts(folder, dtype)
    with torch.no_grad():
        text = adapter(states, ids, seen.expand(ids.shape), read.expand(states.shape[:2]))
        expected = transformer(
            x_t[:, :, None], told, text, padding_mask=torch.zeros(1, 1, 64, 96, dtype=dtype), return_dict=False
        )[0][:, :, 0]
    assert torch.equal(predict(family, family.load_denoiser(CPU), batch.inputs), expected)
    is_ragged = len({*captions}) > 1
    assert (seen.shape[1] > 1, read.shape[1] > 1) == (is_ragged, is_ragged)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    for number in range(len(captions)):
        generator = torch.Generator().manual_seed(3 + number)
        clean, noise = (torch.randn(16, 8, 12, generator=generator) for _ in range(2))
        clean = clean.to(dtype).float()
        t = torch.tensor([family.timestep(0.2 + 0.3 * number, (8, 12))])
        scheduler.sigmas, scheduler.timesteps = t, t * 1000
        assert torch.equal(x_t[number], scheduler.scale_noise(clean[None], t * 1000, noise[None])[0].to(dtype))
        assert torch.equal(batch.target[number], noise - clean)
        assert told[number] == t[0]


def test_neighbours_in_a_batch_change_nothing(folder):
    family = anima(diffusers_path=folder)
    denoiser, texts = family.load_denoiser(CPU), encoded(family, SHORT, LONG)
    together = predict(family, denoiser, batch_of(family, texts).inputs)
    alone = predict(family, denoiser, batch_of(family, texts[:1]).inputs)
    torch.testing.assert_close(together[:1], alone, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_text_equals_the_pipelines(folder, dtype):
    family = anima(diffusers_path=folder, dtype=str(dtype).removeprefix("torch."))
    pipeline = family.pipeline(family.load_denoiser(CPU), CPU)
    for caption, text in zip((SHORT, LONG), encoded(family, SHORT, LONG), strict=True):
        with torch.no_grad():
            expected = AnimaTextEncoderStep.encode_prompt(
                pipeline, caption, prepare_unconditional_embeds=False, device=CPU
            )
        assert torch.equal(text["qwen_embeds"], expected["qwen_prompt_embeds"][0])
        assert torch.equal(text["t5_ids"], expected["t5_input_ids"][0])
        assert text["qwen_embeds"].dtype == dtype


def test_an_empty_caption_is_the_padding_token(folder):
    """As in ComfyUI, whose tokenizer gives one token at least."""
    family = anima(diffusers_path=folder)
    encoder = family.load_text_encoder("qwen", CPU)
    (text,) = encoded(family, "")
    with torch.no_grad():
        expected = encoder.model(torch.tensor([[encoder.tokenizer[0].pad_token_id]])).last_hidden_state
    assert torch.equal(text["qwen_embeds"], expected[0])
    assert text["t5_ids"].tolist() == [1]
    assert torch.isfinite(predict(family, family.load_denoiser(CPU), batch_of(family, [text]).inputs)).all()


def assert_same(ours: Anima, theirs: Anima) -> None:
    for first, second in (
        (ours.load_denoiser(CPU), theirs.load_denoiser(CPU)),
        (ours.load_vae(CPU), theirs.load_vae(CPU)),
        (ours.load_text_encoder("qwen", CPU).model, theirs.load_text_encoder("qwen", CPU).model),
    ):
        states = first.state_dict(), second.state_dict()
        assert states[0].keys() == states[1].keys()
        for name, value in states[1].items():
            assert torch.equal(value, states[0][name]), name


@pytest.mark.parametrize(
    "parts",
    [{"transformer_path": "dit"}, {"transformer_path": "bare", "llm_adapter_path": "adapter"}],
    ids=["together", "apart"],
)
def test_single_files_equal_the_folder(parts, folder, files):
    given = {"vae_path": "vae", "llm_path": "qwen", **parts}
    tokenizers = {"t5_tokenizer_path": folder / "t5_tokenizer", "llm_tokenizer_path": folder / "tokenizer"}
    family, whole = anima(**{k: files[v] for k, v in given.items()}, **tokenizers), anima(diffusers_path=folder)
    for one in (family, whole):
        one.check_files()
    assert_same(family, whole)
    assert torch.equal(encoded(family, SHORT)[0]["qwen_embeds"], encoded(whole, SHORT)[0]["qwen_embeds"])
    exported = family.comfyui_tensors(family.load_denoiser(CPU).state_dict())
    expected = load_file(files["dit"])
    assert exported.keys() == expected.keys()
    assert all(torch.equal(value, expected[name].float()) for name, value in exported.items())


def test_a_folder_of_the_language_model(folder, files, tmp_path):
    """With its tokenizer in it; and with Qwen-Image's VAE, which diffusers has as a class of its own."""
    diffusers.AutoencoderKLQwenImage(base_dim=8, num_res_blocks=1, dim_mult=[1, 1, 1, 1]).save_pretrained(
        tmp_path / "vae"
    )
    for file in [*(folder / "text_encoder").iterdir(), *(folder / "tokenizer").iterdir()]:
        (tmp_path / file.name).write_bytes(file.read_bytes())
    family = anima(transformer_path=files["dit"], vae_path=tmp_path / "vae", llm_path=tmp_path,
                   t5_tokenizer_path=folder / "t5_tokenizer")  # fmt: skip
    family.check_files()
    assert torch.equal(
        encoded(family, SHORT)[0]["qwen_embeds"], encoded(anima(diffusers_path=folder), SHORT)[0]["qwen_embeds"]
    )
    pixels = torch.rand(1, 3, 1, 32, 32) * 2 - 1
    theirs = diffusers.AutoencoderKLQwenImage.from_pretrained(tmp_path / "vae")
    with torch.no_grad():
        mode = theirs.encode(pixels).latent_dist.mode()
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (theirs.config.latents_mean, theirs.config.latents_std))
    latents = family.encode_media(family.load_vae(CPU), pixels, [])["latents"]
    torch.testing.assert_close(latents, (mode[:, :, 0] - mean) / std, atol=1e-5, rtol=1e-4)


def test_published_adapter_is_known_by_its_shapes(tmp_path):
    with torch.device("meta"):
        adapter = diffusers.AnimaTextConditioner()
    header = {
        name: {"dtype": "BF16", "shape": [*value.shape], "data_offsets": [0, 0]}
        for name, value in adapter.state_dict().items()
    }
    text = json.dumps(header).encode()
    (tmp_path / "adapter.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    found = adapter_config(Weights(tmp_path / "adapter.safetensors", "model.llm_adapter_path"))
    assert {key: value for key, value in found.items() if value != adapter.config[key]} == {}


def test_rates_by_group(folder):
    def adapted(**rates: float) -> set[str]:
        family = anima(diffusers_path=folder, **rates)
        settings = validate(Lora, {"type": "lora", "rank": 2})
        return set(adapted_layers(inject(family.load_denoiser(CPU), family, settings, 0, family.learning_rates())))

    everything = adapted()
    assert {name.split(".")[0] for name in everything} == {"transformer_blocks", "llm_adapter"}
    assert adapted(llm_adapter_lr=0) == {name for name in everything if not name.startswith("llm_adapter")}
    assert all(".self_attn" in name or "attn1" not in name for name in adapted(self_attn_lr=0))
    assert any(name.startswith("llm_adapter.blocks.0.self_attn") for name in adapted(self_attn_lr=0))


def test_lora_moves_diffusers_as_in_training(folder):
    family = anima(diffusers_path=folder)
    denoiser = inject(family.load_denoiser(CPU), family, validate(Lora, {"type": "lora", "rank": 4, "alpha": 2.0}), 0)
    layers = adapted_layers(denoiser)
    for layer in layers.values():
        torch.nn.init.normal_(layer.adapter.up, std=0.2)
    exported = export_tensors(layers, family, torch.float32)
    assert {name.split(".")[1] for name in exported} == {"blocks", "llm_adapter"}
    pipeline = family.pipeline(family.load_denoiser(CPU), CPU, text_encoders=False)
    transformer, adapter = library_parts(folder)
    pipeline.update_components(transformer=transformer, text_conditioner=adapter)
    pipeline.load_lora_weights(exported)
    batch = batch_of(family, encoded(family, SHORT))
    x_t, told, ids, _, states, _ = batch.inputs
    bare, ours = (predict(family, network, batch.inputs) for network in (family.load_denoiser(CPU), denoiser))
    with torch.no_grad():
        theirs = transformer(
            x_t[:, :, None], told, adapter(states, ids), padding_mask=torch.zeros(1, 1, 64, 96), return_dict=False
        )[0][:, :, 0]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
    assert (ours - bare).norm() > 0.05 * bare.norm()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vae_path": "vae", "llm_path": "qwen"}, "model.transformer_path: give an Anima transformer"),
        ({"transformer_path": "bare", "vae_path": "vae", "llm_path": "qwen"}, "is not Anima's adapter, or an Anima"),
        ({"transformer_path": "qwen", "vae_path": "vae", "llm_path": "qwen"}, "is not an Anima transformer"),
        ({"transformer_path": "dit", "vae_path": "vae", "llm_path": "vae"}, "is not Qwen3 0.6B"),
        ({"transformer_path": "dit", "vae_path": "vae"}, "model.llm_path: give Qwen3 0.6B"),
        ({"transformer_path": "dit", "vae_path": "vae", "llm_path": "wide"}, "has 48 features"),
        ({"transformer_path": "dit", "vae_path": "vae", "llm_path": "qwen"}, "model.t5_tokenizer_path: no tokenizer"),
    ],
)
def test_what_it_says_of_wrong_files(options, message, files, tmp_path):
    wide = {
        name: torch.cat([v, v], -1) if "embed_tokens" in name else v for name, v in load_file(files["qwen"]).items()
    }
    save_file(wide, tmp_path / "wide.safetensors")
    given = {**files, "wide": str(tmp_path / "wide.safetensors")}
    options = {key: given[value] for key, value in options.items()}
    if "wide" in message or "features" in message:
        for name in ("t5_tokenizer_path", "llm_tokenizer_path"):
            options[name] = str(tmp_path)
        (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(SettingsError, match=re.escape(message)):
        anima(**options).check_files()


def test_all_weights_and_samples(tmp_path):
    """What is trained moves, adapter and all, and is what ComfyUI reads."""
    bench = Bench(tmp_path, "anima")
    result = bench.train(
        adapter=None,
        epochs=1,
        save_every_n_epochs=1,
        sample={"prompts": ["a dog"], "steps": 2, "width": 64, "height": 32},
    )
    (file,) = result.folder.path.glob("epoch1/*.safetensors")
    family = anima(diffusers_path=bench.model["diffusers_path"])
    start = family.comfyui_tensors(family.load_denoiser(CPU).state_dict())
    trained = load_file(file)
    assert trained.keys() == start.keys()
    for name in ("net.blocks.0.self_attn.q_proj.weight", "net.llm_adapter.blocks.0.cross_attn.k_proj.weight"):
        assert not torch.equal(trained[name].float(), start[name])
    again = anima(diffusers_path=bench.model["diffusers_path"], transformer_path=file)
    again.check_files()
    state = again.load_denoiser(CPU).state_dict()
    assert torch.equal(state["llm_adapter.out_proj.weight"], trained["net.llm_adapter.out_proj.weight"].float())
    assert list((result.folder.path / "samples").rglob("*.png"))


def test_stages_draw_the_same(tmp_path):
    """The adapter is on another stage than most of the transformer."""
    bench = Bench(tmp_path, "anima")
    sample = {"prompts": ["a dog"], "steps": 2, "every_n_epochs": 1, "width": 64, "height": 32}
    options: dict[str, Any] = {"epochs": 1, "sample": sample}
    alone, apart = bench.train(**options), bench.launch(2, pipeline_stages=2, timeout=240, **options)
    pictures = [sorted((result.folder.path / "samples").rglob("*.png")) for result in (alone, apart)]
    assert [file.name for file in pictures[0]] == [file.name for file in pictures[1]] != []
    for one, other in zip(*pictures, strict=True):
        difference = np.asarray(Image.open(one)).astype(int) - np.asarray(Image.open(other))
        assert abs(difference).max() <= 1
