"""Triton kernels for quantised weights and activations; each passes over its data once. `kernels` says the shapes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _quantise(x, columns, q, scales, width, largest, tiny,
              HAS_COLUMNS: tl.constexpr, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    value = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_COLUMNS:
        value *= tl.load(columns + at, mask=inside, other=0.0)
    scale = tl.maximum(tl.max(tl.abs(value), axis=0), tiny) / largest
    value = value / scale
    if ROUNDS:
        value = tl.floor(value + 0.5)
    tl.store(q + row * width + at, value.to(q.dtype.element_ty), mask=inside)
    tl.store(scales + row, scale)


def quantise_rows(
    x_MK: Tensor, dtype: torch.dtype, columns: Tensor | None, largest: float, tiny: float
) -> tuple[Tensor, Tensor]:
    """As `kernels.quantise_rows`; one program holds a whole row in registers."""
    rows, width = x_MK.shape
    q_MK, scale_M1 = torch.empty_like(x_MK, dtype=dtype), x_MK.new_empty(rows, 1, dtype=torch.float32)
    block = triton.next_power_of_2(width)
    _quantise[(rows,)](
        x_MK, scale_M1 if columns is None else columns, q_MK, scale_M1, width, largest, tiny,
        HAS_COLUMNS=columns is not None, ROUNDS=dtype == torch.int8, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return q_MK, scale_M1


@triton.jit
def _dequantise(q, scales, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    value = tl.load(q + row * width + at, mask=inside, other=0.0).to(tl.float32) * tl.load(scales + row)
    tl.store(out + row * width + at, value.to(out.dtype.element_ty), mask=inside)


def dequantise_rows(q_MK: Tensor, scale_M1: Tensor, dtype: torch.dtype) -> Tensor:
    """As `kernels.dequantise_rows`."""
    rows, width = q_MK.shape
    out_MK = torch.empty_like(q_MK, dtype=dtype)
    block = min(triton.next_power_of_2(width), 4096)
    _dequantise[(rows, triton.cdiv(width, block))](q_MK, scale_M1, out_MK, width, BLOCK=block, num_warps=_warps(block))
    return out_MK


@triton.jit
def _transpose(source, target, rows, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    tile = tl.load(source + row[:, None] * columns + column[None, :], mask=inside, other=0)
    inside = (column[:, None] < columns) & (row[None, :] < rows)
    tl.store(target + column[:, None] * rows + row[None, :], tl.trans(tile), mask=inside)


def transpose(q_NK: Tensor) -> Tensor:
    """As `kernels.transpose`, of int8."""
    rows, columns = q_NK.shape
    target_KN = q_NK.new_empty(columns, rows)
    _transpose[(triton.cdiv(rows, 128), triton.cdiv(columns, 128))](
        q_NK, target_KN, rows, columns, BLOCK=128, num_warps=8
    )
    return target_KN


@triton.jit
def _rescale(sums, row_scales, column_scales, bias, out, width, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    value = tl.load(sums + row * width + at, mask=inside, other=0).to(tl.float32) * tl.load(row_scales + row)
    value *= tl.load(column_scales + at, mask=inside, other=0.0)
    if HAS_BIAS:
        value += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + at, value.to(out.dtype.element_ty), mask=inside)


def rescale(
    sums_MN: Tensor, row_scale_M1: Tensor, column_scale_N1: Tensor, bias_N: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Sums of int8 products (int32) times their scales, plus ``bias``."""
    rows, width = sums_MN.shape
    out_MN = torch.empty_like(sums_MN, dtype=dtype)
    block = min(triton.next_power_of_2(width), 4096)
    _rescale[(rows, triton.cdiv(width, block))](
        sums_MN, row_scale_M1, column_scale_N1, column_scale_N1 if bias_N is None else bias_N, out_MN, width,
        HAS_BIAS=bias_N is not None, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return out_MN


def _warps(block: int) -> int:
    """For about 16 values in each thread."""
    return min(32, max(1, block // 512))
