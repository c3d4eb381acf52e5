"""A linear layer with a LoRA update as two operators, forward and backward.

Written in plain torch operations it costs two more passes over the output and one over the input's gradient,
and torch.compile copies the output before it adds to it. As operators of our own the additions happen inside
the matrix multiplications, in place. The small product comes first: the large one, bound by arithmetic, then
reads it along the way, where the small one, bound by memory, would have to read and write the large output.

Shape legend: M rows (tokens of all samples), I inputs, O outputs, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from .storage import convert, is_multiplied_quantised, product, product_of_grad


@torch.library.custom_op("diffusion_trainer::lora_linear", mutates_args=())
def lora_linear(
    x_MI: Tensor, weight_OI: Tensor, scale: Tensor | None, bias_O: Tensor | None, down_RI: Tensor, up_OR: Tensor
) -> tuple[Tensor, Tensor]:
    """``x W' + b + (x D') U'`` and the inner ``x D'`` (M, R), all in the dtype of ``x_MI``; W as in
    `storage`."""
    inner_MR = x_MI @ down_RI.t()
    if is_multiplied_quantised(x_MI, weight_OI):
        return product(x_MI, weight_OI, scale, bias_O).addmm_(inner_MR, up_OR.t()), inner_MR
    output_MO = F.linear(inner_MR, up_OR, bias_O)
    return output_MO.addmm_(x_MI, convert(weight_OI, scale, x_MI.dtype).t()), inner_MR


@torch.library.custom_op("diffusion_trainer::lora_linear_backward", mutates_args=())
def lora_linear_backward(
    grad_MO: Tensor,
    x_MI: Tensor,
    inner_MR: Tensor,
    weight_OI: Tensor,
    scale: Tensor | None,
    down_RI: Tensor,
    up_OR: Tensor,
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (empty unless ``needs_x``), D and U."""
    grad_inner_MR = grad_MO @ up_OR
    grad_x_MI = grad_MO.new_empty(0)
    if needs_x and is_multiplied_quantised(grad_MO, weight_OI):
        grad_x_MI = product_of_grad(grad_MO, weight_OI, scale).addmm_(grad_inner_MR, down_RI)
    elif needs_x:
        grad_x_MI = (grad_inner_MR @ down_RI).addmm_(grad_MO, convert(weight_OI, scale, grad_MO.dtype))
    return grad_x_MI, grad_inner_MR.t() @ x_MI, grad_MO.t() @ inner_MR


@lora_linear.register_fake
def _(
    x_MI: Tensor, weight_OI: Tensor, scale: Any, bias_O: Any, down_RI: Tensor, up_OR: Tensor
) -> tuple[Tensor, Tensor]:
    return x_MI.new_empty(x_MI.shape[0], weight_OI.shape[0]), x_MI.new_empty(x_MI.shape[0], down_RI.shape[0])


@lora_linear_backward.register_fake
def _(
    grad_MO: Tensor,
    x_MI: Tensor,
    inner_MR: Tensor,
    weight_OI: Tensor,
    scale: Tensor | None,
    down_RI: Tensor,
    up_OR: Tensor,
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return x_MI.new_empty(x_MI.shape if needs_x else (0,)), torch.empty_like(down_RI), torch.empty_like(up_OR)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x_MI, weight_OI, scale, _, down_RI, up_OR = inputs
    ctx.save_for_backward(x_MI, output[1], weight_OI, scale, down_RI, up_OR)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_MO: Tensor, _inner: Any) -> tuple[Tensor | None, None, None, None, Tensor, Tensor]:
    x_MI, *rest = ctx.saved_tensors
    needs_x = ctx.needs_input_grad[0]
    grad_x, grad_down, grad_up = lora_linear_backward(grad_MO, x_MI, *rest, needs_x)
    return grad_x if needs_x else None, None, None, None, grad_down, grad_up


lora_linear.register_autograd(_backward, setup_context=_save)


# What recomputing them costs, for torch.compile to decide what to keep.
@register_flop_formula(torch.ops.diffusion_trainer.lora_linear)
def _flops(x_MI: Any, weight_OI: Any, scale: Any, bias_O: Any, down_RI: Any, *unused: Any, **shapes: Any) -> int:
    (rows, inputs), outputs, rank = x_MI, weight_OI[0], down_RI[0]
    return 2 * rows * (inputs * outputs + rank * (inputs + outputs))


@register_flop_formula(torch.ops.diffusion_trainer.lora_linear_backward)
def _backward_flops(grad_MO: Any, x_MI: Any, inner_MR: Any, *unused: Any, **shapes: Any) -> int:
    (rows, outputs), inputs, rank = grad_MO, x_MI[1], inner_MR[1]
    return 2 * rows * (inputs * outputs + 2 * rank * (inputs + outputs))
