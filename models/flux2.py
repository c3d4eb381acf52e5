"""FLUX.2: klein base 4B and 9B, and dev, by Black Forest Labs.

A rectified-flow transformer over 2x2 patches of 32-channel latents, which its VAE normalises. Text and image tokens
pass the double blocks as two streams with joint attention, then the single blocks as one sequence; all blocks of a
kind share one modulation. Text is three hidden states of a language model side by side (Qwen3 for klein, Mistral
Small 3 for dev), always of 512 tokens: what fills it up is seen as well, so a cached caption takes 8 (klein 4B) to 16
(dev) million bytes. Guidance is an input of dev (distilled); klein has none. The network predicts noise - x0. Control
pictures come after the image, each at a time of its own in the position ids.

klein comes as base and distilled to four steps, and nothing in a file tells which it is: base is the one to train.

Reference: https://github.com/black-forest-labs/flux2, and diffusers' Flux2KleinPipeline and Flux2Pipeline, which the
layers here equal bit for bit. In ComfyUI dev's text is filled up with zeros instead. Licence of the weights: klein 4B
Apache-2.0, klein 9B and dev FLUX Non-Commercial.

Shape legend: N batch, C channels of patched latents (128), H W height and width of patched latents, T image tokens
(H * W), L text tokens, D features.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..utils.config import SettingsError, option
from ..utils.imports import lazy
from ..utils.weights import Weights, build
from . import flux2_vae
from .base import Batch, Encodings, Example, Layer, SampleRequest, Shapes
from .components import Component, FromComponents, TextEncoder, language_model_name
from .files import fingerprint, read_json, write_json
from .flow import FlowFamily
from .flux import DEV_SCHEDULE, read_bfl
from .from_comfyui import FromComfyUI
from .fused import swap_halves, to_fused
from .mistral import EMBEDDED_TOKENIZER, MISTRAL, load_mistral, miniature_mistral, mistral_name, write_mistral_tokenizer
from .qwen3 import QWEN3_4B, is_qwen3_tokenizer, load_qwen, write_qwen_tokenizer

if TYPE_CHECKING:
    import diffusers
    import torch
    import transformers
    from PIL import ImageOps
    from torch import nn
else:
    diffusers, torch, transformers = map(lazy, ("diffusers", "torch", "transformers"))
    ImageOps = lazy("PIL.ImageOps")

QWEN_LAYERS = (9, 18, 27)
QWEN_TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
"""A prompt as Qwen3 is asked it: its chat template with thinking left out."""
MISTRAL_LAYERS = (10, 20, 30)
MISTRAL_TEMPLATE = (
    "<s>[SYSTEM_PROMPT]You are an AI that reasons about image descriptions. You give structured responses focusing on "
    "object relationships, object\nattribution and actions without speculation.[/SYSTEM_PROMPT][INST]{}[/INST]"
)
CONTROL_TIME = 10
"""Control pictures are at this time, twice this, and so on; the image is at 0."""
USUAL_STEPS = 50
"""Of the pipelines; their shift depends on it."""


class Flux2Config(FromComfyUI):
    """FLUX.2 dev and klein (base, not the distilled one), from single files as ComfyUI has them, from a diffusers
    folder, or from both."""

    type: Literal["flux2"] = "flux2"
    diffusers_path: str | None = option(
        None,
        "Folder of the whole model in diffusers layout. What a file given elsewhere holds is taken from there instead.",
        picker="diffusers",
    )
    tokenizer_path: str | None = option(
        None,
        "Folder of the tokenizer, if it is in neither the diffusers folder nor ComfyUI nor the text encoder's file.",
        advanced=True,
    )
    guidance: float = option(
        1.0, "Guidance that dev is told while training; klein is told none. 1 leaves later guidance intact.",
        ge=0, step=0.1,
    )  # fmt: skip
    max_sequence_length: int = option(
        512,
        "Tokens of text, with those of the template; shorter captions are filled up, longer ones cut. FLUX.2 was "
        "trained with 512.",
        ge=64,
        le=512,
        advanced=True,
    )


QWEN3_8B = replace(
    QWEN3_4B, title="Qwen3 8B, such as qwen_3_8b.safetensors", prefixes=("text_encoders.qwen3_8b.transformer.",)
)
QWEN3_8B_WIDTH = 4096
"""Features of it; the other has 2560."""
COMPONENTS = {
    "transformer": Component(
        "a FLUX.2 transformer, such as flux-2-klein-base-4b.safetensors", "diffusion_model", "transformer",
        "Flux2Transformer2DModel", ("double_blocks.0.img_attn.qkv.weight", "double_stream_modulation_img.lin.weight"),
        ("model.diffusion_model.", "diffusion_model.")),
    "vae": flux2_vae.FLUX2_VAE,
    "text": QWEN3_4B,
}  # fmt: skip


class Flux2(FromComponents, FlowFamily):
    """FLUX.2 in the hands of the trainer."""

    title = "FLUX.2"
    Config = Flux2Config
    config: Flux2Config
    components = COMPONENTS
    whole = "a FLUX.2 folder in diffusers layout"
    size_multiple = 16
    latent_multiple = 16
    max_controls = 10
    text_encoders = ("text",)
    shared_inputs = (("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"))
    says_alpha = False
    adapter_blocks = ("Flux2TransformerBlock", "Flux2SingleTransformerBlock")
    high_precision = (
        "^time_guidance_embed", "^context_embedder", "^x_embedder", "^norm_out", "^proj_out", "_stream_modulation",
    )  # fmt: skip

    # -- files ------------------------------------------------------------------------------------

    def _given(self, name: str) -> tuple[str | None, str]:
        if name != "text":
            return super()._given(name)
        files = self.config.text_encoders
        if len(files) > 1 or any(entry.paths for entry in files):
            raise SettingsError(f"model.text_encoders: FLUX.2 has one; give {self._component(name).title}")
        return files[0].path if files else None, "model.text_encoders.path"

    def _component(self, name: str) -> Component:
        """The text encoder is that which the transformer was trained with."""
        if name != "text":
            return super()._component(name)
        if self._is_dev:
            return MISTRAL
        is_larger = self._transformer_shape("context_embedder.weight")[1] == QWEN3_8B_WIDTH * len(QWEN_LAYERS)
        return QWEN3_8B if is_larger else QWEN3_4B

    @property
    def _is_dev(self) -> bool:
        """Known by its guidance."""
        weights = self._weights("transformer")
        name = "time_guidance_embed.guidance_embedder.linear_1.weight"
        return (name if weights.path.is_dir() else source_of(name)[0]) in weights

    @property
    def published(self) -> str:  # type: ignore[override]
        return "FLUX.2-dev" if self._is_dev else "FLUX.2-klein-base-4B"

    def _transformer_shape(self, name: str) -> tuple[int, ...]:
        weights = self._weights("transformer")
        return weights.shape(name if weights.path.is_dir() else source_of(name)[0])

    def check_files(self) -> None:
        parts = {name: self._weights(name) for name in self.components}
        tokenizer = self._tokenizer()
        if tokenizer and not self._is_dev and not is_qwen3_tokenizer(tokenizer):
            raise SettingsError(
                f"model.tokenizer_path: the tokenizer in '{tokenizer}' is not Qwen3's, but an older one, such as "
                f"ComfyUI 0.3.64 has; give the folder 'tokenizer' of {self.published}"
            )
        channels = parts["vae"].shape("decoder.conv_in.weight")[1]
        text, last = parts["text"], self._text_layers[-1]
        name_of = mistral_name if self._is_dev else language_model_name
        width = text.shape(name_of("embed_tokens.weight", text))[1] * len(self._text_layers)
        self._check_widths(
            parts,
            {
                "vae": (channels * 4, self._transformer_shape("x_embedder.weight")[1]),
                "text": (width, self._transformer_shape("context_embedder.weight")[1]),
            },
        )
        num_layers = text.count(name_of("layers.0.input_layernorm.weight", text).partition("0.")[0])
        if num_layers < last:
            raise SettingsError(
                f"{text.option}: '{text.path}' has {num_layers} layers, but FLUX.2 reads what layer {last} gives; give "
                f"{self._component('text').title}"
            )

    @property
    def _text_layers(self) -> tuple[int, ...]:
        return MISTRAL_LAYERS if self._is_dev else QWEN_LAYERS

    def _tokenizer(self) -> Path | None:
        """The tokenizer's folder; None: in the text encoder's file."""
        if self._is_dev and not self.config.tokenizer_path and EMBEDDED_TOKENIZER in self._weights("text"):
            return None
        return self._tokenizer_folder("text")

    def identity(self, part: str) -> str:
        identity = {"weights": fingerprint(self._place(part)[0]), "dtype": self.config.dtype}
        if part == "text":
            folder = self._tokenizer()
            identity["tokenizer"] = fingerprint(folder) if folder else EMBEDDED_TOKENIZER
            identity["length"] = str(self.config.max_sequence_length)
            if self.text_dtype:
                identity["storage"] = self.text_dtype
        return json.dumps(identity)

    # -- encoding, once per sample, cached ----------------------------------------------------------

    def load_vae(self, device: torch.device) -> nn.Module:
        return flux2_vae.load_vae(self._weights("vae"), self.dtype, device)

    def encode_media(
        self, vae: Any, pixels_NCFHW: torch.Tensor, generators: Sequence[torch.Generator]
    ) -> dict[str, torch.Tensor]:
        return {"latents": flux2_vae.encode(vae, pixels_NCFHW, self.dtype)}

    def load_text_encoder(self, name: str, device: torch.device) -> TextEncoder:
        """Without the layers that nothing is taken from."""
        load: Any = load_mistral if self._is_dev else load_qwen
        weights, folder = self._weights(name), self._tokenizer()
        return load(weights, folder, self.dtype, device, self.text_storage(), self._text_layers[-1])

    def encode_text(self, name: str, encoder: TextEncoder, captions: Sequence[str]) -> Encodings:
        filled = {"padding": "max_length", "truncation": True, "max_length": self.config.max_sequence_length}
        if self._is_dev:  # whose template has the first token, and for which this one stands for a picture
            texts = [MISTRAL_TEMPLATE.format(caption.replace("[IMG]", "")) for caption in captions]
            tokens = encoder.tokenizer(texts, add_special_tokens=False, return_tensors="pt", **filled)
        else:
            tokens = encoder.tokenizer([QWEN_TEMPLATE.format(c) for c in captions], return_tensors="pt", **filled)
        device = encoder.model.device
        with torch.no_grad():
            output = encoder.model(
                tokens.input_ids.to(device), attention_mask=tokens.attention_mask.to(device), output_hidden_states=True,
                use_cache=False,
            )  # fmt: skip
        return {"text_embeds": torch.cat([output.hidden_states[n] for n in self._text_layers], dim=-1).to(self.dtype)}

    # -- training -----------------------------------------------------------------------------------

    def timestep_shift(self, latent_size: tuple[int, ...]) -> float:
        if self.config.shift is None and self.config.flux_shift:
            return resolution_shift(latent_size)
        return super().timestep_shift(latent_size)

    def build_denoiser(self) -> nn.Module:
        weights = self._weights("transformer")
        is_folder = weights.path.is_dir()
        config = read_json(weights.path / "config.json") if is_folder else transformer_config(weights)
        return build(lambda: diffusers.Flux2Transformer2DModel.from_config(config))

    def denoiser_reader(self) -> Callable[[str], torch.Tensor]:
        weights = self._weights("transformer")
        return weights.read if weights.path.is_dir() else partial(read_single, weights)

    def layers(self, denoiser: Any) -> list[Layer]:
        """As `Family.layers`; the denoiser is given the forms of `flux2_attention`, which pipelines run as well."""
        from .flux2_attention import use_fast_forms

        use_fast_forms(denoiser)

        def parts(*names: str) -> dict[str, Any]:
            return {name: getattr(denoiser, name) for name in names}

        modulations = parts("double_stream_modulation_img", "double_stream_modulation_txt")
        embedders = parts("x_embedder", "context_embedder", "time_guidance_embed", "pos_embed")
        layers = [Layer("embed", _embed, {**embedders, **modulations})]
        for index, block in enumerate(denoiser.transformer_blocks):
            layers.append(Layer(f"transformer_blocks.{index}", _double, {"block": block}, is_block=True))
        layers.append(Layer("join", _join, parts("single_stream_modulation")))
        for index, block in enumerate(denoiser.single_transformer_blocks):
            layers.append(Layer(f"single_transformer_blocks.{index}", _single, {"block": block}, is_block=True))
        layers.append(Layer("out", _out, parts("norm_out", "proj_out")))
        return layers

    def collate(self, examples: Sequence[Example]) -> Batch:
        x_t_NCHW, t_N, velocity_NCHW = self.noised(examples)
        # The network is told the time as the pipeline rounds it: t * 1000 in the latents' precision.
        told_N = ((t_N * 1000).to(self.dtype) / 1000).float()
        text_NLD = torch.stack([example.text["text_embeds"] for example in examples]).to(self.dtype)
        target_NTC = tokens_of(velocity_NCHW)
        controls = zip(*(example.controls for example in examples), strict=True)
        return Batch(
            inputs=(
                x_t_NCHW.to(self.dtype), told_N, text_NLD, torch.full_like(t_N, self.config.guidance),
                *(torch.stack([each["latents"] for each in control]).to(self.dtype) for control in controls),
            ),
            target=target_NTC,
            weight=self.time_weight(t_N, target_NTC),
        )  # fmt: skip

    def cached_shapes(self, latent_size: tuple[int, int, int]) -> tuple[Shapes, Shapes]:
        config: Any = self.build_denoiser().config
        text = {"text_embeds": (self.config.max_sequence_length, config.joint_attention_dim)}
        return {"latents": (config.in_channels, *latent_size[1:])}, text

    def spread_mask(self, mask_NFHW: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return tokens_of(mask_NFHW)

    # -- results ------------------------------------------------------------------------------------

    def lora_keys(self, module_name: str) -> str:
        """Modules whose names in diffusers ComfyUI does not know are called as in the single file."""
        if module_name.startswith("time_guidance_embed") or "_stream_modulation" in module_name:
            single = source_of(f"{module_name}.weight")[0].removesuffix(".weight")
            return f"lora_unet_{single.replace('.', '_')}"
        return f"transformer.{module_name}"

    def comfyui_rows(self, module_name: str, scale: torch.Tensor) -> torch.Tensor:
        return swap_halves(scale) if source_of(f"{module_name}.weight")[1] == "swapped" else scale

    def comfyui_tensors(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return to_fused(tensors, source_of)

    def pipeline(self, denoiser: Any, device: torch.device, text_encoders: bool = True) -> Any:
        text = self.load_text_encoder("text", device) if text_encoders else TextEncoder(None, None)
        schedule = self._schedule(DEV_SCHEDULE)
        self.layers(denoiser)  # for its attention
        parts = {
            "scheduler": diffusers.FlowMatchEulerDiscreteScheduler.from_config(schedule),
            "vae": self.load_vae(device),
            "text_encoder": text.model,
            "tokenizer": text.tokenizer,
            "transformer": denoiser,
        }
        if denoiser.config.guidance_embeds:
            return diffusers.Flux2Pipeline(**parts)
        return diffusers.Flux2KleinPipeline(**parts, is_distilled=self._is_distilled)

    @property
    def _is_distilled(self) -> bool:
        """As the folder says, where its transformer is trained; a file says nothing."""
        if self.config.diffusers_path and not self._given("transformer")[0]:
            file = Path(self.config.diffusers_path).expanduser() / "model_index.json"
            return file.is_file() and bool(read_json(file).get("is_distilled"))
        return False

    def vae_latents(self, latents: torch.Tensor) -> torch.Tensor:
        return flux2_vae.unpatched(latents)

    def prompt_arguments(self, request: SampleRequest, device: torch.device) -> dict[str, Any]:
        arguments: dict[str, Any] = {"prompt_embeds": request.text["text_embeds"][None].to(device)}
        if not self._is_dev:
            arguments["negative_prompt_embeds"] = request.negative_text["text_embeds"][None].to(device)
        if request.images:  # at the size of what is drawn, as in training
            size = request.width, request.height
            arguments["image"] = [ImageOps.fit(image.convert("RGB"), size) for image in request.images]
        return arguments

    @classmethod
    def write_miniature(cls, folder: Path, variant: Literal["klein", "dev"] = "klein") -> dict[str, Any]:
        """As `Family.write_miniature`."""
        is_dev = variant == "dev"
        vocabulary = (write_mistral_tokenizer if is_dev else write_qwen_tokenizer)(folder / "tokenizer")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            parts = _miniature_parts(is_dev, vocabulary)
        pipeline = "Flux2Pipeline" if is_dev else "Flux2KleinPipeline"
        index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": diffusers.__version__}
        for name, part in parts.items():
            part.save_pretrained(folder / name)
            index[name] = [type(part).__module__.split(".")[0], type(part).__name__]
        index["tokenizer"] = ["transformers", "PreTrainedTokenizerFast"]
        index |= {} if is_dev else {"is_distilled": False}
        write_json(folder / "model_index.json", index)
        return {"type": "flux2", "diffusers_path": str(folder), "dtype": "float32", "max_sequence_length": 64}


def resolution_shift(latent_size: tuple[int, ...]) -> float:
    """The shift that FLUX.2 uses for a picture of this size: e^mu, mu linear in the number of image tokens.

    mu is 1.6 to 2.0 for 256 to 4300 tokens at `USUAL_STEPS` steps; above it begins anew at 1.2, whatever the steps.
    Source: the sampling code of Black Forest Labs' flux2 repository (`compute_empirical_mu`).
    """
    tokens = latent_size[-2] * latent_size[-1]
    at_200_steps = 0.00016927 * tokens + 0.45666666
    at_10_steps = 8.73809524e-05 * tokens + 1.89833333
    if tokens > 4300:
        return math.exp(at_200_steps)
    return math.exp(at_200_steps + (at_10_steps - at_200_steps) * (200 - USUAL_STEPS) / 190)


# -- links of the chain ---------------------------------------------------------------------------------

Tensors = tuple["torch.Tensor", ...]


def tokens_of(latents_NCHW: torch.Tensor) -> torch.Tensor:
    """Patched latents as tokens, row by row: NTC."""
    return latents_NCHW.flatten(2).transpose(1, 2).contiguous()


def position_ids(num_text: int, height: int, width: int, num_controls: int, device: torch.device) -> torch.Tensor:
    """(time, row, column, place) of each token: text, which has places alone; then the image and the controls."""
    text_L4 = torch.zeros(num_text, 4, device=device)
    text_L4[:, 3] = torch.arange(num_text, device=device)
    pictures = torch.zeros(1 + num_controls, height, width, 4, device=device)
    pictures[..., 0] = CONTROL_TIME * torch.arange(1 + num_controls, device=device)[:, None, None]
    pictures[..., 1] = torch.arange(height, device=device)[:, None]
    pictures[..., 2] = torch.arange(width, device=device)
    return torch.cat([text_L4, pictures.flatten(0, 2)])


def _embed(
    modules: Any,
    x_t_NCHW: torch.Tensor,
    t_N: torch.Tensor,
    text_NLD: torch.Tensor,
    guidance_N: torch.Tensor,
    *controls_NCHW: torch.Tensor,
) -> Tensors:
    """Image, text, time, the modulations of both, how far features are turned, and a tensor as long as there are
    tokens that are made."""
    x_NTD = modules.x_embedder(torch.cat([tokens_of(picture) for picture in (x_t_NCHW, *controls_NCHW)], dim=1))
    time_ND = modules.time_guidance_embed(*(told.to(x_NTD.dtype) * 1000 for told in (t_N, guidance_N)))
    height, width = x_t_NCHW.shape[2:]
    cos, sin = modules.pos_embed(position_ids(text_NLD.shape[1], height, width, len(controls_NCHW), x_NTD.device))
    made_T = torch.zeros(height * width, dtype=torch.uint8, device=x_NTD.device)
    return (
        x_NTD, modules.context_embedder(text_NLD), time_ND, modules.double_stream_modulation_img(time_ND),
        modules.double_stream_modulation_txt(time_ND), cos.contiguous(), sin.contiguous(), made_T,
    )  # fmt: skip


def _double(
    modules: Any, x_NTD: torch.Tensor, text_NLD: torch.Tensor, time_ND: torch.Tensor, x_mod: torch.Tensor,
    text_mod: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, made_T: torch.Tensor,
) -> Tensors:  # fmt: skip
    text_NLD, x_NTD = modules.block(x_NTD, text_NLD, x_mod, text_mod, (cos, sin))
    return x_NTD.contiguous(), text_NLD.contiguous(), time_ND, x_mod, text_mod, cos, sin, made_T


def _join(
    modules: Any, x_NTD: torch.Tensor, text_NLD: torch.Tensor, time_ND: torch.Tensor, _x_mod: Any, _text_mod: Any,
    cos: torch.Tensor, sin: torch.Tensor, made_T: torch.Tensor,
) -> Tensors:  # fmt: skip
    """One sequence, text first; and a tensor as long as the text, beside the last."""
    text_L = torch.zeros(text_NLD.shape[1], dtype=torch.uint8, device=made_T.device)
    modulation = modules.single_stream_modulation(time_ND)
    return torch.cat([text_NLD, x_NTD], dim=1), time_ND, modulation, cos, sin, text_L, made_T


def _single(
    modules: Any, joined_NTD: torch.Tensor, time_ND: torch.Tensor, modulation: torch.Tensor, cos: torch.Tensor,
    sin: torch.Tensor, text_L: torch.Tensor, made_T: torch.Tensor,
) -> Tensors:  # fmt: skip
    joined_NTD = modules.block(joined_NTD, None, modulation, (cos, sin))
    return joined_NTD.contiguous(), time_ND, modulation, cos, sin, text_L, made_T


def _out(
    modules: Any, joined_NTD: torch.Tensor, time_ND: torch.Tensor, _modulation: Any, _cos: Any, _sin: Any,
    text_L: torch.Tensor, made_T: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    x_NTD = joined_NTD.narrow(1, len(text_L), len(made_T))
    prediction_NTC: torch.Tensor = modules.proj_out(modules.norm_out(x_NTD, time_ND))
    return prediction_NTC


# -- the transformer in Black Forest Labs' layout ---------------------------------------------------------

TOP_MODULES = {
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "context_embedder": "txt_in",
    "x_embedder": "img_in",
    "norm_out.linear": "final_layer.adaLN_modulation.1:swapped",
    "proj_out": "final_layer.linear",
}
DOUBLE_MODULES = {
    "attn.to_q": "img_attn.qkv:q",
    "attn.to_k": "img_attn.qkv:k",
    "attn.to_v": "img_attn.qkv:v",
    "attn.add_q_proj": "txt_attn.qkv:q",
    "attn.add_k_proj": "txt_attn.qkv:k",
    "attn.add_v_proj": "txt_attn.qkv:v",
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
}
SINGLE_MODULES = {
    "attn.to_qkv_mlp_proj": "linear1",
    "attn.to_out": "linear2",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
}


def source_of(name: str) -> tuple[str, str]:
    """Where a parameter of diffusers' transformer lies in BFL's: the tensor's name and the part of it.

    The part is empty (all of it), "q", "k" or "v" (that third of the rows), or "swapped": BFL's last modulation gives
    shift before scale, diffusers' scale before shift.
    """
    module, _, leaf = name.rpartition(".")
    if match := re.fullmatch(r"(single_)?transformer_blocks\.(\d+)\.(.+)", module):
        stack, modules = ("single_blocks", SINGLE_MODULES) if match[1] else ("double_blocks", DOUBLE_MODULES)
        target = f"{stack}.{match[2]}.{modules[match[3]]}"
    else:
        target = TOP_MODULES[module]
    target, _, part = target.partition(":")
    return f"{target}.{'scale' if target.endswith(('query_norm', 'key_norm')) else leaf}", part


def _source_in(weights: Weights, name: str) -> tuple[str, str]:
    """As `source_of`; files that ComfyUI has written call the norms' parameters differently."""
    source, part = source_of(name)
    return (source if source in weights else re.sub("scale$", "weight", source)), part


def read_single(weights: Weights, name: str) -> torch.Tensor:
    """A parameter of diffusers' transformer from a file in BFL's layout."""
    return read_bfl(weights, name, partial(_source_in, weights))


def transformer_config(weights: Weights) -> dict[str, Any]:
    """Arguments of Flux2Transformer2DModel for a file in BFL's layout, from names and shapes."""
    head_dim = weights.shape(_source_in(weights, "transformer_blocks.0.attn.norm_q.weight")[0])[0]
    width, in_channels = weights.shape("img_in.weight")
    return {
        "in_channels": in_channels,
        "out_channels": weights.shape("final_layer.linear.weight")[0],
        "num_layers": weights.count("double_blocks."),
        "num_single_layers": weights.count("single_blocks."),
        "attention_head_dim": head_dim,
        "num_attention_heads": width // head_dim,
        "joint_attention_dim": weights.shape("txt_in.weight")[1],
        "timestep_guidance_channels": weights.shape("time_in.in_layer.weight")[1],
        "mlp_ratio": weights.shape("double_blocks.0.img_mlp.2.weight")[1] / width,
        "axes_dims_rope": (head_dim // 4,) * 4,
        "guidance_embeds": "guidance_in.in_layer.weight" in weights,
    }


# -- miniature --------------------------------------------------------------------------------------------


def _miniature_parts(is_dev: bool, vocabulary: int) -> dict[str, Any]:
    """The language models have one layer more than is read."""
    text: Any = {"vocab_size": vocabulary, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 1,
                 "num_key_value_heads": 1}  # fmt: skip
    if is_dev:
        encoder = miniature_mistral({**text, "num_hidden_layers": MISTRAL_LAYERS[-1] + 1})
    else:
        text |= {"num_hidden_layers": QWEN_LAYERS[-1] + 1, "head_dim": 16, "rope_theta": 1e6}
        encoder = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**text))
    models: dict[str, Any] = {
        "transformer": diffusers.Flux2Transformer2DModel(
            in_channels=32, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=48, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=is_dev),
        "vae": flux2_vae.miniature(),
        "text_encoder": encoder,
    }  # fmt: skip
    return {
        **{name: model.to(torch.bfloat16) for name, model in models.items()},
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(**DEV_SCHEDULE),
    }
