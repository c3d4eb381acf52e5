"""CUDA graphs of micro-batches: forward, loss and backward replayed without Python.

A transformer with adapters launches thousands of small kernels a step; issuing them one by one from
Python takes longer than running them. Where one stage is all, one graph is recorded for each shape of batch, all in
one memory pool, since only one runs at a time. A stage of several has other micro-batches between the two passes of
one, so each pass is a graph, and each place of a micro-batch on its way has graphs and a pool of its own.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

logger = logging.getLogger(__name__)

Tensors = tuple[torch.Tensor, ...]
MAX_SHAPES = 64
"""Batches of further shapes run without a graph."""


@dataclass
class _Graph:
    graph: torch.cuda.CUDAGraph
    inputs: list[torch.Tensor]
    loss: torch.Tensor


class StepGraphs:
    """Calls ``step(inputs, labels)``, which adds to the gradients and returns the loss; from the third batch of
    a shape on as a graph.

    Args:
        step: Must do the same work whatever the values are, and add to gradients that exist already.
        on_failure: Called when recording failed: what ``step`` issued meanwhile never runs.
    """

    def __init__(
        self, step: Callable[[Tensors, Tensors], torch.Tensor], on_failure: Callable[[], None] = lambda: None
    ) -> None:
        self._step, self._on_failure = step, on_failure
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[tuple[object, ...], _Graph] = {}
        self._seen: set[tuple[object, ...]] = set()
        self._working = True

    def __call__(self, inputs: Tensors, labels: Tensors) -> torch.Tensor:
        key = tuple((tuple(t.shape), t.dtype) for t in (*inputs, *labels))
        if not self._working or key not in self._graphs:
            if not self._working or key not in self._seen or len(self._graphs) >= MAX_SHAPES:
                self._seen.add(key)  # the first run compiles kernels and sets libraries up, which a recording cannot
                return self._step(inputs, labels)
            recorded = self._record(inputs, labels)
            if recorded is None:
                return self._step(inputs, labels)
            self._graphs[key] = recorded
        found = self._graphs[key]
        for static, value in zip(found.inputs, (*inputs, *labels), strict=True):
            static.copy_(value, non_blocking=True)
        found.graph.replay()
        return found.loss.clone()

    def _record(self, inputs: Tensors, labels: Tensors) -> _Graph | None:
        gc.collect()
        torch.cuda.empty_cache()  # what eager steps left cached would stand beside the graph's own memory
        static = [tensor.clone() for tensor in (*inputs, *labels)]
        graph = torch.cuda.CUDAGraph()
        try:
            with recording(graph, self._pool):
                loss = self._step(tuple(static[: len(inputs)]), tuple(static[len(inputs) :]))
        except RuntimeError as error:
            self._working = False
            self._graphs.clear()
            self._on_failure()
            logger.warning("steps run without CUDA graphs: %s", str(error).splitlines()[0])
            return None
        return _Graph(graph, static, loss)


@contextmanager
def recording(graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream | None = None) -> Iterator[None]:
    """What is issued within becomes ``graph``; where that fails, memory and random numbers are as if nothing had been
    begun, which torch does not see to (2.11)."""
    device = torch.cuda.current_device()
    numbers = torch.cuda.default_generators[device]
    before, inside = numbers.clone_state(), None
    try:
        # "thread_local": the loader's thread may pin memory meanwhile, which is none of this recording's business
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            try:
                yield
            except BaseException as error:
                inside = error
                raise
    except BaseException as error:
        numbers.graphsafe_set_state(before)
        of_old = "_cuda_endAllocateCurrentStreamToPool"  # its name before torch 2.8
        end = getattr(torch._C, "_cuda_endAllocateToPool", None) or getattr(torch._C, of_old)
        with suppress(RuntimeError):  # it has ended already
            end(device, pool)
        if inside is not None and not isinstance(inside, RuntimeError):
            raise inside from error  # not what ending the recording said of it
        raise


@dataclass
class Passage:
    """A micro-batch on its way through a stage, forward already."""

    inputs: Tensors
    """After `backward` those that require a gradient have it."""
    outputs: Tensors

    def with_grad(self) -> list[torch.Tensor]:
        """The outputs for which `backward` wants a gradient."""
        return [output for output in self.outputs if output.requires_grad]

    def backward(self, grads: Sequence[torch.Tensor]) -> None:
        """Adds to the gradients of the weights.

        Args:
            grads: Of `with_grad`.
        """
        if outputs := self.with_grad():
            torch.autograd.backward(outputs, list(grads))


@dataclass
class _PassageAside(Passage):
    aside: Callable[[], AbstractContextManager[None]]
    done: Callable[[], None]

    def backward(self, grads: Sequence[torch.Tensor]) -> None:
        with self.aside():
            super().backward(grads)
        self.done()


@dataclass
class _RecordedPassage(Passage):
    labels: Tensors
    grads: list[torch.Tensor]
    forward: torch.cuda.CUDAGraph = field(default_factory=torch.cuda.CUDAGraph)
    behind: torch.cuda.CUDAGraph = field(default_factory=torch.cuda.CUDAGraph)

    def start(self, inputs: Tensors, labels: Tensors) -> None:
        """Forward with these values."""
        with torch.no_grad():
            for static, value in zip((*self.inputs, *self.labels), (*inputs, *labels), strict=True):
                static.copy_(value, non_blocking=True)
        self.forward.replay()

    def backward(self, grads: Sequence[torch.Tensor]) -> None:
        for static, value in zip(self.grads, grads, strict=True):
            static.copy_(value, non_blocking=True)
        if self.grads:
            self.behind.replay()


class StageGraphs:
    """Runs ``stage(inputs, labels)``, which gives outputs to go backward from, for pipelines of several stages; as
    graphs once a micro-batch of the shape has gone both ways.

    Args:
        stage: Must do the same work whatever the values are, and add to gradients of weights that exist already.
    """

    def __init__(self, stage: Callable[[Tensors, Tensors], Tensors]) -> None:
        self._stage = stage
        # Where gradients of weights are summed follows the pass that is under way the longest, so all of them run in
        # the stream of the recordings; else a recording would depend on work outside of it.
        self._stream = torch.cuda.Stream()
        self._recorded: dict[tuple[object, ...], _RecordedPassage] = {}
        self._pools: dict[int, Any] = {}
        self._seen: set[tuple[object, ...]] = set()
        self._working = True

    def __call__(self, place: int, inputs: Tensors, labels: Tensors) -> Passage:
        """Forward.

        Args:
            place: Micro-batches that are under way at a time have different ones; there should be few.
        """
        shapes = tuple((tuple(t.shape), t.dtype, t.requires_grad) for t in (*inputs, *labels))
        found = self._recorded.get((place, shapes))
        if found is None and self._working and shapes in self._seen and len(self._recorded) < MAX_SHAPES:
            found = self._record(place, inputs, labels)
            if found:
                self._recorded[place, shapes] = found
        if found is None:
            with self._aside():  # both passes once, as they compile kernels and set libraries up
                return _PassageAside(inputs, self._stage(inputs, labels), self._aside, partial(self._seen.add, shapes))
        found.start(inputs, labels)
        return found

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """What runs within begins after, and ends before, what the current stream is given."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)

    def _record(self, place: int, inputs: Tensors, labels: Tensors) -> _RecordedPassage | None:
        gc.collect()
        torch.cuda.empty_cache()
        pool = self._pools.setdefault(place, torch.cuda.graph_pool_handle())
        static = tuple(tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in inputs)
        passage = _RecordedPassage(static, (), tuple(label.clone() for label in labels), [])
        try:
            with recording(passage.forward, pool, self._stream):
                passage.outputs = self._stage(static, passage.labels)
            passage.grads = [torch.zeros_like(output) for output in passage.with_grad()]
            if passage.grads:
                with recording(passage.behind, pool, self._stream):
                    torch.autograd.backward(passage.with_grad(), passage.grads)
        except RuntimeError as error:
            self._working = False
            self._recorded.clear()
            logger.warning("steps run without CUDA graphs: %s", str(error).splitlines()[0])
            return None
        return passage
