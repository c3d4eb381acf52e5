"""Gradient checkpointing of a ComfyUI model's blocks: they keep their inputs and compute the rest again in backward.

Models add to their residual in place, although a norm before it needs it as it was for its gradient and a block that
is computed again must start from the same input. Where a model does that, autograd says so, and these work on copies.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class Copies:
    """Whether norms and recomputed blocks work on copies of their inputs."""

    def __init__(self, made: bool = False) -> None:
        self.made = made
        self.tried = False
        """Whether a step has shown which it is; until then norms get aliases, see `_Alias`."""

    def for_block(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What a recomputed block makes of its inputs, or of copies of them."""
        return self._on(_copy, forward, args, kwargs) if self.made else forward(*args, **kwargs)

    def for_norm(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What a norm makes of its inputs, or of copies of them."""
        if self.made:
            return self._on(_copy, forward, args, kwargs)
        return forward(*args, **kwargs) if self.tried else self._on(_alias, forward, args, kwargs)

    @staticmethod
    def _on(change: Callable[[Any], Any], forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return forward(*map(change, args), **{key: change(value) for key, value in kwargs.items()})

    def would_help(self, error: RuntimeError) -> bool:
        """Whether ``error``, of a step without copies, says that something was changed in place."""
        return not self.made and bool(re.search("in-?place", str(error)))


class Recomputed:
    """One call of a block that keeps its inputs and computes the rest again in backward.

    As torch.utils.checkpoint, but with a third of its work for each tensor that a block keeps, which is what small
    models spend their time on.
    """

    def __init__(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.forward, self.names = forward, tuple(kwargs)
        values = [*args, *kwargs.values()]
        self.at = [index for index, value in enumerate(values) if isinstance(value, Tensor)]
        self.others = [None if isinstance(value, Tensor) else value for value in values]
        start = torch.empty(0, requires_grad=True)  # makes autograd keep the inputs, by its own rules
        self.differentiable = [values[index].requires_grad for index in self.at]
        self.inputs: Any = _Held.apply(start, *(values[index].detach() for index in self.at))
        self.sizes: list[tuple[Any, torch.dtype]] = []
        self.again: list[tuple[Tensor, int] | None] | None = None

    @classmethod
    def run(cls, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What a block makes of its inputs."""
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        call = cls(forward, args, kwargs)
        with saved_tensors_hooks(call._count, call._value):
            return call.forward(*args, **kwargs)

    def _count(self, value: Tensor) -> int:
        self.sizes.append((value.shape, value.dtype))
        return len(self.sizes) - 1

    def _value(self, index: int) -> Tensor:
        if self.again is None:
            self._compute_again()
        assert self.again is not None
        kept, self.again[index] = self.again[index], None
        assert kept is not None, "nothing is asked for twice"
        value, version = kept
        if value._version != version:  # autograd sees this itself only where nothing is computed again
            raise RuntimeError("a tensor that the model's gradient needs was modified by an inplace operation")
        return value

    def _compute_again(self) -> None:
        values, num_args = self.others, len(self.others) - len(self.names)
        # Before torch 2.13 the node keeps them only while its result lives, so that is what is held
        for index, value, flag in zip(self.at, self.inputs.grad_fn.saved_tensors, self.differentiable, strict=True):
            values[index] = value.detach().requires_grad_(flag)
        self.again = []
        with torch.enable_grad(), saved_tensors_hooks(self._keep, _never), suppress(_Enough):
            self.forward(*values[:num_args], **dict(zip(self.names, values[num_args:], strict=True)))
        self.inputs, self.others = None, []
        if len(self.again) != len(self.sizes):
            raise RuntimeError(_UNLIKE)

    def _keep(self, value: Tensor) -> None:
        assert self.again is not None
        if (value.shape, value.dtype) != self.sizes[len(self.again)]:
            raise RuntimeError(_UNLIKE)
        self.again.append((value.detach(), value._version))
        if len(self.again) == len(self.sizes):
            raise _Enough


class _Held(torch.autograd.Function):
    """Keeps tensors for backward."""

    @staticmethod
    def forward(ctx: Any, start: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return start.detach()


class _Enough(BaseException):  # models catch any Exception of some attention kernels
    """All that backward needs of a block is there; what the block computes after it is not needed again."""


_UNLIKE = ("gradient_checkpointing: a block of this model computes something else when it is called again; "
           "switch it off")  # fmt: skip


def _never(_: None) -> Tensor:
    raise AssertionError("nothing goes backward through what is computed again")


class _Alias(torch.autograd.Function):
    """The same memory as a tensor that does not become what its origin does.

    A tensor that is changed in place with what depends on itself holds what it was made of, and that holds it. Only
    a backward pass that succeeds would let go of them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _alias(value: Any) -> Any:
    return _Alias.apply(value) if type(value) is Tensor and value.requires_grad else value  # type: ignore[no-untyped-call]


def _copy(value: Any) -> Any:
    return value.clone() if type(value) is Tensor and value.is_floating_point() else value
