"""Optimizers by the names users know."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .config import SettingsError
from .finetune import rate_of
from .step_settings import Optimizer

KAHAN = ("adamw_optimi", "stableadamw", "adamw8bitkahan", "automagic", "genericoptim")
"""Types whose optimizers keep what bfloat16 weights lose in a sum."""
OURS = ("type", "offload", "cpu_offload", "gradient_release", "beta2_half_life")
"""Options of the table that are not the optimizer's own."""
MUON = ("muon", "adamuon", "normuon", "adago", "muonclip")
"""Classes of pytorch_optimizer that want to be told which weights are matrices."""
UNSOUND = {
    **dict.fromkeys(("sam", "gsam", "wsam", "bsam", "looksam", "friendlysam", "alig", "lomo", "adalomo", "pcgrad"),
                    "computes gradients by itself"),
    **dict.fromkeys(("adahessian", "sophiah"), "needs second derivatives"),
    **dict.fromkeys(("lookahead", "orthograd", "gradientcentralization", "schedulefreewrapper", "trac",
                     "dynamiclossscaler", "distributedmuon"), "wraps another optimizer or the training itself"),
}  # fmt: skip
"""Classes of pytorch_optimizer that cannot be used here, and why."""
_IGNORED = {"automagic": ("lr", "betas")}
"""Arguments of files that people have which mean nothing to that optimizer."""


def keeps_kahan_sums(settings: Optimizer) -> bool:
    """Whether the optimizer steps bfloat16 weights as they are, without a float32 copy."""
    return settings.type.lower() in KAHAN


def is_offloaded(settings: Optimizer) -> bool:
    """Whether weights are stepped in main memory, where their optimizer state lies."""
    extra = settings.model_extra or {}
    return settings.offload or settings.type.lower() == "offload" or bool(extra.get("cpu_offload"))


def build_optimizers(
    settings: Optimizer,
    parameters: Mapping[str, nn.Parameter],
    rates: Mapping[str, float] | None = None,
    global_batch: int = 1,
) -> list[torch.optim.Optimizer]:
    """The optimizer that ``[optimizer]`` asks for; none where there is nothing to train.

    Args:
        parameters: What it trains, by name.
        rates: Learning rates by regular expression of names; the first that is found in a name counts.
        global_batch: Samples of a step, for beta2_half_life.

    Raises:
        SettingsError: The type is unknown or cannot be used, or does not take an argument.
    """
    if not parameters:
        return []
    name = settings.type.lower()
    kind = _optimizer_class(settings.type)
    arguments = settings.model_dump(exclude_none=True, exclude=set(OURS)) | (settings.model_extra or {})
    for ignored in (*OURS, *_IGNORED.get(name, ())):
        arguments.pop(ignored, None)
    accepted = _accepted(kind)
    if "betas" in arguments:
        arguments["betas"] = tuple(arguments["betas"])
    if settings.beta2_half_life:
        default = accepted["betas"].default if "betas" in accepted else (0.9, 0.999)
        first = arguments.get("betas", default)[0]
        arguments["betas"] = (first, 0.5 ** (global_batch / settings.beta2_half_life))
    unknown = [key for key in arguments if key not in accepted]
    if unknown:
        known = sorted(set(accepted) - {"self", "params", "kwargs", "arguments"})
        raise SettingsError(f"optimizer.{unknown[0]}: {settings.type} does not take it; it takes {', '.join(known)}")
    if name == "adafactor" and settings.lr is not None:
        arguments = {"relative_step": False, "scale_parameter": False} | arguments
    if kind is torch.optim.AdamW:
        on_gpu = next(iter(parameters.values())).device.type == "cuda"
        arguments = {"fused": on_gpu or is_offloaded(settings)} | arguments
    try:
        return [kind(_groups(parameters, rates or {}, name in MUON), **arguments)]
    except (ValueError, TypeError) as error:
        raise SettingsError(f"optimizer: {settings.type} refuses: {error}") from None


def _accepted(kind: type) -> Mapping[str, inspect.Parameter]:
    """What a class takes, its parents' arguments included where it hands them on."""
    found: dict[str, inspect.Parameter] = {}
    for owner in kind.__mro__:
        parameters = inspect.signature(owner.__init__).parameters  # type: ignore[misc]
        found = {**parameters, **found}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            break
    return found


def _groups(parameters: Mapping[str, nn.Parameter], rates: Mapping[str, float], muon: bool) -> list[dict[str, Any]]:
    """Parameters by learning rate, and those of one dimension apart, which are not decayed."""
    groups: dict[tuple[float | None, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        groups.setdefault((rate_of(name, rates), parameter.ndim > 1), []).append(parameter)
    return [
        {
            "params": group,
            **({} if rate is None else {"lr": rate}),
            **({} if is_matrix else {"weight_decay": 0.0}),
            **({"use_muon": is_matrix} if muon else {}),
        }
        for (rate, is_matrix), group in sorted(groups.items(), key=lambda item: (item[0][0] or -1.0, not item[0][1]))
    ]


def _optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    match name.lower():
        case "adamw" | "offload":
            return torch.optim.AdamW
        case "sgd":
            return torch.optim.SGD
        case "automagic":
            from .automagic import Automagic

            return Automagic
        case "genericoptim":
            from .generic_optimizer import GenericOptim

            return GenericOptim
        case "adamw_optimi":
            import optimi

            return optimi.AdamW
        case "stableadamw":
            import optimi

            return optimi.StableAdamW
        case "adamw8bit":
            import bitsandbytes

            return bitsandbytes.optim.AdamW8bit
        case "adamw8bitkahan":
            from .kahan8bit import AdamW8bitKahan

            return AdamW8bitKahan
    return _further_class(name)


def _further_class(name: str) -> type[torch.optim.Optimizer]:
    import pytorch_optimizer

    if reason := UNSOUND.get(name.lower()):
        raise SettingsError(f"optimizer.type: {name} {reason}, which cannot be done here; use adamw")
    found = {
        key.lower(): value
        for key, value in vars(pytorch_optimizer).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
    }.get(name.lower())
    if found is None:
        raise SettingsError(
            f"optimizer.type: '{name}' is unknown; use adamw, adamw8bit, adamw_optimi, stableadamw, AdamW8bitKahan, "
            "Lion, Adafactor, Prodigy, ScheduleFreeAdamW, Muon, automagic, genericoptim, sgd, offload or the name of "
            "a class in pytorch_optimizer"
        )
    return found
