"""Qwen-Image's own parts: captions of their own lengths, edits, two noise levels in one picture, its files."""

import json
import re
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from diffusion_trainer.models import qwen25_vl
from diffusion_trainer.models.base import Example, SampleRequest
from diffusion_trainer.models.flow import pack
from diffusion_trainer.models.qwen_image import (
    DROPPED,
    EDIT_DROPPED,
    EDIT_TEMPLATE,
    TEMPLATE,
    TIME_ZERO,
    QwenImage,
    QwenImage2511,
)
from diffusion_trainer.models.wan_files import original_vae_name
from diffusion_trainer.utils.adapted import adapted_layers
from diffusion_trainer.utils.adapter_settings import Lora
from diffusion_trainer.utils.adapters import export_tensors, inject
from diffusion_trainer.utils.config import SettingsError, validate
from diffusion_trainer.utils.weights import Weights
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from test_kontext import AtOneTime

CPU = torch.device("cpu")
SHORT, LONG = "a red cat", "a photo of a red cat on a roof at night"
SIZE = 6, 8
"""Of latents: 48 x 64 pixels."""
EDITS = ("Edit", "EditPlus", "2511")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Miniatures of pictures alone, and of each kind of edits."""
    made = {}
    for name in ("", *EDITS):
        made[name] = tmp_path_factory.mktemp(f"qwen-image{name}")
        if name == "2511":
            QwenImage2511.write_miniature(made[name])
        else:
            QwenImage.write_miniature(made[name], name)
    return made


@pytest.fixture(scope="module")
def folder(folders) -> Path:
    return folders[""]


@pytest.fixture(params=EDITS)
def edit(request, folders) -> tuple[str, Path]:
    return request.param, folders[request.param]


def qwen_image(folder: Path | None = None, kind: str = "", **options: Any) -> QwenImage:
    family = QwenImage2511 if kind == "2511" else QwenImage
    table = {"type": "qwen2511" if kind == "2511" else "qwen_image", "dtype": "float32", "max_sequence_length": 64}
    table |= {"diffusers_path": folder} if folder else {}
    given = {key: str(value) if isinstance(value, Path) else value for key, value in {**table, **options}.items()}
    return family(validate(family.Config, given, "model"))


class PictureProcessor(transformers.Qwen2VLProcessor):
    """transformers' own without videos, whose part needs torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([self.image_token, self.video_token])
        transformers.ProcessorMixin.__init__(self, image_processor, tokenizer)


def library_pipeline(folder: Path, kind: str = "", dtype: torch.dtype = torch.float32) -> Any:
    """diffusers' own pipeline on the folder; its language model is told which tokens are a picture's."""
    pipeline: Any = diffusers.QwenImagePipeline.from_pretrained(folder, torch_dtype=dtype)
    if kind:
        processor = PictureProcessor(
            transformers.Qwen2VLImageProcessorPil.from_pretrained(folder / "processor"), pipeline.tokenizer
        )
        make = diffusers.QwenImageEditPipeline if kind == "Edit" else diffusers.QwenImageEditPlusPipeline
        pipeline = make(**pipeline.components, processor=processor)
        model = pipeline.text_encoder

        def told(_module: Any, args: Any, given: dict[str, Any]) -> Any:
            return args, {**given, "mm_token_type_ids": (given["input_ids"] == model.config.image_token_id).int()}

        model.register_forward_pre_hook(told, with_kwargs=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def encoded(family: QwenImage, *captions: str) -> list[torch.Tensor]:
    return list(family.encode_text("qwen", family.load_text_encoder("qwen", CPU), captions)["qwen_embeds"])


def batch_of(family: QwenImage, texts: list[torch.Tensor], num_controls: int = 0, size: tuple[int, int] = SIZE):
    def example(number: int, text: torch.Tensor) -> Example:
        source = torch.Generator().manual_seed(3 + number)
        latents, noise, *controls = (torch.randn(16, 1, *size, generator=source) for _ in range(2 + num_controls))
        shown = tuple({"latents": control} for control in controls)
        return Example({"latents": latents}, {"qwen_embeds": text}, noise, 0.2 + 0.3 * number, shown)

    return family.collate([example(*numbered) for numbered in enumerate(texts)])


def predict(family: QwenImage, denoiser: Any, values: Any) -> torch.Tensor:
    with torch.no_grad():
        for layer in family.layers(denoiser):
            values = layer.forward(SimpleNamespace(**layer.submodules), *values)
            assert not isinstance(values, tuple) or all(value.is_contiguous() for value in values)
    return values


def library_prediction(transformer: Any, family: QwenImage, batch: Any, size: tuple[int, int] = SIZE) -> torch.Tensor:
    """diffusers' transformer in its own attention, as its pipelines call it."""
    x_t, told, text, seen, *controls = batch.inputs
    tokens = torch.cat([pack(part.squeeze(2)) for part in (x_t, *controls)], dim=1)
    grid = (1, size[0] // 2, size[1] // 2)
    mask = seen if seen.shape[1] > 1 else None
    with torch.no_grad():
        made = transformer(tokens, text, mask, told, [[grid] * (1 + len(controls))] * len(x_t), return_dict=False)[0]
    return made[:, : grid[1] * grid[2]]


def pictures(number: int, size: tuple[int, int] = (90, 120)) -> list[torch.Tensor]:
    """Control pictures as they are read: CHW, uint8; each has another shape."""
    source = torch.Generator().manual_seed(7)
    return [
        torch.randint(0, 255, (3, size[0] + 20 * n, size[1]), generator=source, dtype=torch.uint8)
        for n in range(number)
    ]


def opened(picture_CHW: torch.Tensor) -> Image.Image:
    return Image.fromarray(picture_CHW.permute(1, 2, 0).numpy())


# -- captions ---------------------------------------------------------------------------------------------


def test_text_equals_the_pipelines(folder):
    family, pipeline = qwen_image(folder), library_pipeline(folder)
    assert (pipeline.prompt_template_encode, pipeline.prompt_template_encode_start_idx) == (TEMPLATE, DROPPED)
    with torch.no_grad():
        expected, seen = pipeline.encode_prompt([SHORT, LONG])
        cut, _ = pipeline.encode_prompt("dog " * 50, max_sequence_length=64)
    for ours, theirs, mask in zip(encoded(family, SHORT, LONG), expected, seen, strict=True):
        assert torch.equal(ours, theirs[mask.bool()])
    torch.testing.assert_close(encoded(family, "dog " * 50), [cut[0]], atol=1e-5, rtol=1e-5)
    assert cut.shape[1] == 64


def test_what_is_dropped_is_the_template(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    for template, dropped in ((TEMPLATE, DROPPED), (EDIT_TEMPLATE, EDIT_DROPPED)):
        assert len(tokenizer(template.split("{}")[0]).input_ids) == dropped


@pytest.mark.parametrize("number", [1, 2, 3])
def test_text_that_sees_pictures_equals_the_pipelines(edit, number):
    kind, folder = edit
    if kind == "Edit" and number > 1:
        pytest.skip("takes one")
    family, pipeline = qwen_image(folder, kind), library_pipeline(folder, kind)
    shown = pictures(number)
    if kind == "Edit":
        area, module = 1024 * 1024, pipeline_qwenimage_edit
    else:
        area, module = pipeline_qwenimage_edit_plus.CONDITION_IMAGE_SIZE, pipeline_qwenimage_edit_plus
    sizes = [module.calculate_dimensions(area, picture.shape[2] / picture.shape[1])[:2] for picture in shown]
    images = [
        pipeline.image_processor.resize(opened(picture), height, width)
        for picture, (width, height) in zip(shown, sizes, strict=True)
    ]
    with torch.no_grad():
        expected, mask = pipeline.encode_prompt(SHORT, images[0] if kind == "Edit" else images)
    assert mask is None
    encoder = family.load_text_encoder("qwen", CPU)
    texts = family.encode_edit("qwen", encoder, [SHORT, LONG], [shown, []])["qwen_embeds"]
    assert torch.equal(texts[0], expected[0])
    assert torch.equal(texts[1], encoded(family, LONG)[0]), "without a picture it is asked as for a picture alone"
    mirrored = [picture.flip(2) for picture in shown]
    other = family.encode_edit("qwen", encoder, [SHORT], [mirrored])["qwen_embeds"][0]
    assert not torch.allclose(other, texts[0], atol=1e-4)


def test_tokens_of_a_picture_have_rows_and_columns(folders):
    """A picture and its transpose have the same patches in other places of the grid, of another shape."""
    family = qwen_image(folders["Edit"], "Edit")
    encoder = family.load_text_encoder("qwen", CPU)
    seen: list[torch.Tensor] = []
    encoder.model.language_model.register_forward_pre_hook(
        lambda _module, _args, given: seen.append(given["position_ids"]), with_kwargs=True
    )
    text = qwen25_vl.PICTURE + "a"
    qwen25_vl.encode_with_pictures(encoder, text, [Image.new("RGB", (28 * 3, 28 * 2))])
    time, rows, columns = seen[0][-3:, 0].tolist()
    assert rows == [0, 1, 1, 1, 2, 2, 2, 4, 5]
    assert columns == [0, 1, 2, 3, 1, 2, 3, 4, 5]
    assert time == [0, 1, 1, 1, 1, 1, 1, 4, 5]


# -- latents ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latents_equal_the_pipelines(folders, dtype):
    folder = folders["Edit"]
    family = qwen_image(folder, dtype=str(dtype).removeprefix("torch."))
    pixels = torch.rand(2, 3, 1, 48, 64, generator=torch.Generator().manual_seed(5)) * 2 - 1
    with torch.no_grad():
        expected = library_pipeline(folder, "Edit", dtype)._encode_vae_image(pixels.to(dtype), None)
    latents = family.encode_media(family.load_vae(CPU), pixels, [])["latents"]
    assert latents.shape == (2, 16, 1, *SIZE)
    assert latents.dtype == dtype
    if dtype == torch.float32:
        assert torch.equal(latents, expected)
    torch.testing.assert_close(latents, expected, atol=0.02, rtol=0.02)


# -- a step -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("captions", [[SHORT, SHORT], [SHORT, LONG], [LONG]], ids=["alike", "ragged", "one"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_equals_the_librarys_transformer(folder, captions, dtype):
    """With diffusers' own attention in complex numbers."""
    family = qwen_image(folder, dtype=str(dtype).removeprefix("torch."))
    batch = batch_of(family, encoded(family, *captions))
    transformer = library_pipeline(folder, dtype=dtype).transformer
    expected = library_prediction(transformer, family, batch)
    prediction = predict(family, family.load_denoiser(CPU), batch.inputs)
    loose = {"atol": 2e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.02, "rtol": 0.02}
    torch.testing.assert_close(prediction, expected, **loose)
    assert batch.inputs[3].shape[1] == (1 if len(set(captions)) == 1 else batch.inputs[2].shape[1])


@pytest.mark.parametrize("number", [0, 1, 3])
@pytest.mark.parametrize("captions", [[SHORT], [SHORT, LONG]], ids=["one", "ragged"])
def test_edit_equals_the_librarys_transformer(edit, captions, number):
    kind, folder = edit
    family = qwen_image(folder, kind)
    texts = encoded(family, *captions)
    batch = batch_of(family, texts, number)
    denoiser = family.load_denoiser(CPU)
    prediction = predict(family, denoiser, batch.inputs)
    expected = library_prediction(library_pipeline(folder).transformer, family, batch)
    torch.testing.assert_close(prediction, expected, atol=2e-6, rtol=1e-5)
    if number:
        changed = [*batch.inputs]
        changed[4] = changed[4] + 1
        assert not torch.allclose(predict(family, denoiser, changed), prediction, atol=1e-4)


def test_gradients_with_controls_equal_the_librarys(folders):
    family = qwen_image(folders["2511"], "2511")
    batch = batch_of(family, encoded(family, SHORT, LONG), 2)
    found = []
    for network in (family.load_denoiser(CPU), library_pipeline(folders["2511"]).transformer):
        if found:
            with torch.enable_grad():
                x_t, told, text, seen, *controls = batch.inputs
                tokens = torch.cat([pack(part.squeeze(2)) for part in (x_t, *controls)], dim=1)
                shapes = [[(1, 3, 4)] * 3] * 2
                made = network(tokens, text, seen, told, shapes, return_dict=False)[0][:, :12]
        else:
            made = batch.inputs
            for layer in family.layers(network):
                made = layer.forward(SimpleNamespace(**layer.submodules), *made)
        torch.nn.functional.mse_loss(made, batch.target).backward()
        found.append({name: parameter.grad for name, parameter in network.named_parameters()})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        if gradient is None or found[1][name] is None:
            assert gradient is found[1][name], name  # the last block's text goes nowhere
        else:
            torch.testing.assert_close(gradient, found[1][name], atol=1e-6, rtol=1e-4, msg=name)


def test_neighbours_in_a_batch_change_nothing(folder):
    family = qwen_image(folder)
    denoiser, texts = family.load_denoiser(CPU), encoded(family, SHORT, LONG)
    together = predict(family, denoiser, batch_of(family, texts).inputs)
    alone = predict(family, denoiser, batch_of(family, texts[:1]).inputs)
    torch.testing.assert_close(together[:1], alone, atol=2e-6, rtol=1e-5)


def test_control_pictures_are_at_time_zero_in_2511(folders):
    """So the time changes what is made, but what a control's own modulation is stays."""
    families = [qwen_image(folders[kind], kind) for kind in ("EditPlus", "2511")]
    denoisers = [family.load_denoiser(CPU) for family in families]
    assert all(torch.equal(value, denoisers[1].state_dict()[name]) for name, value in denoisers[0].state_dict().items())
    batch = batch_of(families[0], encoded(families[0], SHORT), 1)
    predictions = [predict(*pair, batch.inputs) for pair in zip(families, denoisers, strict=True)]
    assert not torch.allclose(*predictions, atol=1e-4)
    bare = [predict(*pair, batch.inputs[:4]) for pair in zip(families, denoisers, strict=True)]
    torch.testing.assert_close(*bare, atol=2e-6, rtol=1e-5)


def test_target_is_what_the_pipeline_steps_by(folder):
    """An Euler step of its scheduler along the target arrives at the clean latents."""
    family = qwen_image(folder)
    batch = batch_of(family, encoded(family, SHORT))
    scheduler = AtOneTime()
    scheduler.sigma = family.timestep(0.2, SIZE)
    scheduler.set_timesteps()
    source = torch.Generator().manual_seed(3)
    clean, noise = (torch.randn(16, 1, *SIZE, generator=source)[None] for _ in range(2))
    x_t = scheduler.scale_noise(clean, scheduler.timesteps, noise)
    torch.testing.assert_close(batch.inputs[0], x_t)
    torch.testing.assert_close(batch.inputs[1], scheduler.timesteps / 1000)
    stepped = scheduler.step(batch.target, scheduler.timesteps[0], pack(x_t.squeeze(2))).prev_sample
    torch.testing.assert_close(stepped, pack(clean.squeeze(2)), atol=1e-5, rtol=1e-4)


# -- drawing ----------------------------------------------------------------------------------------------


@contextmanager
def pictures_of_size(monkeypatch, width: int, height: int):
    """The pipelines for edits make control pictures of this size, where they would choose a megapixel."""
    with monkeypatch.context() as patch:
        patch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda *_: (width, height, None))
        patch.setattr(pipeline_qwenimage_edit_plus, "calculate_dimensions", lambda *_: (width, height))
        yield


def decoded(pipeline: Any, draw: Any) -> torch.Tensor:
    """The latents that the pipeline decodes while it draws; of a picture a miniature's decoder shows little."""
    seen: list[torch.Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        decode = pipeline.vae.decode
        patch.setattr(
            pipeline.vae, "decode", lambda latents, **given: (seen.append(latents), decode(latents, **given))[1]
        )
        draw()
    return seen[0]


def test_draws_what_the_pipelines_for_edits_draw(edit, monkeypatch):
    kind, folder = edit
    family, theirs = qwen_image(folder, kind), library_pipeline(folder, kind)
    family.check_files()
    shown = tuple(opened(picture) for picture in pictures(family.max_controls, (48, 64)))
    encoder = family.load_text_encoder("qwen", CPU)
    controls = [pictures(family.max_controls, (48, 64))] * 2
    texts = family.encode_edit("qwen", encoder, [SHORT, " "], controls)["qwen_embeds"]
    text, negative = ({"qwen_embeds": value} for value in texts)
    ours = family.pipeline(family.load_denoiser(CPU), CPU, text_encoders=False)
    ours.set_progress_bar_config(disable=True)

    def drawn(images: tuple[Image.Image, ...], guidance: float | None) -> torch.Tensor:
        request = SampleRequest(text, negative, width=64, height=48, steps=2, guidance=guidance, seed=5, images=images)
        return decoded(ours, lambda: family.sample(ours, request))

    def expected(**guidance: float) -> torch.Tensor:
        images = [ImageOps.fit(image, (64, 48)) for image in shown]
        return decoded(theirs, lambda: theirs(
            image=images[0] if kind == "Edit" else images, prompt_embeds=texts[0][None],
            prompt_embeds_mask=torch.ones(1, len(texts[0])), negative_prompt_embeds=texts[1][None],
            negative_prompt_embeds_mask=torch.ones(1, len(texts[1])), width=64, height=48, num_inference_steps=2,
            generator=torch.Generator().manual_seed(5), **guidance,
        ))  # fmt: skip

    with pictures_of_size(monkeypatch, 64, 48):
        for guidance in (8.0, None):
            given = {} if guidance is None else {"true_cfg_scale": guidance}
            torch.testing.assert_close(drawn(shown, guidance), expected(**given), atol=2e-5, rtol=1e-4)
    others = [drawn((), 8.0), drawn(tuple(map(ImageOps.mirror, shown)), 8.0), drawn(shown, None)]
    assert all(not torch.allclose(drawn(shown, 8.0), other, atol=1e-3) for other in others)


# -- files ------------------------------------------------------------------------------------------------


def tensors(folder: Path, part: str) -> dict[str, torch.Tensor]:
    (file,) = (folder / part).glob("*.safetensors")
    return load_file(file)


@pytest.fixture(scope="module")
def files(folder: Path, tmp_path_factory) -> dict[str, str]:
    """The parts as single files, under the names that ComfyUI's have and under others."""
    path = tmp_path_factory.mktemp("single")
    qwen, vae = tensors(folder, "text_encoder"), tensors(folder, "vae")
    newer = {
        f"model.{name}" if name.startswith("visual.") else name.replace("model.", "model.language_model.", 1): value
        for name, value in qwen.items()
    }
    scaled = {}
    for name, value in qwen.items():
        if value.ndim == 2 and ".layers." in name:
            factor = value.float().abs().max() / 448
            scaled[name] = (value.float() / factor).to(torch.float8_e4m3fn)
            scaled[name.removesuffix("weight") + "scale_weight"] = factor
        else:
            scaled[name] = value
    wan = {original_vae_name(name, 2, False): value for name, value in vae.items()}
    parts = {"qwen": qwen, "qwen-newer": newer, "qwen-fp8": scaled, "vae": wan, "vae-diffusers": vae,
             "dit": tensors(folder, "transformer")}  # fmt: skip
    parts["dit-prefix"] = {f"model.diffusion_model.{name}": value for name, value in parts["dit"].items()}
    parts["dit-2511"] = {**parts["dit"], TIME_ZERO: torch.zeros(0)}
    for name, part in parts.items():
        save_file({key: value.contiguous() for key, value in part.items()}, path / f"{name}.safetensors")
    return {name: str(path / f"{name}.safetensors") for name in parts}


@pytest.mark.parametrize(
    "names",
    [{}, {"text_encoder_path": "qwen-newer", "vae_path": "vae-diffusers", "transformer_path": "dit-prefix"}],
    ids=["comfyui", "others"],
)
def test_single_files_equal_the_folder(folder, files, names):
    names = {"text_encoder_path": "qwen", "vae_path": "vae", "transformer_path": "dit", **names}
    whole = qwen_image(folder)
    family = qwen_image(tokenizer_path=folder / "tokenizer", **{option: files[name] for option, name in names.items()})
    family.check_files()
    parts = [(f.load_denoiser(CPU), f.load_vae(CPU), f.load_text_encoder("qwen", CPU).model) for f in (family, whole)]
    for ours, theirs in zip(*parts, strict=True):
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        for name, value in theirs.state_dict().items():
            assert torch.equal(value, ours.state_dict()[name]), name
    for key in ("axes_dims_rope", "num_attention_heads", "joint_attention_dim", "out_channels", "zero_cond_t"):
        assert list(map(str, [parts[0][0].config[key]])) == list(map(str, [tuple_of(parts[1][0].config[key])])), key
    shown = [pictures(1, (60, 90))]
    texts = [
        f.encode_edit("qwen", f.load_text_encoder("qwen", CPU), [SHORT], shown)["qwen_embeds"][0]
        for f in (family, whole)
    ]
    assert torch.equal(*texts)


def tuple_of(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def test_the_published_text_encoders_config_follows_from_its_shapes(tmp_path):
    """Of a file of few values, all on one place of the disk."""
    shapes = {
        "model.embed_tokens.weight": (152064, 3584), "model.layers.0.self_attn.q_proj.bias": (3584,),
        "model.layers.0.self_attn.k_proj.weight": (512, 3584), "model.layers.0.mlp.gate_proj.weight": (18944, 3584),
        "visual.patch_embed.proj.weight": (1280, 3, 2, 14, 14), "visual.blocks.0.attn.qkv.bias": (3840,),
        "visual.blocks.0.mlp.gate_proj.weight": (3420, 1280),
        **{f"model.layers.{n}.input_layernorm.weight": (3584,) for n in range(28)},
        **{f"visual.blocks.{n}.norm1.weight": (1280,) for n in range(32)},
    }  # fmt: skip
    header = {name: {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
    text = json.dumps(header).encode()
    (tmp_path / "qwen.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    config = transformers.Qwen2_5_VLConfig.from_dict(
        qwen25_vl.config_of(Weights(tmp_path / "qwen.safetensors", "model.text_encoder_path"))
    )
    published = {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "vocab_size": 152064,
    }  # fmt: skip
    assert {key: getattr(config.text_config, key) for key in published} == published
    assert config.text_config.rope_parameters["mrope_section"] == [16, 24, 24]
    assert config.text_config.rope_parameters["rope_theta"] == 1e6
    visual = {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
        "fullatt_block_indexes": [7, 15, 23, 31], "window_size": 112,
    }  # fmt: skip
    assert {key: getattr(config.vision_config, key) for key in visual} == visual
    assert config.image_token_id == 151655


def test_a_folder_with_the_older_flat_config_is_read(folder, tmp_path):
    """As the published folder has it."""
    path = tmp_path / "model"
    path.mkdir()
    for part in folder.iterdir():
        (path / part.name).symlink_to(part)
    (path / "text_encoder").unlink()
    (path / "text_encoder").mkdir()
    (path / "text_encoder/model.safetensors").symlink_to(next((folder / "text_encoder").glob("*.safetensors")))
    config = json.loads((folder / "text_encoder/config.json").read_text("utf-8"))
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    flat = {key: text[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                                       "num_key_value_heads", "rms_norm_eps", "vocab_size", "hidden_act")}  # fmt: skip
    flat |= {"rope_theta": rope["rope_theta"]}
    flat |= {"rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}}
    config["vision_config"] |= {"model_type": "qwen2_5_vl", "in_chans": 3, "spatial_patch_size": 14}
    (path / "text_encoder/config.json").write_text(json.dumps({**config, **flat}), "utf-8")
    family = qwen_image(path)
    family.check_files()
    shown = [pictures(1, (60, 90))]
    texts = [
        f.encode_edit("qwen", f.load_text_encoder("qwen", CPU), [SHORT], shown)["qwen_embeds"][0]
        for f in (family, qwen_image(folder))
    ]
    assert torch.equal(*texts)


def test_a_scaled_float8_text_encoder_is_read(folder, files):
    ours, theirs = (
        encoded(qwen_image(folder, **options), SHORT)[0] for options in ({"text_encoder_path": files["qwen-fp8"]}, {})
    )
    assert not torch.equal(ours, theirs)
    torch.testing.assert_close(ours, theirs, atol=0.2, rtol=0.2)


@pytest.mark.parametrize("storage", ["float8", "int8", "nf4"])
def test_a_text_encoder_in_few_bits_sees_in_full_precision(folders, storage):
    family = qwen_image(folders["EditPlus"], text_encoder_dtype=storage)
    encoder, whole = (f.load_text_encoder("qwen", CPU) for f in (family, qwen_image(folders["EditPlus"])))
    kinds = {
        part: {type(module).__name__ for module in model.modules() if isinstance(module, torch.nn.Linear)}
        for part, model in (("visual", encoder.model.visual), ("text", encoder.model.language_model))
    }
    assert kinds == {"visual": {"Linear"}, "text": {"StoredLinear"}}
    ours, theirs = (
        family.encode_edit("qwen", each, [SHORT], [pictures(1, (60, 90))])["qwen_embeds"][0]
        for each in (encoder, whole)
    )
    assert not torch.equal(ours, theirs)
    assert (ours - theirs).norm() < 0.2 * theirs.norm()
    assert family.identity("qwen") != qwen_image(folders["EditPlus"]).identity("qwen")


def test_the_file_says_that_it_is_2511(folder, files):
    assert not qwen_image(folder, transformer_path=files["dit"]).build_denoiser().config.zero_cond_t
    assert qwen_image(folder, transformer_path=files["dit-2511"]).build_denoiser().config.zero_cond_t
    told = qwen_image(folder, "2511", transformer_path=files["dit"])
    told.check_files()
    assert told.build_denoiser().config.zero_cond_t
    assert (told.is_plus, told.max_controls) == (True, 3)


@pytest.mark.parametrize(
    ("kind", "options", "most"),
    [("Edit", {}, 1), ("EditPlus", {}, 3), ("", {"edit_mode": "edit_plus"}, 3), ("EditPlus", {"edit_mode": "edit"}, 1),
     ("2511", {}, 3)],
)  # fmt: skip
def test_how_many_controls_it_takes(folders, kind, options, most):
    family = qwen_image(folders[kind], kind, **options)
    family.check_files()
    assert family.max_controls == most
    assert family.starts_from_pictures
    single = qwen_image(folders[kind], kind, edit_mode="edit")
    assert (family.identity("qwen") == single.identity("qwen")) == (most == 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "model.transformer_path: give a Qwen-Image transformer"),
        ({"transformer_path": "qwen"}, "is not a Qwen-Image transformer"),
        ({"text_encoder_path": "vae", "folder": ""}, "model.text_encoder_path: '.*' is not Qwen2.5-VL 7B"),
        ({"vae_path": "dit", "folder": ""}, "model.vae_path: '.*' is not the Qwen-Image VAE"),
        ({"transformer_path": "layered", "folder": ""}, "addition_t_embedding"),
        ({"folder": "", "kind": "2511"}, "is not Qwen-Image-Edit-2511"),
        ({"transformer_path": "narrow", "folder": ""}, "has 32 features, but the transformer works with 16"),
    ],
)
def test_what_it_says_of_wrong_files(options, message, folders, files, tmp_path):
    made = load_file(files["dit"])
    layered = {**made, "time_text_embed.addition_t_embedding.weight": torch.zeros(2, 32)}
    narrow = {**made, "txt_in.weight": torch.zeros(32, 16)}
    for name, part in (("layered", layered), ("narrow", narrow)):
        save_file(part, tmp_path / f"{name}.safetensors")
        files = {**files, name: str(tmp_path / f"{name}.safetensors")}
    options = dict(options)
    folder, kind = folders[options.pop("folder")] if "folder" in options else None, options.pop("kind", "")
    with pytest.raises(SettingsError, match=message if ".*" in message else re.escape(message)):
        qwen_image(folder, kind, **{key: files[value] for key, value in options.items()}).check_files()


# -- results ----------------------------------------------------------------------------------------------


def test_lora_moves_the_pipeline_as_in_training(folder, tmp_path):
    family = qwen_image(folder)
    denoiser = inject(family.load_denoiser(CPU), family, validate(Lora, {"type": "lora", "rank": 4}), 0)
    layers = adapted_layers(denoiser)
    assert {name.split(".")[0] for name in layers} == {"transformer_blocks"}
    source = torch.Generator().manual_seed(3)
    for layer in layers.values():
        torch.nn.init.normal_(layer.adapter.up, std=0.2, generator=source)
    save_file(export_tensors(layers, family, torch.float32), tmp_path / "lora.safetensors")
    pipeline = library_pipeline(folder)
    pipeline.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    batch = batch_of(family, encoded(family, SHORT, LONG))
    bare, ours = (predict(family, network, batch.inputs) for network in (family.load_denoiser(CPU), denoiser))
    theirs = library_prediction(pipeline.transformer, family, batch)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
    assert (ours - bare).norm() > 0.05 * bare.norm()


@pytest.mark.parametrize("kind", ["", "2511"])
def test_an_exported_model_loads_in_diffusers(folders, kind, tmp_path):
    family = qwen_image(folders[kind], kind)
    weights = dict(family.load_denoiser(CPU).named_parameters())
    exported = {**family.other_tensors(weights), **family.comfyui_tensors(weights)}
    save_file({name: value.detach().contiguous() for name, value in exported.items()}, tmp_path / "model.safetensors")
    loaded = diffusers.QwenImageTransformer2DModel.from_single_file(
        str(tmp_path / "model.safetensors"),
        config=str(folders[kind]),
        subfolder="transformer",
        torch_dtype=torch.float32,
    )
    assert loaded.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in loaded.state_dict().items())


def test_an_exported_model_says_what_it_is(folders):
    for kind, marked in (("", False), ("2511", True)):
        assert (TIME_ZERO in qwen_image(folders[kind], kind).other_tensors(())) == marked
