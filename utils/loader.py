"""Feeding the trainer: cached samples become the micro-batches of each step, ahead of time."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock

import torch

from ..models.base import Batch, Example, Family
from .cache import Cache, Encoded, View
from .dataset import Sample
from .media import UnreadableMedia
from .randomness import derive_seed, generator
from .sampler import Draw

AHEAD = 3
"""Steps prepared while one is trained."""
READERS = 4
"""Threads that read samples."""


class Loader:
    """The micro-batches of one data-parallel rank."""

    def __init__(
        self,
        cache: Cache,
        family: Family,
        seed: int,
        num_micro_batches: int,
        rank: int = 0,
        num_ranks: int = 1,
        uncond_fraction: float = 0.0,
        pinned: bool = False,
    ) -> None:
        """
        Args:
            uncond_fraction: Share of the times that a sample is trained without its caption.
            pinned: Batches lie in pinned memory. From other memory the copy of the next batch to the GPU would wait
                for the running step, and the GPU then for the host.
        """
        self._pinned = pinned
        self._cache, self._family, self._seed, self._uncond = cache, family, seed, uncond_fraction
        self._num_micro_batches, self._rank, self._num_ranks = num_micro_batches, rank, num_ranks
        self._remaking = Lock()

    def steps(self, epoch: int, plan: Sequence[Sequence[Draw]]) -> Iterator[list[Batch]]:
        """The micro-batches of each step of ``plan``, this rank's share of the step, in order.

        Raises:
            FileNotFoundError: A cached value has vanished, and so has what it was made of.
        """
        with ThreadPoolExecutor(1) as pool, ThreadPoolExecutor(READERS) as readers:
            waiting: list[Future[list[Batch]]] = []
            for position in range(len(plan)):
                for following in plan[position + len(waiting) : position + AHEAD + 1]:
                    share = len(following) // self._num_ranks
                    mine = following[self._rank * share : (self._rank + 1) * share]
                    waiting.append(pool.submit(self._step, epoch, mine, readers))
                yield waiting.pop(0).result()

    def view(self, epoch: int, sample: Sample, repeat: int = 0) -> View:
        """How a sample is trained in an epoch: its captions in turn, now and then none, mirrored or not."""
        chance = random.Random(derive_seed("view", self._seed, epoch, sample.key, repeat))
        kept = (1 - self._uncond) * (1 - sample.caption_dropout)
        caption = "" if chance.random() >= kept else self._caption(epoch, sample, repeat)
        return View(caption, sample.flip and chance.random() < 0.5)

    def _caption(self, epoch: int, sample: Sample, repeat: int) -> str:
        """Each caption once before one comes again, every time in another order."""
        count = len(sample.captions)
        turn, place = divmod(epoch * max(1, int(sample.num_repeats)) + repeat, count)
        order = list(range(count))
        random.Random(derive_seed("captions", self._seed, turn, sample.key)).shuffle(order)
        return sample.captions[order[place]]

    def _step(self, epoch: int, draws: Sequence[Draw], readers: ThreadPoolExecutor) -> list[Batch]:
        size = len(draws) // self._num_micro_batches
        examples = list(readers.map(lambda draw: self._example(epoch, draw), draws))
        return [
            self.collate(examples[n * size : (n + 1) * size], [d.weight for d in draws[n * size : (n + 1) * size]])
            for n in range(self._num_micro_batches)
        ]

    def collate(self, examples: Sequence[tuple[Example, torch.Tensor | None]], weights_N: Sequence[float]) -> Batch:
        """One micro-batch of examples with their masks, each of which weighs so much."""
        batch = self._family.collate([example for example, _ in examples])
        weights = torch.tensor(weights_N).view(-1, *[1] * (batch.target.ndim - 1))
        masks = [mask for _, mask in examples]
        if any(mask is not None for mask in masks):
            shape = next(mask.shape for mask in masks if mask is not None)
            stacked = torch.stack([torch.ones(shape) if mask is None else mask / mask.mean() for mask in masks])
            weights = weights * self._family.spread_mask(stacked, batch.target)
        batch.weight = batch.weight * weights
        return batch.pinned() if self._pinned else batch

    def _example(self, epoch: int, draw: Draw) -> tuple[Example, torch.Tensor | None]:
        sample = self._cache.samples[draw.sample]
        value = self.value(sample, self.view(epoch, sample, draw.repeat))
        source = generator("noise", self._seed, epoch, sample.key, draw.repeat)
        noise = torch.randn(value.media["latents"].shape, generator=source)
        quantile = torch.rand((), generator=source, dtype=torch.float64).clamp(1e-6, 1 - 1e-6).item()
        seed = derive_seed("further", self._seed, epoch, sample.key, draw.repeat)
        return Example(value.media, value.text, noise, quantile, value.controls, seed), value.mask

    def value(self, sample: Sample, view: View) -> Encoded:
        """What the encoders gave for a sample; made again if it has vanished from the cache.

        Raises:
            FileNotFoundError: It cannot be made again.
        """
        value = self._cache.load(sample, view)
        if value is not None:
            return value
        try:
            with self._remaking:
                self._cache.remake(sample)
        except UnreadableMedia as problem:
            raise FileNotFoundError(
                f"the cached encoding of {sample.path} is missing or damaged and cannot be made again: {problem}"
            ) from None
        value = self._cache.load(sample, view)
        if value is None:
            raise FileNotFoundError(
                f"the cached encoding of {sample.path} cannot be kept; is the disk full or failing?"
            )
        return value
