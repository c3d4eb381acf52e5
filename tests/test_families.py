"""What holds for every family in the registry, seen on its miniature."""

import dataclasses
import math
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cosmos_stand_ins  # noqa: F401
import pytest
import torch
from diffusion_trainer.models import families
from diffusion_trainer.models.base import Example, Family, SampleRequest
from diffusion_trainer.utils.adapted import adapted_layers
from diffusion_trainer.utils.adapter_settings import Lora
from diffusion_trainer.utils.adapters import inject, target_names
from diffusion_trainer.utils.config import read_toml, validate, write_toml
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


def flux_forward(denoiser, x_t, t, pooled, text, guidance):
    from diffusers import FluxPipeline

    n, c, h, w = x_t.shape
    return denoiser(
        hidden_states=FluxPipeline._pack_latents(x_t, n, c, h, w),
        timestep=t,
        guidance=guidance if denoiser.config.guidance_embeds else None,
        pooled_projections=pooled,
        encoder_hidden_states=text,
        txt_ids=torch.zeros(text.shape[1], 3),
        img_ids=FluxPipeline._prepare_latent_image_ids(n, h // 2, w // 2, CPU, torch.float32),
        return_dict=False,
    )[0]


def chroma_forward(denoiser, x_t, t, text, mask):
    from diffusers import ChromaPipeline

    n, c, h, w = x_t.shape
    seen = torch.cat([mask.bool(), torch.ones(n, h * w // 4, dtype=torch.bool)], dim=1) if mask.shape[1] > 1 else None
    return denoiser(
        hidden_states=ChromaPipeline._pack_latents(x_t, n, c, h, w),
        timestep=t,
        encoder_hidden_states=text,
        txt_ids=torch.zeros(text.shape[1], 3),
        img_ids=ChromaPipeline._prepare_latent_image_ids(n, h // 2, w // 2, CPU, torch.float32),
        attention_mask=seen,
        return_dict=False,
    )[0]


def sd3_forward(denoiser, x_t, told, text, pooled):
    return denoiser(x_t, text, pooled, told, return_dict=False)[0]


def lumina_2_forward(denoiser, x_t, told, text, seen):
    from diffusion_trainer.models.next_dit import patches

    mask = seen.bool().expand(text.shape[:2])
    return patches(denoiser(x_t, told, text, mask, return_dict=False)[0])


def sdxl_forward(denoiser, x_t, t, sizes, seen, *texts):
    *tokens, second = texts if len(texts) == 2 else texts[:2]
    states = []
    assert seen.shape[1] == 1
    for name, values in (("text_encoder", tokens[0]), ("text_encoder_2", second)):
        if name in denoiser:
            assert values.shape[1] == 1
            output = denoiser[name](values[:, 0], output_hidden_states=True)
            # The first encoder lacks its last layer, whose output SDXL does not use
            states.append(output.hidden_states[-1 if name == "text_encoder" else -2])
            pooled = output[0]
        else:
            states.append(values)
    if len(texts) == 3:
        pooled = texts[2]
    return denoiser["unet"](
        x_t, t, torch.cat(states, -1), added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}, return_dict=False
    )[0]


def wan_forward(denoiser, x_t, t, text, image=None):
    if image is not None:  # the library takes the frames of a sample one by one
        image = image.reshape(-1, 17, image.shape[-1])
    return denoiser(x_t, t, text, image, return_dict=False)[0]


def z_image_forward(denoiser, x_t, told, text, kinds, seen):
    from diffusion_trainer.models.z_image import patches

    pictures = list(x_t[:, :, None])
    captions = [states[kind == 1] for states, kind in zip(text, kinds, strict=True)]
    made = denoiser(pictures, told, captions, return_dict=False)[0]
    return patches(torch.stack(made)[:, :, 0])


def flux2_forward(denoiser, x_t, t, text, guidance):
    from diffusers import Flux2Pipeline

    return denoiser(
        hidden_states=Flux2Pipeline._pack_latents(x_t),
        encoder_hidden_states=text,
        timestep=t,
        guidance=guidance if denoiser.config.guidance_embeds else None,
        img_ids=Flux2Pipeline._prepare_latent_ids(x_t),
        txt_ids=Flux2Pipeline._prepare_text_ids(text),
        return_dict=False,
    )[0]


def qwen_image_forward(denoiser, x_t, told, text, seen):
    from diffusion_trainer.models.flow import pack

    return denoiser(
        pack(x_t.squeeze(2)),
        text,
        seen if seen.shape[1] > 1 else None,
        told,
        [[(1, x_t.shape[3] // 2, x_t.shape[4] // 2)]] * len(x_t),
        return_dict=False,
    )[0]


def cosmos_forward(denoiser, x_t, told, text):
    """Of diffusers' class and with its attention, for which the denoiser has its own."""
    from diffusers import CosmosTransformer3DModel
    from diffusers.models.transformers.transformer_cosmos import CosmosAttnProcessor2_0

    attention = [getattr(block, name) for block in denoiser.transformer_blocks for name in ("attn1", "attn2")]
    own = [module.processor for module in attention]
    for module in attention:
        module.set_processor(CosmosAttnProcessor2_0())
    prediction = CosmosTransformer3DModel.forward(
        denoiser, x_t[:, :, None], told, text, padding_mask=torch.zeros(1, 1, 32, 64).to(x_t), return_dict=False
    )[0][:, :, 0]
    for module, processor in zip(attention, own, strict=True):
        module.set_processor(processor)
    return prediction


def anima_forward(denoiser, x_t, told, ids, seen, qwen, read):
    """Through diffusers' adapter, with all of the masks, and as above."""
    masks = [mask.expand(values.shape[:2]) for mask, values in ((seen, ids), (read, qwen))]
    return cosmos_forward(denoiser, x_t, told, denoiser.llm_adapter(qwen, ids, *masks))


def ltx_video_forward(denoiser, x_t, told, text, seen):
    from diffusers import LTXConditionPipeline, LTXPipeline

    frames, height, width = x_t.shape[2:]
    # no token of the miniatures' batches lies behind the first latent frame, where versions differ
    ids = LTXConditionPipeline._prepare_video_ids(len(x_t), frames, height, width)
    coordinates = LTXConditionPipeline._scale_video_ids(ids).float() * torch.tensor([1 / 25, 1, 1])[None, :, None]
    return denoiser(
        hidden_states=LTXPipeline._pack_latents(x_t),
        timestep=told,
        encoder_hidden_states=text,
        encoder_attention_mask=seen if seen.shape[1] > 1 else None,
        video_coords=coordinates,
        return_dict=False,
    )[0]


def hunyuan_video_forward(denoiser, x_t, told, text, seen, pooled, guidance):
    mask = seen if seen.shape[1] > 1 else seen.expand(text.shape[:2])
    return denoiser(x_t, told, text, mask, pooled, guidance, return_dict=False)[0]


FORWARD = {
    "anima": anima_forward,
    "chroma": chroma_forward,
    "cosmos_predict2": cosmos_forward,
    "flux": flux_forward,
    "flux2": flux2_forward,
    "hunyuan-video": hunyuan_video_forward,
    "ltx-video": ltx_video_forward,
    "lumina_2": lumina_2_forward,
    "qwen2511": qwen_image_forward,
    "qwen_image": qwen_image_forward,
    "sd3": sd3_forward,
    "sdxl": sdxl_forward,
    "wan": wan_forward,
    "z_image": z_image_forward,
}
"""For each family, the library's own forward on the inputs of the first link."""


def flux_prompted(pipeline, prompt, generator, images):
    return pipeline(
        prompt, height=32, width=64, num_inference_steps=2, guidance_scale=4.0, max_sequence_length=32,
        generator=generator,
    ).images  # fmt: skip


def lumina_2_prompted(pipeline, prompt, generator, images):
    arguments = {}
    for prefix, text in (("", prompt), ("negative_", "")):  # without the system prompt
        embeds, mask = pipeline._get_gemma_prompt_embeds(text, max_sequence_length=64)
        arguments |= {f"{prefix}prompt_embeds": embeds, f"{prefix}prompt_attention_mask": mask}
    return pipeline(
        **arguments, height=32, width=64, num_inference_steps=2, guidance_scale=4.0, generator=generator
    ).images


def sdxl_prompted(pipeline, prompt, generator, images):
    return pipeline(
        prompt, height=32, width=64, num_inference_steps=2, guidance_scale=4.0, negative_prompt="", generator=generator
    ).images


def wan_prompted(pipeline, prompt, generator, images):
    from diffusers import WanPipeline

    # WanImageToVideoPipeline's own function for this is the same, but does not work without ftfy
    with torch.no_grad():
        positive, negative = (
            WanPipeline._get_t5_prompt_embeds(pipeline, [text], max_sequence_length=512) for text in (prompt, "")
        )
    names = ("image", "last_image") if pipeline.transformer.config.pos_embed_seq_len else ("image",)
    return pipeline(
        prompt_embeds=positive, negative_prompt_embeds=negative, height=32, width=64, num_frames=5 if images else 1,
        num_inference_steps=2, guidance_scale=4.0, generator=generator, output_type="pil",
        **dict(zip(names, images, strict=False)),
    ).frames[0]  # fmt: skip


def z_image_prompted(pipeline, prompt, generator, images):
    return pipeline(
        prompt=prompt, height=32, width=64, num_inference_steps=2, guidance_scale=4.0, max_sequence_length=64,
        generator=generator,
    ).images  # fmt: skip


def qwen_image_prompted(pipeline, prompt, generator, images):
    return pipeline(
        prompt, negative_prompt="", height=32, width=64, num_inference_steps=2, true_cfg_scale=4.0,
        max_sequence_length=64, generator=generator,
    ).images  # fmt: skip


def anima_prompted(pipeline, prompt, generator, images):
    """An empty caption is Qwen3's padding token, unlike there."""
    own, t5 = pipeline.tokenizer, pipeline.t5_tokenizer
    arguments = {}
    for prefix, text in (("", prompt), ("negative_", "")):
        ids = torch.tensor([own(text).input_ids or [own.pad_token_id]])
        arguments[f"{prefix}qwen_prompt_embeds"] = pipeline.text_encoder(ids).last_hidden_state.detach()
        arguments[f"{prefix}qwen_attention_mask"] = torch.ones_like(ids)
        tokens = t5([text], return_tensors="pt")
        arguments[f"{prefix}t5_input_ids"] = tokens.input_ids
        arguments[f"{prefix}t5_attention_mask"] = tokens.attention_mask
    pipeline._blocks.sub_blocks.pop("text_encoder")
    return pipeline(
        **arguments, height=32, width=64, num_inference_steps=2, generator=generator, output="images"
    )  # fmt: skip


def ltx_video_prompted(pipeline, prompt, generator, images):
    """With what T5 gives where it does not see the padding, which LTXPipeline shows it."""
    told = {"decode_timestep": 0.05, "decode_noise_scale": 0.025}
    arguments = told if pipeline.vae.config.timestep_conditioning else {}
    longest = len(pipeline.tokenizer(prompt).input_ids)
    for prefix, text in (("", prompt), ("negative_", "")):
        tokens = pipeline.tokenizer(text, padding="max_length", max_length=32, return_tensors="pt")
        mask = tokens.attention_mask.bool()
        with torch.no_grad():
            embeds = pipeline.text_encoder(tokens.input_ids, attention_mask=mask)[0]
        arguments[f"{prefix}prompt_embeds"] = embeds[:, :longest]
        arguments[f"{prefix}prompt_attention_mask"] = mask[:, :longest]
    return pipeline(
        height=32, width=64, num_frames=1, num_inference_steps=2, guidance_scale=4.0, generator=generator, **arguments
    ).frames[0]  # fmt: skip


def hunyuan_video_prompted(pipeline, prompt, generator, images):
    from diffusion_trainer.models.hunyuan_video_files import END, PROMPTS

    before, start = PROMPTS["llama_picture_embeds"]
    return pipeline(
        prompt, height=32, width=64, num_frames=1, num_inference_steps=2, guidance_scale=4.0, generator=generator,
        prompt_template={"template": before + "{}" + END, "crop_start": start}, output_type="pil",
    ).frames[0]  # fmt: skip


PROMPTED = {
    "anima": anima_prompted,
    "chroma": flux_prompted,
    "cosmos_predict2": sdxl_prompted,
    "flux": flux_prompted,
    "flux2": z_image_prompted,
    "hunyuan-video": hunyuan_video_prompted,
    "ltx-video": ltx_video_prompted,
    "lumina_2": lumina_2_prompted,
    "qwen2511": qwen_image_prompted,
    "qwen_image": qwen_image_prompted,
    "sd3": flux_prompted,
    "sdxl": sdxl_prompted,
    "wan": wan_prompted,
    "z_image": z_image_prompted,
}
"""For each family, what its pipeline draws from a prompt: 64 wide, 32 high, 2 steps, guidance 4; where there are
pictures to start from, 5 frames."""

VARIANTS: dict[str, list[dict]] = {
    "ltx-video": [{"variant": name} for name in ("0.9", "0.9.5")],
    "sd3": [{"variant": name} for name in ("sd3", "sd35_medium")],
    "flux2": [{"variant": name} for name in ("klein", "dev")],
    "wan": [{"variant": name} for name in ("t2v", "flf2v")],
}
"""For families whose variants differ in shape, the arguments of `write_miniature` for each."""
MINIATURES = [(name, variant) for name in families() for variant in VARIANTS.get(name, [{}])]


@pytest.fixture(scope="module", params=MINIATURES, ids=lambda pair: "-".join([pair[0], *pair[1].values()]))
def miniature(request, tmp_path_factory):
    """A family's name, which variant, and the ``[model]`` table of that miniature."""
    name, variant = request.param
    return name, variant, families()[name].write_miniature(tmp_path_factory.mktemp(name), **variant)


@pytest.fixture(scope="module")
def table(miniature):
    return miniature[2]


def load(table, **changes) -> Family:
    kind = families()[table["type"]]
    family = kind(validate(kind.Config, {**table, **changes}))
    family.check_files()
    return family


def examples(family: Family, number: int = 2) -> list[Example]:
    """Samples of noise, 64 wide and 32 high, through the family's own encoders; clips where it takes no pictures."""
    generator = torch.Generator().manual_seed(1)
    frames = 1 if family.takes_pictures else 5
    pixels = torch.rand(number, 3, frames, 32, 64, generator=generator) * 2 - 1
    generators = [torch.Generator().manual_seed(2 + i) for i in range(number)]
    media = family.encode_media(family.load_vae(CPU), pixels, generators)
    text = {}
    for name in family.text_encoders:
        text |= family.encode_text(name, family.load_text_encoder(name, CPU), ["a red cat", "a photo"][:number])
    return [
        Example(
            {key: value[i] for key, value in media.items()},
            {key: value[i] for key, value in text.items()},
            torch.randn(media["latents"][i].shape, generator=generator),
            quantile=0.3 + 0.4 * i,
        )
        for i in range(number)
    ]


def run(layers, inputs, see=lambda values: None):
    """The chain's prediction; ``see`` is shown the tuple at every cut."""
    for layer in layers:
        inputs = layer.forward(SimpleNamespace(**layer.submodules), *inputs)
        if layer is not layers[-1]:
            see(inputs)
    return inputs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_equal_the_librarys_forward(table, dtype):
    family = load(table, dtype=dtype)
    denoiser, batch = family.load_denoiser(CPU), family.collate(examples(family))
    cuts = []
    with torch.no_grad():
        prediction = run(family.layers(denoiser), batch.inputs, cuts.append)
        expected = FORWARD[table["type"]](denoiser, *batch.inputs)
    assert torch.equal(prediction, expected)
    assert prediction.shape == batch.target.shape
    assert batch.target.dtype == torch.float32
    assert all(tensor.is_contiguous() for cut in cuts for tensor in cut)


def test_gradients_of_the_layers_equal_the_librarys(table):
    family = load(table, dtype="float32")
    denoiser, batch = family.load_denoiser(CPU), family.collate(examples(family))
    gradients = []
    for predict in (
        lambda *inputs: run(family.layers(denoiser), inputs),
        lambda *i: FORWARD[table["type"]](denoiser, *i),
    ):
        denoiser.zero_grad()
        torch.nn.functional.mse_loss(predict(*batch.inputs), batch.target).backward()
        gradients.append({name: parameter.grad for name, parameter in denoiser.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=lambda text, name=name: f"{name}: {text}")


def test_each_parameter_is_held_by_one_link(table):
    family = load(table)
    denoiser = family.load_denoiser(CPU)
    layers = family.layers(denoiser)
    held = [{id(p) for module in layer.submodules.values() for p in module.parameters()} for layer in layers]
    assert sum(len(part) for part in held) == len(set().union(*held))
    assert set().union(*held) == {id(parameter) for parameter in denoiser.parameters()}
    assert len({layer.name for layer in layers}) == len(layers)
    assert any(layer.is_block for layer in layers)


def test_names_in_the_attributes_exist(table):
    family = load(table)
    denoiser = family.load_denoiser(CPU)
    classes = {type(module).__name__ for module in denoiser.modules()}
    assert set(family.adapter_blocks) <= classes
    names = [name for name, _ in denoiser.named_parameters()]
    for pattern in family.high_precision:
        assert any(re.search(pattern, name) for name in names), pattern


def test_layers_of_a_module_that_share_their_input_are_declared(table):
    family = load(table)
    denoiser, batch = family.load_denoiser(CPU), family.collate(examples(family))
    given: dict[tuple[str, int], set[str]] = {}
    held = []

    def note(name: str, inputs: tuple) -> None:
        held.append(inputs[0])  # so that its id stays its own
        given.setdefault((name.rpartition(".")[0], id(inputs[0])), set()).add(name)

    targets = set(target_names(denoiser, family, validate(Lora, {"type": "lora", "rank": 2})))
    for name in targets:
        denoiser.get_submodule(name).register_forward_pre_hook(lambda _, inputs, name=name: note(name, inputs))
    with torch.no_grad():
        run(family.layers(denoiser), batch.inputs)
    together: dict[object, set[str]] = {}
    for name, layer in adapted_layers(inject(denoiser, family, validate(Lora, {"type": "lora", "rank": 2}), 0)).items():
        together.setdefault(layer.together, set()).add(name)
    assert {frozenset(names) for names in together.values()} == {frozenset(names) for names in given.values()}


def test_settings_survive_a_round_trip(table, tmp_path):
    config = load(table).config
    write_toml(tmp_path / "train.toml", {"model": config.model_dump()})
    assert validate(type(config), read_toml(tmp_path / "train.toml")["model"], "model") == config


def test_every_option_is_described(table):
    for name, field in load(table).config.__class__.model_fields.items():
        assert field.description or name == "type", name


def test_miniature_is_small_and_the_same_every_time(miniature, tmp_path):
    name, variant, table = miniature
    family = families()[name]
    again = load({**table, **family.write_miniature(tmp_path, **variant)})
    first = load(table)
    states = [model.load_denoiser(CPU).state_dict() for model in (first, again)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert sum(value.numel() for value in states[0].values()) < 400_000  # Z-Image's time alone has 300,000
    parts = ("vae", *family.text_encoders)
    assert [first.identity(part) for part in parts] == [again.identity(part) for part in parts]


def test_encoded_tensors_are_plain(table):
    family = load(table, dtype="bfloat16")
    for example in examples(family):
        assert not any(tensor.requires_grad for tensor in (*example.media.values(), *example.text.values()))
        assert example.media["latents"].dtype == torch.bfloat16


def test_collating_one_by_one_equals_a_batch(table):
    """Inputs differ where captions have their own lengths; what is made of them does not."""
    family = load(table, dtype="float32")
    both = examples(family)
    batch, layers = family.collate(both), family.layers(family.load_denoiser(CPU))
    with torch.no_grad():
        together = run(layers, batch.inputs)
        for i, example in enumerate(both):
            single = family.collate([example])
            assert torch.equal(single.target[0], batch.target[i])
            assert torch.equal(single.inputs[0][0], batch.inputs[0][i])
            torch.testing.assert_close(run(layers, single.inputs)[0], together[i], atol=1e-5, rtol=1e-5)
    assert not torch.equal(family.collate([dataclasses.replace(both[0], quantile=0.9)]).inputs[0], batch.inputs[0][:1])


def test_loss_falls_on_one_sample(table):
    family = load(table, dtype="float32")
    denoiser, batch = family.load_denoiser(CPU), family.collate(examples(family, 1))
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=3e-3)
    layers, losses = family.layers(denoiser), []
    for _ in range(40):
        loss = torch.nn.functional.mse_loss(run(layers, batch.inputs), batch.target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0], losses


@pytest.mark.parametrize("name", list(families()))
def test_importing_a_family_loads_no_torch(name):
    module = families()[name].__module__
    code = (
        "import sys, conftest, importlib\n"
        f"importlib.import_module({module!r})\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'accelerate', 'safetensors', 'deepspeed'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "tests", capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_a_sample_is_what_the_pipeline_draws_from_the_prompt(table):
    family = load(table, dtype="float32")
    denoiser = family.load_denoiser(CPU)
    text, negative = {}, {}
    for name in family.text_encoders:
        encoder = family.load_text_encoder(name, CPU)
        text |= {key: value[0] for key, value in family.encode_text(name, encoder, ["a red cat"]).items()}
        negative |= {key: value[0] for key, value in family.encode_text(name, encoder, [""]).items()}
    pipeline = family.pipeline(denoiser, CPU, text_encoders=False)
    networks = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    assert {parameter for network in networks for parameter in network.parameters()} >= set(denoiser.parameters())
    pipeline.set_progress_bar_config(disable=True)
    chance = random.Random(3)
    images = [Image.frombytes("RGB", (64, 32), chance.randbytes(64 * 32 * 3)) for _ in range(2)]
    if family.takes_pictures:
        images = []
    frames = 5 if images else 1
    request = SampleRequest(text, negative, 64, 32, frames, steps=2, guidance=4.0, seed=5, images=tuple(images))
    drawn = family.sample(pipeline, request)
    whole = family.pipeline(denoiser, CPU)
    whole.set_progress_bar_config(disable=True)
    expected = PROMPTED[table["type"]](whole, "a red cat", torch.Generator().manual_seed(5), images)
    assert len(drawn) == len(expected) == frames
    assert all(frame.size == (64, 32) for frame in drawn)
    assert [frame.tobytes() for frame in drawn] == [frame.tobytes() for frame in expected]


def test_the_weight_by_noise_level_is_in_the_batch(table):
    field = families()[table["type"]].Config.model_fields["loss_weighting"]
    if "cosmap" not in str(field.annotation):
        pytest.skip("weighs its loss in its own way")
    both = examples(load(table))
    plain, weighted = load(table).collate(both), load(table, loss_weighting="cosmap").collate(both)
    ratio = (weighted.weight / plain.weight).expand_as(plain.target).flatten(1)
    for example, row in zip(both, ratio, strict=True):
        t = load(table).timestep(example.quantile, tuple(example.media["latents"].shape[-2:]))
        assert row.unique().item() == pytest.approx(2 / (math.pi * (1 - 2 * t + 2 * t**2)), rel=1e-4)
