"""Which weights are trained when there is no adapter."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from .config import SettingsError

logger = logging.getLogger(__name__)


def choose_weights(
    denoiser: nn.Module, train_only: Sequence[str] | None, freeze: Sequence[str] | None, rates: Mapping[str, float]
) -> None:
    """Says of each parameter of ``denoiser`` whether it is trained.

    Args:
        train_only: Regular expressions; what none of them is found in is not trained.
        freeze: Regular expressions; what one of them is found in is not trained.
        rates: Learning rates by regular expression; at 0 weights are not trained.

    Raises:
        SettingsError: An expression is found in no parameter's name, or nothing is left to train.
    """
    names = [name for name, _ in denoiser.named_parameters()]
    for option, patterns in (("train_only", train_only), ("freeze", freeze)):
        for pattern in patterns or ():
            if not any(re.search(pattern, name) for name in names):
                raise SettingsError(
                    f"{option}: '{pattern}' is found in no weight's name; names are like {_some(names)}"
                )
    count = 0
    for name, parameter in denoiser.named_parameters():
        wanted = not train_only or any(re.search(pattern, name) for pattern in train_only)
        frozen = any(re.search(pattern, name) for pattern in freeze or ()) or rate_of(name, rates) == 0
        parameter.requires_grad_(wanted and not frozen)
        count += parameter.numel() if parameter.requires_grad else 0
    if not count:
        raise SettingsError("freeze: nothing is left to train")
    logger.info(
        "training %.1f million weights of %.1f", count / 1e6, sum(p.numel() for p in denoiser.parameters()) / 1e6
    )


def rate_of(name: str, rates: Mapping[str, float]) -> float | None:
    """The learning rate of the first expression that is found in ``name``; None: the optimizer's."""
    return next((rate for pattern, rate in rates.items() if re.search(pattern, name)), None)


def _some(names: Iterable[str]) -> str:
    short = sorted(names, key=len)
    return ", ".join(short[:: max(1, len(short) // 4)][:4])
