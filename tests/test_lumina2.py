"""Lumina Image 2's own parts: captions of their own lengths, grouped queries, the one layer of qkv, its files."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import sentencepiece
import torch
from diffusers.loaders.single_file_utils import convert_lumina2_to_diffusers
from diffusion_trainer.models.base import Example
from diffusion_trainer.models.lumina2 import Lumina2, original_name
from diffusion_trainer.models.next_dit import patches
from diffusion_trainer.utils.adapted import adapted_layers
from diffusion_trainer.utils.adapter_settings import Lora
from diffusion_trainer.utils.adapters import export_tensors, inject
from diffusion_trainer.utils.config import SettingsError, validate
from diffusion_trainer.utils.weights import Weights
from safetensors.torch import load_file, save_file
from torch import nn
from training import Bench

CPU = torch.device("cpu")
SHORT, LONG = "a red cat", "a photo of a red cat on a roof"
"""Of 4 and of 10 tokens."""
WIDE = {
    "in_channels": 16, "hidden_size": 2304, "num_layers": 1, "num_refiner_layers": 1, "num_attention_heads": 24,
    "num_kv_heads": 8, "multiple_of": 32, "ffn_dim_multiplier": 0.01, "axes_dim_rope": (32, 32, 32), "cap_feat_dim": 64,
}  # fmt: skip
"""As wide as the published model: diffusers takes that for granted where it reads the original layout."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("lumina2")
    Lumina2.write_miniature(path)
    return path


def tensors(folder: Path, part: str) -> dict[str, torch.Tensor]:
    (file,) = (folder / part).glob("*.safetensors")
    return load_file(file)


def original(family: Lumina2) -> dict[str, torch.Tensor]:
    """The transformer as its single file has it."""
    state = family.load_denoiser(CPU).state_dict()
    return {name: value.contiguous() for name, value in family.comfyui_tensors(state).items()}


def embedded(folder: Path) -> torch.Tensor:
    return torch.frombuffer(bytearray((folder / "tokenizer/tokenizer.model").read_bytes()), dtype=torch.uint8)


@pytest.fixture(scope="module")
def files(folder: Path, tmp_path_factory) -> dict[str, str]:
    """The parts as single files, Gemma's with its tokenizer, the transformer's with what the original has in vain."""
    path = tmp_path_factory.mktemp("single")
    save_file({**original(lumina2(diffusers_path=folder, dtype="bfloat16")), "norm_final.weight": torch.ones(48)},
              path / "dit.safetensors")  # fmt: skip
    gemma = {f"model.{name.removeprefix('model.')}": value for name, value in tensors(folder, "text_encoder").items()}
    save_file({**gemma, "spiece_model": embedded(folder)}, path / "gemma.safetensors")
    save_file(gemma, path / "bare.safetensors")
    return {part: str(path / f"{part}.safetensors") for part in ("dit", "gemma", "bare")}


def lumina2(**options) -> Lumina2:
    table = {"type": "lumina_2", "dtype": "float32", "max_sequence_length": 64, **options}
    values = {key: str(value) if isinstance(value, Path) else value for key, value in table.items()}
    return Lumina2(validate(Lumina2.Config, values, "model"))


def library_pipeline(folder: Path) -> diffusers.Lumina2Pipeline:
    pipeline = diffusers.Lumina2Pipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def encoded(family: Lumina2, *captions: str) -> list[torch.Tensor]:
    return list(family.encode_text("gemma", family.load_text_encoder("gemma", CPU), captions)["gemma_embeds"])


def batch_of(family: Lumina2, texts: list[torch.Tensor], size: tuple[int, int] = (8, 12)):
    def example(number: int, text: torch.Tensor) -> Example:
        generator = torch.Generator().manual_seed(3 + number)
        latents, noise = (torch.randn(16, *size, generator=generator) for _ in range(2))
        return Example({"latents": latents}, {"gemma_embeds": text}, noise, 0.2 + 0.3 * number)

    return family.collate([example(*numbered) for numbered in enumerate(texts)])


def predict(family: Lumina2, denoiser: nn.Module, values: tuple) -> torch.Tensor:
    with torch.no_grad():
        for layer in family.layers(denoiser):
            values = layer.forward(SimpleNamespace(**layer.submodules), *values)
    return values


def of_library(transformer: nn.Module, values: tuple) -> torch.Tensor:
    """What diffusers' own transformer, untouched, predicts for the inputs of the first link."""
    x_t, told, text, seen = values
    with torch.no_grad():
        return patches(transformer(x_t, told, text, seen.bool().expand(text.shape[:2]), return_dict=False)[0])


@pytest.mark.parametrize("captions", [[SHORT, SHORT], [SHORT, LONG], [LONG, "", SHORT]], ids=["alike", "two", "three"])
def test_step_equals_the_librarys_transformer(folder, captions):
    """With diffusers' own attention in complex numbers, three layers, and its pipeline's time and padding."""
    family, pipeline = lumina2(diffusers_path=folder), library_pipeline(folder)
    texts = encoded(family, *captions)
    batch = batch_of(family, texts)
    timesteps = torch.tensor([family.timestep(0.2 + 0.3 * i, (8, 12)) for i in range(len(texts))]) * 1000
    with torch.no_grad():
        embeds, mask = pipeline._get_gemma_prompt_embeds(captions, max_sequence_length=64)
        expected = pipeline.transformer(
            batch.inputs[0], 1 - timesteps / pipeline.scheduler.config.num_train_timesteps, embeds, mask
        ).sample
    prediction = predict(family, family.load_denoiser(CPU), batch.inputs)
    torch.testing.assert_close(prediction, patches(expected), atol=2e-6, rtol=1e-5)
    assert batch.inputs[3].shape[1] == (10 if len(set(captions)) > 1 else 1)


def test_target_is_what_the_pipeline_steps_by(folder):
    """An Euler step of its scheduler along the negated target arrives at the clean latents."""
    family = lumina2(diffusers_path=folder)
    batch = batch_of(family, encoded(family, SHORT))
    scheduler = library_pipeline(folder).scheduler
    t = family.timestep(0.2, (8, 12))
    scheduler.set_timesteps(sigmas=[t], mu=None)
    generator = torch.Generator().manual_seed(3)
    clean = patches(torch.randn(16, 8, 12, generator=generator)[None])
    start = scheduler.sigmas[0]  # shifted
    noise = batch.target * -1 + clean
    sample = start * noise + (1 - start) * clean
    stepped = scheduler.step(-batch.target, scheduler.timesteps[0], sample, return_dict=False)[0]
    torch.testing.assert_close(stepped, clean, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(patches(batch.inputs[0]), t * noise + (1 - t) * clean, atol=1e-5, rtol=1e-4)
    assert batch.inputs[1].item() == pytest.approx(1 - t)


def test_neighbours_in_a_batch_change_nothing(folder):
    family = lumina2(diffusers_path=folder)
    denoiser, texts = family.load_denoiser(CPU), encoded(family, SHORT, LONG)
    together = predict(family, denoiser, batch_of(family, texts).inputs)
    alone = predict(family, denoiser, batch_of(family, texts[:1]).inputs)
    torch.testing.assert_close(together[:1], alone, atol=2e-6, rtol=1e-5)
    x_t, told, text, seen = batch_of(family, texts).inputs
    garbage = torch.where(seen[..., None] == 1, text, torch.full_like(text, 7.0))
    assert torch.equal(predict(family, denoiser, (x_t, told, garbage, seen)), together)


def test_a_caption_moves_the_picture(folder):
    family = lumina2(diffusers_path=folder)
    denoiser, (text,) = family.load_denoiser(CPU), encoded(family, LONG)
    shuffled = predict(family, denoiser, batch_of(family, [text.flip(0)]).inputs)
    first = predict(family, denoiser, batch_of(family, [text]).inputs)
    assert (shuffled - first).norm() > 1e-3 * first.norm()


@pytest.mark.parametrize("storage", [None, "float8", "int8", "nf4"])
def test_gradients_equal_the_librarys(folder, storage):
    """Those of a ragged batch, which goes through the reordering; with quantised weights they are only near."""
    family, library = lumina2(diffusers_path=folder, transformer_dtype=storage), library_pipeline(folder).transformer
    batch = batch_of(family, encoded(family, SHORT, LONG))
    denoiser, values = family.load_denoiser(CPU), batch.inputs
    for layer in family.layers(denoiser):
        values = layer.forward(SimpleNamespace(**layer.submodules), *values)
    nn.functional.mse_loss(values, batch.target).backward()
    x_t, told, text, seen = batch.inputs
    prediction = patches(library(x_t, told, text, seen.bool(), return_dict=False)[0])
    nn.functional.mse_loss(prediction, batch.target).backward()
    ours, theirs = denoiser.get_parameter("x_embedder.weight").grad, library.x_embedder.weight.grad
    limits = {"atol": 1e-7, "rtol": 1e-4} if storage is None else {"atol": theirs.std().item(), "rtol": 0.2}
    torch.testing.assert_close(ours, theirs, **limits)
    if storage is None:
        block, other = denoiser.layers[0].attn, library.layers[0].attn
        rows = torch.cat([layer.weight.grad for layer in (other.to_q, other.to_k, other.to_v)])
        torch.testing.assert_close(block.to_qkv.weight.grad, rows, atol=1e-7, rtol=1e-3)


def test_text_equals_the_pipelines(folder):
    family, pipeline = lumina2(diffusers_path=folder), library_pipeline(folder)
    captions = [SHORT, LONG, "a dog, " * 40]
    with torch.no_grad():
        embeds, mask = pipeline._get_gemma_prompt_embeds(captions, max_sequence_length=64)
    for ours, theirs, seen in zip(encoded(family, *captions), embeds, mask.bool(), strict=True):
        assert torch.equal(ours, theirs[seen])
    assert [len(text) for text in encoded(family, *captions)] == [4, 10, 64]


def test_a_prefix_is_the_pipelines_system_prompt(folder):
    """As the guide says: the caption goes as it is, so what the pipeline adds is for caption_prefix."""
    family, pipeline = lumina2(diffusers_path=folder, max_sequence_length=256), library_pipeline(folder)
    with torch.no_grad():
        embeds, mask, *_ = pipeline.encode_prompt(SHORT, do_classifier_free_guidance=False)
    (ours,) = encoded(family, f"{pipeline.system_prompt} <Prompt Start> {SHORT}")
    assert torch.equal(ours, embeds[0][mask[0].bool()])


def test_captions_may_be_longer_than_the_librarys_table(folder):
    family = lumina2(diffusers_path=folder, max_sequence_length=512)
    (text,) = encoded(family, "a dog, " * 200)
    assert len(text) == 512
    denoiser = family.load_denoiser(CPU)
    values = batch_of(family, [text]).inputs
    assert torch.equal(predict(family, denoiser, values), of_library(denoiser, values))


def test_low_noise_may_count_more(folder):
    """By the level of noise, not by what the network is told."""
    family = lumina2(diffusers_path=folder, loss_weighting="sigma_sqrt")
    t = family.timestep(0.2, (8, 12))
    assert batch_of(family, encoded(family, SHORT)).weight.unique().item() == pytest.approx(t**-2, rel=1e-4)


def test_a_mask_weighs_the_patches_where_it_lies(folder):
    family = lumina2(diffusers_path=folder)
    target = batch_of(family, encoded(family, SHORT)).target
    mask_NFHW = torch.rand(1, 1, 8, 12, generator=torch.Generator().manual_seed(1))
    weights = family.spread_mask(mask_NFHW, target)
    assert torch.equal(weights, patches(mask_NFHW.expand(1, 16, 8, 12)))
    assert torch.equal(weights[0, 7].view(2, 2, 16)[..., 3], mask_NFHW[0, 0, 2:4, 2:4])  # the second in the second row


@pytest.mark.parametrize(("options", "shift"), [({}, 1.0), ({"lumina_shift": True}, math.exp(1.15)),
                                                ({"lumina_shift": True, "shift": 3.0}, 3.0)])  # fmt: skip
def test_shift(options, shift):
    assert lumina2(**options).timestep_shift((128, 128)) == pytest.approx(shift)
    assert lumina2(lumina_shift=True).timestep_shift((32, 32)) == pytest.approx(math.exp(0.5))


# -- files ------------------------------------------------------------------------------------------------


def test_single_files_equal_the_folder(folder, files):
    whole = lumina2(diffusers_path=folder)
    family = lumina2(transformer_path=files["dit"], llm_path=files["gemma"], vae_path=folder / "vae")
    family.check_files()
    ours, theirs = (f.load_denoiser(CPU) for f in (family, whole))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name]), name
    for name, buffer in whole.load_text_encoder("gemma", CPU).model.named_buffers():
        assert torch.equal(buffer, dict(family.load_text_encoder("gemma", CPU).model.named_buffers())[name]), name
    batch = batch_of(whole, encoded(whole, SHORT, LONG))
    assert torch.equal(predict(family, ours, batch.inputs), predict(whole, theirs, batch.inputs))
    for one, other in zip(encoded(family, SHORT, LONG), encoded(whole, SHORT, LONG), strict=True):
        assert torch.equal(one, other)


def test_a_file_in_scaled_float8_is_read(folder, files, tmp_path):
    scaled = load_file(files["dit"])
    expected = lumina2(transformer_path=files["dit"]).load_denoiser(CPU).state_dict()
    for name in [name for name in scaled if re.search(r"^layers.*(qkv|w\d)\.weight$", name)]:
        scale = scaled[name].float().abs().max() / 448
        scaled[name] = (scaled[name].float() / scale).to(torch.float8_e4m3fn)
        scaled[name.replace(".weight", ".scale_weight")] = scale
        stored = name.replace(".attention.qkv", ".attn.to_qkv").replace("forward.w", "forward.linear_")
        expected[stored] = scaled[name].float() * scale
    save_file(scaled, tmp_path / "scaled.safetensors")
    found = lumina2(transformer_path=tmp_path / "scaled.safetensors").load_denoiser(CPU).state_dict()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model."])
def test_one_file_may_hold_all(folder, files, tmp_path, prefix):
    parts = {prefix: load_file(files["dit"]), "text_encoders.gemma2_2b.transformer.": load_file(files["bare"])}
    everything = {f"{before}{name}": value for before, part in parts.items() for name, value in part.items()}
    save_file({**everything, "text_encoders.spiece_model": embedded(folder)}, tmp_path / "all.safetensors")
    family, whole = lumina2(checkpoint_path=tmp_path / "all.safetensors"), lumina2(diffusers_path=folder)
    assert torch.equal(encoded(family, SHORT)[0], encoded(whole, SHORT)[0])
    assert torch.equal(family.load_denoiser(CPU).x_embedder.weight, whole.load_denoiser(CPU).x_embedder.weight)
    with pytest.raises(SettingsError, match=r"model\.checkpoint_path: .* is not the Flux VAE"):
        family.check_files()
    lumina2(checkpoint_path=tmp_path / "all.safetensors", vae_path=folder / "vae").check_files()


def test_the_embedded_tokenizer_is_sentencepiece(folder, files):
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer/tokenizer.model"))
    tokenizers = [lumina2(**options).load_text_encoder("gemma", CPU).tokenizer
                  for options in ({"llm_path": files["gemma"]}, {"diffusers_path": folder})]  # fmt: skip
    for text in (LONG, "", " two  blanks", "unknown é 猫", "line\nand\ttab", "<end_of_turn> 123 <Prompt Start> a"):
        for tokenizer in tokenizers:
            assert tokenizer(text).input_ids == [model.bos_id(), *model.encode(text)], text


@pytest.fixture(scope="module")
def wide() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return diffusers.Lumina2Transformer2DModel(**WIDE).state_dict()


@pytest.fixture(scope="module")
def wide_file(wide, tmp_path_factory) -> Path:
    """The wide transformer in the original layout."""
    folder = tmp_path_factory.mktemp("wide")
    diffusers.Lumina2Transformer2DModel(**WIDE).save_config(folder / "transformer")
    save_file(wide, folder / "transformer/diffusion_pytorch_model.safetensors")
    family = lumina2(diffusers_path=folder)
    save_file(original(family), folder / "dit.safetensors")
    return folder / "dit.safetensors"


def test_names_and_rows_are_those_of_diffusers_converter(wide, wide_file):
    found = convert_lumina2_to_diffusers(load_file(wide_file))
    assert found.keys() == wide.keys()
    for name, value in wide.items():
        assert torch.equal(found[name], value), name


def test_widths_are_read_from_shapes(wide_file):
    config = lumina2(transformer_path=wide_file).build_denoiser().config
    names = set(WIDE) - {"multiple_of", "ffn_dim_multiplier"}
    assert {name: config[name] for name in names} == {name: WIDE[name] for name in names} | {
        "axes_dim_rope": [32, 32, 32]
    }
    assert Weights(wide_file, "model.transformer_path").shape("layers.0.feed_forward.w1.weight") == (96, 2304)


@pytest.mark.parametrize("alpha", [4.0, 6.0])
def test_lora_moves_the_pipeline_as_in_training(folder, wide_file, alpha, tmp_path):
    family = lumina2(diffusers_path=folder, transformer_path=wide_file)
    settings = validate(Lora, {"type": "lora", "rank": 4, "alpha": alpha})
    denoiser = inject(family.load_denoiser(CPU), family, settings, 0)
    layers = adapted_layers(denoiser)
    assert {name.split(".")[0] for name in layers} == {"noise_refiner", "context_refiner", "layers"}
    for layer in layers.values():
        nn.init.normal_(layer.adapter.up, std=0.1)
    exported = export_tensors(layers, family, torch.float32)
    save_file(exported, tmp_path / "lora.safetensors")
    pipeline = library_pipeline(folder)
    pipeline.register_modules(transformer=diffusers.Lumina2Transformer2DModel(**WIDE))
    converted = convert_lumina2_to_diffusers(load_file(wide_file))
    pipeline.transformer.load_state_dict(converted)
    inputs = batch_of(family, [torch.randn(5, 64)]).inputs
    bare = of_library(pipeline.transformer, inputs)
    pipeline.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    ours, theirs = predict(family, denoiser, inputs), of_library(pipeline.transformer, inputs)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
    assert (ours - bare).norm() > 0.05 * bare.norm()
    assert not any(name.endswith("alpha") for name in exported)
    named = validate(Lora, {"type": "lora", "rank": 4, "target_modules": ["attention.qkv"]})  # as older files do
    assert {name.split(".", 2)[2] for name in adapted_layers(inject(family.load_denoiser(CPU), family, named, 0))} == {
        "attn.to_qkv"
    }
    again = validate(Lora, {"type": "lora", "rank": 4, "init_from_existing": str(tmp_path / "lora.safetensors")})
    reloaded = inject(family.load_denoiser(CPU), family, again, 1)
    torch.testing.assert_close(predict(family, reloaded, inputs), ours, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "model.transformer_path: give a Lumina Image 2 transformer"),
        ({"transformer_path": "gemma"}, "is not a Lumina Image 2 transformer"),
        ({"transformer_path": "newbie"}, "(it has 'clip_text_pooled_proj.0.weight')"),
        ({"transformer_path": "dit", "vae_path": "vae"}, "model.llm_path: give Gemma 2 2B"),
        ({"transformer_path": "dit", "vae_path": "vae", "llm_path": "dit"}, "is not Gemma 2 2B"),
        ({"transformer_path": "dit", "vae_path": "vae", "llm_path": "bare"}, "model.tokenizer_path: no tokenizer"),
        ({"transformer_path": "wide", "vae_path": "vae", "llm_path": "gemma"}, "has 32 features, but the transformer"),
    ],
)
def test_what_it_says_of_wrong_files(options, message, folder, files, wide_file, tmp_path):
    newbie = {**load_file(files["dit"]), "clip_text_pooled_proj.0.weight": torch.ones(4)}
    save_file(newbie, tmp_path / "newbie.safetensors")
    known = {**files, "newbie": tmp_path / "newbie.safetensors", "vae": folder / "vae", "wide": wide_file}
    with pytest.raises(SettingsError, match=re.escape(message)):
        lumina2(**{key: known[value] for key, value in options.items()}).check_files()


def test_what_the_cache_keys_depend_on(folder, files):
    whole = lumina2(diffusers_path=folder)
    assert whole.identity("gemma") != lumina2(diffusers_path=folder, max_sequence_length=32).identity("gemma")
    assert whole.identity("gemma") != lumina2(diffusers_path=folder, text_encoder_dtype="float8").identity("gemma")
    assert whole.identity("vae") == lumina2(diffusers_path=folder, max_sequence_length=32).identity("vae")
    assert "in the file" in lumina2(llm_path=files["gemma"]).identity("gemma")


def test_the_file_beside_a_lora_says_no_other_alpha(tmp_path):
    result = Bench(tmp_path, "lumina_2").train(epochs=1, adapter={"alpha": 12.0})
    config = json.loads((Path(result.status.exports[-1]) / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] != 12.0


def test_all_weights_and_samples(tmp_path):
    """What is trained moves, and is what ComfyUI reads."""
    bench = Bench(tmp_path, "lumina_2")
    result = bench.train(adapter=None, epochs=1, save_every_n_epochs=1, sample={"prompts": ["a dog"], "steps": 2})
    (file,) = result.folder.path.glob("epoch1/*.safetensors")
    start = original(lumina2(diffusers_path=Path(bench.model["diffusers_path"])))
    trained = load_file(file)
    assert trained.keys() == start.keys()
    assert not torch.equal(trained["layers.0.attention.qkv.weight"].float(), start["layers.0.attention.qkv.weight"])
    assert list((result.folder.path / "samples").rglob("*.png"))
    assert original_name("layers.0.attn.to_qkv.weight") in trained
