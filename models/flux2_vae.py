"""FLUX.2's picture autoencoder (diffusers' AutoencoderKLFlux2): 2x2 patches of its latents, normalised by the
statistics that it holds.

Reference: https://github.com/black-forest-labs/flux2 (`AutoEncoder`), whose encoder gives the middle of what it takes
a picture for, without a draw. Licence of the weights: Apache-2.0.

Shape legend: N batch, C latent channels (32), H W height and width of the latents before they are patched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..utils.imports import lazy
from ..utils.weights import Weights, build, fill
from . import autoencoder
from .components import Component
from .files import read_json

if TYPE_CHECKING:
    import diffusers
    import torch
    from torch import nn
else:
    diffusers, torch = map(lazy, ("diffusers", "torch"))

FLUX2_VAE = Component(
    "the FLUX.2 VAE, such as flux2-vae.safetensors", "vae", "vae", "AutoencoderKLFlux2",
    ("decoder.conv_in.weight", "bn.running_mean"), ("vae.", "first_stage_model."))  # fmt: skip
STATISTICS = ("running_mean", "running_var")


def load_vae(weights: Weights, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """AutoencoderKLFlux2 from a folder or a file, in eval mode."""
    is_folder = weights.path.is_dir()
    config = read_json(weights.path / "config.json") if is_folder else vae_config(weights)
    vae = build(lambda: diffusers.AutoencoderKLFlux2.from_config(config))
    name_of = _names(weights)
    fill(vae, lambda name: autoencoder.as_matrix(name, weights.read(name_of(name))), dtype, device)
    for name in STATISTICS:
        setattr(vae.bn, name, weights.read(f"bn.{name}").to(device, dtype))
    return vae.eval()


def encode(vae: Any, pixels_NCFHW: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Latents of pictures (F is 1) as the denoiser wants them: N, 4C, H/2, W/2."""
    with torch.no_grad():
        latents_NCHW = vae.encode(pixels_NCFHW.squeeze(2).to(dtype)).latent_dist.mode()
    mean, variance = (getattr(vae.bn, name).to(latents_NCHW.dtype).view(1, -1, 1, 1) for name in STATISTICS)
    return (patched(latents_NCHW) - mean) / torch.sqrt(variance + vae.config.batch_norm_eps)


def patched(latents_NCHW: torch.Tensor) -> torch.Tensor:
    """2x2 patches as channels: N, 4C, H/2, W/2."""
    n, c, h, w = latents_NCHW.shape
    return latents_NCHW.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(n, c * 4, h // 2, w // 2)


def unpatched(latents_NCHW: torch.Tensor) -> torch.Tensor:
    """The inverse of `patched`."""
    n, c, h, w = latents_NCHW.shape
    return latents_NCHW.reshape(n, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c // 4, h * 2, w * 2)


def vae_config(weights: Weights) -> dict[str, Any]:
    """Arguments of AutoencoderKLFlux2 for a file, from names and shapes."""
    name_of = _names(weights)

    def widths(side: str) -> tuple[int, ...]:
        found: list[int] = []
        while (name := name_of(f"{side}_blocks.{len(found)}.resnets.0.conv1.weight")) in weights:
            found.append(weights.shape(name)[0])
        return tuple(found)

    encoder, decoder = widths("encoder.down"), widths("decoder.up")[::-1]
    resnets = range(100)
    return {
        "in_channels": weights.shape("encoder.conv_in.weight")[1],
        "out_channels": weights.shape("decoder.conv_out.weight")[0],
        "down_block_types": ("DownEncoderBlock2D",) * len(encoder),
        "up_block_types": ("UpDecoderBlock2D",) * len(encoder),
        "block_out_channels": encoder,
        "decoder_block_out_channels": None if decoder == encoder else decoder,
        "layers_per_block": next(
            n for n in resnets if name_of(f"encoder.down_blocks.0.resnets.{n}.conv1.weight") not in weights
        ),
        "latent_channels": weights.shape("decoder.conv_in.weight")[1],
        "norm_num_groups": math.gcd(32, *decoder),
        "use_quant_conv": name_of("quant_conv.weight") in weights,
        "use_post_quant_conv": name_of("post_quant_conv.weight") in weights,
        "mid_block_add_attention": name_of("encoder.mid_block.attentions.0.to_q.weight") in weights,
    }


def _names(weights: Weights) -> Callable[[str], str]:
    """Where a parameter of AutoencoderKLFlux2 lies: files have diffusers' names or the original ones."""
    if "encoder.down_blocks.0.resnets.0.conv1.weight" in weights:
        return lambda name: name
    levels = weights.count("encoder.down.")

    def name_of(name: str) -> str:
        name = autoencoder.original_name(name, levels)
        if "quant_conv" in name and name not in weights:  # beside the network that they belong to
            return f"{'decoder' if name.startswith('post') else 'encoder'}.{name}"
        return name

    return name_of


def to_original(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All tensors of AutoencoderKLFlux2, by name, as the original file has them."""
    own = {name: value for name, value in tensors.items() if not name.startswith("bn.")}
    return {**autoencoder.to_original(own), **{name: tensors[name] for name in tensors.keys() - own.keys()}}


def miniature() -> Any:
    """A small one."""
    vae = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 32, 32), layers_per_block=1, latent_channels=8,
    )  # fmt: skip
    vae.bn.running_mean.normal_(std=0.1)
    vae.bn.running_var.uniform_(0.5, 1.5)
    return vae
