"""Wan's files: names and shapes in the layouts that people have.

"Original" is Wan-AI's own layout, which ComfyUI's single files have for transformer and VAE, too; "library" is
that of diffusers and transformers. Here is where a parameter of the library's modules lies in an original
file, and what arguments the library's classes need for a file. Reads headers alone.

Reference: https://github.com/Wan-Video/Wan2.1 (``wan/modules``), Apache-2.0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.config import SettingsError
from ..utils.weights import Weights

if TYPE_CHECKING:
    import torch

HEAD_DIM = 128
"""Features of a head of every Wan transformer; one that is smaller has one head."""
CLIP_HEAD_DIM = 80
"""Features of a head of CLIP-ViT-H."""


@dataclass(frozen=True)
class Layout:
    """One way to name the tensors of a part."""

    markers: tuple[str, ...]
    """Tensors that tell it: every file of it has them."""
    prefixes: tuple[str, ...] = ("",)
    """Before the names; files of several parts have one for each."""


@dataclass(frozen=True)
class Part:
    """A part of the model: how it is called in each place and how to know its file."""

    title: str
    option: str
    folder: str
    """In a folder in diffusers layout."""
    files: tuple[str, ...]
    """In a folder in original layout; the first that is there."""
    library: Layout
    original: Layout


PARTS = {
    "transformer": Part(
        "a Wan transformer, such as wan2.1_t2v_1.3B_bf16.safetensors", "transformer_path", "transformer", ("",),
        Layout(("blocks.0.attn1.to_q.weight", "condition_embedder.time_proj.weight", "proj_out.weight")),
        Layout(("blocks.0.self_attn.q.weight", "time_projection.1.weight", "head.modulation"),
               ("", "model.diffusion_model.", "diffusion_model."))),
    "vae": Part(
        "the Wan VAE, such as wan_2.1_vae.safetensors", "vae_path", "vae", ("Wan2.1_VAE.pth", "Wan2.2_VAE.pth"),
        Layout(("decoder.mid_block.resnets.0.norm1.gamma", "quant_conv.weight")),
        Layout(("decoder.middle.0.residual.0.gamma", "conv2.weight"), ("", "vae.", "first_stage_model."))),
    "umt5": Part(
        "UMT5-XXL, such as umt5_xxl_fp16.safetensors", "llm_path", "text_encoder",
        ("models_t5_umt5-xxl-enc-bf16.pth",),
        # the second marker tells it from T5, which has one position bias for all blocks
        Layout(("encoder.block.0.layer.1.DenseReluDense.wi_0.weight",
                "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"),
               ("", "text_encoders.umt5xxl.transformer.")),
        Layout(("blocks.0.ffn.gate.0.weight", "blocks.1.pos_embedding.embedding.weight"))),
    "clip": Part(
        "CLIP-ViT-H, such as clip_vision_h.safetensors", "clip_path", "image_encoder",
        ("models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",),
        Layout(("encoder.layers.0.self_attn.q_proj.weight", "embeddings.patch_embedding.weight"),
               ("", "vision_model.")),
        Layout(("transformer.0.attn.to_qkv.weight", "patch_embedding.weight"), ("visual.", ""))),
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """The tensors of a part, and whether they are named as Wan-AI names them."""

    weights: Weights
    original: bool

    def shape(self, name: str, original_name: Callable[[str], str]) -> tuple[int, ...]:
        """Shape of the library's parameter ``name``."""
        return self.weights.shape(original_name(name) if self.original else name)

    def has(self, name: str, original_name: Callable[[str], str]) -> bool:
        """Whether it has the library's parameter ``name``."""
        return (original_name(name) if self.original else name) in self.weights


def open_part(part: Part, path: Path, option: str) -> Source:
    """The tensors of a file or folder, known to be of the right kind.

    Raises:
        SettingsError: It is not what the part should be.
    """
    weights = Weights(path, option)
    for layout in (part.library, part.original):
        for prefix in layout.prefixes:
            if all(prefix + marker in weights for marker in layout.markers):
                if prefix:
                    weights = Weights(path, option, (prefix,), layout.markers[0])
                return Source(weights, layout is part.original)
    raise SettingsError(f"{option}: '{path}' is not {part.title} (it has no '{part.library.markers[0]}')")


# -- transformer ----------------------------------------------------------------------------------------------

TOP_MODULES = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
    "patch_embedding": "patch_embedding",
    "proj_out": "head.head",
}
PARAMETERS = {
    "condition_embedder.image_embedder.pos_embed": "img_emb.emb_pos",
    "scale_shift_table": "head.modulation",
}
BLOCK_MODULES = {
    "attn1": "self_attn", "attn2": "cross_attn", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o",
    "add_k_proj": "k_img", "add_v_proj": "v_img", "norm_q": "norm_q", "norm_k": "norm_k",
    "norm_added_k": "norm_k_img", "norm2": "norm3", "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2",
}  # fmt: skip
KNOWN = {
    True: {"patch_embedding", "time_embedding", "time_projection", "text_embedding", "img_emb", "blocks", "head"},
    False: {"patch_embedding", "condition_embedder", "blocks", "scale_shift_table", "proj_out"},
}
"""First parts of the names in an original (True) and a library file; anything else is of another variant."""
MARKS = {"scaled_fp8", "model_type"}
"""First parts of the names of tensors that only say something about the file."""


def original_name(name: str) -> str:
    """Where a parameter of WanTransformer3DModel lies in an original file; module names, too."""
    if name in PARAMETERS or name in TOP_MODULES:
        return PARAMETERS.get(name) or TOP_MODULES[name]
    if block := re.fullmatch(r"(blocks\.\d+)\.(.+)", name):
        return f"{block[1]}.{_in_block(block[2])}"
    module, _, leaf = name.rpartition(".")
    return f"{TOP_MODULES[module]}.{leaf}"


def _in_block(name: str) -> str:
    if name == "scale_shift_table":
        return "modulation"
    name, leaf = re.fullmatch(r"(.+?)(\.weight|\.bias)?", name).groups("")  # type: ignore[union-attr]
    attention = re.fullmatch(r"(attn[12])\.(.+)", name)
    parts = attention.groups() if attention else (name,)
    return ".".join(BLOCK_MODULES[part] for part in parts) + (leaf or "")


def transformer_config(source: Source, head_dim: int = HEAD_DIM) -> dict[str, Any]:
    """Arguments of WanTransformer3DModel for a file, from names and shapes."""

    def shape(name: str) -> tuple[int, ...]:
        return source.shape(name, original_name)

    dim, in_channels, *patch = shape("patch_embedding.weight")
    image = "condition_embedder.image_embedder"
    has_image, has_positions = (source.has(f"{image}.{name}", original_name) for name in ("norm1.weight", "pos_embed"))
    return {
        "patch_size": tuple(patch),
        "num_attention_heads": dim // min(head_dim, dim),
        "attention_head_dim": min(head_dim, dim),
        "in_channels": in_channels,
        "out_channels": shape("proj_out.weight")[0] // math.prod(patch),
        "text_dim": shape("condition_embedder.text_embedder.linear_1.weight")[1],
        "freq_dim": shape("condition_embedder.time_embedder.linear_1.weight")[1],
        "ffn_dim": shape("blocks.0.ffn.net.0.proj.weight")[0],
        "num_layers": source.weights.count("blocks."),
        "image_dim": shape(f"{image}.norm1.weight")[0] if has_image else None,
        "added_kv_proj_dim": dim if source.has("blocks.0.attn2.add_k_proj.weight", original_name) else None,
        "pos_embed_seq_len": shape(f"{image}.pos_embed")[1] if has_positions else None,
    }


def foreign_parts(source: Source) -> list[str]:
    """Parts of a transformer that text-to-video and image-to-video models do not have."""
    return sorted({name.split(".")[0] for name in source.weights} - KNOWN[source.original] - MARKS)


# -- VAE ------------------------------------------------------------------------------------------------------

LATENTS_22: dict[str, Any] = {
    "latents_mean": [
        -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891, 0.1570,
        -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502, -0.2055, -0.0322,
        0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520,
        0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667],
    "latents_std": [
        0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165,
        0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659, 0.7069, 0.5338, 0.4889, 0.4917,
        0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600,
        0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744],
}  # fmt: skip
"""Of the 48 channels of Wan 2.2's own VAE; from its source, as the file does not hold them. AutoencoderKLWan's
defaults are those of the 16 channels of Wan 2.1."""


def vae_config(weights: Weights) -> dict[str, Any]:
    """Arguments of AutoencoderKLWan for an original file, from names and shapes."""
    residual = "encoder.downsamples.0.downsamples.0.residual.0.gamma" in weights
    links = [f"encoder.downsamples.{n}" for n in range(weights.count("encoder.downsamples."))]
    if residual:
        links = [f"{link}.downsamples.{n}" for link in links for n in range(weights.count(f"{link}.downsamples."))]
    levels: list[list[int]] = [[]]
    in_time = []
    for link in links:
        if f"{link}.residual.6.weight" in weights:
            levels[-1].append(weights.shape(f"{link}.residual.6.weight")[0])
        else:
            levels.append([])
            in_time.append(f"{link}.time_conv.weight" in weights)
    base, in_channels = weights.shape("encoder.conv1.weight")[:2]
    patch = math.isqrt(in_channels // 3)
    factors = [level[0] // base for level in levels]
    channels = weights.shape("conv2.weight")[0]
    return {
        "base_dim": base,
        "decoder_base_dim": weights.shape("decoder.conv1.weight")[0] // factors[-1],
        "z_dim": channels,
        "dim_mult": factors,
        "num_res_blocks": len(levels[0]),
        "temperal_downsample": in_time,
        "is_residual": residual,
        "in_channels": in_channels,
        "out_channels": weights.shape("decoder.head.2.weight")[0],
        "patch_size": patch if patch > 1 else None,
        "scale_factor_temporal": 2 ** sum(in_time),
        "scale_factor_spatial": 2 ** len(in_time) * patch,
        **(LATENTS_22 if channels == 48 else {}),
    }


def original_vae_name(name: str, num_res_blocks: int, residual: bool) -> str:
    """Where a parameter of AutoencoderKLWan lies in an original file."""

    def flat(match: re.Match[str]) -> str:
        within = int(match[3]) if match[2] == "resnets" else num_res_blocks + 1
        return f"decoder.upsamples.{int(match[1]) * (num_res_blocks + 2) + within}"

    if residual:
        name = re.sub(r"(down|up)_blocks\.(\d+)\.resnets", r"\1samples.\2.\1samples", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsampler", rf"downsamples.\1.downsamples.{num_res_blocks}", name)
        name = re.sub(r"up_blocks\.(\d+)\.upsampler", rf"upsamples.\1.upsamples.{num_res_blocks + 1}", name)
    else:
        name = re.sub(r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)", flat, name)
        name = name.replace("encoder.down_blocks", "encoder.downsamples")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"middle.{int(match[1]) * 2}", name)
    for ours, theirs in (
        (r"mid_block\.attentions\.0", "middle.1"), (r"norm1\.gamma", "residual.0.gamma"),
        (r"conv_shortcut", "shortcut"), (r"norm2\.gamma", "residual.3.gamma"),
        (r"\.conv1\.", ".residual.2."), (r"\.conv2\.", ".residual.6."),
        (r"coder\.conv_in", "coder.conv1"), (r"norm_out", "head.0"), (r"conv_out", "head.2"),
        (r"^quant_conv", "conv1"), (r"^post_quant_conv", "conv2"),
    ):  # fmt: skip
        name = re.sub(ours, theirs, name)
    return name


# -- text encoder ---------------------------------------------------------------------------------------------

UMT5_MODULES = {
    "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
    "layer.0.SelfAttention.q": "attn.q",
    "layer.0.SelfAttention.k": "attn.k",
    "layer.0.SelfAttention.v": "attn.v",
    "layer.0.SelfAttention.o": "attn.o",
    "layer.0.layer_norm": "norm1",
    "layer.1.DenseReluDense.wi_0": "ffn.gate.0",
    "layer.1.DenseReluDense.wi_1": "ffn.fc1",
    "layer.1.DenseReluDense.wo": "ffn.fc2",
    "layer.1.layer_norm": "norm2",
}


def original_umt5_name(name: str) -> str:
    """Where a parameter of UMT5EncoderModel lies in an original file."""
    if name in ("shared.weight", "encoder.embed_tokens.weight"):
        return "token_embedding.weight"
    if match := re.fullmatch(r"encoder\.block\.(\d+)\.(.+)\.weight", name):
        return f"blocks.{match[1]}.{UMT5_MODULES[match[2]]}.weight"
    return {"encoder.final_layer_norm.weight": "norm.weight"}[name]


def umt5_reader(source: Source) -> Callable[[str], torch.Tensor]:
    """Reads a parameter of UMT5EncoderModel."""
    return lambda name: source.weights.read(original_umt5_name(name) if source.original else _shared(name, source))


def _shared(name: str, source: Source) -> str:
    """The token embedding is one tensor with two names; a file has either or both."""
    if name in ("shared.weight", "encoder.embed_tokens.weight") and name not in source.weights:
        return "shared.weight" if "shared.weight" in source.weights else "encoder.embed_tokens.weight"
    return name


def umt5_config(source: Source) -> dict[str, Any]:
    """Arguments of UMT5Config for a file, from names and shapes."""

    def shape(name: str) -> tuple[int, ...]:
        return source.shape(name if source.original else _shared(name, source), original_umt5_name)

    block = "encoder.block.0.layer"
    buckets, heads = shape(f"{block}.0.SelfAttention.relative_attention_bias.weight")
    inner, width = shape(f"{block}.0.SelfAttention.q.weight")
    return {
        "vocab_size": shape("shared.weight")[0],
        "d_model": width,
        "d_kv": inner // heads,
        "d_ff": shape(f"{block}.1.DenseReluDense.wi_0.weight")[0],
        "num_layers": source.weights.count("blocks." if source.original else "encoder.block."),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu",
    }


# -- image encoder --------------------------------------------------------------------------------------------

CLIP_NAMES: Mapping[str, str] = {
    "embeddings.class_embedding": "cls_embedding",
    "embeddings.patch_embedding.weight": "patch_embedding.weight",
    "embeddings.position_embedding.weight": "pos_embedding",
    "pre_layrnorm": "pre_norm",
    "post_layernorm": "post_norm",
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "self_attn.q_proj": "attn.to_qkv",
    "self_attn.k_proj": "attn.to_qkv",
    "self_attn.v_proj": "attn.to_qkv",
    "self_attn.out_proj": "attn.proj",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
}


def original_clip_name(name: str) -> str:
    """Where a parameter of CLIPVisionModel lies in an original file; queries, keys and values are one tensor."""
    if name in CLIP_NAMES:
        return CLIP_NAMES[name]
    module, _, leaf = name.rpartition(".")
    if match := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", module):
        return f"transformer.{match[1]}.{CLIP_NAMES[match[2]]}.{leaf}"
    return f"{CLIP_NAMES[module]}.{leaf}"


def clip_reader(source: Source) -> Callable[[str], torch.Tensor]:
    """Reads a parameter of CLIPVisionModel, which some versions of transformers name ``vision_model.<name>``."""

    def read(name: str) -> torch.Tensor:
        name = name.removeprefix("vision_model.")
        if not source.original:
            return source.weights.read(name)
        rows = None
        if match := re.search(r"\.([qkv])_proj\.", name):
            width, third = source.weights.shape("patch_embedding.weight")[0], "qkv".index(match[1])
            rows = slice(third * width, (third + 1) * width)
        value = source.weights.read(original_clip_name(name), rows)
        if "class_embedding" in name:
            return value.flatten()
        return value.squeeze(0) if "position_embedding" in name else value

    return read


def clip_config(source: Source) -> dict[str, Any]:
    """Arguments of CLIPVisionConfig for a file, from names and shapes."""

    def shape(name: str) -> tuple[int, ...]:
        return source.shape(name, original_clip_name)

    width, _, patch, _ = shape("embeddings.patch_embedding.weight")
    positions = shape("embeddings.position_embedding.weight")[-2]
    return {
        "hidden_size": width,
        "intermediate_size": shape("encoder.layers.0.mlp.fc1.weight")[0],
        "num_hidden_layers": source.weights.count("transformer." if source.original else "encoder.layers."),
        "num_attention_heads": max(1, width // CLIP_HEAD_DIM),
        "image_size": patch * math.isqrt(positions - 1),
        "patch_size": patch,
        "hidden_act": "gelu",
    }
