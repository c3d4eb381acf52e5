"""Original files that hold several of diffusers' layers in one tensor, or a layer's rows in another order.

Where a parameter of diffusers' lies is told by the original tensor's name and the part of it: empty (all), one of
`ROWS`, or "swapped".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from ..utils.imports import lazy

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")

Source = Callable[[str], tuple[str, str]]
"""Of a parameter's name: the original tensor's, and the part."""
ROWS = ("q", "k", "v", "mlp")
"""Order of the parts in a fused projection. The first three have the same number of rows."""


def to_fused(tensors: Mapping[str, torch.Tensor], source_of: Source) -> dict[str, torch.Tensor]:
    """Diffusers' tensors in the original layout."""
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        source, part = source_of(name)
        parts.setdefault(source, {})[part] = swap_halves(tensor) if part == "swapped" else tensor
    return {
        name: torch.cat([found[part] for part in ROWS if part in found]) if "q" in found else next(iter(found.values()))
        for name, found in parts.items()
    }


def swap_halves(value: torch.Tensor) -> torch.Tensor:
    """The second half of the rows before the first: in original modulations shift comes before scale, in diffusers'
    some have scale before shift."""
    return torch.cat(value.chunk(2)[::-1])
