"""Captions in their own lengths, side by side in a batch.

Shape legend: N batch, L text tokens, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..utils.imports import lazy

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")


def side_by_side(texts_LD: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Captions as NLD, the shorter ones with zeros behind, and which tokens are a caption's: NL, uint8.

    Where all are equally long that is a single column: without a mask attention takes faster kernels.
    """
    lengths = [len(text_LD) for text_LD in texts_LD]
    text_NLD = filled_up(texts_LD, max(lengths))
    width = max(lengths) if min(lengths) < max(lengths) else 1
    seen_NL = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    return text_NLD, seen_NL.to(torch.uint8)


def filled_up(texts_LD: Sequence[torch.Tensor], length: int) -> torch.Tensor:
    """Captions as NLD, each with zeros behind up to ``length`` tokens, for networks that see those zeros."""
    text_NLD = texts_LD[0].new_zeros(len(texts_LD), length, texts_LD[0].shape[-1])
    for row_LD, text_LD in zip(text_NLD, texts_LD, strict=True):
        row_LD[: len(text_LD)] = text_LD
    return text_NLD
