"""A frozen layer with an adapter: how it computes, and what of it goes into a file.

LoRA on a linear layer runs through `lora_linear`, whose two operators save passes over the large tensors, together
with other layers that are given the same tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .adapter_layers import Adapter, Lora, Shape
from .lora_linear import lora_linears
from .storage import StoredLinear, convert


class Adapted(nn.Module):
    """``base_layer`` plus ``adapter``; shapes as those of the layer.

    Args:
        dropout: Share of the adapter's inputs that is dropped while training.
        rank_dropout: Share of the outputs to which the adapter adds nothing while training.
        decomposed: DoRA (Liu et al. 2024): the adapter turns each row of the weight, and `magnitude` says how long
            it is. As in the paper the row's length counts as a constant in the backward pass.
    """

    def __init__(
        self,
        base: nn.Module,
        adapter: Adapter,
        dropout: float = 0.0,
        rank_dropout: float = 0.0,
        decomposed: bool = False,
    ) -> None:
        super().__init__()
        self.base_layer, self.adapter = base, adapter
        self.dropout, self.rank_dropout = dropout, rank_dropout
        self.magnitude = nn.Parameter(self._merged_length()) if decomposed else None
        self.together, self.number = Together([self]), 0

    @property
    def weight(self) -> Any:
        """Of the frozen layer."""
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        """Of the frozen layer."""
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output with what the adapter adds."""
        if self.is_fused:
            return self.together.output(self.number, x)
        added = self.adapter(F.dropout(x, self.dropout, self.training) if self.dropout else x)
        if self.rank_dropout and self.training:
            kept = torch.rand(self.adapter.shape.outputs, device=x.device) >= self.rank_dropout
            added = added * self._along_outputs(kept.to(added.dtype))
        if self.magnitude is None:
            return self.base_layer(x) + added
        factor = self._along_outputs((self.magnitude / self._merged_length()).to(x.dtype))
        bias = None if self.bias is None else self._along_outputs(self.bias.to(x.dtype))
        output = self.base_layer(x) if bias is None else self.base_layer(x) - bias
        output = (output + added) * factor
        return output if bias is None else output + bias

    @property
    def is_fused(self) -> bool:
        """Whether the layer and its adapter are computed by one operator: a LoRA, nothing dropped, no DoRA."""
        dropping = self.training and (self.dropout or self.rank_dropout)
        plain = isinstance(self.adapter, Lora) and not self.adapter.shape.kernel
        return plain and not dropping and self.magnitude is None

    def matrices(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Of a LoRA: down in ``dtype``, and up with its scale as it is kept."""
        adapter: Any = self.adapter
        # The scale goes to the small matrix instead of the large output
        return adapter.down.to(dtype), adapter.up if adapter.scale == 1.0 else adapter.up * adapter.scale

    def _along_outputs(self, value_O: Tensor) -> Tensor:
        return value_O.view(-1, *[1] * len(self.adapter.shape.kernel))

    @torch.no_grad()
    def _merged_length(self) -> Tensor:
        """The length of each row of the weight with the adapter in it, fp32, (O)."""
        frozen = frozen_weight(self.base_layer).flatten(1)  # may wait in main memory
        return (frozen + self.adapter.delta().to(frozen.device)).norm(dim=1)

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """What goes into a file, by the last part of its key; LoRA's as ``lora_up.weight``, ``lora_down.weight``.

        ComfyUI multiplies a DoRA's merged weight by ``dora_scale`` over the length of the *frozen* row; the one
        written here makes that the same function.
        """
        found = {**self.adapter.tensors(), "alpha": torch.tensor(self.adapter.alpha)}
        if self.magnitude is not None:
            found["dora_scale"] = self._along_frozen(self.magnitude.cpu() / self._merged_length().cpu())
        return found

    def _along_frozen(self, factor_O: Tensor) -> Tensor:
        length = frozen_weight(self.base_layer).flatten(1).norm(dim=1)
        length = length * factor_O.to(length.device)
        return length.view(-1, *[1] * (len(self.adapter.shape.weight) - 1))

    @torch.no_grad()
    def scale_rows(self, dora_scale: Tensor) -> None:
        """Takes over a file's ``dora_scale``; the inverse of what `tensors` does."""
        assert self.magnitude is not None
        frozen = frozen_weight(self.base_layer).flatten(1).norm(dim=1)
        self.magnitude.copy_(dora_scale.flatten().to(frozen) / frozen * self._merged_length())


class Together:
    """Layers that are given the same tensor one after the other: the first call computes the outputs of all.

    A layer that is given another tensor after all is computed anew; that costs time and changes nothing. Between the
    calls nobody may write to the tensor: `Family.shared_inputs` names layers of which that is known.
    """

    def __init__(self, members: Sequence[Adapted]) -> None:
        self._members = list(members)
        self._of: Tensor | None = None
        self._outputs: dict[int, Tensor] = {}

    @classmethod
    def join(cls, layers: Sequence[Adapted]) -> None:
        """Has ``layers`` computed together, if that is possible."""
        together = cls(layers)
        if len({layer.weight.dtype for layer in layers}) == 1 and all(layer.is_fused for layer in layers):
            for number, layer in enumerate(layers):
                layer.together, layer.number = together, number

    def output(self, number: int, x: Tensor) -> Tensor:
        """The output of one of the layers for ``x``."""
        if self._of is not x or number not in self._outputs:
            self._of, self._outputs = x, dict(enumerate(self._compute(x)))
        output = self._outputs.pop(number)
        if not self._outputs:
            self._of = None
        return output.view(*x.shape[:-1], output.shape[-1])

    def _compute(self, x: Tensor) -> list[Tensor]:
        bases: list[Any] = [member.base_layer for member in self._members]
        downs, ups = zip(*(member.matrices(x.dtype) for member in self._members), strict=True)
        scales = [getattr(base, "weight_scale", None) for base in bases]
        transposed = [getattr(base, "weight_transposed", None) for base in bases]
        weights, biases = [base.weight for base in bases], [base.bias for base in bases]
        return lora_linears(x.flatten(0, -2), weights, scales, transposed, biases, downs, ups)


def frozen_weight(layer: nn.Module) -> Tensor:
    """The weight of a linear layer or a convolution in fp32, however it is stored."""
    weight: Any = layer.weight
    return convert(weight.data, getattr(layer, "weight_scale", None), torch.float32)


@torch.no_grad()
def replace_frozen(layer: nn.Module, value: Tensor) -> None:
    """Puts another value into the weight of a linear layer or a convolution, stored as before."""
    weight: Any = layer.weight
    if isinstance(layer, StoredLinear):  # in place: a swapped block's weights are part of a larger piece of memory
        scale = layer.weight_scale
        fresh = layer.store(value.to(weight.device), weight.dtype)
        weight.copy_(fresh)
        layer.weight = weight
        if scale is not None and layer.weight_scale is not None:
            scale.copy_(layer.weight_scale)
            layer.weight_scale = scale
    else:
        weight.copy_(value)


def adapted_layers(module: nn.Module) -> dict[str, Adapted]:
    """The layers with an adapter, by name."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, Adapted)}


def shapes_of(module: nn.Module) -> dict[str, Shape]:
    """The layers that may get an adapter, by name."""
    found = {name: Shape.of(layer) for name, layer in module.named_modules()}
    return {name: shape for name, shape in found.items() if shape is not None}
