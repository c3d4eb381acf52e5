"""Automagic: a learning rate for every single weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from .compensation import add


class Automagic(torch.optim.Optimizer):
    """Finds a learning rate for every single weight: it grows while the gradient keeps its sign and
    shrinks when the sign flips. Steps are gradients over the root of a factored second moment.

    Args:
        lr: Learning rate that every weight begins with.
        lr_bump: What one step adds to it or takes from it.
        clip_threshold: Largest root mean square of a step, as in Adafactor (Shazeer and Stern 2018).
        eps: Added to the squared gradient.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-6,
        min_lr: float = 1e-7,
        max_lr: float = 1e-3,
        lr_bump: float = 1e-6,
        beta2: float = 0.999,
        clip_threshold: float = 1.0,
        eps: float = 1e-30,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "min_lr": min_lr,
                "max_lr": max_lr,
                "lr_bump": lr_bump,
                "beta2": beta2,
                "clip_threshold": clip_threshold,
                "eps": eps,
                "weight_decay": weight_decay,
            },
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of all weights that have a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, weight.grad.float(), self.state[weight], group)

    def _update(self, weight: torch.Tensor, grad: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state["step"] = 0
        state["step"] += 1
        step = grad * inverse_root(grad.square() + group["eps"], state, group["beta2"])
        step /= (step.square().mean().sqrt() / group["clip_threshold"]).clamp(min=1.0)
        bump_rates(step, state, group)
        add(weight, -state["rates"] * (weight.float() * group["weight_decay"] + step), state)


def bump_rates(step: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """Raises the rates of weights whose step keeps its sign, lowers those of the others."""
    falling = step > 0
    if "rates" not in state:
        state["rates"] = torch.full_like(step, group["lr"])
    else:
        kept = falling == state["falling"]
        state["rates"].add_(torch.where(kept, group["lr_bump"], -group["lr_bump"])).clamp_(
            group["min_lr"], group["max_lr"]
        )
    state["falling"] = falling


def inverse_root(square: torch.Tensor, state: dict[str, Any], beta2: float) -> torch.Tensor:
    """One over the root of the averaged square, of matrices as the product of a row and a column (Adafactor)."""
    decay = min(beta2, 1 - state["step"] ** -0.8)
    if square.ndim < 2:
        state["second"] = state.get("second", torch.zeros_like(square)).lerp(square, 1 - decay)
        return state["second"].rsqrt()
    rows, columns = square.mean(-1), square.mean(-2)
    state["rows"] = state.get("rows", torch.zeros_like(rows)).lerp(rows, 1 - decay)
    state["columns"] = state.get("columns", torch.zeros_like(columns)).lerp(columns, 1 - decay)
    row_part = (state["rows"] / state["rows"].mean(-1, keepdim=True)).rsqrt().unsqueeze(-1)
    return row_part * state["columns"].rsqrt().unsqueeze(-2)
