"""Blocks whose frozen weights wait in main memory and are copied to the GPU ahead of use, in both directions.

The weights of a swapped block lie in one piece of pinned memory and have a fixed place in a pool on the GPU that
is shared by turns. So the parameters always point to the same addresses: nothing is rebound when a block comes or
goes, compiled code and CUDA graphs stay valid, and a block is one copy. Weights are never copied back.

Within a pass blocks are used in order. When the device is done with a block, those that lie next on its place are
sent for on a stream of their own. After a forward pass the last blocks are in the pool, where the backward pass
begins, and after that the first ones.

A copy begins after all work that was issued before it was asked for, and a block's work begins after its copy: both
by events, which CUDA graphs record as well.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..models.base import Layer

logger = logging.getLogger(__name__)

ALIGNMENT = 256
"""Bytes; what kernels may ask of the address of a tensor."""
NUM_PLACES = 2
"""Neighbouring blocks that the pool holds: one at work, one on its way."""
SMALL = 0.25
"""Share of the largest kind's weights below which a kind of block is hardly worth swapping."""

Tensors = tuple[Tensor, ...]


def main_memory(num_bytes: int, device: torch.device) -> Tensor:
    """Bytes in main memory that ``device`` can copy from and to by itself.

    torch's own pinned memory is rounded up to a power of two, which wastes a third of it.
    """
    memory = torch.empty(num_bytes, dtype=torch.uint8)
    if device.type != "cuda" or not num_bytes:  # a driver does not pin nothing
        return memory
    runtime, address = torch.cuda.cudart(), memory.data_ptr()
    if int(runtime.cudaHostRegister(address, num_bytes, 0)) != 0:
        raise MemoryError(
            f"{num_bytes / 2**20:.0f} MiB of main memory could not be pinned for swapping; close other programs, swap "
            "fewer blocks, or raise the limit of locked memory (ulimit -l)"
        )
    weakref.finalize(memory.untyped_storage(), runtime.cudaHostUnregister, address)
    return memory


class Lane:
    """Copies between main memory and the device that run beside the computation; on the CPU at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, target: Tensor, source: Tensor) -> Any:
        """Copies once all work issued so far is done; returns what to `wait` for. Autograd sees nothing of it."""
        target, source = target.detach(), source.detach()
        if self._stream is None:
            target.copy_(source)
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        return self._stream.record_event()

    def wait(self, copy: Any) -> None:
        """Lets work issued from now on begin after ``copy``."""
        if copy is not None:
            torch.cuda.current_stream(self._device).wait_event(copy)


class _Mark(torch.autograd.Function):
    """Passes tensors on; its backward pass calls ``act`` when the gradients of all of them are there."""

    @staticmethod
    def forward(ctx: Any, act: Callable[[], None], *tensors: Tensor) -> Tensors:
        ctx.act = act
        ctx.set_materialize_grads(False)
        return tensors

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        ctx.act()
        return None, *grads


def on_backward(tensors: Tensors, act: Callable[[], None]) -> Tensors:
    """``tensors``, with ``act`` called when the backward pass reaches them; never, if it does not."""
    places = [n for n, tensor in enumerate(tensors) if tensor.requires_grad]
    if not places or not torch.is_grad_enabled():
        return tensors
    marked = list(tensors)
    for place, tensor in zip(places, _Mark.apply(act, *(tensors[n] for n in places)), strict=True):
        marked[place] = tensor
    return tuple(marked)


@dataclass
class _Unit:
    """A swapped block."""

    name: str
    modules: Sequence[nn.Module]
    host: Tensor
    """All its frozen weights, as bytes."""
    places: list[tuple[nn.Module, str, int]]
    """Owner, attribute and first byte of each weight."""
    start: int = 0
    """First byte in the pool."""
    after_forward: list[int] = field(default_factory=list)
    """Blocks to send for when the forward pass is done with this one."""
    after_backward: list[int] = field(default_factory=list)

    def overlaps(self, other: _Unit) -> bool:
        return self.start < other.start + len(other.host) and other.start < self.start + len(self.host)


class BlockSwap:
    """The swapped blocks of this process.

    First `take` each block with its weights; then `bind`, when adapters are in place; from then on `run` the blocks.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._lane = Lane(device)
        self._units: list[_Unit] = []
        self._index: dict[str, int] = {}
        self._pool = torch.empty(0, dtype=torch.uint8)
        self._loaded: set[int] = set()
        self._copies: dict[int, Any] = {}
        self._first: list[int] = []
        self._last: list[int] = []
        self._suspended = False

    # -- setting up ---------------------------------------------------------------------------------

    @property
    def main_bytes(self) -> int:
        """Bytes in main memory."""
        return sum(len(unit.host) for unit in self._units)

    @property
    def pool_bytes(self) -> int:
        """Bytes on the device."""
        return len(self._pool)

    def take(self, layer: Layer) -> None:
        """Moves the weights of a block, wherever they are, to main memory."""
        places, size = _layout(_weights(layer.submodules.values()))
        unit = _Unit(layer.name, list(layer.submodules.values()), main_memory(size, self.device), places)
        _move(unit, unit.host, keep=True)
        self._units.append(unit)

    def bind(self) -> None:
        """Lets the frozen weights point to their places on the device, and moves the trained ones there."""
        for unit in self._units:
            self._part_with_trained(unit)
        self._units = [unit for unit in self._units if unit.places]
        self._index = {unit.name: number for number, unit in enumerate(self._units)}
        pool_size = pool_bytes([len(unit.host) for unit in self._units])
        start = 0
        for unit in self._units:
            unit.start = start if start + len(unit.host) <= pool_size else 0
            start = unit.start + len(unit.host)
        self._plan()
        self._pool = torch.empty(pool_size, dtype=torch.uint8, device=self.device)
        for unit in self._units:
            self._to_pool(unit)
        self.start()
        if not self._units:
            logger.warning("blocks_to_swap: all weights of the blocks are trained, and only frozen ones are swapped")
            return
        logger.info(
            "%d blocks wait in main memory (%.1f GiB), %.1f GiB of the GPU for those at work",
            len(self._units),
            self.main_bytes / 2**30,
            pool_size / 2**30,
        )

    def _part_with_trained(self, unit: _Unit) -> None:
        """Trained weights go to the device; what is frozen moves together."""
        for module in unit.modules:
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(self.device, copy=True)
        frozen = [(owner, name) for owner, name, _ in unit.places if not getattr(owner, name).requires_grad]
        if len(frozen) < len(unit.places):
            unit.places, size = _layout((owner, name, getattr(owner, name)) for owner, name in frozen)
            host = main_memory(size, self.device)
            _move(unit, host, keep=True)
            unit.host = host

    def _plan(self) -> None:
        for number, unit in enumerate(self._units):
            before = [n for n in range(number) if unit.overlaps(self._units[n])]
            after = [n for n in range(number + 1, len(self._units)) if unit.overlaps(self._units[n])]
            (self._units[before[-1]].after_forward if before else self._first).append(number)
            (self._units[after[0]].after_backward if after else self._last).insert(0, number)

    def _to_pool(self, unit: _Unit) -> None:
        _move(unit, self._pool[unit.start : unit.start + len(unit.host)], keep=False)

    # -- running ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Sends for the first blocks, if they are not there."""
        if not self._suspended:
            for number in self._first:
                self._load(number)

    def settle(self) -> None:
        """`start`, and work issued from now on begins after all copies."""
        self.start()
        for copy in self._copies.values():
            self._lane.wait(copy)
        self._copies.clear()

    def forget(self) -> None:
        """Takes nothing for loaded: what was issued may never have run."""
        self._loaded.clear()
        self._copies.clear()

    def run(self, name: str, block: Callable[..., Any], inputs: Tensors) -> Any:
        """``block(*inputs)`` with its weights in place, in the backward pass as well."""
        number = self._index.get(name)
        if number is None or self._suspended:
            return block(*inputs)
        inputs = on_backward(inputs, lambda: self._release(self._units[number].after_backward))
        self._need(number)
        outputs = block(*inputs)
        self._release(self._units[number].after_forward)
        return on_backward(outputs, lambda: self._need(number, self._last))

    def _need(self, number: int, first: Sequence[int] = ()) -> None:
        if number not in self._loaded:  # a pass begins elsewhere than the one before ended
            for other in first:
                self._load(other)
            self._load(number)
        self._lane.wait(self._copies.pop(number, None))

    def _release(self, following: Sequence[int]) -> None:
        for number in following:
            self._load(number)

    def _load(self, number: int) -> None:
        if number in self._loaded:
            return
        unit = self._units[number]
        for other in [n for n in self._loaded if unit.overlaps(self._units[n])]:
            self._loaded.discard(other)
            self._copies.pop(other, None)
        self._copies[number] = self._lane.copy(self._pool[unit.start : unit.start + len(unit.host)], unit.host)
        self._loaded.add(number)

    # -- using the network otherwise ------------------------------------------------------------------

    @contextmanager
    def resident(self) -> Iterator[None]:
        """All blocks on the device; for evaluation on a GPU that has the room."""
        self.settle()
        for unit in self._units:
            _move(unit, unit.host.to(self.device), keep=False)
        self._suspended = True
        try:
            yield
        finally:
            self._suspended = False
            for unit in self._units:
                self._to_pool(unit)

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Frozen weights can be read, but not used: they point to main memory."""
        for unit in self._units:
            _move(unit, unit.host, keep=False)
        try:
            yield
        finally:
            for unit in self._units:
                self._to_pool(unit)

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """The network can be called as a whole, without gradients, outside of the chain of layers."""
        handles, compiled, current = [], {}, [-1]

        def before(number: int) -> None:
            if current[0] >= 0 and current[0] != number:
                self._release(self._units[current[0]].after_forward)
            if number <= current[0]:
                self.start()
            current[0] = number
            self._need(number)

        for number, unit in enumerate(self._units):
            for module in unit.modules:
                handles.append(module.register_forward_pre_hook(lambda *_, n=number: before(n)))
                compiled[module], module._compiled_call_impl = module._compiled_call_impl, None
        self.settle()
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module, call in compiled.items():
                module._compiled_call_impl = call
            self.settle()


def _weights(modules: Any) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """The parameters and scales of modules, each once, with who holds them under which name."""
    seen: set[int] = set()
    for module in modules:
        for owner in module.modules():
            scale = owner._buffers.get("weight_scale")
            for name, tensor in [*owner._parameters.items(), ("weight_scale", scale)]:
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield owner, name, tensor


def _layout(weights: Iterable[tuple[nn.Module, str, Tensor]]) -> tuple[list[tuple[nn.Module, str, int]], int]:
    """Where each weight begins in one piece of memory, and how large that is."""
    places, size = [], 0
    for owner, name, tensor in weights:
        places.append((owner, name, size))
        size += math.ceil(tensor.nbytes / ALIGNMENT) * ALIGNMENT
    return places, size


def _move(unit: _Unit, memory: Tensor, keep: bool) -> None:
    """Lets the frozen weights of a block point into ``memory``; ``keep`` copies their values there."""
    for owner, name, offset in unit.places:
        tensor = getattr(owner, name)
        view = memory[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        if keep:
            view.copy_(tensor)
        tensor.data = view.data  # has a version of its own: to autograd a block that arrives is no change


def frozen_bytes(layer: Layer) -> int:
    """What a block takes in main memory when it is swapped."""
    return _layout(entry for entry in _weights(layer.submodules.values()) if not entry[2].requires_grad)[1]


def pool_bytes(sizes: Sequence[int]) -> int:
    """What swapped blocks of these sizes, in order, take on the device."""
    return max((sum(sizes[n : n + NUM_PLACES]) for n in range(len(sizes))), default=0)


def swapped(
    layers: Sequence[Layer], mine: Sequence[Layer], blocks_to_swap: int, costs: Sequence[int] | None = None
) -> list[Layer]:
    """The blocks of this stage to swap.

    How many of each kind is such that each kind has as many bytes to copy for the time that it computes; those of a
    kind are spread evenly. Kinds of small blocks come last, as they free little.

    Args:
        layers: Of the whole network, their weights not quantised yet.
        mine: Of this stage.
        blocks_to_swap: Of the whole network; as many as there are if it has fewer.
        costs: Arithmetic of each of ``layers``; left out: in proportion to the weights.
    """
    blocks = [layer for layer in mine if layer.is_block]
    total = sum(layer.is_block for layer in layers)
    if blocks_to_swap > total:
        logger.info("blocks_to_swap: the model has %d blocks; all are swapped", total)
    count = min(len(blocks), math.ceil(blocks_to_swap * len(blocks) / max(1, total)))
    work = dict(zip((layer.name for layer in layers), costs or (), strict=bool(costs)))
    kinds: dict[tuple[str, ...], list[int]] = {}
    for number, block in enumerate(blocks):
        kinds.setdefault(tuple(type(m).__name__ for m in block.submodules.values()), []).append(number)
    chosen: set[int] = set()
    for members, part in zip(kinds.values(), _shares(blocks, list(kinds.values()), work, count), strict=True):
        of = len(members)
        chosen |= {block for n, block in enumerate(members) if (n + 1) * part // of > n * part // of}
    return [block for number, block in enumerate(blocks) if number in chosen]


def _shares(blocks: Sequence[Layer], kinds: Sequence[Sequence[int]], work: dict[str, int], count: int) -> list[int]:
    """How many of ``count`` blocks are of each kind."""
    sizes = [sum(_num_weights(blocks[n]) for n in members) / len(members) for members in kinds]
    times = [sum(work.get(blocks[n].name, _num_weights(blocks[n])) for n in members) for members in kinds]
    shares = [0] * len(kinds)
    for _ in range(count):
        free = [kind for kind, members in enumerate(kinds) if shares[kind] < len(members)]
        best = min(free, key=lambda k: (sizes[k] < SMALL * max(sizes), (shares[k] + 1) * sizes[k] / max(1, times[k])))
        shares[best] += 1
    return shares


def _num_weights(block: Layer) -> int:
    return sum(tensor.numel() for _, _, tensor in _weights(block.submodules.values()))
