"""Feeding the trainer: cached samples become the micro-batches of each step, ahead of time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from ..models.base import Batch, Example, Family
from .cache import Cache
from .randomness import generator
from .sampler import Draw

AHEAD = 3
"""Steps prepared while one is trained."""


class Loader:
    """The micro-batches of one data-parallel rank."""

    def __init__(
        self, cache: Cache, family: Family, seed: int, micro_batch: int, num_micro_batches: int, rank: int
    ) -> None:
        self._cache, self._family, self._seed = cache, family, seed
        self._micro_batch, self._num_micro_batches, self._rank = micro_batch, num_micro_batches, rank

    def steps(self, epoch: int, plan: Sequence[Sequence[Draw]]) -> Iterator[list[Batch]]:
        """The micro-batches of each step of ``plan``, this rank's share of the step, in order.

        Raises:
            FileNotFoundError: A cached value has vanished or was damaged since caching.
        """
        share = self._micro_batch * self._num_micro_batches
        with ThreadPoolExecutor(1) as pool:
            waiting: list[Future[list[Batch]]] = []
            for position in range(len(plan)):
                for following in plan[position + len(waiting) : position + AHEAD + 1]:
                    mine = following[self._rank * share : (self._rank + 1) * share]
                    waiting.append(pool.submit(self._step, epoch, mine))
                yield waiting.pop(0).result()

    def _step(self, epoch: int, draws: Sequence[Draw]) -> list[Batch]:
        groups = [draws[n * self._micro_batch : (n + 1) * self._micro_batch] for n in range(self._num_micro_batches)]
        return [self._collate(epoch, group) for group in groups]

    def _collate(self, epoch: int, draws: Sequence[Draw]) -> Batch:
        batch = self._family.collate([self._example(epoch, draw) for draw in draws])
        weights = torch.tensor([draw.weight for draw in draws]).view(-1, *[1] * (batch.target.ndim - 1))
        batch.weight = batch.weight * weights
        return batch

    def _example(self, epoch: int, draw: Draw) -> Example:
        sample = self._cache.samples[draw.sample]
        value = self._cache.load(sample)
        if value is None:
            raise FileNotFoundError(
                f"the cached encoding of {sample.path} is missing or damaged; start again to make it anew"
            )
        media, text = value
        source = generator("noise", self._seed, epoch, sample.key, draw.repeat)
        noise = torch.randn(media["latents"].shape, generator=source)
        quantile = torch.rand((), generator=source, dtype=torch.float64).clamp(1e-6, 1 - 1e-6).item()
        return Example(media, text, noise, quantile)
