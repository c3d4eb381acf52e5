"""Attention through the fastest kernel of the GPU at hand.

On Hopper cuDNN's attention is about twice as fast as flash attention, but its backward pass reads a
gradient of the wrong layout out of bounds (torch 2.11, cuDNN 9: illegal memory access in Flux blocks).
Made contiguous first, the gradient is right. So torch must not choose cuDNN by itself, and we call it.
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from torch.nn import functional as F

logger = logging.getLogger(__name__)

Backend = Literal["auto", "native", "cudnn"]

_native = F.scaled_dot_product_attention


class _ContiguousGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return grad.contiguous()


def choose(backend: Backend, device: torch.device) -> str:
    """Makes every ``F.scaled_dot_product_attention`` of this process use ``backend``; returns the one taken.

    diffusers' models all call that function, so it is replaced there rather than in each model.
    """
    if device.type != "cuda":
        return "native"
    torch.backends.cuda.enable_cudnn_sdp(False)
    if backend == "auto":
        backend = "cudnn" if torch.cuda.get_device_capability(device)[0] == 9 else "native"
    F.scaled_dot_product_attention = _cudnn if backend == "cudnn" else _native  # type: ignore[assignment]
    logger.info("attention: %s", backend)
    return backend


def _cudnn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """As ``F.scaled_dot_product_attention`` (query_NHLD ...); what cuDNN does not cover goes there."""
    fits = (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and attn_mask is None
        and not enable_gqa
        and query.ndim == 4
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 128
    )
    if not fits:
        return _native(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    output = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, torch.is_grad_enabled(), dropout_p, is_causal, False, scale=scale
    )[0]
    return _ContiguousGrad.apply(output)
