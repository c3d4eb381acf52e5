"""Activation checkpointing: which activations of a block are kept, recomputed, or wait in main memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from .device_settings import ActivationCheckpointing
from .offload import Lane, main_memory

MIN_BYTES = 2**20
"""Inputs below this size stay on the GPU."""
ROUNDING = 2**22
"""Bytes; pieces of main memory are multiples of it, so that batches of like shapes share them."""

Tensors = tuple[Tensor, ...]
Block = Callable[..., Any]


class Checkpointing:
    """Runs the blocks of a stage as ``mode`` says.

    Args:
        random: Blocks draw random numbers, which recomputing has to draw again.
        compiled: Blocks are compiled; the compiler then does what "selective" asks for.
    """

    def __init__(self, mode: ActivationCheckpointing, device: torch.device, random: bool, compiled: bool) -> None:
        self._every = 1 if isinstance(mode, str) else int(mode)
        self._mode = "off" if compiled and mode == "selective" else mode
        self._random = random
        self._inputs = Inputs(device) if mode == "unsloth" else None

    @property
    def copies(self) -> bool:
        """Whether activations wait in main memory."""
        return self._inputs is not None

    def start(self) -> None:
        """A forward pass begins."""
        if self._inputs:
            self._inputs.start()

    def finish(self) -> None:
        """Work issued from now on begins after all copies."""
        if self._inputs:
            self._inputs.start()

    def run(self, number: int, block: Block, inputs: Tensors) -> Any:
        """``block(*inputs)``; ``number`` counts the blocks."""
        if not torch.is_grad_enabled() or self._mode == "off" or not self._every or number % self._every:
            return block(*inputs)
        kept: dict[str, Any] = {}
        if self._mode == "selective":
            kept["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
        elif self._inputs:
            held = self._inputs.hold(inputs)
            block, inputs = partial(held.call, block), (inputs[0].new_empty(0),)  # what is passed names the device
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=self._random, **kept)


KEPT_NAMES = ("mm", "addmm", "bmm", "baddbmm", "convolution", "lora_linears", "stored_linear")
"""Operators whose results are dear to compute again, besides attention."""


def is_dear(operator: Any) -> bool:
    """Whether selective checkpointing keeps the result of an operator."""
    name = operator._schema.name.split("::")[-1]
    return name in KEPT_NAMES or "dot_product" in name


def _policy(context: Any, operator: Any, *unused: Any, **options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if is_dear(operator) else CheckpointPolicy.PREFER_RECOMPUTE


class Inputs:
    """Inputs of checkpointed blocks in main memory, from the forward pass of a block to its backward pass.

    Tensors that the block before was given as well stay where they are: they are kept anyway.
    """

    def __init__(self, device: torch.device) -> None:
        self.lane = Lane(device)
        self._device = device
        self._free: list[Tensor] = []
        self._last: Held | None = None

    def start(self) -> None:
        """The next block is the first of a pass; work issued from now on begins after all copies."""
        if self._last:
            self._last.let_go()
        self._last = None

    def hold(self, inputs: Tensors) -> Held:
        """Begins to copy the inputs of the next block."""
        before = self._last
        known = before.tensors if before else []
        self._last = Held(self, inputs, before)
        for n, tensor in enumerate(inputs):
            if tensor.nbytes >= MIN_BYTES and not any(tensor is other for other in known):
                self._last.copy_away(n, tensor, self._memory(tensor.nbytes))
        if before:
            before.let_go()
        return self._last

    def _memory(self, num_bytes: int) -> Tensor:
        fitting = [n for n, piece in enumerate(self._free) if len(piece) >= num_bytes]
        if fitting:
            return self._free.pop(min(fitting, key=lambda n: len(self._free[n])))
        return main_memory(math.ceil(num_bytes / ROUNDING) * ROUNDING, self._device)

    def give_back(self, memory: Tensor) -> None:
        """The next copy may overwrite it: copies run in the order in which they were issued."""
        self._free.append(memory)


class Held:
    """The inputs of one block."""

    def __init__(self, store: Inputs, inputs: Tensors, before: Held | None) -> None:
        self.tensors: list[Tensor | None] = list(inputs)
        self._store, self._before = store, before
        self._shapes = [(tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad) for tensor in inputs]
        self._away: dict[int, tuple[Tensor, Any]] = {}
        self._coming: dict[int, Any] = {}
        self._was_called = False

    def copy_away(self, place: int, tensor: Tensor, memory: Tensor) -> None:
        """Begins to copy input ``place``, which is ``tensor``."""
        self._away[place] = memory, self._store.lane.copy(self._view(place, memory), tensor)

    def let_go(self) -> None:
        """Frees what was copied."""
        for place, (_, copy) in self._away.items():
            self._store.lane.wait(copy)
            self.tensors[place] = None

    def call(self, block: Block, _: Tensor) -> Any:
        """``block`` on the inputs; from the second time on they come from main memory."""
        if not self._was_called:
            self._was_called = True
            return block(*self.tensors)
        self._send_for()
        if self._before:
            self._before._send_for()
            self._before = None
        for copy in self._coming.values():
            self._store.lane.wait(copy)
        for memory, _copy in self._away.values():
            self._store.give_back(memory)
        inputs = self.tensors
        self.tensors, self._away, self._coming = [], {}, {}
        return block(*inputs)

    def _send_for(self) -> None:
        for place, (memory, _) in self._away.items():
            if self.tensors[place] is None:
                shape, dtype, device, needs_grad = self._shapes[place]
                tensor = torch.empty(shape, dtype=dtype, device=device)
                self._coming[place] = self._store.lane.copy(tensor, self._view(place, memory))
                self.tensors[place] = tensor.requires_grad_(needs_grad)

    def _view(self, place: int, memory: Tensor) -> Tensor:
        shape, dtype, *_ = self._shapes[place]
        return memory[: shape.numel() * dtype.itemsize].view(dtype).view(shape)
