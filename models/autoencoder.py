"""The picture autoencoder of latent diffusion models (diffusers' AutoencoderKL) in its original single file.

Reference: https://github.com/CompVis/latent-diffusion (`AutoencoderKL`), whose names SDXL, SD3 and Flux kept.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..utils.imports import lazy
from ..utils.weights import Weights, build, fill
from .files import read_json

if TYPE_CHECKING:
    import diffusers
    import torch
    from torch import nn
else:
    diffusers, torch = map(lazy, ("diffusers", "torch"))


def load_autoencoder(
    weights: Weights, dtype: torch.dtype, device: torch.device, scaling: float, shift: float | None = None
) -> nn.Module:
    """AutoencoderKL from a folder or an original file, in eval mode.

    Args:
        scaling: Factor of its latents, and
        shift: what is taken from them before, for a file, which does not hold them.
    """
    vae = build(lambda: diffusers.AutoencoderKL.from_config(_config(weights, scaling, shift)))
    fill(vae, reader(weights), dtype, device)
    return vae.eval()


FLUX_SCALING, FLUX_SHIFT = 0.3611, 0.1159
"""Of Flux's latents, which others took over; from the reference code's parameters, as a file does not hold them."""
SD3_SCALING, SD3_SHIFT = 1.5305, 0.0609
"""Of Stable Diffusion 3's, likewise."""


def encode(
    vae: Any, pixels_NCFHW: torch.Tensor, generators: Sequence[torch.Generator], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """As `Family.encode_media`, for pictures and a VAE with scaling and shift: a draw from each posterior."""
    with torch.no_grad():
        latents_NCHW = vae.encode(pixels_NCFHW.squeeze(2).to(dtype)).latent_dist.sample(list(generators))
    return {"latents": (latents_NCHW - vae.config.shift_factor) * vae.config.scaling_factor}


def miniature(scaling: float = FLUX_SCALING, shift: float = FLUX_SHIFT) -> Any:
    """A small one of Flux's kind."""
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=16, norm_num_groups=8,
        scaling_factor=scaling, shift_factor=shift, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


def reader(weights: Weights) -> Callable[[str], torch.Tensor]:
    """Reads a parameter of AutoencoderKL by its name, from a folder or an original file."""
    if weights.path.is_dir():
        return weights.read
    levels = weights.count("encoder.down.")
    return lambda name: as_matrix(name, weights.read(original_name(name, levels)))


def read_original(weights: Weights) -> dict[str, torch.Tensor]:
    """All of an autoencoder as an original file has it, in the precision that it is stored in."""
    vae, read = build(lambda: diffusers.AutoencoderKL.from_config(_config(weights, 1.0, None))), reader(weights)
    return to_original({name: read(name) for name, _ in vae.named_parameters()})


def _config(weights: Weights, scaling: float, shift: float | None) -> dict[str, Any]:
    if weights.path.is_dir():
        return read_json(weights.path / "config.json")
    return {**config_of(weights), "scaling_factor": scaling, "shift_factor": shift}


def config_of(weights: Weights) -> dict[str, Any]:
    """Arguments of AutoencoderKL for a file in the original layout, from names and shapes."""
    levels = weights.count("encoder.down.")
    channels = [weights.shape(f"encoder.down.{level}.block.0.conv1.weight")[0] for level in range(levels)]
    return {
        "in_channels": weights.shape("encoder.conv_in.weight")[1],
        "out_channels": weights.shape("decoder.conv_out.weight")[0],
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": tuple(channels),
        "layers_per_block": weights.count("encoder.down.0.block."),
        "latent_channels": weights.shape("decoder.conv_in.weight")[1],
        "norm_num_groups": math.gcd(32, *channels),
        "use_quant_conv": "quant_conv.weight" in weights,
        "use_post_quant_conv": "post_quant_conv.weight" in weights,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in weights,
    }


def original_name(name: str, levels: int) -> str:
    """The name in an original file of a parameter of AutoencoderKL with ``levels`` resolutions."""
    name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{levels - 1 - int(match[1])}", name)
    name = re.sub(r"mid_block\.resnets\.(\d+)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
    for ours, theirs in (
        (r"down_blocks", "down"), (r"resnets", "block"), (r"(down|up)samplers\.0", r"\1sample"),
        (r"mid_block\.attentions\.0", "mid.attn_1"), (r"group_norm", "norm"), (r"to_([qkv])\.", r"\1."),
        (r"to_out\.0", "proj_out"), (r"conv_shortcut", "nin_shortcut"), (r"conv_norm_out", "norm_out"),
    ):  # fmt: skip
        name = re.sub(ours, theirs, name)
    return name


def as_matrix(name: str, value: torch.Tensor) -> torch.Tensor:
    """A tensor of the original file for parameter ``name``: its attention has 1x1 convolutions where diffusers'
    has linear layers."""
    return value.flatten(1) if ".attentions." in name and value.ndim > 1 else value


def to_original(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All parameters of AutoencoderKL, by name, as the original file has them."""
    levels = 1 + max(int(match[1]) for name in tensors if (match := re.match(r"encoder\.down_blocks\.(\d+)", name)))
    return {
        original_name(name, levels): value[..., None, None] if ".attentions." in name and value.ndim == 2 else value
        for name, value in tensors.items()
    }
