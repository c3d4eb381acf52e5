"""The U-Net of latent diffusion models (diffusers' UNet2DConditionModel): its links and its original file.

Between the links travel the embedding of time, sizes and pooled text, the text, what of it is seen, and a
stack: the states that wait for the way up, on top the one that is worked on.

Reference: https://github.com/CompVis/latent-diffusion (`UNetModel`), whose names SDXL kept.

Shape legend: N batch, C channels, H W height and width, L text tokens, D features.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..utils.imports import lazy
from ..utils.weights import Weights
from .base import Layer

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")

Tensors = tuple["torch.Tensor", ...]


def layers(unet: Any) -> list[Layer]:
    """The chain that computes what ``unet.forward`` computes, from `embed`'s arguments to the prediction."""
    names = ("conv_in", "time_proj", "time_embedding", "add_time_proj", "add_embedding")
    links = [Layer("unet.embed", embed, {name: getattr(unet, name) for name in names})]
    for index, block in enumerate(unet.down_blocks):
        links += _pairs(f"unet.down_blocks.{index}", block, _down)
        if block.downsamplers:
            links.append(Layer(f"unet.down_blocks.{index}.down", _downsample, {"sampler": block.downsamplers[0]}))
    links += _mid_pairs(unet.mid_block)
    for index, block in enumerate(unet.up_blocks):
        links += _pairs(f"unet.up_blocks.{index}", block, _up)
        if block.upsamplers:
            links.append(Layer(f"unet.up_blocks.{index}.up", _upsample, {"sampler": block.upsamplers[0]}))
    ends = {"norm": unet.conv_norm_out, "act": unet.conv_act, "conv": unet.conv_out}
    return [*links, Layer("unet.out", _out, ends)]


def _pairs(name: str, block: Any, forward: Callable[..., Tensors]) -> list[Layer]:
    """A link for each resnet and the attention after it."""
    attentions = list(getattr(block, "attentions", ()))
    links = []
    for index, resnet in enumerate(block.resnets):
        modules = {"resnet": resnet, **({"attention": attentions[index]} if attentions else {})}
        links.append(Layer(f"{name}.{index}", forward, modules, is_block=True))
    return links


def _mid_pairs(block: Any) -> list[Layer]:
    """The first resnet begins a new entry of the stack, the others go on with it."""
    if block is None:
        return [Layer("unet.mid_block", _begin, {})]
    first, *rest = block.resnets
    attentions = list(getattr(block, "attentions", ()))
    parts = [(first, attentions[:1]), *((resnet, attentions[i + 1 : i + 2]) for i, resnet in enumerate(rest))]
    return [
        Layer(f"unet.mid_block.{index}", _down if index == 0 else _go_on,
              {"resnet": resnet, **({"attention": attention[0]} if attention else {})}, is_block=True)
        for index, (resnet, attention) in enumerate(parts)
    ]  # fmt: skip


def embed(
    modules: Any,
    x_t_NCHW: torch.Tensor,
    t_N: torch.Tensor,
    size_ids_N6: torch.Tensor,
    seen_NL: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    pooled_ND: torch.Tensor,
) -> Tensors:
    """The first link: two texts side by side, as (N, pieces * L, D) or (N * pieces, L, D).

    Args:
        size_ids_N6: Original size, crop and size in pixels, height before width.
        seen_NL: Which tokens count; (N, 1) where all do.
    """
    count, dtype = len(x_t_NCHW), x_t_NCHW.dtype
    emb_ND = modules.time_embedding(modules.time_proj(t_N).to(dtype))
    sizes_ND = modules.add_time_proj(size_ids_N6.flatten()).reshape(count, -1)
    emb_ND = emb_ND + modules.add_embedding(torch.cat([pooled_ND, sizes_ND], dim=-1).to(dtype))
    text_NLD = torch.cat([text.reshape(count, -1, text.shape[-1]) for text in (first, second)], dim=-1)
    bias_N1L = ((1 - seen_NL.to(dtype)) * -10000.0).unsqueeze(1)
    return emb_ND, text_NLD, bias_N1L, modules.conv_in(x_t_NCHW)


def _pair(modules: Any, x: torch.Tensor, emb: torch.Tensor, text: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    x = modules.resnet(x, emb)
    attention = getattr(modules, "attention", None)
    if attention is None:
        return x
    seen = {} if bias.shape[-1] == 1 else {"encoder_attention_mask": bias}  # one: all is seen
    return attention(x, encoder_hidden_states=text, return_dict=False, **seen)[0].contiguous()


def _down(modules: Any, *values: torch.Tensor) -> Tensors:
    return *values, _pair(modules, values[-1], *values[:3])


def _downsample(modules: Any, *values: torch.Tensor) -> Tensors:
    return *values, modules.sampler(values[-1])


def _begin(_modules: Any, *values: torch.Tensor) -> Tensors:
    return *values, values[-1]


def _go_on(modules: Any, *values: torch.Tensor) -> Tensors:
    return *values[:-1], _pair(modules, values[-1], *values[:3])


def _up(modules: Any, *values: torch.Tensor) -> Tensors:
    *below, kept, x = values
    return *below, _pair(modules, torch.cat([x, kept], dim=1), *values[:3])


def _upsample(modules: Any, *values: torch.Tensor) -> Tensors:
    """To twice the size, or where that was odd to the size of what waits below."""
    *below, x = values
    size = below[-1].shape[-2:]
    even = all(large == 2 * small for large, small in zip(size, x.shape[-2:], strict=True))
    return *below, modules.sampler(x, None if even else size)


def _out(modules: Any, *values: torch.Tensor) -> torch.Tensor:
    return modules.conv(modules.act(modules.norm(values[-1])))


# -- the U-Net in the original layout ---------------------------------------------------------------------

TOP_MODULES = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESNET_MODULES = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def original_name(name: str, config: Mapping[str, Any]) -> str:
    """The original name of a parameter or module of UNet2DConditionModel, which has this ``config``."""
    for ours, theirs in TOP_MODULES.items():
        if name == ours or name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    match = re.fullmatch(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(resnets|attentions|\w+samplers)\.(\d+)\.(.+)", name)
    assert match, name
    way, block, kind, index, rest = match.groups()
    per_block, inner, number = config["layers_per_block"] + 1, int(kind == "attentions"), int(index)
    if kind == "resnets":
        module, dot, leaf = rest.partition(".")
        rest = RESNET_MODULES[module] + dot + leaf
    if way == "mid":
        return f"middle_block.{2 * number + inner}.{rest}"
    if way == "down":
        place = 1 + int(block) * per_block + (config["layers_per_block"] if kind == "downsamplers" else number)
        return f"input_blocks.{place}.{inner}.{'op' + rest.removeprefix('conv') if kind == 'downsamplers' else rest}"
    if kind == "upsamplers":
        inner = 2 if "CrossAttn" in config["up_block_types"][int(block)] else 1
        number = config["layers_per_block"]
    return f"output_blocks.{int(block) * per_block + number}.{inner}.{rest}"


def config_of(weights: Weights, pooled_width: int) -> dict[str, Any]:
    """Arguments of UNet2DConditionModel for a file in the original layout, from names and shapes.

    Args:
        pooled_width: Features of the pooled text, which share an input with those of the sizes.
    """
    places = range(weights.count("input_blocks."))
    ends = [place for place in places if f"input_blocks.{place}.0.op.weight" in weights] + [len(places)]
    starts = [1, *(end + 1 for end in ends[:-1])]
    depths = [weights.count(f"input_blocks.{place}.1.transformer_blocks.") for place in starts]
    channels = [weights.shape(f"input_blocks.{place}.0.in_layers.2.weight")[0] for place in starts]
    kinds = ["CrossAttn" if depth else "" for depth in depths]
    attention = f"input_blocks.{starts[depths.index(max(depths))]}.1.transformer_blocks.0.attn2.to_k.weight"
    return {
        "in_channels": weights.shape("input_blocks.0.0.weight")[1],
        "out_channels": weights.shape("out.2.weight")[0],
        "down_block_types": tuple(f"{kind}DownBlock2D" for kind in kinds),
        "up_block_types": tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        "block_out_channels": tuple(channels),
        "layers_per_block": ends[0] - starts[0],
        "transformer_layers_per_block": tuple(max(1, depth) for depth in depths),
        "attention_head_dim": tuple(max(1, width // 64) for width in channels),  # the number of heads, in truth
        "cross_attention_dim": weights.shape(attention)[1],
        "norm_num_groups": math.gcd(32, *(width // 2 for width in channels)),  # of two channels at least
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": (weights.shape("label_emb.0.0.weight")[1] - pooled_width) // 6,
        "projection_class_embeddings_input_dim": weights.shape("label_emb.0.0.weight")[1],
    }
