"""LTX-Video 0.9, by Lightricks: videos from text, or from text and a first frame, and pictures.

A rectified-flow transformer whose tokens are single latents, 128 channels wide, of a VAE that halves time three times
and space five times: 8n+1 frames, sides of multiples of 32. Text (T5-XXL) comes in through cross-attention. Each token
is told its time, so a first frame is given clean, at time 0, in its own place. The network predicts noise - x0. Its
places are seconds, at 25 frames a second, and pixels. Since 0.9.5 the first latent, which stands for one frame, is one
frame long there, too; in 0.9 and 0.9.1 it is eight long like the others.

Captions have their own lengths here. Padding is hidden from T5, too, as in Lightricks' code, ComfyUI and diffusers'
LTXConditionPipeline, but not in LTXPipeline of diffusers 0.42. The layers equal diffusers' transformer bit for bit.
Norms and rotation go over all heads at once, for which `rotary` has no kernels.

Reference: https://github.com/Lightricks/LTX-Video, and diffusers' LTXPipeline, LTXImageToVideoPipeline and
LTXConditionPipeline. Licence of the weights: LTX-Video Open Weights License, older ones OpenRAIL-M.

Shape legend: N batch, C latent channels, F H W frames, height and width of the latents, T tokens (F * H * W), K tokens
of a frame, L text tokens, D features, P pairs of features, S times of a sample: one, or that of the first latent frame
and that of the rest.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..utils.config import SettingsError, option
from ..utils.imports import lazy
from ..utils.weights import Weights, build
from . import ltx_video_vae
from .base import Batch, Encodings, Example, Layer, SampleRequest, Shapes
from .captions import side_by_side
from .components import T5_XXL, Component, FromComponents, TextEncoder, width_of
from .files import file_metadata, fingerprint, read_json, require_path, write_json
from .flow import FlowConfig, FlowFamily
from .t5 import load_t5, write_t5_tokenizer

if TYPE_CHECKING:
    import diffusers
    import torch
    import transformers
    from PIL import Image, ImageOps
    from torch import nn
else:
    diffusers, torch, transformers = map(lazy, ("diffusers", "torch", "transformers"))
    Image, ImageOps = map(lazy, ("PIL.Image", "PIL.ImageOps"))

FPS = 25
LATENT_SIZE = 8, 32, 32
"""Frames, and pixels down and across, of one latent."""
USUAL_LENGTH = 128
"""Tokens of a caption, for estimates."""
NUM_HEADS = 32
"""In every published model; a file may say otherwise."""
SCHEDULES: dict[bool, dict[str, Any]] = {
    False: {"use_dynamic_shifting": True, "base_shift": 0.95, "max_shift": 2.05, "base_image_seq_len": 1024,
            "max_image_seq_len": 4096, "shift_terminal": 0.1},
    True: {"use_dynamic_shifting": False},
}  # fmt: skip
"""How it is sampled, before and since 0.9.5."""
DECODING = {"decode_timestep": 0.05, "decode_noise_scale": 0.025}
"""For VAEs whose decoder is told a time; Lightricks' usual values."""


class LTXVideoConfig(FlowConfig):
    """LTX-Video 0.9, from a diffusers folder, from single files as Lightricks and ComfyUI have them, or from both."""

    type: Literal["ltx-video"] = "ltx-video"
    diffusers_path: str | None = option(
        None,
        "Folder of the whole model in diffusers layout, or of its text encoder and tokenizer. What a path below names "
        "is taken from there instead.",
        picker="diffusers",
    )
    single_file_path: str | None = option(
        None,
        "Transformer and VAE as a single file, such as ltx-video-2b-v0.9.5.safetensors.",
        picker="checkpoints",
    )
    first_frame_conditioning_p: float = option(
        0.0,
        "Share of the times that a clip is trained with its first frame given, as for image to video. The rest is text "
        "to video.",
        ge=0,
        le=1,
        step=0.01,
    )
    vae_path: str | None = option(
        None, "VAE as a single file, if it is neither in single_file_path nor in the folder.", picker="vae"
    )
    t5_path: str | None = option(
        None, "T5-XXL text encoder as a single file, such as t5xxl_fp16.safetensors.", picker="text_encoders"
    )
    t5_tokenizer_path: str | None = option(
        None, "Folder of the T5 tokenizer, if it is in neither the diffusers folder nor ComfyUI.", advanced=True
    )
    max_sequence_length: int = option(256, "T5 tokens per caption; longer captions are cut.", ge=1, le=512,
                                      advanced=True)  # fmt: skip


COMPONENTS = {
    "transformer": Component(
        "an LTX-Video 0.9 transformer, such as ltx-video-2b-v0.9.5.safetensors", "single_file_path", "transformer",
        "LTXVideoTransformer3DModel",
        ("patchify_proj.weight", "adaln_single.linear.weight", "transformer_blocks.0.attn2.to_k.weight"),
        ("model.diffusion_model.", "diffusion_model."),
        # LTX-2 makes sound as well
        ("audio_adaln_single.linear.weight", "audio_patchify_proj.weight")),
    "vae": Component(
        "the VAE of LTX-Video 0.9, as ltx-video-2b-v0.9.5.safetensors has it", "vae_path", "vae",
        "AutoencoderKLLTXVideo",
        ("per_channel_statistics.std-of-means", "encoder.conv_in.conv.weight",
         "decoder.up_blocks.0.res_blocks.0.conv1.conv.weight"), ("vae.",)),
    "t5": replace(T5_XXL, folder="text_encoder", tokenizer_folder="tokenizer"),
}  # fmt: skip


class LTXVideo(FromComponents, FlowFamily):
    """LTX-Video in the hands of the trainer."""

    title = "LTX-Video"
    Config = LTXVideoConfig
    config: LTXVideoConfig
    components = COMPONENTS
    whole = "an LTX-Video folder in diffusers layout"
    published = "LTX-Video"
    size_multiple = 32
    latent_multiple = 32
    frame_multiple = 8
    fps: float | None = float(FPS)
    text_encoders = ("t5",)
    shared_inputs = (("attn1.to_q", "attn1.to_k", "attn1.to_v"), ("attn2.to_k", "attn2.to_v"))
    adapter_blocks = ("LTXVideoTransformerBlock",)
    model_folder = "checkpoints"
    says_alpha = False  # diffusers refuses a file that does
    high_precision = ("^proj_in", "^time_embed", "^caption_projection", "^proj_out")

    # -- files ------------------------------------------------------------------------------------

    def _given(self, name: str) -> tuple[str | None, str]:
        """`single_file_path` has the VAE where no other option names it, if it has one."""
        value, setting = super()._given(name)
        if name != "vae" or value or not self.config.single_file_path:
            return value, setting
        part, single = self.components[name], "model.single_file_path"
        path = require_path(self.config.single_file_path, single, self.components["transformer"].title)
        if not path.is_dir() and part.prefixes[0] + part.markers[0] in Weights(path, single):
            return str(path), single
        if not self.config.diffusers_path:
            raise SettingsError(f"{setting}: give {part.title}, or model.diffusers_path; '{path}' has none")
        return None, setting

    def check_files(self) -> None:
        parts = {name: self._weights(name) for name in self.components}
        self._tokenizer_folder("t5")
        channels = parts["vae"].shape("decoder.conv_in.conv.weight")[1]
        widths = {
            "vae": (channels, self._network["in_channels"]),
            "t5": (width_of(parts["t5"]), self._network["caption_channels"]),
        }
        self._check_widths(parts, widths)

    @property
    def starts_from_pictures(self) -> bool:
        return True

    def identity(self, part: str) -> str:
        identity = {"weights": fingerprint(self._place(part)[0]), "dtype": self.config.dtype}
        if part == "t5":
            identity["tokenizer"] = fingerprint(self._tokenizer_folder(part))
            identity["length"] = str(self.config.max_sequence_length)
            identity["storage"] = self.text_dtype or ""
        return json.dumps(identity)

    @cached_property
    def _network(self) -> dict[str, Any]:
        """Arguments of LTXVideoTransformer3DModel."""
        weights = self._weights("transformer")
        if weights.path.is_dir():
            return {"in_channels": 128, "caption_channels": 4096, **read_json(weights.path / "config.json")}
        return transformer_config(weights, self._told("transformer"))

    @cached_property
    def is_causal(self) -> bool:
        """Whether the first latent is one frame long for the transformer: as its file says, else since 0.9.5, whose
        VAE tells it."""
        told = self._told("transformer")
        if told:
            return bool(told.get("causal_temporal_positioning", False))
        return ltx_video_vae.has_new_encoder(self._weights("vae"))

    def _told(self, name: Literal["transformer", "vae"]) -> dict[str, Any]:
        """What Lightricks' files say of a part in their header."""
        text = file_metadata(self._place(name)[0]).get("config")
        return json.loads(text).get(name, {}) if text else {}

    # -- encoding, once per sample, cached ----------------------------------------------------------

    def load_vae(self, device: torch.device) -> nn.Module:
        return ltx_video_vae.load_vae(self._weights("vae"), self.dtype, device)

    def encode_media(
        self, vae: Any, pixels_NCFHW: torch.Tensor, generators: Sequence[torch.Generator]
    ) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            posterior = vae.encode(pixels_NCFHW.to(self.dtype)).latent_dist
        latents_NCFHW = posterior.sample(list(generators)).float()
        mean, std = (values.view(1, -1, 1, 1, 1).to(latents_NCFHW) for values in (vae.latents_mean, vae.latents_std))
        return {"latents": ((latents_NCFHW - mean) * vae.config.scaling_factor / std).to(self.dtype)}

    def load_text_encoder(self, name: str, device: torch.device) -> TextEncoder:
        tokenizer = transformers.T5TokenizerFast.from_pretrained(  # type: ignore[attr-defined]
            self._tokenizer_folder(name)
        )
        return TextEncoder(tokenizer, load_t5(self, self._weights(name), device))

    def encode_text(self, name: str, encoder: TextEncoder, captions: Sequence[str]) -> Encodings:
        tokens = encoder.tokenizer(
            list(captions), padding="max_length", max_length=self.config.max_sequence_length, truncation=True,
            return_tensors="pt",
        )  # fmt: skip
        ids_NL, mask_NL = (value.to(encoder.model.device) for value in (tokens.input_ids, tokens.attention_mask))
        with torch.no_grad():
            states_NLD = encoder.model(ids_NL, attention_mask=mask_NL).last_hidden_state.to(self.dtype)
        return {"t5_embeds": [text_LD[:n] for text_LD, n in zip(states_NLD, mask_NL.sum(1).tolist(), strict=True)]}

    # -- training -----------------------------------------------------------------------------------

    def timestep_shift(self, latent_size: tuple[int, ...]) -> float:
        """By the number of tokens as Lightricks trains and samples: e^mu, mu linear between 0.95 at 1024 tokens and
        2.05 at 4096, and beyond."""
        if self.config.shift is None and self.config.flux_shift:
            return math.exp(0.95 + (math.prod(latent_size) - 1024) * (2.05 - 0.95) / (4096 - 1024))
        return super().timestep_shift(latent_size)

    def build_denoiser(self) -> nn.Module:
        return build(lambda: diffusers.LTXVideoTransformer3DModel.from_config(self._network))

    def denoiser_reader(self) -> Callable[[str], torch.Tensor]:
        weights = self._weights("transformer")
        return weights.read if weights.path.is_dir() else lambda name: weights.read(original_name(name))

    def layers(self, denoiser: Any) -> list[Layer]:
        embedders = {name: getattr(denoiser, name) for name in ("rope", "proj_in", "time_embed", "caption_projection")}
        layers = [Layer("embed", partial(_embed, is_causal=self.is_causal), embedders)]
        for index, block in enumerate(denoiser.transformer_blocks):
            layers.append(Layer(f"transformer_blocks.{index}", _block, {"block": block}, is_block=True))
        modules = {
            "norm_out": denoiser.norm_out,
            "proj_out": denoiser.proj_out,
            "tables": torch.nn.ParameterList([denoiser.scale_shift_table]),  # a layer holds modules alone
        }
        layers.append(Layer("out", _out, modules))
        return layers

    def collate(self, examples: Sequence[Example]) -> Batch:
        """As `Family.collate`. What is given is no part of the loss, which is the mean of the rest."""
        x_t_NCFHW, t_N, velocity_NCFHW = self.noised(examples)
        told_NS, target_NTC = t_N[:, None] * 1000, pack(velocity_NCFHW)
        weight = self.time_weight(t_N, target_NTC)
        if self.config.first_frame_conditioning_p and x_t_NCFHW.shape[2] > 1:
            given_N = torch.tensor([self._is_given(example) for example in examples])
            clean_NCHW = torch.stack([example.media["latents"][:, 0] for example in examples]).float()
            x_t_NCFHW[:, :, 0] = torch.where(given_N.view(-1, 1, 1, 1), clean_NCHW, x_t_NCFHW[:, :, 0])
            told_NS = torch.cat([told_NS.masked_fill(given_N[:, None], 0.0), told_NS], dim=1)
            made_NFHW = torch.ones_like(x_t_NCFHW[:, 0])
            made_NFHW[given_N, 0] = 0
            made_NT1 = self.spread_mask(made_NFHW, target_NTC)
            weight = weight * made_NT1 / made_NT1.mean(1, keepdim=True)
        text_NLD, seen_NL = side_by_side([example.text["t5_embeds"].to(self.dtype) for example in examples])
        return Batch((x_t_NCFHW.to(self.dtype), told_NS, text_NLD, seen_NL), target_NTC, weight)

    def _is_given(self, example: Example) -> bool:
        """Whether the first frame of a sample is given, this time."""
        return random.Random(example.seed).random() < self.config.first_frame_conditioning_p

    def cached_shapes(self, latent_size: tuple[int, int, int]) -> tuple[Shapes, Shapes]:
        text = {"t5_embeds": (min(USUAL_LENGTH, self.config.max_sequence_length), self._network["caption_channels"])}
        return {"latents": (self._network["in_channels"], *latent_size)}, text

    def spread_mask(self, mask_NFHW: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return mask_NFHW.flatten(1)[..., None]

    # -- results ------------------------------------------------------------------------------------

    def lora_keys(self, module_name: str) -> str:
        return f"diffusion_model.{original_name(f'{module_name}.').removesuffix('.')}"

    def comfyui_tensors(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {f"model.diffusion_model.{original_name(name)}": tensor for name, tensor in tensors.items()}

    def other_tensors(self, names: Container[str]) -> dict[str, torch.Tensor]:
        return {f"vae.{name}": value for name, value in ltx_video_vae.read_original(self._weights("vae")).items()}

    def exported_metadata(self) -> dict[str, str]:
        config: dict[str, Any] = {"transformer": {**self._told("transformer"), **self._described()}}
        if vae := self._told("vae"):
            config["vae"] = vae
        return {"config": json.dumps(config)}

    def _described(self) -> dict[str, Any]:
        """What ComfyUI reads of the transformer."""
        network: Any = self.build_denoiser()
        names = ("in_channels", "num_attention_heads", "attention_head_dim", "cross_attention_dim", "num_layers",
                 "caption_channels")  # fmt: skip
        return {name: network.config[name] for name in names} | {"causal_temporal_positioning": self.is_causal}

    def pipeline(self, denoiser: Any, device: torch.device, text_encoders: bool = True) -> Any:
        t5 = self.load_text_encoder("t5", device) if text_encoders else TextEncoder(None, None)
        make = diffusers.LTXConditionPipeline if self.is_causal else diffusers.LTXPipeline
        schedule = self._schedule(SCHEDULES[self.is_causal])
        return make(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler.from_config(schedule),
            vae=self.load_vae(device),
            text_encoder=t5.model,
            tokenizer=t5.tokenizer,
            transformer=denoiser,
        )

    def prompt_arguments(self, request: SampleRequest, device: torch.device) -> dict[str, Any]:
        """As `Family.prompt_arguments`; with a picture for LTXImageToVideoPipeline before 0.9.5."""
        texts = [text["t5_embeds"] for text in (request.text, request.negative_text)]
        text_NLD, seen_NL = side_by_side(texts)
        seen_NL = seen_NL.bool().expand(text_NLD.shape[:2]).to(device)
        arguments: dict[str, Any] = {}
        for index, prefix in enumerate(("", "negative_")):
            arguments[f"{prefix}prompt_embeds"] = text_NLD[index, None].to(device)
            arguments[f"{prefix}prompt_attention_mask"] = seen_NL[index, None]
        if request.images:
            arguments["image"] = ImageOps.fit(request.images[0].convert("RGB"), (request.width, request.height))
        return arguments

    def sample(self, pipeline: Any, request: SampleRequest) -> list[Image.Image]:
        if request.images and not self.is_causal:
            pipeline = diffusers.LTXImageToVideoPipeline(**pipeline.components)
            pipeline.set_progress_bar_config(disable=True)
        output = pipeline(
            width=request.width,
            height=request.height,
            num_frames=request.frames,
            frame_rate=FPS,
            num_inference_steps=request.steps,
            **({} if request.guidance is None else {"guidance_scale": request.guidance}),
            **(DECODING if pipeline.vae.config.timestep_conditioning else {}),
            **self.prompt_arguments(request, pipeline._execution_device),
            generator=torch.Generator().manual_seed(request.seed),
            output_type="pil",
        )
        return output.frames[0]

    @classmethod
    def write_miniature(cls, folder: Path, variant: Literal["0.9", "0.9.1", "0.9.5"] = "0.9.5") -> dict[str, Any]:
        """As `Family.write_miniature`; ``variant`` is the version."""
        vocabulary = write_t5_tokenizer(folder / "tokenizer")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            parts = _miniature_parts(variant, vocabulary)
        pipeline = "LTXConditionPipeline" if variant == "0.9.5" else "LTXPipeline"
        index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": diffusers.__version__}
        for name, part in parts.items():
            part.save_pretrained(folder / name)
            index[name] = [type(part).__module__.split(".")[0], type(part).__name__]
        index["tokenizer"] = ["transformers", "T5TokenizerFast"]
        write_json(folder / "model_index.json", index)
        return {"type": "ltx-video", "diffusers_path": str(folder), "dtype": "float32", "max_sequence_length": 32}


# -- links of the chain ---------------------------------------------------------------------------------

Tensors = tuple["torch.Tensor", ...]


def pack(latents_NCFHW: torch.Tensor) -> torch.Tensor:
    """Latents as tokens: NTC."""
    return latents_NCFHW.flatten(2).transpose(1, 2)


def places(frames: int, height: int, width: int, is_causal: bool, device: torch.device) -> torch.Tensor:
    """Seconds, and pixels down and across, at which each latent begins: 1 x 3 x T."""
    axes = [torch.arange(count, device=device) * size
            for count, size in zip((frames, height, width), LATENT_SIZE, strict=True)]  # fmt: skip
    if is_causal:  # the first latent stands for one frame
        axes[0] = (axes[0] + 1 - LATENT_SIZE[0]).clamp(min=0)
    grid_3T = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1).float()
    grid_3T[0] *= 1.0 / FPS
    return grid_3T[None]


def _embed(
    modules: Any, x_NCFHW: torch.Tensor, told_NS: torch.Tensor, text_NLD: torch.Tensor, seen_NL: torch.Tensor, *,
    is_causal: bool,
) -> Tensors:  # fmt: skip
    """The tables of rotation are the same for both features of a pair: FKP."""
    frames, height, width = x_NCFHW.shape[2:]
    x_NTC = pack(x_NCFHW)
    where = places(frames, height, width, is_causal, x_NTC.device)
    tables = [table[0, :, ::2].unflatten(0, (frames, -1)).contiguous()
              for table in modules.rope(x_NTC[:1], video_coords=where)]  # fmt: skip
    x_NTD = modules.proj_in(x_NTC)
    temb, embedded = modules.time_embed(told_NS.flatten(), batch_size=len(x_NTD), hidden_dtype=x_NTD.dtype)
    times = [value.unflatten(0, (len(x_NTD), -1)) for value in (temb, embedded)]
    return x_NTD, modules.caption_projection(text_NLD), *times, *tables, seen_NL


def _per_token(values_NSD: torch.Tensor, frames: int, tokens: int) -> torch.Tensor:
    """What is told of each time, for each token; as it is, where all have one time."""
    if values_NSD.shape[1] == 1:
        return values_NSD
    first, rest = (value.expand(-1, tokens, -1) for value in values_NSD.split(1, dim=1))
    return torch.cat([first, rest.repeat(1, frames - 1, 1)], dim=1)


def _block(
    modules: Any, x_NTD: torch.Tensor, text_NLD: torch.Tensor, temb_NSD: torch.Tensor, embedded_NSD: torch.Tensor,
    cos_FKP: torch.Tensor, sin_FKP: torch.Tensor, seen_NL: torch.Tensor,
) -> Tensors:  # fmt: skip
    rotation = tuple(table.flatten(0, 1).repeat_interleave(2, dim=-1)[None] for table in (cos_FKP, sin_FKP))
    hidden = (1 - seen_NL.to(x_NTD.dtype)).unsqueeze(1) * -10000.0 if seen_NL.shape[1] > 1 else None
    temb_NTD = _per_token(temb_NSD, *cos_FKP.shape[:2])
    x_NTD = modules.block(x_NTD, text_NLD, temb_NTD, rotation, hidden)
    return x_NTD.contiguous(), text_NLD, temb_NSD, embedded_NSD, cos_FKP, sin_FKP, seen_NL


def _out(
    modules: Any, x_NTD: torch.Tensor, _text: Any, _temb: Any, embedded_NSD: torch.Tensor, cos_FKP: torch.Tensor,
    _sin: Any, _seen: Any,
) -> torch.Tensor:  # fmt: skip
    embedded_NTD = _per_token(embedded_NSD, *cos_FKP.shape[:2])
    shift, scale = (modules.tables[0][None, None] + embedded_NTD[:, :, None]).unbind(2)
    prediction_NTC: torch.Tensor = modules.proj_out(modules.norm_out(x_NTD) * (1 + scale) + shift)
    return prediction_NTC


# -- the transformer in Lightricks' layout ------------------------------------------------------------------


def original_name(name: str) -> str:
    """The name in Lightricks' files of a parameter of diffusers' transformer."""
    for ours, theirs in (("proj_in.", "patchify_proj."), ("time_embed.", "adaln_single.")):
        if name.startswith(ours):
            return name.replace(ours, theirs, 1)
    return name.replace(".norm_q.", ".q_norm.").replace(".norm_k.", ".k_norm.")


def transformer_config(weights: Weights, told: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of LTXVideoTransformer3DModel for a file in the original layout, from names and shapes.

    Args:
        told: What its header says.
    """
    width, channels = weights.shape("patchify_proj.weight")
    heads = told.get("num_attention_heads", NUM_HEADS)
    return {
        "in_channels": channels,
        "out_channels": weights.shape("proj_out.weight")[0],
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "cross_attention_dim": weights.shape("transformer_blocks.0.attn2.to_k.weight")[1],
        "num_layers": weights.count("transformer_blocks."),
        "caption_channels": weights.shape("caption_projection.linear_1.weight")[1],
    }


# -- miniature --------------------------------------------------------------------------------------------


def _miniature_parts(variant: str, vocabulary: int) -> dict[str, Any]:
    t5 = transformers.T5Config(
        vocab_size=vocabulary, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu")  # fmt: skip
    models: dict[str, Any] = {
        "transformer": diffusers.LTXVideoTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32, num_layers=2, caption_channels=32),
        "vae": ltx_video_vae.miniature(variant),
        "text_encoder": transformers.T5EncoderModel(t5),
    }  # fmt: skip
    return {
        **{name: model.to(torch.bfloat16) for name, model in models.items()},
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(**SCHEDULES[variant == "0.9.5"]),
    }
