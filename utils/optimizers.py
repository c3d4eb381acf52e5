"""Optimizers by the names users know."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from .config import SettingsError
from .finetune import rate_of
from .settings import Optimizer


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
            state["rates"] = torch.full_like(grad, group["lr"])
            state["falling"] = torch.zeros_like(grad, dtype=torch.bool)
            state["step"] = 0
        state["step"] += 1
        step = grad * self._inverse_root(grad.square() + group["eps"], state, group["beta2"])
        step /= max(1.0, step.square().mean().sqrt().item() / group["clip_threshold"])
        falling = step > 0
        if state["step"] > 1:
            kept = falling == state["falling"]
            state["rates"].add_(torch.where(kept, group["lr_bump"], -group["lr_bump"])).clamp_(
                group["min_lr"], group["max_lr"]
            )
        state["falling"] = falling
        weight.mul_(1 - state["rates"] * group["weight_decay"]).sub_(state["rates"] * step)

    @staticmethod
    def _inverse_root(square: torch.Tensor, state: dict[str, Any], beta2: float) -> torch.Tensor:
        decay = min(beta2, 1 - state["step"] ** -0.8)
        if square.ndim < 2:
            state["second"] = state.get("second", torch.zeros_like(square)).lerp(square, 1 - decay)
            return state["second"].rsqrt()
        rows, columns = square.mean(-1), square.mean(-2)
        state["rows"] = state.get("rows", torch.zeros_like(rows)).lerp(rows, 1 - decay)
        state["columns"] = state.get("columns", torch.zeros_like(columns)).lerp(columns, 1 - decay)
        row_part = (state["rows"] / state["rows"].mean(-1, keepdim=True)).rsqrt().unsqueeze(-1)
        return row_part * state["columns"].rsqrt().unsqueeze(-2)


KAHAN = ("adamw_optimi", "stableadamw")
"""Types whose optimizers keep a Kahan sum for bfloat16 weights: the bits that their sum loses."""


def keeps_kahan_sums(settings: Optimizer) -> bool:
    """Whether the optimizer steps bfloat16 weights as they are, without a float32 copy."""
    return settings.type.lower() in KAHAN


def build_optimizers(
    settings: Optimizer, parameters: Mapping[str, nn.Parameter], rates: Mapping[str, float] | None = None
) -> list[torch.optim.Optimizer]:
    """The optimizer that ``[optimizer]`` asks for; none where there is nothing to train.

    Args:
        parameters: What it trains, by name.
        rates: Learning rates by regular expression of names; the first that is found in a name counts.

    Raises:
        SettingsError: The type is unknown, needs a GPU that is not there, or does not take an argument.
    """
    if not parameters:
        return []
    device = next(iter(parameters.values())).device
    kind = _optimizer_class(settings.type)
    arguments = settings.model_dump(exclude_none=True, exclude={"type"}) | (settings.model_extra or {})
    for ignored in _IGNORED.get(settings.type.lower(), ()):
        arguments.pop(ignored, None)
    if "betas" in arguments:
        arguments["betas"] = tuple(arguments["betas"])
    accepted = inspect.signature(kind.__init__).parameters
    unknown = [name for name in arguments if name not in accepted]
    if unknown:
        known = sorted(set(accepted) - {"self", "params", "kwargs"})
        raise SettingsError(f"optimizer.{unknown[0]}: {settings.type} does not take it; it takes {', '.join(known)}")
    if settings.type.lower() == "adafactor" and settings.lr is not None:
        arguments = {"relative_step": False, "scale_parameter": False} | arguments
    if kind is torch.optim.AdamW:
        arguments = {"fused": device.type == "cuda"} | arguments
    return [kind(_groups(parameters, rates or {}), **arguments)]


def _groups(parameters: Mapping[str, nn.Parameter], rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """Parameters by learning rate, and those of one dimension apart, which are not decayed."""
    groups: dict[tuple[float | None, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        rate = rate_of(name, rates)
        groups.setdefault((rate, parameter.ndim > 1), []).append(parameter)
    return [
        {"params": group, **({} if rate is None else {"lr": rate}), **({} if decayed else {"weight_decay": 0.0})}
        for (rate, decayed), group in sorted(groups.items(), key=lambda item: (item[0][0] or -1.0, not item[0][1]))
    ]


_IGNORED = {"automagic": ("lr", "betas"), "adamw8bitkahan": ("stabilize",)}
"""Arguments of files that people have which mean nothing to that optimizer."""


def _optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    match name.lower():
        case "adamw":
            return torch.optim.AdamW
        case "sgd":
            return torch.optim.SGD
        case "automagic":
            return Automagic
        case "adamw_optimi":
            import optimi

            return optimi.AdamW
        case "stableadamw":
            import optimi

            return optimi.StableAdamW
        case "adamw8bit" | "adamw8bitkahan":  # Kahan sums guard bfloat16 weights; those of an adapter are float32
            import bitsandbytes

            return bitsandbytes.optim.AdamW8bit
    import pytorch_optimizer

    found = {
        key.lower(): value
        for key, value in vars(pytorch_optimizer).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
    }.get(name.lower())
    if found is None:
        raise SettingsError(
            f"optimizer.type: '{name}' is unknown; use adamw, adamw8bit, adamw_optimi, AdamW8bitKahan, Lion, "
            "Adafactor, Prodigy, automagic, sgd or the name of a class in pytorch_optimizer"
        )
    return found
