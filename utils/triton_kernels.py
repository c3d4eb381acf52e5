"""Triton kernels, each of which passes over its data once.

They quantise weights and activations (`kernels` says the shapes), and normalise and rotate queries and keys (`rotary`).
"""

from __future__ import annotations

from collections.abc import Sequence

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
        HAS_COLUMNS=columns is not None, ROUNDS=dtype == torch.int8, BLOCK=block,
        num_warps=min(32, max(1, block // 2048)),
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


@triton.jit
def _place(tokens, heads, HEADS: tl.constexpr):
    """Sample, token and heads (a column) of this program, in 64 bits."""
    blocks = tl.cdiv(heads, HEADS)
    row = tl.program_id(0) // blocks
    head = (tl.program_id(0) % blocks) * HEADS + tl.arange(0, HEADS)[:, None]
    return (row // tokens).to(tl.int64), (row % tokens).to(tl.int64), head.to(tl.int64)


@triton.jit
def _turned(x, HEADS: tl.constexpr, D: tl.constexpr):
    """Each pair (a, b) of a row as (-b, a); a thread holds whole pairs, so that no value changes its thread."""
    first, second = tl.split(tl.reshape(x, (HEADS, D // 2, 2)))
    return tl.reshape(tl.join(-second, first), (HEADS, D))


@triton.jit
def _for_each(row, inside, HEADS: tl.constexpr, D: tl.constexpr):
    """A row of D once for each head: from the cache to where the values lie, which one row would reach by barriers."""
    at = tl.arange(0, D)[None, :]
    return tl.load(tl.broadcast_to(row + at, (HEADS, D)), mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _norm_rotate(x, weight, cos, sin, out, tokens, heads, x_n, x_t, x_h, out_n, out_t, eps,
                 HAS_WEIGHT: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr):  # fmt: skip
    n, t, head = _place(tokens, heads, HEADS)
    at, inside = tl.arange(0, D)[None, :], head < heads
    value = tl.load(x + n * x_n + t * x_t + head * x_h + at, mask=inside, other=0.0).to(tl.float32)
    cosine, sine = _for_each(cos + t * D, inside, HEADS, D), _for_each(sin + t * D, inside, HEADS, D)
    factor = tl.rsqrt(tl.sum(value * value, axis=1) / D + eps)[:, None]
    value *= factor
    if HAS_WEIGHT:
        value *= _for_each(weight, inside, HEADS, D)
    value = value.to(x.dtype.element_ty).to(tl.float32)
    value = value * cosine + _turned(value, HEADS, D) * sine
    tl.store(out + n * out_n + t * out_t + head * D + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _norm_rotate_backward(grad, x, weight, cos, sin, out, tokens, heads, grad_n, grad_t, grad_h, x_n, x_t, x_h, eps,
                          HAS_WEIGHT: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr):  # fmt: skip
    n, t, head = _place(tokens, heads, HEADS)
    at, inside = tl.arange(0, D)[None, :], head < heads
    value = tl.load(x + n * x_n + t * x_t + head * x_h + at, mask=inside, other=0.0).to(tl.float32)
    slope = tl.load(grad + n * grad_n + t * grad_t + head * grad_h + at, mask=inside, other=0.0).to(tl.float32)
    cosine, sine = _for_each(cos + t * D, inside, HEADS, D), _for_each(sin + t * D, inside, HEADS, D)
    slope = slope * cosine - _turned(slope * sine, HEADS, D)
    if HAS_WEIGHT:
        slope *= _for_each(weight, inside, HEADS, D)
    factor = tl.rsqrt(tl.sum(value * value, axis=1) / D + eps)[:, None]
    value *= factor
    slope = factor * (slope - value * (tl.sum(slope * value, axis=1) / D)[:, None])
    place = ((n * tokens + t) * heads + head) * D + at
    tl.store(out + place, slope.to(out.dtype.element_ty), mask=inside)


def norm_rotate(
    parts: Sequence[Tensor], weights: Sequence[Tensor | None], cos_TD: Tensor, sin_TD: Tensor, eps: float
) -> Tensor:
    """As `rotary.norm_rotate`; a program has some heads of one token."""
    n, _, h, d = parts[0].shape
    out_NTHD = parts[0].new_empty(n, len(cos_TD), h, d)
    begin = 0
    for part, weight in zip(parts, weights, strict=True):
        part, end = _rows(part), begin + part.shape[1]
        heads, warps = _heads(h, d)
        of_part = cos_TD[begin:end].contiguous(), sin_TD[begin:end].contiguous(), out_NTHD[:, begin:end]
        _norm_rotate[(n * part.shape[1] * triton.cdiv(h, heads),)](
            part, part if weight is None else weight, *of_part, part.shape[1], h, *part.stride()[:3],
            *out_NTHD.stride()[:2], eps, HAS_WEIGHT=weight is not None, HEADS=heads, D=d, num_warps=warps,
        )  # fmt: skip
        begin = end
    return out_NTHD


def norm_rotate_backward(
    grad_NTHD: Tensor, parts: Sequence[Tensor], weights: Sequence[Tensor | None], cos_TD: Tensor, sin_TD: Tensor,
    eps: float,
) -> list[Tensor]:  # fmt: skip
    """As `rotary.norm_rotate_backward`."""
    grad_NTHD, begin, grads = _rows(grad_NTHD), 0, []
    for part, weight in zip(parts, weights, strict=True):
        part, end, out = _rows(part), begin + part.shape[1], part.new_empty(part.shape)
        (n, tokens, h, d), slope = part.shape, grad_NTHD[:, begin:end]
        heads, warps = _heads(h, d)
        _norm_rotate_backward[(n * tokens * triton.cdiv(h, heads),)](
            slope, part, part if weight is None else weight, cos_TD[begin:end].contiguous(),
            sin_TD[begin:end].contiguous(), out, tokens, h, *slope.stride()[:3], *part.stride()[:3], eps,
            HAS_WEIGHT=weight is not None, HEADS=heads, D=d, num_warps=warps,
        )  # fmt: skip
        grads.append(out)
        begin = end
    return grads


def _rows(x_NTHD: Tensor) -> Tensor:
    """With the features of a head side by side; the other strides are free."""
    return x_NTHD if x_NTHD.stride(-1) == 1 else x_NTHD.contiguous()


def _heads(heads: int, width: int) -> tuple[int, int]:
    """How many heads a program has, and its warps: each thread loads 8 values, 16 bytes of bfloat16."""
    heads = min(triton.next_power_of_2(heads), max(1, 1024 // width))
    return heads, max(1, heads * width // 256)
