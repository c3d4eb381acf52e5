"""Quantising, dequantising, multiplying with scales, and the small products of LoRAs: kernels of our own where there
is Triton, else plain torch.

Shape legend: M rows of activations, K the summed dimension, N columns of the result; a scale_R1 has one factor for
each row of what it belongs to; R a rank.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

logger = logging.getLogger(__name__)

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
TINY = 1e-12
"""Stands for the largest value of a row of zeros."""
MOST_RANK = 32
"""Up to which kernels of our own are as fast as the library's, or faster (H200, torch 2.11)."""
MOST_RANK_ADDED = 64
"""The same of `add_low_rank`."""
FEW_ROWS = 32
"""A product of fewer rows takes as long as reading the weight."""


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@torch.compiler.assume_constant_result
def has_triton() -> bool:
    """Whether Triton can build kernels for this process's GPU, which the first call tries; a warning says why not."""
    return importlib.util.find_spec("triton") is not None and _builds()


@cache
def _builds() -> bool:
    try:
        from . import triton_kernels

        triton_kernels.transpose(torch.zeros(16, 16, dtype=torch.int8, device="cuda"))
    except Exception as error:  # of Triton, of the C compiler that it calls, of the driver or the disk
        first = str(error).strip().splitlines() or [type(error).__name__]
        logger.warning(
            "Triton cannot build kernels here, so plain torch computes in their place, which is slower (%s); it needs "
            "a C compiler and Python's headers, on Debian and Ubuntu the packages gcc and python3-dev", first[0],
        )  # fmt: skip
        return False
    return True


def _fused(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether Triton has kernels for ``dtype`` where ``tensor`` is; float8 (e4m3) begins with Ada.

    torch.compile makes its own of the plain operations that it traces.
    """
    if torch.compiler.is_compiling() or not tensor.is_cuda or not has_triton():
        return False
    return dtype != torch.float8_e4m3fn or _capability(tensor.device) >= (8, 9)


def _has_small_products(tensor: Tensor, rank: int, most: int = MOST_RANK) -> bool:
    """Whether Triton's kernels of small products are to be taken; they need Ampere's memory."""
    fits = tensor.is_cuda and _is_half(tensor) and rank <= most
    return fits and _fused(tensor, tensor.dtype) and _capability(tensor.device) >= (8, 0)


def _is_half(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.bfloat16, torch.float16)


@cache
def _ones(count: int, device: torch.device) -> Tensor:
    return torch.ones(count, 1, device=device)


def spare_workspace(device: torch.device) -> None:
    """Keeps cuBLASLt on Hopper from using a workspace, unless ``CUBLASLT_WORKSPACE_SIZE`` says how much.

    Its float8 products empty it before each, and are as fast without (torch 2.11, CUDA 13). torch looks at its size at
    the first product.
    """
    if device.type == "cuda" and _capability(device) == (9, 0):
        os.environ.setdefault("CUBLASLT_WORKSPACE_SIZE", "0")


def quantise_rows(x_MK: Tensor, dtype: torch.dtype, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``x`` (times ``columns``, one factor for each) in int8 or float8, with a float32 scale for each row."""
    if _fused(x_MK, dtype) and x_MK.shape[1] <= 2**16:
        from . import triton_kernels

        return triton_kernels.quantise_rows(x_MK.contiguous(), dtype, columns, LARGEST[dtype], TINY)
    value_MK = x_MK.float() if columns is None else x_MK.float() * columns
    scale_M1 = value_MK.abs().amax(1, keepdim=True).clamp(min=TINY) / LARGEST[dtype]
    value_MK = value_MK / scale_M1
    return (value_MK.round() if dtype == torch.int8 else value_MK).to(dtype), scale_M1


def dequantise_rows(q_MK: Tensor, scale_M1: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of `quantise_rows` in ``dtype``."""
    if _fused(q_MK, q_MK.dtype):
        from . import triton_kernels

        return triton_kernels.dequantise_rows(q_MK, scale_M1, dtype)
    return q_MK.to(dtype) * scale_M1.to(dtype)


def transpose(q_NK: Tensor) -> Tensor:
    """A contiguous transposed copy of a tensor of bytes."""
    if _fused(q_NK, torch.int8):
        from . import triton_kernels

        return triton_kernels.transpose(q_NK.view(torch.int8)).view(q_NK.dtype)
    return q_NK.view(torch.int8).t().contiguous().view(q_NK.dtype)


def multiply_scaled(
    a_MK: Tensor, b_NK: Tensor, a_scale_M1: Tensor, b_scale_N1: Tensor | None, bias_N: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``a b' + bias`` of quantised tensors with scales, in ``dtype``; a left-out scale is 1.

    Sizes must be multiples of 16, and M larger than 16.
    """
    if b_scale_N1 is None:
        b_scale_N1 = _ones(len(b_NK), a_scale_M1.device)
    if a_MK.dtype == torch.int8:
        sums_MN = torch._int_mm(a_MK, b_NK.t())
        if _fused(sums_MN, torch.int8):
            from . import triton_kernels

            return triton_kernels.rescale(sums_MN, a_scale_M1, b_scale_N1, bias_N, dtype)
        result_MN = (sums_MN.float() * a_scale_M1 * b_scale_N1.t()).to(dtype)
        return result_MN if bias_N is None else result_MN.add_(bias_N)
    # Scales for each row come with bfloat16 results alone.
    result_MN = torch._scaled_mm(
        a_MK,
        b_NK.t(),
        a_scale_M1,
        b_scale_N1.t(),
        out_dtype=torch.bfloat16,
        bias=None if bias_N is None else bias_N.to(torch.bfloat16),
        use_fast_accum=True,
    )
    return result_MN.to(dtype)


def multiplies_few(x_MK: Tensor, dtype: torch.dtype) -> bool:
    """Whether `multiply_few` takes so few rows, and weights of this ``dtype``."""
    is_scaled = dtype in (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
    return is_scaled and len(x_MK) < FEW_ROWS and _is_half(x_MK) and _fused(x_MK, dtype)


def multiply_few(x_MK: Tensor, q_NK: Tensor, scale_N1: Tensor, bias_N: Tensor | None) -> Tensor:
    """``x b' + bias``, for b of quantised values and scales, read once and never written as what it stands for."""
    from . import triton_products

    return triton_products.few_rows(x_MK.contiguous(), q_NK, scale_N1, bias_N)


def low_rank(left_MR: Tensor, right_NR: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """``left right' + bias`` in the dtype of ``left``, which ``right`` may exceed."""
    if _has_small_products(left_MR, left_MR.shape[1]):
        from . import triton_products

        out_MN = left_MR.new_empty(len(left_MR), len(right_NR))
        return triton_products.low_rank(left_MR, right_NR, bias_N, out_MN, adds=False)
    return F.linear(left_MR, right_NR.to(left_MR.dtype), bias_N)


def add_low_rank(out_MN: Tensor, left_MR: Tensor, right_NR: Tensor) -> Tensor:
    """``out``, to which ``left right'`` is added in place; ``right`` may be of a higher precision."""
    if _has_small_products(left_MR, left_MR.shape[1], MOST_RANK_ADDED):
        from . import triton_products

        return triton_products.low_rank(left_MR, right_NR, None, out_MN, adds=True)
    return out_MN.addmm_(left_MR, right_NR.t().to(left_MR.dtype))


def low_rank_grads(grad_MN: Tensor, up_NR: Tensor, inner_MR: Tensor, into_MR: Tensor) -> Tensor:
    """The gradient of ``up`` (N, R) in its precision, where ``grad`` is that of ``inner up'``.

    Args:
        up_NR: Of the precision of ``grad`` or a higher one.
        into_MR: Where the gradient of ``inner`` goes.
    """
    lower_NR = up_NR.to(grad_MN.dtype)
    if _has_small_products(grad_MN, up_NR.shape[1]) and len(grad_MN) >= FEW_ROWS:
        from . import triton_products

        grad_MN = grad_MN if grad_MN.stride(1) == 1 else grad_MN.contiguous()
        return triton_products.low_rank_grads(grad_MN, lower_NR.contiguous(), inner_MR, into_MR, up_NR.dtype)
    torch.mm(grad_MN, lower_NR, out=into_MR)
    return (grad_MN.t() @ inner_MR).to(up_NR.dtype)
