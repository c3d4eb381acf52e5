"""Small updates of bfloat16 weights: the bits that a sum loses are kept and come in later (Kahan 1965)."""

from __future__ import annotations

from typing import Any

import torch


def add(weight: torch.Tensor, update: torch.Tensor, state: dict[str, Any]) -> None:
    """``weight += update``; what does not fit into the weight's dtype stays in ``state``.

    Args:
        update: float32.
    """
    if weight.dtype == torch.float32:
        weight.add_(update)
        return
    rest = state.setdefault("rest", torch.zeros_like(weight))
    exact = weight.float() + rest.float() + update
    weight.copy_(exact)
    rest.copy_(exact - weight.float())
