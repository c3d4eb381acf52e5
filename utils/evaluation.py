"""The loss of sets that are not trained, at fixed noise levels and fixed noise, so that runs can be compared.

Noise and caption of a sample depend on the sample alone: not on the run's seed, its batch size or the number of
processes. Every sample counts once at every noise level.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from ..models.base import Batch, Example, Family
from .cache import Cache, View
from .config import SettingsError, read_toml
from .dataset import Kind, Sample
from .dataset_settings import DatasetSettings, parse_dataset_settings
from .loader import AHEAD, READERS, Loader
from .pipeline import Engine
from .randomness import derive_seed, generator
from .settings import TrainSettings
from .world import World

logger = logging.getLogger(__name__)

QUANTILES = tuple(n / 10 for n in range(1, 10))
"""Where the loss is measured: the noise level below which this share of training lies."""


def read_sets(settings: TrainSettings) -> dict[str, DatasetSettings]:
    """The datasets of ``eval_datasets`` by name.

    Raises:
        SettingsError: A file cannot be read or is no dataset.
    """
    sets = {}
    for number, entry in enumerate(settings.eval_datasets):
        where = f"eval_datasets[{number}].config"
        try:
            values = entry.config
            if isinstance(values, str):
                values = read_toml(Path(values).expanduser())
            sets[entry.name] = parse_dataset_settings(values)
        except SettingsError as error:
            lines = "\n".join(f"{where}: {line}" for line in str(error).split("\n"))
            raise SettingsError(lines) from None
    return sets


@dataclass(frozen=True, slots=True)
class _Item:
    """One sample at one noise level."""

    sample: int
    quantile: float


class Evaluation:
    """The sets of a run; every process has one and measures together."""

    def __init__(
        self, sets: Mapping[str, Cache], family: Family, settings: TrainSettings, world: World, engine: Engine
    ) -> None:
        self._settings, self._world, self._engine = settings, world, engine
        self._sets = {name: _Set(cache, family) for name, cache in sets.items()}

    def __bool__(self) -> bool:
        return bool(self._sets)

    def measure(self, tell: Callable[[int, int], None] = lambda *_: None) -> dict[str, float]:
        """Losses by curve name, ``<set>/loss_quantile_0.10`` ... and ``<set>/loss``, on every process.

        Args:
            tell: Hears how many of this process's micro-batches are done, and of how many.
        """
        values = {}
        plans = {name: self._plan(part) for name, part in self._sets.items()}
        done, total = 0, sum(map(len, plans.values()))

        def one_more() -> None:
            nonlocal done
            done += 1
            tell(done, total)

        tell(done, total)
        for name, part in self._sets.items():
            losses = self._losses(part, plans[name], one_more)
            means = []
            for quantile in QUANTILES:
                at_level = [losses[_Item(n, quantile)] for n in range(len(part.samples))]
                means.append(sum(at_level) / len(at_level))
                values[f"{name}/loss_quantile_{quantile:.2f}"] = means[-1]
            values[f"{name}/loss"] = sum(means) / len(means)
            logger.info("%s: loss %.4f over %d samples", name, values[f"{name}/loss"], len(part.samples))
        return values

    def _plan(self, part: _Set) -> list[list[_Item]]:
        """This process's share of the micro-batches."""
        grid = self._engine.grid
        rank, num_ranks = grid.get_data_parallel_rank(), grid.get_data_parallel_world_size()
        return part.micro_batches(self._settings, num_ranks)[rank::num_ranks]

    def _losses(self, part: _Set, plan: Sequence[list[_Item]], one_more: Callable[[], None]) -> dict[_Item, float]:
        """The loss of every item, the same on all processes."""

        def batches() -> Iterator[Batch]:
            for batch in part.batches(plan):
                yield batch
                one_more()  # when the next is asked for, or all are done

        measured = self._engine.measure(batches(), self._settings.disable_block_swap_for_eval)
        items = [item for micro_batch in plan for item in micro_batch]
        mine = dict(zip(items, measured, strict=True)) if measured else {}
        return {item: loss for other in self._world.gather(mine) for item, loss in other.items()}


class _Set:
    """One dataset."""

    def __init__(self, cache: Cache, family: Family) -> None:
        self.samples = cache.samples
        self._family = family
        self._loader = Loader(cache, family, 0, 1)

    def micro_batches(self, settings: TrainSettings, num_ranks: int) -> list[list[_Item]]:
        """All items in micro-batches of one kind, each full: the last of a kind is filled with items that come
        again, and so are the micro-batches up to a multiple of ``num_ranks``. What comes again gives the same loss
        and is counted once."""
        by_kind: dict[Kind, list[_Item]] = defaultdict(list)
        for number, sample in enumerate(self.samples):
            by_kind[sample.kind] += [_Item(number, quantile) for quantile in QUANTILES]
        plan = []
        for (bucket, _), items in sorted(by_kind.items()):
            size = settings.eval_micro_batch(bucket.width, bucket.height, bucket.frames)
            padded = items + [items[n % len(items)] for n in range(-len(items) % size)]
            plan += [padded[start : start + size] for start in range(0, len(padded), size)]
        return plan + [plan[n % len(plan)] for n in range(-len(plan) % num_ranks)]

    def batches(self, plan: Sequence[Sequence[_Item]]) -> Iterator[Batch]:
        """The micro-batches of ``plan``, read ahead."""
        with ThreadPoolExecutor(1) as pool, ThreadPoolExecutor(READERS) as readers:
            waiting: list[Future[Batch]] = []
            for position in range(len(plan)):
                for items in plan[position + len(waiting) : position + AHEAD + 1]:
                    waiting.append(pool.submit(self._batch, items, readers))
                yield waiting.pop(0).result()

    def _batch(self, items: Sequence[_Item], readers: ThreadPoolExecutor) -> Batch:
        return self._loader.collate(list(readers.map(self._example, items)), [1.0] * len(items))

    def _example(self, item: _Item) -> tuple[Example, torch.Tensor | None]:
        sample: Sample = self.samples[item.sample]
        value = self._loader.value(sample, View(sample.captions[0]))
        source = generator("evaluation", sample.key, item.quantile)
        noise = torch.randn(value.media["latents"].shape, generator=source)
        seed = derive_seed("evaluation further", sample.key, item.quantile)
        return Example(value.media, value.text, noise, item.quantile, value.controls, seed), value.mask
