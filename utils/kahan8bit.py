"""8-bit AdamW whose steps of bfloat16 weights lose nothing."""

from __future__ import annotations

from typing import Any

import bitsandbytes
import torch


class AdamW8bitKahan(bitsandbytes.optim.AdamW8bit):
    """bitsandbytes' AdamW with 8-bit state; what a bfloat16 weight cannot hold is kept beside it.

    Args:
        stabilize: Shorten the update of a tensor whose root mean square is above the learning rate to that.
    """

    def __init__(self, params: Any, stabilize: bool = False, **arguments: Any) -> None:
        super().__init__(params, **arguments)
        self._stabilize = stabilize

    @torch.no_grad()
    def update_step(self, group: dict[str, Any], p: torch.Tensor, gindex: int, pindex: int) -> None:
        """The library steps a weight of zero, so that its update comes out alone and is added exactly."""
        if p.dtype == torch.float32 and not self._stabilize:
            super().update_step(group, p, gindex, pindex)
            return
        state, before = self.state[p], p.detach().clone()
        p.zero_()
        super().update_step(group, p, gindex, pindex)
        update = p.float()
        if self._stabilize:
            update /= (update.square().mean().sqrt() / group["lr"]).clamp(min=1.0)
        update -= group["lr"] * group["weight_decay"] * before.float()
        exact = before.float() + update
        if p.dtype != torch.float32:
            exact += state.get("rest", torch.zeros_like(p)).float()
            state["rest"] = (exact - exact.to(p.dtype).float()).to(p.dtype)
        p.copy_(exact)
