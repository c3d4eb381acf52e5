"""RMSNorm and rotary embedding of queries or keys as one operator, so that they are read once and written once.

In plain torch operations these are up to ten passes over the tensor, and torch.compile makes several kernels of
them that are slowed by their access to pairs. On a GPU the operators are Triton kernels, elsewhere plain torch.

How they round, in bfloat16 and float16: forward as torch's RMSNorm and diffusers' ``apply_rotary_emb`` do one after
the other (float32 to the weighted norm, rounded, float32 to the end, rounded); backward once, at the end, where the
plain operations round after each step.

Shape legend: N batch, T tokens (of a part, or of all parts together), H heads, D features of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .kernels import has_triton

WIDTHS = (16, 32, 64, 128, 256)
"""Features of a head for which there are kernels."""


def is_fused(x: Tensor, head_dim: int, weights: Sequence[Tensor | None], cos_TD: Tensor, sin_TD: Tensor) -> bool:
    """Whether `norm_rotate` has kernels for heads on the device and in the dtype of ``x``, and the gradients asked for.

    The weights and the angles get none.
    """
    return (
        x.is_cuda
        and has_triton()
        and x.dtype in (torch.bfloat16, torch.float16)
        and head_dim in WIDTHS
        and all(weight is None or (weight.dtype == x.dtype and not weight.requires_grad) for weight in weights)
        and all(angle.dtype == torch.float32 and not angle.requires_grad for angle in (cos_TD, sin_TD))
    )


def plain(
    parts: Sequence[Tensor], weights: Sequence[Tensor | None], cos_TD: Tensor, sin_TD: Tensor, eps: float
) -> Tensor:
    """As `norm_rotate`, in plain operations: those of torch.nn.RMSNorm and of diffusers' ``apply_rotary_emb``."""
    x_NTHD = torch.cat(
        [F.rms_norm(part, part.shape[-1:], weight, eps) for part, weight in zip(parts, weights, strict=True)], dim=1
    )
    return (x_NTHD.float() * cos_TD[:, None] + _turned(x_NTHD).float() * sin_TD[:, None]).to(x_NTHD.dtype)


def _turned(x: Tensor) -> Tensor:
    """Each pair (a, b) of the last axis as (-b, a)."""
    return torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)


def _has_kernels(parts: Sequence[Tensor]) -> bool:
    return parts[0].is_cuda and has_triton() and parts[0].shape[-1] in WIDTHS


@torch.library.custom_op("diffusion_trainer::norm_rotate", mutates_args=())
def norm_rotate(
    parts: Sequence[Tensor], weights: Sequence[Tensor | None], cos_TD: Tensor, sin_TD: Tensor, eps: float
) -> Tensor:
    """Normalises the heads of each part, joins the parts along T and rotates pairs of features: NTHD, contiguous.

    Args:
        parts: Each NTHD, with strides of its own; the parts' T add up to that of the angles.
        weights: Of the norms (D), one for each part. They get no gradient.
        cos_TD: float32, the same for both features of a pair, as diffusers' ``FluxPosEmbed`` gives them. They get no
            gradient either.
    """
    if _has_kernels(parts):
        from . import triton_kernels

        return triton_kernels.norm_rotate(parts, weights, cos_TD, sin_TD, eps)
    return plain(parts, weights, cos_TD, sin_TD, eps).contiguous()


@torch.library.custom_op("diffusion_trainer::norm_rotate_backward", mutates_args=())
def norm_rotate_backward(
    grad_NTHD: Tensor, parts: Sequence[Tensor], weights: Sequence[Tensor | None], cos_TD: Tensor, sin_TD: Tensor,
    eps: float,
) -> list[Tensor]:  # fmt: skip
    """The gradient of each part, contiguous; the norms are computed again."""
    if _has_kernels(parts):
        from . import triton_kernels

        return triton_kernels.norm_rotate_backward(grad_NTHD, parts, weights, cos_TD, sin_TD, eps)
    turned_NTHD = grad_NTHD.float() * cos_TD[:, None] - _turned(grad_NTHD.float() * sin_TD[:, None])
    grads = turned_NTHD.split([part.shape[1] for part in parts], dim=1)
    return [_norm_backward(*of, eps).contiguous() for of in zip(grads, parts, weights, strict=True)]


def _norm_backward(grad: Tensor, part: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    scale = torch.rsqrt(part.float().square().mean(-1, keepdim=True) + eps)
    normed = part.float() * scale
    grad = grad if weight is None else grad * weight.float()
    return (scale * (grad - normed * (grad * normed).mean(-1, keepdim=True))).to(part.dtype)


# Contiguous, whatever is given: torch.compile relies on the strides that these say.
@norm_rotate.register_fake
def _(parts: Any, weights: Any, cos_TD: Any, sin_TD: Any, eps: float) -> Tensor:
    n, _, h, d = parts[0].shape
    return parts[0].new_empty(n, sum(part.shape[1] for part in parts), h, d)


@norm_rotate_backward.register_fake
def _(grad_NTHD: Any, parts: Any, weights: Any, cos_TD: Any, sin_TD: Any, eps: float) -> list[Tensor]:
    return [part.new_empty(part.shape) for part in parts]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    parts, weights, cos_TD, sin_TD, eps = inputs
    ctx.parts, ctx.eps = len(parts), eps
    ctx.save_for_backward(cos_TD, sin_TD, *parts, *weights)


def _backward(ctx: Any, grad_NTHD: Tensor) -> tuple[Any, ...]:
    cos_TD, sin_TD, *rest = ctx.saved_tensors
    grads = norm_rotate_backward(grad_NTHD, rest[: ctx.parts], rest[ctx.parts :], cos_TD, sin_TD, ctx.eps)
    need = ctx.needs_input_grad[1]  # a list is due where a list of tensors was given, but not of tensors and None
    return grads, [None] * len(need) if isinstance(need, list) else None, None, None, None


norm_rotate.register_autograd(_backward, setup_context=_save)
