"""Wan 2.1's and 2.2's VAE (diffusers' AutoencoderKLWan), which other families took over.

Qwen-Image's VAE is Wan 2.1's with other weights.

Shape legend: N batch, C channels, F frames, H W height and width of pixels or latents.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from ..utils.imports import lazy
from ..utils.weights import build, fill
from .files import read_json
from .wan_files import Source, original_vae_name, vae_config

if TYPE_CHECKING:
    import diffusers
    import torch
else:
    diffusers, torch = map(lazy, ("diffusers", "torch"))


def load_wan_vae(source: Source, dtype: torch.dtype, device: torch.device) -> Any:
    """AutoencoderKLWan from a folder or a file of either layout."""
    path = source.weights.path
    if source.original:
        config = vae_config(source.weights)
    else:  # a file of a diffusers folder may be named without the folder
        file = (path if path.is_dir() else path.parent) / "config.json"
        config = read_json(file) if file.is_file() else {}
    vae = build(lambda: diffusers.AutoencoderKLWan.from_config(config))
    rename = partial(original_vae_name, num_res_blocks=vae.config.num_res_blocks, residual=vae.config.is_residual)
    fill(vae, lambda name: source.weights.read(rename(name) if source.original else name), dtype, device)
    return vae


def encode_normalised(vae: Any, pixels_NCFHW: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The mode of each posterior, with mean 0 and standard deviation 1: NCFHW."""
    with torch.no_grad():
        latents_NCFHW = vae.encode(pixels_NCFHW).latent_dist.mode().float()
    mean, std = (
        torch.tensor(values, device=latents_NCFHW.device).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return ((latents_NCFHW - mean) * (1.0 / std)).to(dtype)  # as the pipeline rounds it
