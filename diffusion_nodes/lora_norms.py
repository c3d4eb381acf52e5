"""Frozen norms of a ComfyUI model that keep less for their gradient than autograd would."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .lora_weights import computes_as, weight_of


class _RmsNorm(torch.autograd.Function):
    """A frozen norm that keeps its input alone; where torch puts it together, autograd would keep each part's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Any, base: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(x)
        return base(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        module = ctx.module
        grad_x, wide = grad.float(), x.float()
        if module.weight is not None:
            weight, release = weight_of(module, x.dtype, x.device)
            try:
                grad_x = grad_x * weight
            finally:
                release()
        elif grad_x is grad:
            grad_x = grad.clone()
        length = x.shape[-1]
        mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(length)
        factor = mean_square.add_(module.eps).rsqrt_()
        along = (grad_x * wide).sum(-1, keepdim=True)
        grad_x.addcmul_(wide, along.mul_(factor).mul_(factor), value=-1.0 / length).mul_(factor)
        return grad_x.to(x.dtype), None, None


def forward_of(module: nn.Module) -> Callable[..., Any]:
    """The module's ``forward``, with less to keep if it is an RMS norm that computes as usual, on the CPU.

    On GPUs torch has it as one operation.
    """
    usual = computes_as(module, nn.RMSNorm)
    if not usual or module.eps is None or len(module.normalized_shape) != 1:  # type: ignore[arg-type]
        return module.forward
    return partial(_rms_norm, module, module.forward)


def _rms_norm(module: nn.Module, base: Callable[..., Tensor], x: Tensor) -> Tensor:
    kept = type(x) is Tensor and x.requires_grad and torch.is_grad_enabled()
    if not kept or x.device.type != "cpu":
        return base(x)
    return _RmsNorm.apply(x, module, base)  # type: ignore[no-any-return,no-untyped-call]
