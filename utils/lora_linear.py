"""Linear layers with LoRA updates as two operators, forward and backward; layers of one input are computed together.

Written in plain torch operations a LoRA costs two more passes over the output and one over the input's gradient,
and torch.compile copies the output before it adds to it. As operators of our own the additions happen inside
the matrix multiplications, in place. The small product comes first where the large one can add to it: bound by
arithmetic, that reads it along the way, where the small one, bound by memory, has to read and write the large output.

Layers that are given the same tensor (query, key and value) share what reads it: their downward products are one,
so are the gradients of their downward matrices, the input is quantised once, and its gradient is added up inside
the large products.

Shape legend: M rows (tokens of all samples), I inputs, O outputs of a layer, R rank of a layer, S sum of the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import kernels
from .storage import (
    Quantised,
    convert,
    is_converted,
    is_multiplied_quantised,
    product,
    product_of_grad,
    quantised_while_tracing,
)


def lora_linears(
    x_MI: Tensor,
    weights_OI: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    transposed_IO: Sequence[Tensor | None],
    biases_O: Sequence[Tensor | None],
    downs_RI: Sequence[Tensor],
    ups_OR: Sequence[Tensor],
) -> list[Tensor]:
    """``x W' + b + (x D') U'`` (M, O) of each layer, in the dtype of ``x_MI``.

    Args:
        weights_OI: Of one dtype; they, their ``scales`` and what of them is kept transposed are as in `storage`.
        downs_RI: In the dtype of ``x_MI``.
        ups_OR: In that dtype or a more precise one, which their gradients have, too.
    """
    down_SI = downs_RI[0] if len(downs_RI) == 1 else torch.cat(list(downs_RI))
    quantised = quantised_while_tracing(x_MI, weights_OI[0])
    return lora_linears_forward(x_MI, *quantised, weights_OI, scales, transposed_IO, biases_O, down_SI, ups_OR)[:-1]


@torch.library.custom_op("diffusion_trainer::lora_linears", mutates_args=())
def lora_linears_forward(
    x_MI: Tensor,
    quantised_MI: Tensor | None,
    quantised_scale: Tensor | None,
    weights_OI: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    transposed_IO: Sequence[Tensor | None],
    biases_O: Sequence[Tensor | None],
    down_SI: Tensor,
    ups_OR: Sequence[Tensor],
) -> list[Tensor]:
    """The outputs, and last the inner ``x D'`` (M, S)."""
    inner_MS = x_MI @ down_SI.t()
    quantised: Quantised = quantised_MI, quantised_scale
    if quantised_MI is None and is_multiplied_quantised(x_MI, weights_OI[0]):
        quantised = kernels.quantise_rows(x_MI, weights_OI[0].dtype)
    outputs = []
    for weight_OI, scale, bias_O, inner_MR, up_OR in zip(
        weights_OI, scales, biases_O, _split(inner_MS, ups_OR), ups_OR, strict=True
    ):
        if is_converted(x_MI, weight_OI, scale):
            output_MO = kernels.low_rank(inner_MR, up_OR, bias_O)
            output_MO.addmm_(x_MI, convert(weight_OI, scale, x_MI.dtype).t())
        else:
            output_MO = product(x_MI, quantised, weight_OI, scale, bias_O)
            kernels.add_low_rank(output_MO, inner_MR, up_OR)
        outputs.append(output_MO)
    return [*outputs, inner_MS]


@torch.library.custom_op("diffusion_trainer::lora_linears_backward", mutates_args=())
def lora_linears_backward(
    grads_MO: Sequence[Tensor],
    x_MI: Tensor,
    inner_MS: Tensor,
    weights_OI: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    transposed_IO: Sequence[Tensor | None],
    down_SI: Tensor,
    ups_OR: Sequence[Tensor],
    needs_x: bool,
) -> list[Tensor]:
    """Gradients of D and of each U, and what x's gradient is the sum of: nothing unless ``needs_x``, a part of each
    layer where products are quantised, else one."""
    grad_inner_MS = torch.empty_like(inner_MS)
    of_layers = zip(grads_MO, ups_OR, _split(inner_MS, ups_OR), _split(grad_inner_MS, ups_OR), strict=True)
    grad_ups = [kernels.low_rank_grads(*of_layer) for of_layer in of_layers]
    parts: list[Tensor] = []
    if needs_x and is_multiplied_quantised(grads_MO[0], weights_OI[0]):
        of_weights = zip(grads_MO, weights_OI, scales, transposed_IO, strict=True)
        parts = [product_of_grad(*of_weight) for of_weight in of_weights]
        kernels.add_low_rank(parts[0], grad_inner_MS, down_SI.t())
    elif needs_x:
        parts = [kernels.low_rank(grad_inner_MS, down_SI.t())]
        for grad_MO, weight_OI, scale in zip(grads_MO, weights_OI, scales, strict=True):
            parts[0].addmm_(grad_MO, convert(weight_OI, scale, grad_MO.dtype))
    return [grad_inner_MS.t() @ x_MI, *grad_ups, *parts]


def _split(inner_MS: Tensor, ups_OR: Sequence[Tensor]) -> Sequence[Tensor]:
    return inner_MS.split([up_OR.shape[1] for up_OR in ups_OR], dim=1)


@lora_linears_forward.register_fake
def _(
    x_MI: Tensor, q_MI: Any, q_scale: Any, weights_OI: Any, scales: Any, transposed_IO: Any, biases_O: Any,
    down_SI: Tensor, ups_OR: Any,
) -> list[Tensor]:  # fmt: skip
    outputs = [x_MI.new_empty(x_MI.shape[0], weight_OI.shape[0]) for weight_OI in weights_OI]
    return [*outputs, x_MI.new_empty(x_MI.shape[0], down_SI.shape[0])]


@lora_linears_backward.register_fake
def _(
    grads_MO: Any, x_MI: Tensor, inner_MS: Any, weights_OI: Any, scales: Any, transposed_IO: Any, down_SI: Tensor,
    ups_OR: Any, needs_x: bool,
) -> list[Tensor]:  # fmt: skip
    num_parts = len(grads_MO) if is_multiplied_quantised(grads_MO[0], weights_OI[0]) else 1
    grad_ups = [up_OR.new_empty(up_OR.shape) for up_OR in ups_OR]  # contiguous, whatever is given
    return [x_MI.new_empty(down_SI.shape), *grad_ups, *(x_MI.new_empty(x_MI.shape) for _ in range(num_parts * needs_x))]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x_MI, _, _, weights_OI, scales, transposed_IO, _, down_SI, ups_OR = inputs
    ctx.layers = len(ups_OR)
    ctx.save_for_backward(x_MI, output[-1], down_SI, *weights_OI, *scales, *transposed_IO, *ups_OR)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    x_MI, inner_MS, down_SI, *rest = ctx.saved_tensors
    of_layers = [rest[at : at + ctx.layers] for at in range(0, len(rest), ctx.layers)]
    grads_MO = [
        x_MI.new_zeros(len(x_MI), len(weight_OI)) if grad is None else grad
        for grad, weight_OI in zip(grads, of_layers[0], strict=False)
    ]
    grad_down, *others = lora_linears_backward(
        grads_MO, x_MI, inner_MS, *of_layers[:3], down_SI, of_layers[3], ctx.needs_input_grad[0]
    )
    grad_x, parts = None, others[ctx.layers :]
    for part_MI in parts:
        grad_x = part_MI if grad_x is None else grad_x + part_MI
    # Where a list of tensors was given, a list is due
    nothing = [[None] * len(need) if isinstance(need, list) else None for need in ctx.needs_input_grad]
    return grad_x, *nothing[1:7], grad_down, others[: ctx.layers]


lora_linears_forward.register_autograd(_backward, setup_context=_save)


# What recomputing them costs, for torch.compile to decide what to keep.
@register_flop_formula(torch.ops.diffusion_trainer.lora_linears)
def _flops(
    x_MI: Any, q_MI: Any, q_scale: Any, weights_OI: Any, scales: Any, transposed_IO: Any, biases: Any, down_SI: Any,
    ups_OR: Any, **shapes: Any,
) -> int:  # fmt: skip
    (rows, inputs), outputs = x_MI, sum(up_OR[0] for up_OR in ups_OR)
    return 2 * rows * (inputs * (outputs + down_SI[0]) + sum(up_OR[0] * up_OR[1] for up_OR in ups_OR))


@register_flop_formula(torch.ops.diffusion_trainer.lora_linears_backward)
def _backward_flops(
    grads_MO: Any, x_MI: Any, inner_MS: Any, weights_OI: Any, scales: Any, transposed_IO: Any, down_SI: Any,
    ups_OR: Any, needs_x: bool, **shapes: Any,
) -> int:  # fmt: skip
    (rows, inputs), small = x_MI, sum(up_OR[0] * up_OR[1] for up_OR in ups_OR)
    products_of_x = inputs * sum(up_OR[0] for up_OR in ups_OR) + inputs * down_SI[0] if needs_x else 0
    return 2 * rows * (products_of_x + inputs * down_SI[0] + 2 * small)
