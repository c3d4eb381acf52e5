"""Z-Image and Z-Image Turbo, by Tongyi-MAI: one stream of picture and caption, 6 billion weights.

A rectified-flow transformer over 2x2 patches of Flux's latents. Picture and caption (Qwen3's last hidden states but
one, in their own length) are each padded to a multiple of 32 tokens by a learned token, refined apart by a few
blocks, and then pass the layers as one sequence, the picture first. The network is told 1 - t and predicts data minus
noise.

Reference: https://github.com/Tongyi-MAI/Z-Image, and diffusers' ZImagePipeline, which the layers here equal but for
rounding: rotary embedding is in real numbers here. Licence of the weights: Apache-2.0. Turbo is distilled; a LoRA that
is trained on it undoes that, unless a de-distilling adapter is given to ``merge_adapters``.

Shape legend: N batch, C latent channels, H W height and width of the latents, T picture tokens (H/2 * W/2), L caption
tokens, both with padding, K features of a patch (4C), D features, P pairs of features of a head.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..utils.config import SettingsError, option
from ..utils.imports import lazy
from ..utils.weights import Weights, build
from . import autoencoder
from .base import Batch, Encodings, Example, Layer, SampleRequest, Shapes
from .components import FLUX_VAE, Component, FromComponents, TextEncoder
from .files import fingerprint, read_json, write_json
from .flow import FlowFamily
from .from_comfyui import FromComfyUI
from .qwen3 import QWEN3_4B, load_qwen, qwen_width, write_qwen_tokenizer

if TYPE_CHECKING:
    import diffusers
    import torch
    import transformers
    from torch import nn
else:
    diffusers, torch, transformers = map(lazy, ("diffusers", "torch", "transformers"))
    nn = lazy("torch.nn")

SCHEDULE: dict[str, Any] = {"shift": 3.0, "use_dynamic_shifting": False}
TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
"""A prompt as Qwen3 is asked it: its chat template with thinking left to it."""
MULTIPLE = 32
"""Of tokens."""
REAL, PADDING, NOTHING = 1, 2, 0
"""Kinds of caption tokens: the last fill up a batch, and are not seen."""


class ZImageConfig(FromComfyUI):
    """Z-Image and Z-Image Turbo, from single files as ComfyUI has them, from a diffusers folder, or from both."""

    type: Literal["z_image"] = "z_image"
    checkpoint_path: str | None = option(None, "The whole model as a single file.", picker="checkpoints")
    diffusers_path: str | None = option(
        None,
        "Folder of the whole model in diffusers layout. What a file given elsewhere holds is taken from there instead.",
        picker="diffusers",
    )
    tokenizer_path: str | None = option(
        None, "Folder of the tokenizer, if it is in neither the diffusers folder nor ComfyUI.", advanced=True
    )
    max_sequence_length: int = option(
        512, "Tokens per caption, with those of the template; longer captions are cut.", ge=16, le=1024, advanced=True
    )


COMPONENTS = {
    "transformer": Component(
        "a Z-Image transformer, such as z_image_turbo_bf16.safetensors", "diffusion_model", "transformer",
        "ZImageTransformer2DModel", ("noise_refiner.0.attention.qkv.weight", "cap_pad_token"),
        ("model.diffusion_model.", "diffusion_model.")),
    "vae": replace(FLUX_VAE, option="vae"),
    "qwen": QWEN3_4B,
}  # fmt: skip


class ZImage(FromComponents, FlowFamily):
    """Z-Image in the hands of the trainer."""

    title = "Z-Image"
    Config = ZImageConfig
    config: ZImageConfig
    components = COMPONENTS
    whole = "a Z-Image folder in diffusers layout"
    published = "Z-Image"
    size_multiple = 16
    text_encoders = ("qwen",)
    shared_inputs = (("attention.to_q", "attention.to_k", "attention.to_v"), ("feed_forward.w1", "feed_forward.w3"))
    adapter_blocks = ("ZImageTransformerBlock",)
    high_precision = ("^t_embedder", "^cap_embedder", "^all_x_embedder", "^all_final_layer")

    # -- files ------------------------------------------------------------------------------------

    def _given(self, name: str) -> tuple[str | None, str]:
        """`checkpoint_path` has what no other option names."""
        option = self.components[name].option
        value: Any = getattr(self.config, option)
        if name == "qwen":
            option, value = f"{option}.path", value[0].path if value else None
        if not value and self.config.checkpoint_path:
            return self.config.checkpoint_path, "model.checkpoint_path"
        return value, f"model.{option}"

    def check_files(self) -> None:
        if len(self.config.text_encoders) > 1 or any(entry.paths for entry in self.config.text_encoders):
            raise SettingsError(f"model.text_encoders: Z-Image has one; give {self.components['qwen'].title}")
        parts = {name: self._weights(name) for name in self.components}
        self._tokenizer_folder("qwen")
        transformer, is_single = parts["transformer"], not parts["transformer"].path.is_dir()

        def shape(name: str) -> tuple[int, ...]:
            return transformer.shape(source_of(name)[0] if is_single else name)

        self._check_widths(
            parts,
            {
                "vae": (parts["vae"].shape("decoder.conv_in.weight")[1], shape("all_x_embedder.2-1.weight")[1] // 4),
                "qwen": (qwen_width(parts["qwen"]), shape("cap_embedder.1.weight")[1]),
            },
        )

    def identity(self, part: str) -> str:
        identity = {"weights": fingerprint(self._place(part)[0]), "dtype": self.config.dtype}
        if part == "qwen":
            identity["tokenizer"] = fingerprint(self._tokenizer_folder(part))
            identity["length"] = str(self.config.max_sequence_length)
            if self.text_dtype:
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
        folder = self._tokenizer_folder(name)
        return load_qwen(self._weights(name), folder, self.dtype, device, self.text_storage())

    def encode_text(self, name: str, encoder: TextEncoder, captions: Sequence[str]) -> Encodings:
        tokens = encoder.tokenizer(
            [TEMPLATE.format(caption) for caption in captions], padding="max_length", truncation=True,
            max_length=self.config.max_sequence_length, return_tensors="pt",
        )  # fmt: skip
        device = encoder.model.device
        seen_NL = tokens.attention_mask.to(device).bool()
        with torch.no_grad():
            output = encoder.model(tokens.input_ids.to(device), attention_mask=seen_NL, output_hidden_states=True)
        states_NLD = output.hidden_states[-2].to(self.dtype)
        return {"qwen_embeds": [states_LD[seen_L] for states_LD, seen_L in zip(states_NLD, seen_NL, strict=True)]}

    # -- training -----------------------------------------------------------------------------------

    def build_denoiser(self) -> nn.Module:
        weights = self._weights("transformer")
        is_folder = weights.path.is_dir()
        config = read_json(weights.path / "config.json") if is_folder else transformer_config(weights)
        return build(lambda: diffusers.ZImageTransformer2DModel.from_config(config))

    def denoiser_reader(self) -> Callable[[str], torch.Tensor]:
        weights = self._weights("transformer")
        return weights.read if weights.path.is_dir() else partial(read_single, weights)

    def layers(self, denoiser: Any) -> list[Layer]:
        """As `Family.layers`; the denoiser's attention is given its real form, which pipelines run as well."""
        from .z_image_attention import use_real_attention

        use_real_attention(denoiser)
        embedders = {
            "x_embedder": denoiser.all_x_embedder["2-1"],
            "t_embedder": denoiser.t_embedder,
            "cap_embedder": denoiser.cap_embedder,
            "pads": nn.ParameterList([denoiser.x_pad_token, denoiser.cap_pad_token]),  # a layer holds modules alone
        }
        layers = [Layer("embed", partial(_embed, turns_of=denoiser.rope_embedder), embedders)]
        for stack, run in (("noise_refiner", _picture), ("context_refiner", _caption), ("layers", _both)):
            for index, block in enumerate(getattr(denoiser, stack)):
                layers.append(Layer(f"{stack}.{index}", run, {"block": block}, is_block=True))
        layers.append(Layer("out", _out, {"final_layer": denoiser.all_final_layer["2-1"]}))
        return layers

    def collate(self, examples: Sequence[Example]) -> Batch:
        x_t_NCHW, t_N, velocity_NCHW = self.noised(examples)
        texts = [example.text["qwen_embeds"].to(self.dtype) for example in examples]
        lengths = [len(text_LD) + -len(text_LD) % MULTIPLE for text_LD in texts]
        text_NLD = texts[0].new_zeros(len(texts), max(lengths), texts[0].shape[1])
        kinds_NL = torch.full(text_NLD.shape[:2], NOTHING, dtype=torch.uint8)
        for row, (text_LD, length) in enumerate(zip(texts, lengths, strict=True)):
            text_NLD[row, : len(text_LD)] = text_LD
            kinds_NL[row, :length] = PADDING
            kinds_NL[row, : len(text_LD)] = REAL
        # One column where all is seen: without a mask attention may take faster kernels
        is_ragged = min(lengths) < max(lengths)
        seen_NL = (kinds_NL != NOTHING).to(torch.uint8)[:, : None if is_ragged else 1]
        target_NTK = -patches(velocity_NCHW)
        return Batch(
            inputs=(x_t_NCHW.to(self.dtype), (1000 - t_N * 1000) / 1000, text_NLD, kinds_NL, seen_NL.contiguous()),
            target=target_NTK,
            weight=self.time_weight(t_N, target_NTK),
        )

    def cached_shapes(self, latent_size: tuple[int, int, int]) -> tuple[Shapes, Shapes]:
        config: Any = self.build_denoiser().config
        text = {"qwen_embeds": (4 * MULTIPLE, config.cap_feat_dim)}
        return {"latents": (config.in_channels, *latent_size[1:])}, text

    def spread_mask(self, mask_NFHW: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return patches(mask_NFHW.expand(-1, target.shape[-1] // 4, -1, -1))

    # -- results ------------------------------------------------------------------------------------

    def lora_keys(self, module_name: str) -> str:
        return f"diffusion_model.{module_name}"

    def comfyui_tensors(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return to_single(tensors)

    def pipeline(self, denoiser: Any, device: torch.device, text_encoders: bool = True) -> Any:
        qwen = self.load_text_encoder("qwen", device) if text_encoders else TextEncoder(None, None)
        schedule = self._schedule(SCHEDULE)
        self.layers(denoiser)  # for its attention
        return diffusers.ZImagePipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler.from_config(schedule),
            vae=self.load_vae(device),
            text_encoder=qwen.model,
            tokenizer=qwen.tokenizer,
            transformer=denoiser,
        )

    def prompt_arguments(self, request: SampleRequest, device: torch.device) -> dict[str, Any]:
        return {
            "prompt_embeds": [request.text["qwen_embeds"].to(device)],
            "negative_prompt_embeds": [request.negative_text["qwen_embeds"].to(device)],
        }

    @classmethod
    def write_miniature(cls, folder: Path) -> dict[str, Any]:
        vocabulary = write_qwen_tokenizer(folder / "tokenizer")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            parts = _miniature_parts(vocabulary)
        index: dict[str, Any] = {"_class_name": "ZImagePipeline", "_diffusers_version": diffusers.__version__}
        for name, part in parts.items():
            part.save_pretrained(folder / name)
            index[name] = [type(part).__module__.split(".")[0], type(part).__name__]
        index["tokenizer"] = ["transformers", "PreTrainedTokenizerFast"]
        write_json(folder / "model_index.json", index)
        return {"type": "z_image", "diffusers_path": str(folder), "dtype": "float32", "max_sequence_length": 64}


# -- links of the chain ---------------------------------------------------------------------------------

Tensors = tuple["torch.Tensor", ...]


def patches(latents_NCHW: torch.Tensor) -> torch.Tensor:
    """2x2 patches as tokens, channels last: NTK."""
    n, c, h, w = latents_NCHW.shape
    return latents_NCHW.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(n, h * w // 4, c * 4)


def _embed(
    modules: Any,
    x_t_NCHW: torch.Tensor,
    told_N: torch.Tensor,
    text_NLD: torch.Tensor,
    kinds_NL: torch.Tensor,
    seen_NL: torch.Tensor,
    *,
    turns_of: Callable[[torch.Tensor], torch.Tensor],
) -> Tensors:
    """Also how far each pair of features is turned, as NTP2, or TP2 where it is the same for all samples; what is
    seen, one column where all is; and a tensor as long as there are tokens of the picture without padding."""
    x_pad, caption_pad = modules.pads
    tokens_NTK = patches(x_t_NCHW)
    made_T = torch.zeros(tokens_NTK.shape[1], dtype=torch.uint8, device=tokens_NTK.device)
    missing = -len(made_T) % MULTIPLE
    x_NTD = modules.x_embedder(torch.cat([tokens_NTK, tokens_NTK[:, -1:].expand(-1, missing, -1)], dim=1))
    if missing:
        x_NTD = torch.cat([x_NTD[:, : len(made_T)], x_pad.to(x_NTD).expand(len(x_NTD), missing, -1)], dim=1)
    time_ND = modules.t_embedder(told_N * 1000).type_as(x_t_NCHW)
    caption_NLD = modules.cap_embedder(text_NLD)
    caption_NLD = torch.where((kinds_NL == PADDING)[..., None], caption_pad.to(caption_NLD), caption_NLD)
    caption_NLD = caption_NLD * (kinds_NL != NOTHING)[..., None]
    ids_NT3 = _places(kinds_NL, x_t_NCHW.shape[2] // 2, x_t_NCHW.shape[3] // 2, missing)
    is_ragged = seen_NL.shape[1] > 1
    ids_NT3 = ids_NT3 if is_ragged else ids_NT3[:1]
    turns = torch.view_as_real(turns_of(ids_NT3.flatten(0, 1))).unflatten(0, ids_NT3.shape[:2])
    seen = torch.cat([seen_NL.new_ones(x_NTD.shape[:2]), seen_NL], dim=1) if is_ragged else seen_NL
    return x_NTD, caption_NLD, time_ND, (turns if is_ragged else turns[0]).contiguous(), seen, made_T


def _places(kinds_NL: torch.Tensor, height: int, width: int, missing: int) -> torch.Tensor:
    """(place, row, column) of each token: the picture comes after the caption, its padding at the start."""
    n, length = kinds_NL.shape
    device = kinds_NL.device
    rows, columns = (torch.arange(side, device=device) for side in (height, width))
    grid_NT3 = torch.zeros(n, height, width, 3, dtype=torch.int64, device=device)
    grid_NT3[..., 0] = (kinds_NL != NOTHING).sum(1)[:, None, None] + 1
    grid_NT3[..., 1], grid_NT3[..., 2] = rows[:, None], columns
    caption_NL3 = torch.zeros(n, length, 3, dtype=torch.int64, device=device)
    caption_NL3[..., 0] = torch.arange(1, length + 1, device=device)
    return torch.cat([grid_NT3.flatten(1, 2), grid_NT3.new_zeros(n, missing, 3), caption_NL3], dim=1)


def _picture(
    modules: Any, x_NTD: torch.Tensor, caption_NLD: torch.Tensor, time_ND: torch.Tensor, turns: torch.Tensor,
    *rest: torch.Tensor,
) -> Tensors:  # fmt: skip
    x_NTD = modules.block(x_NTD, None, turns.narrow(-3, 0, x_NTD.shape[1]), time_ND)
    return x_NTD, caption_NLD, time_ND, turns, *rest


def _caption(
    modules: Any, x_NTD: torch.Tensor, caption_NLD: torch.Tensor, time_ND: torch.Tensor, turns: torch.Tensor,
    seen: torch.Tensor, made_T: torch.Tensor,
) -> Tensors:  # fmt: skip
    start, length = x_NTD.shape[1], caption_NLD.shape[1]
    mask = seen[:, start:] if seen.shape[1] > 1 else None
    caption_NLD = modules.block(caption_NLD, mask, turns.narrow(-3, start, length))
    return x_NTD, caption_NLD, time_ND, turns, seen, made_T


def _both(
    modules: Any, x_NTD: torch.Tensor, caption_NLD: torch.Tensor, time_ND: torch.Tensor, turns: torch.Tensor,
    seen: torch.Tensor, made_T: torch.Tensor,
) -> Tensors:  # fmt: skip
    joined_NTD = torch.cat([x_NTD, caption_NLD], dim=1)
    joined_NTD = modules.block(joined_NTD, seen if seen.shape[1] > 1 else None, turns, time_ND)
    x_NTD, caption_NLD = joined_NTD.split([x_NTD.shape[1], caption_NLD.shape[1]], dim=1)
    return x_NTD.contiguous(), caption_NLD.contiguous(), time_ND, turns, seen, made_T


def _out(
    modules: Any, x_NTD: torch.Tensor, caption_NLD: torch.Tensor, time_ND: torch.Tensor, _turns: Any, _seen: Any,
    made_T: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    prediction: torch.Tensor = modules.final_layer(torch.cat([x_NTD, caption_NLD], dim=1), c=time_ND)
    return prediction[:, : len(made_T)]


# -- the single files -------------------------------------------------------------------------------------

RENAMED = {
    "all_x_embedder.2-1.": "x_embedder.", "all_final_layer.2-1.": "final_layer.", ".to_out.0.": ".out.",
    ".norm_q.": ".q_norm.", ".norm_k.": ".k_norm.",
}  # fmt: skip
"""Parts of names in diffusers' transformer, and in the original one."""
ROWS = ("q", "k", "v")
"""Order of the parts in a fused projection."""


def source_of(name: str) -> tuple[str, str]:
    """Where a parameter of diffusers' transformer lies in the original one: the tensor's name and which of `ROWS`."""
    for part, other in RENAMED.items():
        name = name.replace(part, other)
    if match := re.search(r"\.to_([qkv])\.", name):
        return name.replace(match[0], ".qkv."), match[1]
    return name, ""


def read_single(weights: Weights, name: str) -> torch.Tensor:
    """A parameter of diffusers' transformer from a file in the original layout."""
    source, part = source_of(name)
    if not part:
        return weights.read(source)
    rows, index = weights.shape(source)[0] // 3, ROWS.index(part)
    return weights.read(source, slice(index * rows, (index + 1) * rows))


def to_single(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of diffusers' transformer in the original layout; the inverse of `read_single`."""
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        source, part = source_of(name)
        parts.setdefault(source, {})[part] = tensor
    return {
        name: torch.cat([found[part] for part in ROWS]) if "q" in found else found[""] for name, found in parts.items()
    }


def transformer_config(weights: Weights) -> dict[str, Any]:
    """Arguments of ZImageTransformer2DModel for a file in the original layout, from names and shapes."""
    dim, text = weights.shape("cap_embedder.1.weight")
    head_dim = weights.shape("layers.0.attention.q_norm.weight")[0]
    side = head_dim * 3 // 16 * 2  # 48 of 128, for rows and for columns; the first axis has what is left
    return {
        "in_channels": weights.shape("x_embedder.weight")[1] // 4,
        "dim": dim,
        "n_layers": weights.count("layers."),
        "n_refiner_layers": weights.count("noise_refiner."),
        "n_heads": dim // head_dim,
        "n_kv_heads": dim // head_dim,
        "cap_feat_dim": text,
        "axes_dims": [head_dim - 2 * side, side, side],
        "axes_lens": [1536, 512, 512],
    }


# -- miniature --------------------------------------------------------------------------------------------


def _miniature_parts(vocabulary: int) -> dict[str, Any]:
    qwen = transformers.Qwen3Config(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, rope_theta=1e6)  # fmt: skip
    models: dict[str, Any] = {
        "transformer": diffusers.ZImageTransformer2DModel(
            in_channels=16, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=32,
            axes_dims=[4, 6, 6], axes_lens=[1536, 512, 512]),
        "vae": autoencoder.miniature(),
        "text_encoder": transformers.Qwen3Model(qwen),
    }  # fmt: skip
    with torch.no_grad():
        for pad in (models["transformer"].x_pad_token, models["transformer"].cap_pad_token):
            pad.normal_()
    return {
        **{name: model.to(torch.bfloat16) for name, model in models.items()},
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(**SCHEDULE),
    }
