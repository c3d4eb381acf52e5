"""Triton kernels of products with one small side, a LoRA's rank or a few rows: memory bounds them, not arithmetic.

Shape legend: M rows, K the summed dimension, N columns of the result, R a rank.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _low_rank(left, right, bias, out, rows, width, rank, left_m, right_n, right_r,
              HAS_BIAS: tl.constexpr, ADDS: tl.constexpr,
              BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr):  # fmt: skip
    # From the end: what was written last is in the cache still
    row = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None].to(tl.int64)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    place, inside = out + row * width + column, (row < rows) & (column < width)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for begin in range(0, rank, BLOCK_R):
        r = begin + tl.arange(0, BLOCK_R)
        of_left, of_right = (row < rows) & (r[None, :] < rank), (column < width) & (r[:, None] < rank)
        a = tl.load(left + row * left_m + r[None, :], mask=of_left, other=0.0)
        b = tl.load(right + column * right_n + r[:, None] * right_r, mask=of_right, other=0.0)
        sums = tl.dot(a, b.to(left.dtype.element_ty), sums)
    if HAS_BIAS:
        sums += tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)
    if ADDS:
        sums += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, sums.to(out.dtype.element_ty), mask=inside)


def low_rank(left_MR: Tensor, right_NR: Tensor, bias_N: Tensor | None, out_MN: Tensor, adds: bool) -> Tensor:
    """``left right' + bias`` into ``out``, or added to it."""
    (rows, width), rank = out_MN.shape, left_MR.shape[1]
    _low_rank[(triton.cdiv(width, 128), triton.cdiv(rows, 64))](
        left_MR, right_NR, right_NR if bias_N is None else bias_N, out_MN, rows, width, rank, left_MR.stride(0),
        *right_NR.stride(), HAS_BIAS=bias_N is not None, ADDS=adds, BLOCK_M=64, BLOCK_N=128,
        BLOCK_R=min(64, _block(rank)), num_warps=4,
    )  # fmt: skip
    return out_MN


@triton.jit
def _few_rows(x, q, scales, bias, out, rows, width, summed, HAS_BIAS: tl.constexpr,
              BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    row = tl.arange(0, BLOCK_M)[:, None]
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for begin in range(0, summed, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)[None, :]
        a = tl.load(x + row * summed + k, mask=(row < rows) & (k < summed), other=0.0)
        of_q = (column[:, None] < width) & (k < summed)
        b = tl.load(q + column[:, None].to(tl.int64) * summed + k, mask=of_q, other=0.0).to(x.dtype.element_ty)
        sums = tl.dot(a, tl.trans(b), sums)
    sums *= tl.load(scales + column, mask=column < width, other=0.0)[None, :]
    if HAS_BIAS:
        sums += tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    inside = (row < rows) & (column[None, :] < width)
    tl.store(out + row * width + column[None, :], sums.to(out.dtype.element_ty), mask=inside)


def few_rows(x_MK: Tensor, q_NK: Tensor, scale_N1: Tensor, bias_N: Tensor | None) -> Tensor:
    """As `kernels.multiply_few`; both are contiguous."""
    (rows, summed), width = x_MK.shape, len(q_NK)
    out_MN = x_MK.new_empty(rows, width)
    _few_rows[(triton.cdiv(width, 32),)](
        x_MK, q_NK, scale_N1, scale_N1 if bias_N is None else bias_N, out_MN, rows, width, summed,
        HAS_BIAS=bias_N is not None, BLOCK_M=_block(rows), BLOCK_N=32, BLOCK_K=256, num_warps=4,
    )  # fmt: skip
    return out_MN


@triton.jit
def _low_rank_grads(grad, up, inner, parts_inner, parts_up, rows, width, rank, grad_m, inner_m, steps,
                    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr):  # fmt: skip
    strip, share = tl.program_id(0), tl.program_id(1)
    column, r = strip * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)[None, :]
    of_up = (column[:, None] < width) & (r < rank)
    right = tl.load(up + column[:, None] * rank + r, mask=of_up, other=0.0)
    sums = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for step in range(steps):
        row = ((share * steps + step) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]).to(tl.int64)
        inside, of_inner = (row < rows) & (column[None, :] < width), (row < rows) & (r < rank)
        tile = tl.load(grad + row * grad_m + column[None, :], mask=inside, other=0.0)
        small = tl.load(inner + row * inner_m + r, mask=of_inner, other=0.0)
        sums = tl.dot(tl.trans(tile), small, sums)
        tl.store(parts_inner + (strip * rows + row) * rank + r, tl.dot(tile, right), mask=of_inner)
    tl.store(parts_up + (share * width + column[:, None]) * rank + r, sums, mask=of_up)


@triton.jit
def _add_up(parts, out, rows, width, num_parts, out_m, program, BLOCK: tl.constexpr):
    at = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float32)
    for part in range(num_parts):
        sums += tl.load(parts + part * rows * width + at, mask=at < rows * width, other=0.0)
    place = out + at // width * out_m + at % width
    tl.store(place, sums.to(out.dtype.element_ty), mask=at < rows * width)


@triton.jit
def _join(parts_inner, into, strips, into_m, parts_up, grad_up, shares, rows, width, rank, programs,
          BLOCK: tl.constexpr):  # fmt: skip
    """The first ``programs`` add up strips, the rest shares."""
    program = tl.program_id(0)
    if program < programs:
        _add_up(parts_inner, into, rows, rank, strips, into_m, program, BLOCK)
    else:
        _add_up(parts_up, grad_up, width, rank, shares, rank, program - programs, BLOCK)


def low_rank_grads(grad_MN: Tensor, up_NR: Tensor, inner_MR: Tensor, into_MR: Tensor, dtype: torch.dtype) -> Tensor:
    """As `kernels.low_rank_grads`; the rows of the gradient and ``up`` are contiguous, and the gradient of ``up`` is
    of ``dtype``.

    The gradient is read once for both products, in strips of columns and shares of rows; their parts are added up
    afterwards, always in the same order.
    """
    (rows, width), rank = grad_MN.shape, up_NR.shape[1]
    strips, blocks = triton.cdiv(width, 256), triton.cdiv(rows, 64)
    steps = triton.cdiv(blocks, max(1, _num_processors(grad_MN.device) // strips))
    shares = triton.cdiv(blocks, steps)
    parts_inner = torch.empty(strips, rows, rank, dtype=torch.float32, device=grad_MN.device)
    parts_up = torch.empty(shares, width, rank, dtype=torch.float32, device=grad_MN.device)
    grad_up_NR = up_NR.new_empty(width, rank, dtype=dtype)
    _low_rank_grads[(strips, shares)](
        grad_MN, up_NR, inner_MR, parts_inner, parts_up, rows, width, rank, grad_MN.stride(0), inner_MR.stride(0),
        steps, BLOCK_M=64, BLOCK_N=256, BLOCK_R=_block(rank), num_warps=4,
    )  # fmt: skip
    programs, further = triton.cdiv(rows * rank, 512), triton.cdiv(width * rank, 512)
    _join[(programs + further,)](
        parts_inner, into_MR, strips, into_MR.stride(0), parts_up, grad_up_NR, shares, rows, width, rank, programs,
        BLOCK=512,
    )  # fmt: skip
    return grad_up_NR


@cache
def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _block(size: int) -> int:
    """What tensor cores take at least."""
    return max(16, triton.next_power_of_2(size))
