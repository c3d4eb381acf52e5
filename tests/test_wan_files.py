"""Wan's files in every layout, and what is refused."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers
from diffusion_trainer.models.wan import MINIATURES, Wan
from diffusion_trainer.models.wan_files import (
    LATENTS_22,
    PARTS,
    Source,
    clip_config,
    open_part,
    original_clip_name,
    original_name,
    original_umt5_name,
    original_vae_name,
    transformer_config,
    umt5_config,
    vae_config,
)
from diffusion_trainer.utils.config import SettingsError, validate
from diffusion_trainer.utils.weights import Weights
from safetensors.torch import load_file, save_file
from test_flux import fp8
from wan_layouts import folder_tensors, original_tensors, write_original, write_original_transformer, write_single

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Miniatures of all variants, in diffusers layout."""
    found = {name: tmp_path_factory.mktemp(name) for name in MINIATURES}
    for name, path in found.items():
        Wan.write_miniature(path, name)
    return found


def wan(folder: Path | None = None, **options) -> Wan:
    options = {"dtype": "float32", **options}
    if folder:
        options["ckpt_path"] = str(folder)
    return Wan(validate(Wan.Config, {"type": "wan", **options}, "model"))


def states(family: Wan) -> dict[str, dict[str, torch.Tensor]]:
    family.check_files()
    return {
        "transformer": family.load_denoiser(CPU).state_dict(),
        "encoders": family.load_vae(CPU).state_dict(),
        "umt5": family.load_text_encoder("umt5", CPU).model.state_dict(),
    }


def assert_same(found: dict, expected: dict, change=lambda value: value) -> None:
    for part, tensors in expected.items():
        assert found[part].keys() == tensors.keys(), part
        for name, value in tensors.items():
            assert torch.equal(found[part][name], change(value) if part != "encoders" else value), f"{part} {name}"


# -- names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", MINIATURES)
def test_transformer_names_are_those_that_diffusers_converts(folders, variant):
    tensors = folder_tensors(folders[variant], "transformer")
    original = original_tensors(folders[variant], "transformer")
    assert len(original) == len(tensors)
    converted = convert_wan_transformer_to_diffusers(dict(original))
    if "img_emb.emb_pos" in converted:  # the converter knows no first-and-last-frame model
        converted["condition_embedder.image_embedder.pos_embed"] = converted.pop("img_emb.emb_pos")
    assert converted.keys() == tensors.keys()
    assert all(torch.equal(converted[name], value) for name, value in tensors.items())


@pytest.mark.parametrize("variant", ["t2v", "i2v", "i2v_a14b", "ti2v_5b"])
def test_exported_model_loads_in_diffusers(folders, variant, tmp_path):
    """Full fine-tunes are written with original names; diffusers reads them by `from_single_file`."""
    family = wan(folders[variant])
    denoiser = family.load_denoiser(CPU)
    save_file(family.comfyui_tensors(denoiser.state_dict()), tmp_path / "model.safetensors")
    loaded = WanTransformer3DModel.from_single_file(
        tmp_path / "model.safetensors", config=str(folders[variant]), subfolder="transformer"
    )
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in denoiser.state_dict().items())
    again = wan(folders[variant], transformer_path=str(tmp_path / "model.safetensors"))
    assert again.variant == family.variant
    assert_same({"transformer": again.load_denoiser(CPU).state_dict()}, {"transformer": denoiser.state_dict()})


def test_vae_names_are_those_that_diffusers_converts(folders):
    converted = convert_wan_vae_to_diffusers(original_tensors(folders["t2v"], "vae"))
    tensors = folder_tensors(folders["t2v"], "vae")
    assert converted.keys() == tensors.keys()
    assert all(torch.equal(converted[name], value) for name, value in tensors.items())


@pytest.mark.parametrize("variant", ["t2v", "ti2v_5b"])
def test_vae_configuration_is_found_in_shapes(folders, variant, tmp_path):
    save_file(original_tensors(folders[variant], "vae"), tmp_path / "vae.safetensors")
    source = open_part(PARTS["vae"], tmp_path / "vae.safetensors", "vae")
    assert source.original
    wanted = json.loads((folders[variant] / "vae/config.json").read_text())
    found = vae_config(source.weights)
    latents = {key: found.pop(key) for key in LATENTS_22 if key in found}
    assert {key: value for key, value in found.items() if wanted[key] not in (value, None)} == {}
    assert latents == (LATENTS_22 if variant == "ti2v_5b" else {})


def declared(tmp_path: Path, name: str, tensors: dict[str, torch.Tensor]) -> Source:
    """A file that declares tensors and holds no data."""
    header = {key: {"dtype": "BF16", "shape": [*v.shape], "data_offsets": [0, 0]} for key, v in tensors.items()}
    text = json.dumps(header).encode()
    path = tmp_path / f"{name}.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    return open_part(PARTS[name], path, name)


PUBLISHED = {
    "1.3B": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    "14B": {},
    "i2v 14B": {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
    "flf2v 14B": {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120, "pos_embed_seq_len": 514},
    "i2v A14B": {"in_channels": 36},
    "5B": {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_transformers_are_known_by_their_shapes(name, tmp_path):
    with torch.device("meta"):
        model = WanTransformer3DModel(text_dim=4096, **PUBLISHED[name])
    tensors = {original_name(key): value for key, value in model.state_dict().items()}
    found = transformer_config(declared(tmp_path, "transformer", tensors))
    assert {key: value for key, value in found.items() if value != model.config[key]} == {}


def test_published_encoders_are_known_by_their_shapes(tmp_path):
    from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

    umt5 = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
            "relative_attention_num_buckets": 32, "feed_forward_proj": "gated-gelu"}  # fmt: skip
    clip = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
            "image_size": 224, "patch_size": 14, "hidden_act": "gelu"}  # fmt: skip
    large = {"base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "in_channels": 12,
             "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16, **LATENTS_22}  # fmt: skip
    with torch.device("meta"):
        text = UMT5EncoderModel(UMT5Config(**umt5)).state_dict()
        vision = CLIPVisionModel(CLIPVisionConfig(**clip)).state_dict()
        vaes = [(AutoencoderKLWan(), {}), (AutoencoderKLWan(**large), large)]
    assert umt5_config(declared(tmp_path, "umt5", text)) == umt5
    originals = {original_umt5_name(name): value for name, value in text.items()}
    assert umt5_config(declared(tmp_path, "umt5", originals)) == umt5
    assert clip_config(declared(tmp_path, "clip", vision)) == clip
    originals = {f"visual.{original_clip_name(name)}": value for name, value in vision.items()}
    originals["visual.pos_embedding"] = originals["visual.pos_embedding"][None]
    assert clip_config(declared(tmp_path, "clip", originals)) == clip
    for vae, arguments in vaes:
        named = {original_vae_name(name, 2, bool(arguments)): value for name, value in vae.state_dict().items()}
        found = vae_config(declared(tmp_path, "vae", named).weights)
        assert {key: value for key, value in found.items() if value != vae.config[key]} == (
            {} if arguments else {"decoder_base_dim": 96}
        )


# -- layouts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["t2v", "i2v", "flf2v"])
def test_original_folder_equals_the_diffusers_folder(folders, variant, tmp_path):
    folder = write_original(folders[variant], tmp_path / "Wan2.1", variant, shards=3 if variant == "i2v" else 1)
    family = wan(folder)
    assert family.variant == wan(folders[variant]).variant
    assert_same(states(family), states(wan(folders[variant])))


def test_heads_are_read_from_the_original_configuration(folders, tmp_path):
    folder = write_original(folders["t2v"], tmp_path / "Wan2.1")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_heads": 2}))
    assert wan(folder).build_denoiser().config.num_attention_heads == 2


@pytest.mark.parametrize(
    ("variant", "prefix", "precision"),
    [("t2v", "", "bf16"), ("flf2v", "model.diffusion_model.", "bf16"), ("i2v", "", "fp16")],
)
def test_single_files_equal_the_folder(folders, variant, prefix, precision, tmp_path):
    def change(tensors):
        return {name: value.half() for name, value in tensors.items()} if precision == "fp16" else dict(tensors)

    family = wan(**write_single(folders[variant], tmp_path, change, prefix))
    assert family.variant == wan(folders[variant]).variant
    found, expected = states(family), states(wan(folders[variant]))
    assert_same(found, expected, (lambda value: value.half().float()) if precision == "fp16" else lambda value: value)
    captions = ["a photo of a red cat", "", "ﬁve  cats\n&amp; dogs"]
    texts = [model.encode_text("umt5", model.load_text_encoder("umt5", CPU), captions)["umt5_embeds"]
             for model in (family, wan(folders[variant], llm_path=family.config.llm_path))]  # fmt: skip
    assert all(torch.equal(*pair) for pair in zip(*texts, strict=True))


@pytest.mark.parametrize("scale", [None, ".scale_weight", ".weight_scale"])
def test_float8_files(folders, scale, tmp_path):
    """Values come back within float8's precision: 3 bits of mantissa, of a scaled matrix's range."""
    family = wan(**write_single(folders["t2v"], tmp_path, lambda tensors: fp8(tensors, scale)))
    found, expected = states(family), states(wan(folders["t2v"]))
    for part in ("transformer", "umt5"):
        for name, value in expected[part].items():
            tolerance = {"rtol": 0.07, "atol": value.abs().max().item() / 400 if scale else 0.002}
            torch.testing.assert_close(found[part][name], value, **tolerance, msg=lambda text, n=name: f"{n}: {text}")


def test_experts_are_trained_one_at_a_time(folders, tmp_path):
    root = write_original(folders["i2v_a14b"], tmp_path / "Wan2.2-I2V-A14B", "i2v")
    for file in ("config.json", "diffusion_pytorch_model.safetensors"):
        (root / file).unlink()
    for expert in ("high_noise_model", "low_noise_model"):
        write_original_transformer(folders["i2v_a14b"] / "transformer", root / expert, "i2v")
    message = refusal(ckpt_path=str(root))
    assert message.startswith(
        f"model.transformer_path: '{root}' holds two transformers; give '{root}/high_noise_model'"
    )
    assert "max_t" in message
    family = wan(root, transformer_path=str(root / "low_noise_model"), max_t=0.9)
    assert family.variant.task == "i2v"
    assert not family.variant.has_clip
    assert_same(states(family), states(wan(folders["i2v_a14b"])))
    times = [family.timestep(quantile / 100, (8, 8)) for quantile in range(1, 100)]
    assert times == sorted(times)
    assert times[-1] < 0.9


def test_the_5b_model_has_its_own_sizes(folders):
    family = wan(folders["ti2v_5b"])
    family.check_files()
    assert (family.fps, family.size_multiple, family.takes_pictures) == (24.0, 32, True)
    assert family.latent_size(64, 32, 9) == (3, 2, 4)
    pixels = torch.rand(1, 3, 9, 32, 64) * 2 - 1
    assert family.encode_media(family.load_vae(CPU), pixels, [])["latents"].shape == (1, 48, 3, 2, 4)
    assert (Wan.fps, Wan.size_multiple) == (16.0, 16)


def test_the_text_encoder_may_be_stored_in_float8(folders):
    captions = ["a photo of a red cat"]
    values = []
    for stored in (False, True):
        family = wan(folders["t2v"], text_encoder_fp8=stored)
        encoder = family.load_text_encoder("umt5", CPU)
        dtypes = {parameter.dtype for name, parameter in encoder.model.named_parameters() if "layer.1" in name
                  and "norm" not in name}  # fmt: skip
        assert dtypes == {torch.float8_e4m3fn if stored else torch.float32}
        values.append(family.encode_text("umt5", encoder, captions)["umt5_embeds"][0])
    assert 0 < (values[0] - values[1]).norm() / values[0].norm() < 0.1
    assert wan(folders["t2v"]).identity("umt5") != wan(folders["t2v"], text_encoder_fp8=True).identity("umt5")


def test_the_embedded_tokenizer_is_sentencepiece(folders, tmp_path):
    import sentencepiece

    family = wan(**write_single(folders["t2v"], tmp_path))
    model = sentencepiece.SentencePieceProcessor(model_file=str(folders["t2v"] / "tokenizer/spiece.model"))
    tokenizer = family.load_text_encoder("umt5", CPU).tokenizer
    for text in ("a photo of a red cat", "Ｆｕｌｌ width, ½", "unknown é 猫", "two  blanks"):
        assert tokenizer(text).input_ids == [*model.encode(text), 1], text


def test_what_the_cache_keys_depend_on(folders, tmp_path):
    i2v = wan(folders["i2v"])
    assert i2v.identity("vae") != wan(folders["t2v"]).identity("vae")
    assert wan(folders["t2v"]).identity("vae") == wan(folders["t2v"], llm_path=str(tmp_path)).identity("vae")
    options = write_single(folders["i2v"], tmp_path)
    tensors = load_file(options["clip_path"])
    save_file({name: value + 1 for name, value in tensors.items()}, tmp_path / "other.safetensors")
    names = (options["clip_path"], str(tmp_path / "other.safetensors"))
    assert len({wan(folders["i2v"], clip_path=path).identity("vae") for path in names}) == 2


# -- refusals ---------------------------------------------------------------------------------------------


def refusal(**options) -> str:
    with pytest.raises(SettingsError) as error:
        wan(**options).check_files()
    return str(error.value)


def test_nothing_given():
    assert refusal().startswith("model.transformer_path: give a Wan transformer, such as ")


def test_missing_and_empty_folder(tmp_path):
    assert refusal(ckpt_path=str(tmp_path / "gone")).startswith(f"model.ckpt_path: '{tmp_path}/gone' does not exist")
    message = refusal(ckpt_path=str(tmp_path))
    assert message.startswith(f"model.ckpt_path: '{tmp_path}' should hold one model in safetensors files")


def test_folder_without_text_encoder(folders, tmp_path):
    folder = write_original(folders["t2v"], tmp_path / "Wan2.1")
    (folder / "models_t5_umt5-xxl-enc-bf16.pth").unlink()
    message = refusal(ckpt_path=str(folder))
    assert "has neither a folder 'text_encoder' nor models_t5_umt5-xxl-enc-bf16.pth" in message
    assert "model.llm_path" in message


@pytest.mark.parametrize("option", ["transformer_path", "vae_path", "llm_path", "clip_path"])
def test_file_of_another_part(folders, tmp_path, option):
    options = write_single(folders["i2v"], tmp_path)
    other = options["vae_path" if option != "vae_path" else "llm_path"]
    message = refusal(**{**options, option: other})
    assert message.startswith(f"model.{option}: '{other}' is not ")
    assert "such as" in message


def test_t5_is_not_umt5(folders, tmp_path):
    options = write_single(folders["t2v"], tmp_path)
    tensors = load_file(options["llm_path"])
    name = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, options["llm_path"])
    assert f"'{options['llm_path']}' is not UMT5-XXL" in refusal(**options)


def test_marks_in_a_file_and_the_name_of_skyreels(folders, tmp_path):
    options = write_single(folders["t2v"], tmp_path)
    tensors = load_file(options["transformer_path"])
    marks = {"model_type.Wan2_1-T2V": torch.zeros(1), "scaled_fp8": torch.zeros(2)}
    save_file({**tensors, **marks}, tmp_path / "Wan2_1-SkyReels-V2.safetensors")
    for path, fps in ((options["transformer_path"], 16.0), (str(tmp_path / "Wan2_1-SkyReels-V2.safetensors"), 24.0)):
        family = wan(**{**options, "transformer_path": path})
        family.check_files()
        assert family.fps == fps


@pytest.mark.parametrize("name", ["vace_blocks.0.before_proj.weight", "motion_encoder.enc.fc.0.weight"])
def test_other_variants(folders, tmp_path, name):
    options = write_single(folders["t2v"], tmp_path)
    tensors = load_file(options["transformer_path"])
    save_file({**tensors, name: torch.zeros(2)}, options["transformer_path"])
    assert f"is a variant of Wan that cannot be trained (it has '{name.split('.')[0]}')" in refusal(**options)


def test_fun_control(folders, tmp_path):
    options = write_single(folders["t2v"], tmp_path)
    tensors = load_file(options["transformer_path"])
    save_file({**tensors, "patch_embedding.weight": torch.zeros(32, 48, 1, 2, 2)}, options["transformer_path"])
    assert "takes 48 channels; models with further inputs (Fun Control) cannot be trained" in refusal(**options)


def test_vae_of_the_other_version(folders):
    message = refusal(ckpt_path=str(folders["t2v"]), vae_path=str(folders["ti2v_5b"] / "vae"))
    assert "has 48 features, but the transformer works with 16" in message


def test_image_to_video_needs_clip(folders, tmp_path):
    options = write_single(folders["i2v"], tmp_path)
    assert refusal(**{**options, "clip_path": None}).startswith("model.clip_path: give CLIP-ViT-H")


def test_no_tokenizer(folders, tmp_path):
    message = refusal(**write_single(folders["t2v"], tmp_path, embed_tokenizer=False))
    assert message.startswith("model.tokenizer_path: no tokenizer found; give a folder like google/umt5-xxl")
    options = write_single(folders["t2v"], tmp_path, embed_tokenizer=False)
    wan(**options, tokenizer_path=str(folders["t2v"] / "tokenizer")).check_files()


def test_pickles_that_run_code_are_refused(folders, tmp_path):
    class Runs:
        def __reduce__(self):
            return print, ("run",)

    path = tmp_path / "Wan2.1_VAE.pth"
    torch.save({"decoder.middle.0.residual.0.gamma": Runs()}, path)
    message = refusal(ckpt_path=str(folders["t2v"]), vae_path=str(path))
    assert re.match(rf"model.vae_path: '{re.escape(str(path))}' is not a PyTorch file of tensors alone", message)
    path.write_bytes(b"nothing of the kind")
    assert "is not a PyTorch file of tensors alone" in refusal(ckpt_path=str(folders["t2v"]), vae_path=str(path))


def test_files_of_before_zip_archives_are_read(folders, tmp_path):
    tensors = original_tensors(folders["t2v"], "vae")
    torch.save(tensors, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    weights = Weights(tmp_path / "old.pth", "vae")
    assert set(weights) == tensors.keys()
    assert torch.equal(weights.read("conv1.weight"), tensors["conv1.weight"])
    assert torch.equal(weights.read("conv1.weight", slice(2, 5)), tensors["conv1.weight"][2:5])


def test_pictures_are_left_out_where_the_first_frame_is_given(folders, tmp_path):
    import datasets

    (tmp_path / "set").mkdir()
    datasets.picture(tmp_path / "set/a.png", caption="a")
    datasets.video(tmp_path / "set/b.mp4", [n / 16 for n in range(20)])
    (tmp_path / "set/b.txt").write_text("b")
    for variant, kept in (("t2v", {"a.png", "b.mp4"}), ("i2v", {"b.mp4"})):
        family = wan(folders[variant])
        family.check_files()
        samples, report = datasets.look(tmp_path / "set", family, top={"frame_buckets": [1, 5]})
        assert {sample.name for sample in samples} == kept
        assert len(report.left_out) == 2 - len(kept)
    assert "this Wan model trains videos alone" in next(iter(report.left_out.values()))
    shutil.rmtree(tmp_path / "set")
