"""Frozen linear layers whose weights are stored in fewer bits than they compute in.

What a stored weight is follows from its dtype:

* float8 (e4m3, e5m2) and int8: one float32 scale for each output;
* uint8: nf4, two values in each byte, one float32 scale for 64 values in a row (Dettmers et al. 2023, "QLoRA");
* anything else: the values themselves.

The weight is converted each time it is used, forward and backward, so that no converted copy is kept. With
`multiply_quantised`, float8 (e4m3) and int8 weights are not converted: activations and gradients are quantised,
with a scale for each row, and multiplied as they are. While torch.compile traces, activations are quantised outside
of the operators: the kernels that compute them then do it as well.

Shape legend: M rows (tokens of all samples), I inputs, O outputs.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from . import kernels

logger = logging.getLogger(__name__)

DTYPES = {
    "float8": torch.float8_e4m3fn,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "int8": torch.int8,
    "nf4": torch.uint8,
}
NF4_BLOCK = 64

_multiplies_quantised = False


@dataclass(frozen=True)
class Storage:
    """How the weights of a model's linear layers are stored."""

    dtype: torch.dtype
    kept: Sequence[str] = ()
    """Regular expressions; layers whose name one of them matches stay as they are."""

    @classmethod
    def named(cls, name: str, kept: Sequence[str] = ()) -> Storage:
        """For a name that users give: a key of `DTYPES` or a dtype of torch."""
        return cls(DTYPES.get(name) or getattr(torch, name), kept)


class StoredLinear(nn.Linear):
    """A frozen linear layer with a weight of another dtype; see the module's text."""

    weight_scale: Tensor | None
    weight_transposed: Tensor | None
    """(I, O), where `keep_transposed` has put it."""

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Linear``."""
        rows = input.flatten(0, -2)
        quantised = quantised_while_tracing(rows, self.weight)
        output = stored_linear(rows, *quantised, self.weight, self.weight_scale, self.weight_transposed, self.bias)
        return output.view(*input.shape[:-1], output.shape[-1])

    def store(self, value_OI: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> nn.Parameter:
        """Takes over a weight, as `quantise` does; returns the stored parameter."""
        stored, self.weight_scale = quantise(value_OI, dtype, scale)
        self.weight = nn.Parameter(stored, requires_grad=False)
        return self.weight


def quantise(value_OI: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """A weight as stored in ``dtype``, and its scales.

    Args:
        scale: The float32 scale, or one for each row, with which a file has the weight in float8 (e4m3). Stored in
            that dtype it keeps the file's bits.
    """
    if dtype == torch.uint8:
        _load_bitsandbytes()
        packed, scales = torch.ops.bitsandbytes.quantize_4bit(value_OI.contiguous(), NF4_BLOCK, "nf4", torch.uint8)
        return packed.view(value_OI.shape[0], -1), scales
    if dtype.itemsize > 1:
        return value_OI.to(dtype), None
    if value_OI.dtype == dtype:
        return value_OI.clone(), torch.ones(len(value_OI), 1, device=value_OI.device)
    if scale is None or dtype != torch.float8_e4m3fn:
        return kernels.quantise_rows(value_OI, dtype)
    scale_O1 = scale.to(value_OI.device).reshape(-1, 1).expand(len(value_OI), 1).contiguous()
    return (value_OI.float() / scale_O1).to(dtype), scale_O1


def convert(weight_OI: Tensor, scale_O1: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The stored weight's value in ``dtype``."""
    if weight_OI.dtype == torch.uint8:
        _load_bitsandbytes()
        shape = [weight_OI.shape[0], 2 * weight_OI.shape[1]]
        return torch.ops.bitsandbytes.dequantize_4bit(weight_OI, scale_O1, NF4_BLOCK, "nf4", shape, dtype)
    if scale_O1 is None:
        return weight_OI.to(dtype)
    return kernels.dequantise_rows(weight_OI, scale_O1, dtype)


def use_storage(module: nn.Module, storage: Storage) -> None:
    """Turns the linear layers of ``module`` (on the meta device, without values) into `StoredLinear`."""
    for name, layer in list(module.named_modules()):
        if type(layer) is not nn.Linear or any(re.search(pattern, f"{name}.weight") for pattern in storage.kept):
            continue
        if storage.dtype == torch.uint8 and layer.in_features % 2:
            continue  # a byte would hold the end of one row and the start of the next
        layer.__class__ = StoredLinear
        layer.register_buffer("weight_scale", None)
        layer.register_buffer("weight_transposed", None, persistent=False)


def keep_transposed(module: nn.Module) -> None:
    """Gives layers whose weights are multiplied as they are a transposed copy, which the product of a gradient needs
    and makes each time where there is none. Weights must not change afterwards."""
    for layer in module.modules():
        if isinstance(layer, StoredLinear) and _is_multipliable(layer.weight):
            layer.weight_transposed = kernels.transpose(layer.weight)


def hide_weights(model: nn.Module) -> None:
    """Keeps T5's feed-forward layers from converting what they computed to the dtype in which ``wo`` is stored;
    transformers' code does so where it sees a weight."""
    for module in model.modules():
        if type(module).__name__.endswith(("DenseGatedActDense", "DenseActDense")) and isinstance(
            module.wo, StoredLinear
        ):
            hidden: Any = nn.Sequential(module.wo)
            hidden.weight = None
            module.wo = hidden


def _load_bitsandbytes() -> None:
    """Registers its operators; it probes the GPU at import, so not before they are needed."""
    import bitsandbytes  # noqa: F401


# -- products -----------------------------------------------------------------------------------------------


def multiply_quantised(on: bool) -> None:
    """Whether float8 (e4m3) and int8 weights of this process are multiplied as they are."""
    global _multiplies_quantised
    _multiplies_quantised = on


def is_multiplied_quantised(x_MI: Tensor, weight_OI: Tensor) -> bool:
    """Whether the product of these two is computed in the weight's precision."""
    return _multiplies_quantised and x_MI.shape[0] >= kernels.FEW_ROWS and _is_multipliable(weight_OI)


def _is_multipliable(weight_OI: Tensor) -> bool:
    is_kind = weight_OI.dtype in (torch.float8_e4m3fn, torch.int8)
    return is_kind and weight_OI.shape[0] % 16 == weight_OI.shape[1] % 16 == 0


Quantised = tuple[Tensor | None, Tensor | None]
"""Rows in float8 or int8 and their scales (M, 1); twice None where they are not quantised yet."""


def quantised_while_tracing(x_MI: Tensor, weight_OI: Tensor) -> Quantised:
    """What the operators take besides ``x`` while torch.compile traces."""
    if torch.compiler.is_compiling() and is_multiplied_quantised(x_MI, weight_OI):
        return kernels.quantise_rows(x_MI.detach(), weight_OI.dtype)
    return None, None


def is_converted(x_MI: Tensor, weight_OI: Tensor, scale: Tensor | None) -> bool:
    """Whether `product` converts the weight."""
    if scale is None:
        return True
    return not (is_multiplied_quantised(x_MI, weight_OI) or kernels.multiplies_few(x_MI, weight_OI.dtype))


def product(
    x_MI: Tensor, quantised: Quantised, weight_OI: Tensor, scale: Tensor | None, bias_O: Tensor | None
) -> Tensor:
    """``x W' + b``."""
    if scale is None or is_converted(x_MI, weight_OI, scale):
        return F.linear(x_MI, convert(weight_OI, scale, x_MI.dtype), bias_O)
    if not is_multiplied_quantised(x_MI, weight_OI):
        return kernels.multiply_few(x_MI, weight_OI, scale, bias_O)
    q_MI, scale_M1 = quantised
    if q_MI is None or scale_M1 is None:
        q_MI, scale_M1 = kernels.quantise_rows(x_MI, weight_OI.dtype)
    return kernels.multiply_scaled(q_MI, weight_OI, scale_M1, scale, bias_O, x_MI.dtype)


def product_of_grad(
    grad_MO: Tensor, weight_OI: Tensor, scale: Tensor | None, transposed_IO: Tensor | None = None
) -> Tensor:
    """``grad W``. The weight's scales are those of the summed dimension here, so the gradient takes them over before
    it is quantised."""
    if scale is None or not is_multiplied_quantised(grad_MO, weight_OI):
        return grad_MO @ convert(weight_OI, scale, grad_MO.dtype)
    q_MO, scale_M1 = kernels.quantise_rows(grad_MO, weight_OI.dtype, scale.view(-1))
    transposed_IO = kernels.transpose(weight_OI) if transposed_IO is None else transposed_IO
    return kernels.multiply_scaled(q_MO, transposed_IO, scale_M1, None, None, grad_MO.dtype)


@torch.library.custom_op("diffusion_trainer::stored_linear", mutates_args=())
def stored_linear(
    x_MI: Tensor,
    quantised_MI: Tensor | None,
    quantised_scale: Tensor | None,
    weight_OI: Tensor,
    scale: Tensor | None,
    transposed_IO: Tensor | None,
    bias_O: Tensor | None,
) -> Tensor:
    """`product` as an operator."""
    return product(x_MI, (quantised_MI, quantised_scale), weight_OI, scale, bias_O)


@torch.library.custom_op("diffusion_trainer::stored_linear_backward", mutates_args=())
def stored_linear_backward(
    grad_MO: Tensor, weight_OI: Tensor, scale: Tensor | None, transposed_IO: Tensor | None
) -> Tensor:
    """`product_of_grad` as an operator."""
    return product_of_grad(grad_MO, weight_OI, scale, transposed_IO)


def num_inputs(weight_OI: Tensor) -> int:
    """Inputs of the layer that a stored weight belongs to."""
    return weight_OI.shape[1] * (2 if weight_OI.dtype == torch.uint8 else 1)


@stored_linear.register_fake
def _(x_MI: Tensor, q_MI: Any, q_scale: Any, weight_OI: Tensor, scale: Any, transposed_IO: Any, bias_O: Any) -> Tensor:
    return x_MI.new_empty(x_MI.shape[0], weight_OI.shape[0])


@stored_linear_backward.register_fake
def _(grad_MO: Tensor, weight_OI: Tensor, scale: Any, transposed_IO: Any) -> Tensor:
    return grad_MO.new_empty(grad_MO.shape[0], num_inputs(weight_OI))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[3:6])


def _backward(ctx: Any, grad_MO: Tensor) -> tuple[Tensor, None, None, None, None, None, None]:
    return stored_linear_backward(grad_MO, *ctx.saved_tensors), None, None, None, None, None, None


stored_linear.register_autograd(_backward, setup_context=_save)


# What recomputing it costs, for torch.compile to decide what to keep.
@register_flop_formula(torch.ops.diffusion_trainer.stored_linear)
def _flops(x_MI: Any, q_MI: Any, q_scale: Any, weight_OI: Any, *unused: Any, **shapes: Any) -> int:
    return 2 * x_MI[0] * x_MI[1] * weight_OI[0]
