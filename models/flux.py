"""Flux.1: dev, schnell, Kontext and models trained from them, by Black Forest Labs.

A rectified-flow transformer over 2x2 patches of 16-channel latents. Text and image tokens pass the
double blocks as two streams with joint attention, then the single blocks as one sequence. Guidance
is an input of dev (distilled); schnell has none. The network predicts noise - x0. Kontext, and whatever is trained
with control pictures, sees the control's patches after its own; what it says of those is dropped.

Reference: https://github.com/black-forest-labs/flux, and diffusers' FluxPipeline and FluxKontextPipeline, which the
layers here equal bit for bit. Licence of the weights: schnell Apache-2.0, dev and Kontext FLUX.1 [dev] Non-Commercial.

Shape legend: N batch, C latent channels, H W height and width of the latents, T image tokens (H/2 * W/2), twice as
many with a control picture, L text tokens, D features.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..utils.config import SettingsError, option
from ..utils.imports import lazy
from ..utils.weights import Weights, build, fill
from . import autoencoder
from .base import Batch, Encodings, Example, Layer, SampleRequest, Shapes
from .clip import CLIP_LENGTH, clip_config, clip_name, write_clip_tokenizer
from .components import CLIP_L, FLUX_VAE, T5_XXL, Component, FromComponents, TextEncoder, width_of
from .files import fingerprint, read_json, write_json
from .flow import FlowConfig, FlowFamily, pack
from .fused import ROWS, Source, swap_halves, to_fused
from .t5 import load_t5, write_t5_tokenizer

if TYPE_CHECKING:
    import diffusers
    import torch
    import transformers
    from PIL import ImageOps
    from PIL.Image import Image
    from torch import nn
else:
    diffusers, torch, transformers = map(lazy, ("diffusers", "torch", "transformers"))
    ImageOps = lazy("PIL.ImageOps")

DEV_SCHEDULE: dict[str, Any] = {
    "shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15,
    "base_image_seq_len": 256, "max_image_seq_len": 4096,
}  # fmt: skip
SCHNELL_SCHEDULE: dict[str, Any] = {"shift": 1.0, "use_dynamic_shifting": False}


class FluxConfig(FlowConfig):
    """Flux.1 dev, schnell or Kontext, from a diffusers folder, from single files as ComfyUI has them, or from both."""

    type: Literal["flux"] = "flux"
    diffusers_path: str | None = option(
        None,
        "Folder of the whole model in diffusers layout. What a path below names is taken from there instead.",
        picker="diffusers",
    )
    transformer_path: str | None = option(
        None, "Transformer as a single file, such as flux1-dev.safetensors.", picker="diffusion_models"
    )
    vae_path: str | None = option(None, "VAE as a single file, such as ae.safetensors.", picker="vae")
    clip_path: str | None = option(
        None, "CLIP-L text encoder as a single file, such as clip_l.safetensors.", picker="text_encoders"
    )
    t5_path: str | None = option(
        None, "T5-XXL text encoder as a single file, such as t5xxl_fp16.safetensors.", picker="text_encoders"
    )
    clip_tokenizer_path: str | None = option(
        None, "Folder of the CLIP tokenizer, if it is in neither the diffusers folder nor ComfyUI.", advanced=True
    )
    t5_tokenizer_path: str | None = option(
        None, "Folder of the T5 tokenizer, if it is in neither the diffusers folder nor ComfyUI.", advanced=True
    )
    bypass_guidance_embedding: bool = option(
        False,
        "Leave the guidance input out of the model; for models trained without it, such as Flex.1-alpha.",
        advanced=True,
    )
    guidance: float = option(
        1.0, "Guidance that dev is told while training. 1 leaves later guidance intact.", ge=0, step=0.1
    )
    max_sequence_length: int = option(
        512,
        "T5 tokens per caption, 512 for dev and 256 for schnell; longer captions are cut.",
        ge=1,
        le=512,
        advanced=True,
    )


COMPONENTS = {
    "transformer": Component(
        "a Flux transformer, such as flux1-dev.safetensors", "transformer_path", "transformer",
        "FluxTransformer2DModel", ("double_blocks.0.img_attn.qkv.weight", "vector_in.in_layer.weight"),
        ("model.diffusion_model.", "diffusion_model.")),
    "vae": FLUX_VAE,
    "clip": CLIP_L,
    "t5": T5_XXL,
}  # fmt: skip


class Flux(FromComponents, FlowFamily):
    """Flux.1 in the hands of the trainer."""

    title = "Flux"
    Config = FluxConfig
    config: FluxConfig
    components: ClassVar[Mapping[str, Component]] = COMPONENTS
    whole = "a Flux folder in diffusers layout"
    size_multiple = 16
    max_controls = 1
    text_encoders: ClassVar[tuple[str, ...]] = ("clip", "t5")
    shared_inputs = (("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"))
    adapter_blocks = ("FluxTransformerBlock", "FluxSingleTransformerBlock")
    high_precision: ClassVar[tuple[str, ...]] = (
        "^time_text_embed",
        "^context_embedder",
        "^x_embedder",
        "^norm_out",
        "^proj_out",
    )

    # -- files ------------------------------------------------------------------------------------

    def check_files(self) -> None:
        parts = {name: self._weights(name) for name in self.components}
        for name in self.text_encoders:
            self._tokenizer_folder(name)
        transformer, single = parts["transformer"], not parts["transformer"].path.is_dir()

        def shape(name: str) -> tuple[int, ...]:
            return transformer.shape(bfl_source(name)[0] if single else name)

        channels = parts["vae"].shape("decoder.conv_in.weight")[1]
        self._check_widths(
            parts,
            {
                "vae": (channels, shape("proj_out.weight")[0] // 4),
                "clip": (width_of(parts["clip"]), shape("time_text_embed.text_embedder.linear_1.weight")[1]),
                "t5": (width_of(parts["t5"]), shape("context_embedder.weight")[1]),
            },
        )
        if shape("x_embedder.weight")[1] != channels * 4:
            raise SettingsError(
                f"{transformer.option}: '{transformer.path}' takes {shape('x_embedder.weight')[1] // 4} channels, not "
                f"the {channels} of a picture alone; variants with further picture inputs (Fill, Depth, Canny) cannot "
                "be trained"
            )

    def identity(self, part: str) -> str:
        identity = {"weights": fingerprint(self._place(part)[0]), "dtype": self.config.dtype}
        if part in self.text_encoders:
            identity["tokenizer"] = fingerprint(self._tokenizer_folder(part))
            identity["length"] = str(CLIP_LENGTH if part == "clip" else self.config.max_sequence_length)
            if part == "t5" and self.text_dtype:
                identity["storage"] = self.text_dtype
        return json.dumps(identity)

    # -- encoding, once per sample, cached ----------------------------------------------------------

    def load_vae(self, device: torch.device) -> nn.Module:
        return autoencoder.load_autoencoder(
            self._weights("vae"), self.dtype, device, autoencoder.FLUX_SCALING, autoencoder.FLUX_SHIFT
        )

    def encode_media(
        self, vae: Any, pixels_NCFHW: torch.Tensor, generators: Sequence[torch.Generator]
    ) -> dict[str, torch.Tensor]:
        return autoencoder.encode(vae, pixels_NCFHW, generators, self.dtype)

    def load_text_encoder(self, name: str, device: torch.device) -> TextEncoder:
        weights, folder = self._weights(name), self._tokenizer_folder(name)
        if name == "t5":
            tokenizer = transformers.T5TokenizerFast.from_pretrained(folder)  # type: ignore[attr-defined]
            return TextEncoder(tokenizer, load_t5(self, weights, device))
        settings = _json_config(weights) if weights.path.is_dir() else clip_config(weights)
        model = build(lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**settings)))
        fill(model, lambda tensor: weights.read(clip_name(tensor, weights)), self.dtype, device)
        return TextEncoder(transformers.CLIPTokenizer.from_pretrained(folder), model.eval())

    def encode_text(self, name: str, encoder: TextEncoder, captions: Sequence[str]) -> Encodings:
        length = CLIP_LENGTH if name == "clip" else self.config.max_sequence_length
        tokens = encoder.tokenizer(
            list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        with torch.no_grad():  # without the attention mask: Flux was trained to see the padding
            output = encoder.model(tokens.input_ids.to(encoder.model.device))
        if name == "clip":
            return {"clip_pooled": output.pooler_output.to(self.dtype)}
        return {"t5_embeds": output.last_hidden_state.to(self.dtype)}

    # -- training -----------------------------------------------------------------------------------

    def build_denoiser(self) -> nn.Module:
        weights = self._weights("transformer")
        config = _json_config(weights) if weights.path.is_dir() else transformer_config(weights)
        if self.config.bypass_guidance_embedding:
            config = {**config, "guidance_embeds": False}
        return build(lambda: diffusers.FluxTransformer2DModel.from_config(config))

    def denoiser_reader(self) -> Callable[[str], torch.Tensor]:
        weights = self._weights("transformer")
        return weights.read if weights.path.is_dir() else partial(read_bfl, weights)

    def layers(self, denoiser: Any) -> list[Layer]:
        """As `Family.layers`; the denoiser is given the forms of `flux_attention`, which pipelines run as well."""
        from .flux_attention import FluxSingleTransformerBlock, FusedFluxAttention

        denoiser.set_attn_processor(FusedFluxAttention())
        for block in denoiser.single_transformer_blocks:
            block.__class__ = FluxSingleTransformerBlock
        embedders = ("x_embedder", "time_text_embed", "context_embedder", "pos_embed")
        embed = partial(_embed, has_guidance=denoiser.config.guidance_embeds)
        layers = [Layer("embed", embed, {name: getattr(denoiser, name) for name in embedders})]
        for stack in ("transformer_blocks", "single_transformer_blocks"):
            for index, block in enumerate(getattr(denoiser, stack)):
                layers.append(Layer(f"{stack}.{index}", _block, {"block": block}, is_block=True))
        layers.append(Layer("out", _out, {"norm_out": denoiser.norm_out, "proj_out": denoiser.proj_out}))
        return layers

    def collate(self, examples: Sequence[Example]) -> Batch:
        x_t_NCHW, t_N, velocity_NCHW = self.noised(examples)
        # The network is told the time as the pipeline rounds it: t * 1000 in the latents' precision.
        told_N = ((t_N * 1000).to(self.dtype) / 1000).float()
        pooled_ND = torch.stack([example.text["clip_pooled"] for example in examples]).to(self.dtype)
        text_NLD = torch.stack([example.text["t5_embeds"] for example in examples]).to(self.dtype)
        guidance_N = torch.full_like(t_N, self.config.guidance)
        target_NTD = pack(velocity_NCHW)
        controls = [control["latents"].to(self.dtype) for example in examples for control in example.controls]
        further = (torch.stack(controls),) if controls else ()
        return Batch(
            inputs=(x_t_NCHW.to(self.dtype), told_N, pooled_ND, text_NLD, guidance_N, *further),
            target=target_NTD,
            weight=self.time_weight(t_N, target_NTD),
        )

    def cached_shapes(self, latent_size: tuple[int, int, int]) -> tuple[Shapes, Shapes]:
        config: Any = self.build_denoiser().config
        text = {
            "clip_pooled": (config.pooled_projection_dim,),
            "t5_embeds": (self.config.max_sequence_length, config.joint_attention_dim),
        }
        return {"latents": (config.in_channels // 4, *latent_size[1:])}, text

    def spread_mask(self, mask_NFHW: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        channels = target.shape[-1] // 4
        return pack(mask_NFHW.expand(-1, channels, -1, -1))

    # -- results ------------------------------------------------------------------------------------

    def lora_keys(self, module_name: str) -> str:
        return f"transformer.{module_name}"

    def comfyui_rows(self, module_name: str, scale: torch.Tensor) -> torch.Tensor:
        return swap_halves(scale) if bfl_source(f"{module_name}.weight")[1] == "swapped" else scale

    def comfyui_tensors(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return to_bfl(tensors)

    def pipeline(self, denoiser: Any, device: torch.device, text_encoders: bool = True) -> diffusers.FluxPipeline:
        clip, t5 = (
            self.load_text_encoder(name, device) if text_encoders else TextEncoder(None, None)
            for name in self.text_encoders
        )
        schedule = self._schedule(DEV_SCHEDULE if denoiser.config.guidance_embeds else SCHNELL_SCHEDULE)
        return diffusers.FluxPipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler.from_config(schedule),
            vae=self.load_vae(device),
            text_encoder=clip.model,
            tokenizer=clip.tokenizer,
            text_encoder_2=t5.model,
            tokenizer_2=t5.tokenizer,
            transformer=denoiser,
        )

    def prompt_arguments(self, request: SampleRequest, device: torch.device) -> dict[str, Any]:
        arguments: dict[str, Any] = {"true_cfg_scale": request.true_cfg}
        for prefix, text in (("", request.text), ("negative_", request.negative_text)):
            arguments[f"{prefix}prompt_embeds"] = text["t5_embeds"][None].to(device)
            arguments[f"{prefix}pooled_prompt_embeds"] = text["clip_pooled"][None].to(device)
        if request.images:  # at the size of what is drawn, as in training; the pipeline would choose others
            size = request.width, request.height
            arguments["image"] = ImageOps.fit(request.images[0].convert("RGB"), size)
            arguments |= {"max_area": request.width * request.height, "_auto_resize": False}
        return arguments

    def sample(self, pipeline: Any, request: SampleRequest) -> list[Image]:
        """As `Family.sample`; FluxKontextPipeline draws what starts from a picture."""
        if request.images:
            shown = getattr(pipeline, "_progress_bar_config", {})
            pipeline = diffusers.FluxKontextPipeline(**pipeline.components)
            pipeline.set_progress_bar_config(**shown)
        return super().sample(pipeline, request)

    @classmethod
    def write_miniature(cls, folder: Path, guidance: bool = True) -> dict[str, Any]:
        """As `Family.write_miniature`; ``guidance`` says whether it is like dev or like schnell."""
        clip_vocabulary = write_clip_tokenizer(folder / "tokenizer")
        t5_vocabulary = write_t5_tokenizer(folder / "tokenizer_2")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            parts = miniature_parts(guidance, clip_vocabulary, t5_vocabulary)
        index: dict[str, Any] = {"_class_name": "FluxPipeline", "_diffusers_version": diffusers.__version__}
        for name, part in parts.items():
            part.save_pretrained(folder / name)
            index[name] = [type(part).__module__.split(".")[0], type(part).__name__]
        index |= {"tokenizer": ["transformers", "CLIPTokenizer"], "tokenizer_2": ["transformers", "T5TokenizerFast"]}
        write_json(folder / "model_index.json", index)
        return {"type": "flux", "diffusers_path": str(folder), "dtype": "float32", "max_sequence_length": 32}


# -- links of the chain ---------------------------------------------------------------------------------


def position_ids(
    num_text_tokens: int, height: int, width: int, device: torch.device, num_pictures: int = 1
) -> torch.Tensor:
    """(picture, row, column) of each token: text (all zero), then the patches of pictures of ``height`` x ``width``.

    Picture 0 is what is made, picture 1 the control.
    """
    ids = torch.zeros(num_pictures, height, width, 3, device=device)
    ids[..., 0] = torch.arange(num_pictures, device=device)[:, None, None]
    ids[..., 1] = torch.arange(height, device=device)[:, None]
    ids[..., 2] = torch.arange(width, device=device)
    return torch.cat([ids.new_zeros(num_text_tokens, 3), ids.reshape(-1, 3)])


Tensors = tuple["torch.Tensor", ...]


def _embed(
    modules: Any,
    x_t_NCHW: torch.Tensor,
    t_N: torch.Tensor,
    pooled_ND: torch.Tensor,
    text_NLD: torch.Tensor,
    guidance_N: torch.Tensor,
    control_NCHW: torch.Tensor | None = None,
    *,
    has_guidance: bool,
) -> Tensors:
    """With a control there is one tensor more, whose length is the number of tokens that are made."""
    tokens_NTD = pack(x_t_NCHW)
    made: Tensors = ()
    if control_NCHW is not None:
        made = (torch.zeros(tokens_NTD.shape[1], dtype=torch.uint8, device=tokens_NTD.device),)
        tokens_NTD = torch.cat([tokens_NTD, pack(control_NCHW)], dim=1)
    x_NTD = modules.x_embedder(tokens_NTD)
    times = [t_N, guidance_N] if has_guidance else [t_N]
    temb_ND = modules.time_text_embed(*(time.to(x_NTD.dtype) * 1000 for time in times), pooled_ND)
    height, width = x_t_NCHW.shape[2] // 2, x_t_NCHW.shape[3] // 2
    ids = position_ids(text_NLD.shape[1], height, width, x_NTD.device, 1 + len(made))
    cos, sin = modules.pos_embed(ids)
    return x_NTD, modules.context_embedder(text_NLD), temb_ND, cos.contiguous(), sin.contiguous(), *made


def _block(
    modules: Any,
    x_NTD: torch.Tensor,
    text_NLD: torch.Tensor,
    temb_ND: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *made: torch.Tensor,
) -> Tensors:
    """A double or a single block: they take and give the same."""
    text_NLD, x_NTD = modules.block(x_NTD, text_NLD, temb_ND, (cos, sin))
    return x_NTD.contiguous(), text_NLD.contiguous(), temb_ND, cos, sin, *made


def _out(
    modules: Any, x_NTD: torch.Tensor, _text: Any, temb_ND: torch.Tensor, _cos: Any, _sin: Any, *made: torch.Tensor
) -> torch.Tensor:
    prediction_NTD = modules.proj_out(modules.norm_out(x_NTD, temb_ND))
    return prediction_NTD[:, : made[0].shape[0]] if made else prediction_NTD


# -- the transformer in Black Forest Labs' layout ---------------------------------------------------------

TOP_MODULES = {
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "context_embedder": "txt_in",
    "x_embedder": "img_in",
    "norm_out.linear": "final_layer.adaLN_modulation.1:swapped",
    "proj_out": "final_layer.linear",
}
DOUBLE_MODULES = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
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
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
SINGLE_MODULES = {
    "norm.linear": "modulation.lin",
    "attn.to_q": "linear1:q",
    "attn.to_k": "linear1:k",
    "attn.to_v": "linear1:v",
    "proj_mlp": "linear1:mlp",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
    "proj_out": "linear2",
}


def bfl_source(name: str) -> tuple[str, str]:
    """Where a parameter of diffusers' transformer lies in BFL's: the tensor's name and the part of it.

    The part is empty (all of it), one of `ROWS`, or "swapped": BFL's last modulation gives shift before
    scale, diffusers' scale before shift.
    """
    module, _, leaf = name.rpartition(".")
    if match := re.fullmatch(r"(single_)?transformer_blocks\.(\d+)\.(.+)", module):
        stack, modules = ("single_blocks", SINGLE_MODULES) if match[1] else ("double_blocks", DOUBLE_MODULES)
        target = f"{stack}.{match[2]}.{modules[match[3]]}"
    else:
        target = TOP_MODULES[module]
    target, _, part = target.partition(":")
    return f"{target}.{'scale' if target.endswith(('query_norm', 'key_norm')) else leaf}", part


def read_bfl(weights: Weights, name: str, source_of: Source = bfl_source) -> torch.Tensor:
    """A parameter of diffusers' transformer from a file in BFL's layout."""
    source, part = source_of(name)
    if part in ROWS:
        width, index = weights.shape("img_in.weight")[0], ROWS.index(part)
        return weights.read(source, slice(index * width, None if part == "mlp" else (index + 1) * width))
    value = weights.read(source)
    return swap_halves(value) if part else value


def to_bfl(tensors: Mapping[str, torch.Tensor], source_of: Source = bfl_source) -> dict[str, torch.Tensor]:
    """The tensors of diffusers' transformer in BFL's layout; the inverse of `read_bfl`."""
    return to_fused(tensors, source_of)


def transformer_config(weights: Weights) -> dict[str, Any]:
    """Arguments of FluxTransformer2DModel for a file in BFL's layout, from names and shapes."""
    return {
        **block_config(weights),
        "pooled_projection_dim": weights.shape("vector_in.in_layer.weight")[1],
        "guidance_embeds": "guidance_in.in_layer.weight" in weights,
    }


def block_config(weights: Weights) -> dict[str, Any]:
    """What those of all models with such blocks share."""
    head_dim = weights.shape("double_blocks.0.img_attn.norm.query_norm.scale")[0]
    width, in_channels = weights.shape("img_in.weight")
    side = head_dim * 7 // 32 * 2  # 56 of 128, for rows and for columns; the first axis has what is left
    return {
        "in_channels": in_channels,
        "out_channels": weights.shape("final_layer.linear.weight")[0],
        "num_layers": weights.count("double_blocks."),
        "num_single_layers": weights.count("single_blocks."),
        "attention_head_dim": head_dim,
        "num_attention_heads": width // head_dim,
        "joint_attention_dim": weights.shape("txt_in.weight")[1],
        "axes_dims_rope": (head_dim - 2 * side, side, side),
    }


# -- the other single files -------------------------------------------------------------------------------


def _json_config(weights: Weights) -> dict[str, Any]:
    return read_json(weights.path / "config.json")


# -- miniature --------------------------------------------------------------------------------------------


def miniature_parts(guidance: bool, clip_vocabulary: int, t5_vocabulary: int) -> dict[str, Any]:
    clip = transformers.CLIPTextConfig(
        vocab_size=clip_vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1,
        bos_token_id=0, eos_token_id=2, pad_token_id=1)  # fmt: skip
    t5 = transformers.T5Config(
        vocab_size=t5_vocabulary, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu")  # fmt: skip
    models: dict[str, Any] = {
        "transformer": diffusers.FluxTransformer2DModel(
            in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=32, pooled_projection_dim=16, guidance_embeds=guidance, axes_dims_rope=(4, 6, 6)),
        "vae": autoencoder.miniature(),
        "text_encoder": transformers.CLIPTextModel(clip),
        "text_encoder_2": transformers.T5EncoderModel(t5),
    }  # fmt: skip
    schedule = DEV_SCHEDULE if guidance else SCHNELL_SCHEDULE
    return {
        **{name: model.to(torch.bfloat16) for name, model in models.items()},
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(**schedule),
    }
