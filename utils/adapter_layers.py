"""Small trainable additions to frozen layers: LoRA, LoHa and LoKr, in the spelling that ComfyUI loads.

An adapter holds its weights in fp32 and computes in the dtype of what it is given. It knows its layer only by
its shape, so that it works however the base weight is stored. Reference: LyCORIS (arXiv 2309.14859).

Shape legend: M rows (tokens of all samples), I inputs, O outputs, R rank, K kernel sizes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ALGORITHMS = ("LoRA", "LoHa", "LoKr")
_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)


@dataclass(frozen=True)
class Shape:
    """What an adapter needs to know of its layer: a linear map, or a convolution when there is a kernel."""

    outputs: int
    inputs: int
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: Any = ()
    dilation: tuple[int, ...] = ()

    @classmethod
    def of(cls, layer: nn.Module) -> Shape | None:
        """The shape of a linear layer or a convolution; None of any other."""
        if isinstance(layer, nn.Linear):
            return cls(layer.out_features, layer.in_features)
        if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and layer.groups == 1 and layer.padding_mode == "zeros":
            return cls(
                layer.out_channels, layer.in_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation
            )
        return None

    @property
    def columns(self) -> int:
        """Inputs of the layer's weight as a matrix."""
        return self.inputs * math.prod(self.kernel)

    @property
    def weight(self) -> tuple[int, ...]:
        """Shape of the layer's weight."""
        return (self.outputs, self.inputs, *self.kernel)

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer's map with ``weight``, a matrix of any number of rows, instead of its own."""
        if not self.kernel:
            return F.linear(x, weight)
        shaped = weight.reshape(weight.shape[0], self.inputs, *self.kernel)
        return _CONVOLUTIONS[len(self.kernel) - 1](x, shaped, None, self.stride, self.padding, self.dilation)


class Adapter(nn.Module, ABC):
    """An addition to one layer."""

    shape: Shape
    alpha: float
    rank: int

    @property
    def scale(self) -> float:
        """Factor of the addition: alpha / rank."""
        return self.alpha / self.rank

    @abstractmethod
    def delta(self) -> Tensor:
        """What is added to the layer's weight, as a matrix (O, I K), fp32."""

    def forward(self, x: Tensor) -> Tensor:
        """What is added to the layer's output."""
        return self.shape.apply(x, self.delta().to(x.dtype))

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The weights by the last part of their key, in the shapes that files have."""


class Lora(Adapter):
    """``scale * up @ down``."""

    def __init__(self, shape: Shape, up: Tensor, down: Tensor, alpha: float | None) -> None:
        super().__init__()
        self.shape, self.rank = shape, down.shape[0]
        self.alpha = float(self.rank if alpha is None else alpha)
        self.up = nn.Parameter(up.detach().flatten(1).float().clone())
        self.down = nn.Parameter(down.detach().flatten(1).float().clone())

    @classmethod
    def new(cls, shape: Shape, rank: int, alpha: float, generator: torch.Generator) -> Lora:
        """Adds nothing yet."""
        down = _uniform((rank, shape.columns), shape.columns, generator)
        return cls(shape, torch.zeros(shape.outputs, rank), down, alpha)

    def delta(self) -> Tensor:
        return self.up @ self.down * self.scale

    def forward(self, x: Tensor) -> Tensor:
        inner = self.shape.apply(x, self.down.to(x.dtype))
        up = (self.up * self.scale).to(x.dtype)
        if not self.shape.kernel:
            return F.linear(inner, up)
        return _CONVOLUTIONS[len(self.shape.kernel) - 1](inner, up.reshape(*up.shape, *(1 for _ in self.shape.kernel)))

    def tensors(self) -> dict[str, Tensor]:
        ones = [1 for _ in self.shape.kernel]
        return {
            "lora_up.weight": self.up.reshape(self.shape.outputs, self.rank, *ones),
            "lora_down.weight": self.down.reshape(self.rank, self.shape.inputs, *self.shape.kernel),
        }


class Loha(Adapter):
    """``scale * (w1_a @ w1_b) * (w2_a @ w2_b)``, elementwise: rank up to R squared for twice the weights."""

    w1_a: nn.Parameter
    w1_b: nn.Parameter
    w2_a: nn.Parameter
    w2_b: nn.Parameter

    def __init__(self, shape: Shape, w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor, alpha: float | None):
        super().__init__()
        self.shape, self.rank = shape, w1_b.shape[0]
        self.alpha = float(self.rank if alpha is None else alpha)
        for name, value in (("w1_a", w1_a), ("w1_b", w1_b), ("w2_a", w2_a), ("w2_b", w2_b)):
            setattr(self, name, nn.Parameter(value.detach().float().clone()))

    @classmethod
    def new(cls, shape: Shape, rank: int, alpha: float, generator: torch.Generator) -> Loha:
        """Adds nothing yet."""
        w1_a = torch.randn(shape.outputs, rank, generator=generator) * 0.1
        w1_b = torch.randn(rank, shape.columns, generator=generator)
        w2_b = torch.randn(rank, shape.columns, generator=generator) * 0.1
        return cls(shape, w1_a, w1_b, torch.zeros(shape.outputs, rank), w2_b, alpha)

    def delta(self) -> Tensor:
        return (self.w1_a @ self.w1_b) * (self.w2_a @ self.w2_b) * self.scale

    def tensors(self) -> dict[str, Tensor]:
        return {f"hada_{name}": getattr(self, name) for name in ("w1_a", "w1_b", "w2_a", "w2_b")}


class Lokr(Adapter):
    """``scale * kron(w1, w2)``; each factor whole or as a product of two."""

    def __init__(self, shape: Shape, parts: dict[str, Tensor], alpha: float | None) -> None:
        super().__init__()
        self.shape, self.parts = shape, tuple(parts)
        self._file_shapes = {name: tuple(value.shape) for name, value in parts.items()}
        inner = parts.get("w2_b", parts.get("w1_b"))
        self.rank = 1 if inner is None else inner.shape[0]
        self.alpha = 1.0 if inner is None else float(self.rank if alpha is None else alpha)
        for name, value in parts.items():
            setattr(self, name, nn.Parameter(value.detach().flatten(1).float().clone()))

    @classmethod
    def new(cls, shape: Shape, rank: int, alpha: float, generator: torch.Generator, most: int | None = None) -> Lokr:
        """Adds nothing yet. The second factor is whole where a product of two would not be smaller.

        Args:
            most: Largest side of the first factor.
        """
        out_1, in_1 = _divisor(shape.outputs, most), _divisor(shape.inputs, most)
        rows, columns = shape.outputs // out_1, shape.columns // in_1
        parts = {"w1": _uniform((out_1, in_1), in_1, generator)}
        if rank * 2 < min(rows, columns):
            parts |= {"w2_a": torch.zeros(rows, rank), "w2_b": _uniform((rank, columns), columns, generator)}
        else:
            parts["w2"] = torch.zeros(rows, columns)
        return cls(shape, parts, alpha)

    def _factor(self, name: str) -> Tensor:
        whole: Tensor | None = getattr(self, name, None)
        if whole is not None:
            return whole
        first: Tensor = getattr(self, f"{name}_a")
        second: Tensor = getattr(self, f"{name}_b")
        return first @ second

    def delta(self) -> Tensor:
        return torch.kron(self._factor("w1"), self._factor("w2")).reshape(self.shape.outputs, -1) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        w1, w2 = self._factor("w1"), self._factor("w2")
        if self.shape.kernel or w1.shape[1] * w2.shape[1] != self.shape.inputs:
            return super().forward(x)
        split = x.reshape(*x.shape[:-1], w1.shape[1], w2.shape[1])
        inner = F.linear(split, (w2 * self.scale).to(x.dtype))
        return (w1.to(x.dtype) @ inner).flatten(-2)

    def tensors(self) -> dict[str, Tensor]:
        return {f"lokr_{name}": getattr(self, name).reshape(self._file_shapes[name]) for name in self.parts}


def new_adapter(algorithm: str, shape: Shape, rank: int, alpha: float, generator: torch.Generator) -> Adapter:
    """An adapter that adds nothing yet; the same for the same state of ``generator``."""
    kinds: dict[str, Any] = {"LoRA": Lora, "LoHa": Loha, "LoKr": Lokr}
    return kinds[algorithm].new(shape, min(rank, shape.outputs, shape.columns), alpha, generator)


def _uniform(size: tuple[int, int], fan_in: int, generator: torch.Generator) -> Tensor:
    """Values as a new linear layer has them."""
    bound = 1 / math.sqrt(fan_in)
    return torch.rand(size, generator=generator) * (2 * bound) - bound


def _divisor(size: int, most: int | None = None) -> int:
    """The largest divisor of ``size`` up to its square root, or up to ``most`` if that is less."""
    return next(n for n in range(min(math.isqrt(size), most or size), 0, -1) if size % n == 0)
