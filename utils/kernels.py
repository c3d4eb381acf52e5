"""Quantising, dequantising and multiplying with scales: fused kernels where there is Triton, else plain torch.

Shape legend: M rows of activations, K the summed dimension, N columns of the result; a scale_R1 has one factor for
each row of what it belongs to.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
TINY = 1e-12
"""Stands for the largest value of a row of zeros."""


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _fused(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether Triton has kernels for ``dtype`` where ``tensor`` is; float8 (e4m3) begins with Ada.

    torch.compile makes its own of the plain operations that it traces.
    """
    if torch.compiler.is_compiling() or not tensor.is_cuda or not _has_triton():
        return False
    return dtype != torch.float8_e4m3fn or _capability(tensor.device) >= (8, 9)


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
        b_scale_N1 = a_scale_M1.new_ones(len(b_NK), 1)
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
