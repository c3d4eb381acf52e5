"""Order: which samples make up each optimizer step of each epoch."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from .buckets import Bucket
from .dataset import Sample
from .randomness import derive_seed


class Draw(NamedTuple):
    """One place in a step."""

    sample: int
    """Index of the sample."""
    repeat: int
    """Counts the times that this sample comes in this epoch."""
    weight: float
    """Weight of its loss; 0 for a filler."""


class Sampler:
    """Steps of samples of one bucket each, reshuffled every epoch from the seed.

    In an epoch every sample comes exactly ``num_repeats`` times (a fraction is met on average over
    epochs). Where a bucket does not divide into steps, its last step is filled with samples that weigh
    nothing, and the others weigh more, so that the step's loss is the mean over the real ones. The
    plan does not depend on the number of processes.
    """

    def __init__(self, samples: Sequence[Sample], global_batch: int | Callable[[Bucket], int], seed: int) -> None:
        """``global_batch``: samples of one step over all processes, or that for each bucket."""
        self._seed = seed
        self._repeats = np.array([sample.num_repeats for sample in samples])
        members: dict[Bucket, list[int]] = defaultdict(list)
        for index, sample in enumerate(samples):
            members[sample.bucket].append(index)
        self._members = {bucket: np.array(members[bucket]) for bucket in sorted(members)}
        self._batch = {bucket: global_batch(bucket) if callable(global_batch) else global_batch for bucket in members}

    def epoch(self, number: int) -> list[list[Draw]]:
        """The steps of epoch ``number`` (from 0)."""
        steps = []
        for bucket, members in self._members.items():
            counts = self._counts(members, number)
            draws = [
                (index, n) for index, count in zip(members.tolist(), counts.tolist(), strict=True) for n in range(count)
            ]
            random.Random(derive_seed("order", self._seed, number, bucket)).shuffle(draws)
            size = self._batch[bucket]
            steps += [_step(draws[start : start + size], size) for start in range(0, len(draws), size)]
        random.Random(derive_seed("steps", self._seed, number)).shuffle(steps)
        return steps

    def num_steps(self, epoch: int) -> int:
        """How many steps epoch ``epoch`` has, without laying it out."""
        totals = ((bucket, int(self._counts(members, epoch).sum())) for bucket, members in self._members.items())
        return sum(-(-total // self._batch[bucket]) for bucket, total in totals)

    def total_steps(self, epochs: int) -> int:
        """How many steps the first ``epochs`` epochs have."""
        if (self._repeats == np.floor(self._repeats)).all():
            return epochs * self.num_steps(0)
        return sum(self.num_steps(epoch) for epoch in range(epochs))

    def _counts(self, members: np.ndarray, epoch: int) -> np.ndarray:
        """Repeats of samples in an epoch; a fractional count rotates over samples and epochs."""
        wanted = self._repeats[members]
        phase = np.where(wanted == np.floor(wanted), 0.0, (members * 0.6180339887498949) % 1.0)
        return (np.floor((epoch + 1) * wanted + phase) - np.floor(epoch * wanted + phase)).astype(int)


def _step(draws: list[tuple[int, int]], size: int) -> list[Draw]:
    weight = size / len(draws)
    step = [Draw(index, repeat, weight) for index, repeat in draws]
    while len(step) < size:
        filler = draws[len(step) % len(draws)]
        step.append(Draw(*filler, weight=0.0))
    return step
