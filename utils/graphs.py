"""CUDA graphs of whole micro-batches: forward, loss and backward replayed without Python.

A transformer with adapters launches thousands of small kernels a step; issuing them one by one from
Python takes longer than running them. One graph is recorded for each shape of batch, all in one memory
pool, since only one runs at a time.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass

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
            # "thread_local": the loader's thread may pin memory meanwhile, which is none of this recording's business
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                loss = self._step(tuple(static[: len(inputs)]), tuple(static[len(inputs) :]))
        except RuntimeError as error:
            self._working = False
            self._graphs.clear()
            self._on_failure()
            logger.warning("steps run without CUDA graphs: %s", str(error).splitlines()[0])
            return None
        return _Graph(graph, static, loss)
