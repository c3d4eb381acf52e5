"""LTX-Video's VAE (diffusers' AutoencoderKLLTXVideo) in its original file: names, and the shape by names and widths.

There are three. 0.9 has a decoder that mirrors its encoder; 0.9.1 has a decoder that is told a time; 0.9.5, which later
versions kept, has that decoder and a new encoder.

Reference: https://github.com/Lightricks/LTX-Video (`CausalVideoAutoencoder`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..utils.imports import lazy
from ..utils.weights import Weights, build, fill
from .files import read_json

if TYPE_CHECKING:
    import diffusers
    import torch
else:
    diffusers, torch = map(lazy, ("diffusers", "torch"))

MIRRORED_ENCODER = (
    "down_blocks.0", "down_blocks.0.downsamplers.0", "down_blocks.0.conv_out", "down_blocks.1",
    "down_blocks.1.downsamplers.0", "down_blocks.1.conv_out", "down_blocks.2", "down_blocks.2.downsamplers.0",
    "down_blocks.3", "mid_block")  # fmt: skip
MIRRORED_DECODER = (
    "mid_block", "up_blocks.0", "up_blocks.1.upsamplers.0", "up_blocks.1", "up_blocks.2.conv_in",
    "up_blocks.2.upsamplers.0", "up_blocks.2", "up_blocks.3.conv_in", "up_blocks.3.upsamplers.0",
    "up_blocks.3")  # fmt: skip
NEW_ENCODER = (
    "down_blocks.0", "down_blocks.0.downsamplers.0", "down_blocks.1", "down_blocks.1.downsamplers.0", "down_blocks.2",
    "down_blocks.2.downsamplers.0", "down_blocks.3", "down_blocks.3.downsamplers.0", "mid_block")  # fmt: skip
NEW_DECODER = (
    "mid_block", "up_blocks.0.upsamplers.0", "up_blocks.0", "up_blocks.1.upsamplers.0", "up_blocks.1",
    "up_blocks.2.upsamplers.0", "up_blocks.2")  # fmt: skip
"""Diffusers' names of what the original numbers from 0 on in ``down_blocks`` and ``up_blocks``."""
STATISTICS = {
    "latents_mean": "per_channel_statistics.mean-of-means",
    "latents_std": "per_channel_statistics.std-of-means",
}
NEW_BLOCK = "LTXVideo095DownBlock3D"
MIRRORED = 128, 256, 512, 512
"""Widths of the decoder where a folder, from before 0.9.1, does not say them."""


def has_new_encoder(weights: Weights) -> bool:
    """Whether it is that of 0.9.5 and later, from a folder or an original file."""
    if weights.path.is_dir():
        return NEW_BLOCK in (read_json(weights.path / "config.json").get("down_block_types") or ())
    return "encoder.down_blocks.1.conv.conv.weight" in weights


def load_vae(weights: Weights, dtype: torch.dtype, device: torch.device) -> Any:
    """AutoencoderKLLTXVideo from a folder or an original file, in eval mode; its statistics are float32."""
    is_folder = weights.path.is_dir()
    config = read_json(weights.path / "config.json") if is_folder else vae_config(weights)
    vae = build(lambda: diffusers.AutoencoderKLLTXVideo.from_config(config))
    names = None if is_folder else numbered(has_new_encoder(weights), is_mirrored(weights))
    fill(vae, lambda name: weights.read(original_vae_name(name, names) if names else name), dtype, device)
    for name, original in STATISTICS.items():
        setattr(vae, name, weights.read(name if is_folder else original).to(device, torch.float32, copy=True))
    return vae.eval()


def read_original(weights: Weights) -> dict[str, torch.Tensor]:
    """All tensors as an original file has them, in the precision that they are stored in."""
    if not weights.path.is_dir():
        return {name: weights.read(name) for name in weights}
    config = read_json(weights.path / "config.json")
    mirrored = len(config.get("decoder_block_out_channels", MIRRORED)) == 4
    names = numbered(has_new_encoder(weights), mirrored)
    return {original_vae_name(name, names): weights.read(name) for name in weights}


def is_mirrored(weights: Weights) -> bool:
    """Whether an original file has the decoder of 0.9."""
    return "decoder.up_blocks.1.conv.conv.weight" not in weights


def numbered(new_encoder: bool, mirrored_decoder: bool) -> dict[str, str]:
    """Diffusers' blocks, and the original ones; the longer names first, as some begin like others."""
    sides = {
        "encoder": ("down", NEW_ENCODER if new_encoder else MIRRORED_ENCODER),
        "decoder": ("up", MIRRORED_DECODER if mirrored_decoder else NEW_DECODER),
    }
    found = {
        f"{side}.{block}.": f"{side}.{direction}_blocks.{number}."
        for side, (direction, blocks) in sides.items()
        for number, block in enumerate(blocks)
    }
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


def original_vae_name(name: str, names: dict[str, str]) -> str:
    """The original name of a tensor of AutoencoderKLLTXVideo; ``names`` as `numbered` gives them."""
    if name in STATISTICS:
        return STATISTICS[name]
    for part in ("time_embedder.", "scale_shift_table"):
        if name.startswith(f"decoder.{part}"):
            return name.replace("decoder.", "decoder.last_", 1)
    block = next((block for block in names if name.startswith(block)), "")
    name = names.get(block, "") + name.removeprefix(block)
    return (
        name.replace(".resnets.", ".res_blocks.")
        .replace("conv_shortcut.conv.", "conv_shortcut.")
        .replace(".norm3.", ".norm3.norm.")
    )


def vae_config(weights: Weights) -> dict[str, Any]:
    """Arguments of AutoencoderKLLTXVideo for an original file, from names and shapes."""
    new = has_new_encoder(weights)
    pixels = weights.shape("encoder.conv_in.conv.weight")[1]
    encoder = [0, 2, 4, 6, 8] if new else [0, 3, 6, 8, 9]
    widths = [_width(weights, f"encoder.down_blocks.{number}.") for number in encoder]
    return {
        "latent_channels": weights.shape("decoder.conv_in.conv.weight")[1],
        "patch_size": math.isqrt(pixels // 3),
        "block_out_channels": tuple(widths if new else widths[:4]),
        "down_block_types": (NEW_BLOCK if new else "LTXVideoDownBlock3D",) * 4,
        "layers_per_block": _layers(weights, "encoder.down_blocks", encoder),
        "spatio_temporal_scaling": (True, True, True, new),
        "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal") if new else ("conv",) * 4,
        "timestep_conditioning": "decoder.timestep_scale_multiplier" in weights,
        "spatial_compression_ratio": 32,
        "temporal_compression_ratio": 8,
        **(_mirrored_decoder(weights) if is_mirrored(weights) else _new_decoder(weights)),
    }


def _mirrored_decoder(weights: Weights) -> dict[str, Any]:
    blocks = [9, 6, 3, 1, 0]
    return {
        "decoder_block_out_channels": tuple(_width(weights, f"decoder.up_blocks.{number}.") for number in blocks[:4]),
        "decoder_layers_per_block": _layers(weights, "decoder.up_blocks", blocks),
        "decoder_spatio_temporal_scaling": (True, True, True, False),
        "decoder_inject_noise": (False,) * 5,
        "upsample_residual": (False,) * 4,
        "upsample_factor": (1,) * 4,
    }


def _new_decoder(weights: Weights) -> dict[str, Any]:
    blocks = [6, 4, 2, 0]
    widths = [_width(weights, f"decoder.up_blocks.{number}.") for number in blocks]
    noise = [f"decoder.up_blocks.{number}.res_blocks.0.per_channel_scale1" in weights for number in blocks]
    return {
        "decoder_block_out_channels": tuple(widths[1:]),
        "decoder_layers_per_block": _layers(weights, "decoder.up_blocks", blocks),
        "decoder_spatio_temporal_scaling": (True,) * 3,
        "decoder_inject_noise": tuple(noise),
        "upsample_residual": (True,) * 3,
        "upsample_factor": tuple(after // before for before, after in itertools.pairwise(widths)),
    }


def _width(weights: Weights, block: str) -> int:
    return weights.shape(f"{block}res_blocks.0.conv1.conv.weight")[0]


def _layers(weights: Weights, blocks: str, numbers: Sequence[int]) -> tuple[int, ...]:
    return tuple(weights.count(f"{blocks}.{number}.res_blocks.") for number in numbers)


def miniature(variant: str) -> Any:
    """A small one; ``variant`` is a version."""
    shape: dict[str, Any] = {"block_out_channels": (8, 16, 32, 32), "layers_per_block": (1, 1, 1, 1, 1)}
    if variant == "0.9.5":
        shape["block_out_channels"] = (8, 16, 16, 32, 32)
        shape["down_block_types"] = (NEW_BLOCK,) * 4
        shape["spatio_temporal_scaling"] = (True,) * 4
        shape["downsample_type"] = ("spatial", "temporal", "spatiotemporal", "spatiotemporal")
    if variant == "0.9":
        shape |= {"decoder_block_out_channels": (8, 16, 32, 32), "decoder_layers_per_block": (1, 2, 1, 1, 1)}
    else:
        shape |= {
            "decoder_block_out_channels": (16, 32, 64), "decoder_layers_per_block": (1, 2, 1, 1),
            "decoder_spatio_temporal_scaling": (True,) * 3, "upsample_residual": (True,) * 3,
            "decoder_inject_noise": (False, True, True, True) if variant == "0.9.1" else (False,) * 4,
            "upsample_factor": (2,) * 3, "timestep_conditioning": True,
        }  # fmt: skip
    vae = diffusers.AutoencoderKLLTXVideo(**shape, spatial_compression_ratio=32, temporal_compression_ratio=8)
    vae.latents_mean = 0.2 * torch.randn(128)
    vae.latents_std = 0.5 + torch.rand(128)
    return vae
