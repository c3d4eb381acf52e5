"""What a micro-batch takes while it runs forward and backward, measured on tensors that have shapes but no memory.

The real layers, checkpointing and loss run on the meta device, and the storages that operators make are added up
while they live. On a CPU the same meter counts the same bytes in a real step. torch.compile keeps less.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..models.base import Batch, Layer
from .checkpointing import MIN_BYTES, ROUNDING, Checkpointing
from .device_settings import ActivationCheckpointing
from .gradients import Gradients
from .losses import loss_for
from .settings import TrainSettings

META = torch.device("meta")
Tensors = tuple[Tensor, ...]


class Meter(TorchDispatchMode):
    """Counts the bytes of tensors that are made within it, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakKeyDictionary[Any, None] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in _storages((args, kwargs)):
            self._known.setdefault(storage, None)  # what was there before is not made here, but seen by views of it
        result = operator(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage not in self._known:
                self._known[storage] = None
                self._count(storage, storage.nbytes())
        return result

    def _count(self, storage: torch.UntypedStorage, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.now -= size


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    return (value.untyped_storage() for value in pytree.tree_leaves(values) if isinstance(value, Tensor))


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch on one stage."""

    held: float
    """From the end of its forward pass to its backward pass."""
    peak: float
    """Most at once while it runs forward and backward."""
    received: float
    """Of both: what came from the stage before."""
    sent: float
    """Gradients that come back from the next stage."""
    moved: float
    """In main memory."""

    def of(self, under_way: int) -> float:
        """For so many micro-batches at once."""
        return self.held * (under_way - 1) + self.peak

    def mixed(self, other: Activations, share: float) -> Activations:
        """``share`` of this and the rest of the other."""
        names = ("held", "peak", "received", "sent", "moved")
        return Activations(*(share * getattr(self, n) + (1 - share) * getattr(other, n) for n in names))


def measure(
    settings: TrainSettings, layers: Sequence[Layer], bounds: Sequence[int], batch: Batch, wide: bool
) -> list[Activations]:
    """Of each stage, for a batch like this; the layers' weights are on the meta device.

    Args:
        wide: Gradients are summed in float32.
    """
    budget = settings.activation_memory_budget
    if budget is None:
        return _measure(settings, settings.activation_checkpointing, layers, bounds, batch, wide)
    # with torch.compile alone: 1 keeps what autograd would at most, 0 the inputs of blocks
    everything, little = (_measure(settings, mode, layers, bounds, batch, wide) for mode in (False, True))
    return [one.mixed(other, budget) for one, other in zip(everything, little, strict=True)]


def _measure(
    settings: TrainSettings,
    mode: ActivationCheckpointing,
    layers: Sequence[Layer],
    bounds: Sequence[int],
    batch: Batch,
    wide: bool,
) -> list[Activations]:
    found, tensors = [], batch.inputs
    dropping = bool(settings.adapter and settings.adapter.drops)
    for start, stop in itertools.pairwise(bounds):
        stage = _Stage(layers[start:stop], mode, dropping, wide)
        label = (batch.target, batch.weight) if stop == bounds[-1] else None
        activations, tensors = stage.run(tensors, label, loss_for(settings), received=start > 0)
        found.append(activations)
    return found


class _Stage:
    """The layers of one stage, which run one micro-batch."""

    def __init__(self, layers: Sequence[Layer], mode: ActivationCheckpointing, random: bool, wide: bool) -> None:
        self._layers, self._mode = layers, mode
        # what waits in main memory is what checkpointing keeps
        self._way = Checkpointing(True if mode == "unsloth" else mode, META, random, compiled=False)
        self._wide = wide
        self._moved: list[int] = []

    def run(
        self, inputs: Sequence[Tensor], label: tuple[Tensor, Tensor] | None, loss: Any, received: bool
    ) -> tuple[Activations, Tensors]:
        """What it takes, and shapes of what it gives."""
        parameters = {str(n): p for n, p in enumerate(parameters_of(self._layers)) if p.requires_grad}
        gradients = Gradients(parameters, torch.float32 if self._wide else None)
        with fused_attention(), Meter() as meter:
            given = tuple(_empty(tensor) for tensor in inputs)
            target = tuple(torch.empty_like(tensor, device=META) for tensor in label or ())
            arrived = meter.now
            outputs = [*self._forward(given)]
            held, shapes = meter.now, [(t.shape, t.dtype, t.requires_grad) for t in outputs]
            sent = self._backward(outputs, target, loss)
        gradients.let_go()
        del gradients
        for parameter in parameters.values():
            parameter.grad = None
        moved = sum(self._moved)
        stays = sum(sorted(self._moved)[-2:])  # of the block at work, and of the one that is next
        return Activations(
            held - moved,
            meter.peak - moved + stays,
            float(arrived) if received else 0.0,
            float(sent),
            float(sum(math.ceil(size / ROUNDING) * ROUNDING for size in self._moved)),
        ), tuple(torch.empty(shape, dtype=dtype, device=META).requires_grad_(needs) for shape, dtype, needs in shapes)

    def _forward(self, tensors: Tensors) -> Tensors:
        number, before = 0, list(tensors)
        for layer in self._layers:
            run = partial(layer.forward, SimpleNamespace(**layer.submodules))
            if layer.is_block:
                if self._mode == "unsloth":
                    self._moved += [t.nbytes for t in tensors if t.nbytes >= MIN_BYTES and not _among(t, before)]
                    before = [*before, *tensors]
                result = self._way.run(number, run, tensors)
                number += 1
            else:
                result = run(*tensors)
            tensors = result if isinstance(result, tuple) else (result,)
        return tensors

    def _backward(self, outputs: list[Tensor], label: Tensors, loss: Any) -> int:
        """Bytes of the gradients that come from the next stage; lets go of the outputs."""
        if label:
            value = loss(outputs.pop(), label)
            if value.requires_grad:
                value.backward()
            return 0
        tensors = [tensor for tensor in outputs if tensor.requires_grad]
        grads = [torch.empty_like(tensor) for tensor in tensors]
        if tensors:
            torch.autograd.backward(tensors, grads)
        return sum(grad.nbytes for grad in grads)


def measure_drawing(layers: Sequence[Layer], batch: Batch, vae: Any, latents: Tensor) -> float:
    """Bytes that a denoising step and the decoding of its result take at most, beside all weights."""
    with torch.no_grad(), fused_attention():
        with Meter() as step:
            tensors: Any = tuple(_empty(tensor) for tensor in batch.inputs)
            for layer in layers:
                tensors = layer.forward(SimpleNamespace(**layer.submodules), *tensors)
            del tensors
        with Meter() as decoding:
            vae.decode(_empty(latents))
    return float(max(step.peak, decoding.peak))


def parameters_of(layers: Sequence[Layer]) -> list[nn.Parameter]:
    """The parameters of layers, each once."""
    modules = (module for layer in layers for module in layer.submodules.values())
    return list(dict.fromkeys(parameter for module in modules for parameter in module.parameters()))


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device=META).requires_grad_(tensor.requires_grad)


def _among(tensor: Tensor, others: Sequence[Tensor]) -> bool:
    return any(tensor is other for other in others)


def _flash(query: Tensor, key: Tensor, value: Tensor, *unused: Any, scale: float | None = None, **more: Any) -> Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)[0]


@contextmanager
def fused_attention() -> Iterator[None]:
    """Attention keeps what it does on a GPU; without memory torch would choose the form that keeps all products."""
    before = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = _flash  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = before
