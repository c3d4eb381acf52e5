"""What Lumina Image 2 and its descendant Z-Image share: Lumina's Next-DiT.

Shape legend: N batch, C latent channels, H W height and width of the latents, T picture tokens (H/2 * W/2), K features
of a patch (4C).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def patches(latents_NCHW: torch.Tensor) -> torch.Tensor:
    """2x2 patches as tokens, channels last: NTK."""
    n, c, h, w = latents_NCHW.shape
    return latents_NCHW.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(n, h * w // 4, c * 4)
