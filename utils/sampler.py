"""Order: which samples make up each optimizer step of each epoch."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from .buckets import Bucket
from .dataset import Kind, Sample
from .position import Position
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
    """Steps of samples of one `Kind` each, reshuffled every epoch from the seed.

    In an epoch every sample comes exactly ``num_repeats`` times (a fraction is met on average over
    epochs). Where a bucket does not divide into steps, its last step is filled with samples that weigh
    nothing, and the others weigh more, so that the step's loss is the mean over the real ones. The
    plan does not depend on the number of processes.
    """

    def __init__(self, samples: Sequence[Sample], global_batch: int | Callable[[Bucket], int], seed: int) -> None:
        """``global_batch``: samples of one step over all processes, or that for each bucket."""
        self._seed = seed
        self._repeats = np.array([sample.num_repeats for sample in samples])
        members: dict[Kind, list[int]] = defaultdict(list)
        for index, sample in enumerate(samples):
            members[sample.kind].append(index)
        self._members = {kind: np.array(members[kind]) for kind in sorted(members)}
        self._batch = {
            bucket: global_batch(bucket) if callable(global_batch) else global_batch for bucket, _ in members
        }

    def batch_sizes(self) -> dict[str, int]:
        """Samples of one step, by bucket."""
        return {str(bucket): size for bucket, size in self._batch.items()}

    def epoch(self, number: int, past: Sequence[tuple[Mapping[str, int], int]] = ()) -> list[list[Draw]]:
        """The steps of epoch ``number`` (from 0).

        Args:
            past: Parts of the epoch that have been trained in steps of other sizes: `batch_sizes` then, and the
                number of steps. What is left of the epoch is cut into steps of today's sizes.
        """
        left = self._draws(number)
        for turn, (sizes, num_steps) in enumerate(past):
            batch = {bucket: sizes.get(str(bucket), size) for bucket, size in self._batch.items()}
            done = self._cut(left, batch, number, turn)[:num_steps]
            trained = {(draw.sample, draw.repeat) for step in done for draw in step if draw.weight}
            left = {kind: [draw for draw in draws if draw not in trained] for kind, draws in left.items()}
        return self._cut(left, self._batch, number, len(past))

    def _draws(self, number: int) -> dict[Kind, list[tuple[int, int]]]:
        """Sample and repeat of all draws of an epoch, in order, by kind."""
        found = {}
        for (bucket, controls), members in self._members.items():
            counts = self._counts(members, number)
            draws = [
                (index, n) for index, count in zip(members.tolist(), counts.tolist(), strict=True) for n in range(count)
            ]
            random.Random(derive_seed("order", self._seed, number, bucket, *[controls] * (controls > 0))).shuffle(draws)
            found[bucket, controls] = draws
        return found

    def _cut(
        self, draws: Mapping[Kind, list[tuple[int, int]]], batch: Mapping[Bucket, int], number: int, turn: int
    ) -> list[list[Draw]]:
        steps = []
        for (bucket, _), members in draws.items():
            size = batch[bucket]
            steps += [_step(members[start : start + size], size) for start in range(0, len(members), size)]
        random.Random(derive_seed("steps", self._seed, number, *[turn] * (turn > 0))).shuffle(steps)
        return steps

    def num_steps(self, epoch: int) -> int:
        """How many steps epoch ``epoch`` has, without laying it out."""
        totals = ((kind[0], int(self._counts(members, epoch).sum())) for kind, members in self._members.items())
        return sum(-(-total // self._batch[bucket]) for bucket, total in totals)

    def total_steps(self, epochs: int, first: int = 0) -> int:
        """How many steps the epochs from ``first`` to before ``epochs`` have."""
        if first >= epochs:
            return 0
        if (self._repeats == np.floor(self._repeats)).all():
            return (epochs - first) * self.num_steps(0)
        return sum(self.num_steps(epoch) for epoch in range(first, epochs))

    def total_from(self, position: Position, epochs: int) -> int:
        """The number of the last step of a run of ``epochs`` epochs that stands at ``position``."""
        if position.epoch >= epochs:
            return position.step
        left = self.num_steps(position.epoch) if not position.past else len(self.epoch(position.epoch, position.past))
        return position.step - position.step_in_epoch + left + self.total_steps(epochs, position.epoch + 1)

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
