"""The weights of a ComfyUI model's modules, as they take part in the computation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def computes_as(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the module's forward is that of torch's ``kind`` or of ComfyUI's, and nobody else's."""
    forward: Any = type(module).forward
    is_theirs = forward.__module__ in ("comfy.ops", kind.__module__) and isinstance(module, kind)
    return is_theirs and not hasattr(module, "quant_format") and "forward" not in vars(module)


def nothing() -> None:
    """Lets go of nothing."""


def dequantised(weight: Any, dtype: torch.dtype) -> Tensor:
    """A weight in ``dtype``, dequantised if need be."""
    quantised = hasattr(weight, "dequantize") and type(weight) is not Tensor
    plain: Tensor = weight.dequantize() if quantised else weight
    return plain.to(dtype)


def weight_of(module: Any, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Callable[[], None]]:
    """The module's weight as it takes part in the computation, and what is to be called after its last use."""
    plain: Any = getattr(module, "weight", None)
    ready = type(plain) in (nn.Parameter, Tensor) and plain.dtype == dtype and plain.device == device
    if ready and not getattr(module, "weight_function", None):
        return plain, nothing
    weight, _, release = fetch(module, dtype, device)
    return dequantised(weight, dtype), release


def fetch(module: Any, dtype: torch.dtype, device: torch.device) -> tuple[Any, Tensor | None, Callable[[], None]]:
    """Weight and bias of a layer as ComfyUI brings them to the device, and what tells it that they are not used any
    more; until then they stay in the way of others."""
    own = getattr(module, "cast_bias_weight", None)  # GGUF layers have their own
    if own is not None:
        return *own(dtype=dtype, device=device, bias_dtype=dtype)[:2], nothing
    import comfy.ops as ops

    if not hasattr(ops, "uncast_bias_weight"):  # versions that hold nothing for it
        return *ops.cast_bias_weight(module, dtype=dtype, device=device, bias_dtype=dtype), nothing
    fetched = ops.cast_bias_weight(module, dtype=dtype, device=device, bias_dtype=dtype, offloadable=True)
    return *fetched[:2], partial(ops.uncast_bias_weight, module, *fetched)
