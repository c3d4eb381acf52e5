"""One optimizer made of parts: momentum, second moment, orthogonal updates, rates of their own.

References: Muon (Jordan 2024), its scale (Liu et al. 2025), Polar Express (Amsel et al. 2025), NorMuon (Li et al.
2025), AdaMuon (Si et al. 2025), subset norm (Nguyen and Nguyen 2024), Adafactor (Shazeer and Stern 2018).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch

from .automagic import bump_rates, inverse_root
from .compensation import add

NEWTON_SCHULZ = [(3.4445, -4.7750, 2.0315)] * 5
POLAR_EXPRESS = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
]


class GenericOptim(torch.optim.Optimizer):
    """Steps weights by the parts that are asked for; without any: AdamW.

    Args:
        momentum_type: Average of the gradient, or the gradient itself.
        second_moment_type: What a step is divided by the root of: the averaged square of each weight's gradient,
            that of each row ("sn"), the product of a row and a column ("factored"), or nothing.
        muon: Matrices step by the nearest orthogonal matrix instead; the rest goes as told.
        adamuon: As muon, each entry over the root of its averaged square.
        normuon: As muon, each row over the root of its averaged square.
        polar_express: The faster series for the orthogonal matrix.
        automagic: Each weight has a rate of its own, as in `Automagic`.
        correct_bias: Averages count as if they had not begun with zero.
        skip_invalid_grads: A tensor whose gradient is not finite keeps its values in that step.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        momentum_type: Literal["ema", "none"] = "ema",
        second_moment_type: Literal["ema", "sn", "factored", "none"] = "ema",
        muon: bool = False,
        adamuon: bool = False,
        normuon: bool = False,
        polar_express: bool = False,
        automagic: bool = False,
        min_lr: float = 1e-7,
        max_lr: float = 1e-3,
        lr_bump: float = 1e-6,
        correct_bias: bool = True,
        skip_invalid_grads: bool = False,
    ) -> None:
        for name, value, known in (
            ("momentum_type", momentum_type, ("ema", "none")),
            ("second_moment_type", second_moment_type, ("ema", "sn", "factored", "none")),
        ):
            if value not in known:
                raise ValueError(f"{name}: must be one of {', '.join(known)}, got '{value}'")
        own: dict[str, Any] = {key: value for key, value in locals().items() if key in _OPTIONS}
        super().__init__(params, own)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of all weights that have a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                if group["skip_invalid_grads"] and not bool(weight.grad.isfinite().all()):
                    continue
                self._update(weight, weight.grad.float(), self.state[weight], group)

    def _update(self, weight: torch.Tensor, grad: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state["step"] = state.get("step", 0) + 1
        if weight.ndim >= 2 and (group["muon"] or group["adamuon"] or group["normuon"]):
            step = self._orthogonal(self._momentum(grad, state, group).flatten(1), state, group).view_as(grad)
        else:
            step = self._momentum(grad, state, group) * self._scale(grad, state, group)
        rate: Any = group["lr"]
        if group["automagic"]:
            bump_rates(step, state, group)
            rate = state["rates"]
        add(weight, -rate * (step + group["weight_decay"] * weight.float()), state)

    @staticmethod
    def _momentum(grad: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> torch.Tensor:
        if group["momentum_type"] == "none":
            return grad
        beta = group["betas"][0]
        state["first"] = state.get("first", torch.zeros_like(grad)).lerp(grad, 1 - beta)
        return state["first"] / (1 - beta ** state["step"] if group["correct_bias"] else 1.0)

    @staticmethod
    def _scale(grad: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> torch.Tensor:
        """What the step is multiplied with."""
        kind, beta = group["second_moment_type"], group["betas"][1]
        if kind == "none":
            return torch.ones((), device=grad.device)
        square = grad.square()
        if kind == "factored":
            return inverse_root(square + group["eps"] ** 2, state, beta)
        if kind == "sn" and grad.ndim >= 2:
            square = square.mean(-1, keepdim=True)
        return _over_root(square, "second", state, beta, group)

    def _orthogonal(self, momentum: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> torch.Tensor:
        """The orthogonal step; its root mean square is 0.2, as AdamW's is about, whatever the matrix's shape."""
        step = orthogonal(momentum, POLAR_EXPRESS if group["polar_express"] else NEWTON_SCHULZ)
        if group["adamuon"] or group["normuon"]:
            square = step.square() if group["adamuon"] else step.square().mean(-1, keepdim=True)
            step = step * _over_root(square, "orthogonal", state, group["betas"][1], group)
            return step * (0.2 * math.sqrt(step.numel()) / step.norm().clamp(min=1e-12))
        return step * (0.2 * math.sqrt(max(step.shape)))


def _over_root(
    square: torch.Tensor, key: str, state: dict[str, Any], beta: float, group: dict[str, Any]
) -> torch.Tensor:
    state[key] = state.get(key, torch.zeros_like(square)).lerp(square, 1 - beta)
    average = state[key] / (1 - beta ** state["step"] if group["correct_bias"] else 1.0)
    return 1 / (average.sqrt() + group["eps"])


def orthogonal(matrix: torch.Tensor, series: list[tuple[float, float, float]]) -> torch.Tensor:
    """Nearly the orthogonal matrix U V' of ``matrix`` = U S V', by polynomials of odd degree."""
    wide = matrix.shape[0] > matrix.shape[1]
    x = matrix.t() if wide else matrix
    x = x / (x.norm() * 1.01 + 1e-7)
    for a, b, c in series:
        square = x @ x.t()
        x = a * x + (b * square + c * square @ square) @ x
    return x.t() if wide else x


_OPTIONS = (
    "lr", "betas", "eps", "weight_decay", "momentum_type", "second_moment_type", "muon", "adamuon", "normuon",
    "polar_express", "automagic", "min_lr", "max_lr", "lr_bump", "correct_bias", "skip_invalid_grads",
)  # fmt: skip
