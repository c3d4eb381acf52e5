"""Order: which samples make up each optimizer step of each epoch."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from .buckets import Bucket
from .dataset import Sample
from .randomness import derive_seed


@dataclass(frozen=True)
class Draw:
    """One place in a step."""

    sample: int
    """Index of the sample."""
    repeat: int
    """Counts the times that this sample comes in this epoch."""
    weight: float
    """Weight of its loss; 0 for a filler."""


class Sampler:
    """Steps of ``global_batch`` samples of one bucket each, reshuffled every epoch from the seed.

    In an epoch every sample comes exactly ``num_repeats`` times (a fraction is met on average over
    epochs). Where a bucket does not divide into steps, its last step is filled with samples that weigh
    nothing, and the others weigh more, so that the step's loss is the mean over the real ones. The
    plan does not depend on the number of processes.
    """

    def __init__(self, samples: Sequence[Sample], global_batch: int, seed: int) -> None:
        self._samples = samples
        self._batch = global_batch
        self._seed = seed
        self._by_bucket: dict[Bucket, list[int]] = defaultdict(list)
        for index, sample in enumerate(samples):
            self._by_bucket[sample.bucket].append(index)

    def epoch(self, number: int) -> list[list[Draw]]:
        """The steps of epoch ``number`` (from 0)."""
        steps = []
        for bucket, members in sorted(self._by_bucket.items()):
            draws = [(index, repeat) for index in members for repeat in range(self._repeats(index, number))]
            shuffler = random.Random(derive_seed("order", self._seed, number, bucket))
            shuffler.shuffle(draws)
            steps += [self._step(draws[start : start + self._batch]) for start in range(0, len(draws), self._batch)]
        random.Random(derive_seed("steps", self._seed, number)).shuffle(steps)
        return steps

    def num_steps(self, epoch: int) -> int:
        """How many steps epoch ``epoch`` has, without laying it out."""
        totals = (sum(self._repeats(i, epoch) for i in members) for members in self._by_bucket.values())
        return sum(-(-total // self._batch) for total in totals)

    def _step(self, draws: list[tuple[int, int]]) -> list[Draw]:
        weight = self._batch / len(draws)
        step = [Draw(index, repeat, weight) for index, repeat in draws]
        while len(step) < self._batch:
            filler = draws[len(step) % len(draws)]
            step.append(Draw(*filler, weight=0.0))
        return step

    def _repeats(self, index: int, epoch: int) -> int:
        """Repeats of a sample in an epoch; a fractional count rotates over samples and epochs."""
        wanted = self._samples[index].num_repeats
        if wanted == int(wanted):
            return int(wanted)
        phase = (index * 0.6180339887498949) % 1.0
        return math.floor((epoch + 1) * wanted + phase) - math.floor(epoch * wanted + phase)
