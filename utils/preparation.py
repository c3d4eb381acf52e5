"""From settings to encoded data: what is found in the folders, encoded once, and reported, before training begins."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..models.base import Family
from . import preview
from .buckets import Bucket
from .cache import Cache
from .config import SettingsError, write_whole
from .control import Control
from .dataset import Sample, keep_for_good, recall, remember, scan, scan_name
from .dataset_report import Report
from .dataset_settings import DatasetSettings
from .index import Index, Media
from .readers import Readers, usual_count
from .run_folder import RunFolder
from .sampler import Sampler
from .samples import Prompt, find_images, prompts_of
from .settings import TrainSettings
from .sources import printable
from .world import World, num_local

logger = logging.getLogger(__name__)


@dataclass
class Data:
    """What a run trains on and what it is looked at with, encoded."""

    train: Cache
    eval_sets: dict[str, Cache]
    embeddings: dict[Prompt, dict[str, torch.Tensor]]
    """Of what is drawn."""
    images: list[Media]
    """What drawing starts from."""


@dataclass
class Preparation:
    """Finds, encodes and reports the data of a run; every process has one and they share the work."""

    settings: TrainSettings
    dataset: DatasetSettings
    eval_sets: dict[str, DatasetSettings]
    family: Family
    world: World
    folder: RunFolder
    control: Control
    global_batch: Callable[[Bucket], int]
    """Samples of one step over all processes."""

    def run(self) -> Data:
        """The data, all of it in the cache.

        Raises:
            SettingsError: A folder is missing, or nothing in it can be trained.
            Stopped: The run was asked to end.
        """
        s = self.settings
        self.control.say(state="caching")
        self.control.progress("looking through the dataset")
        with Readers(s.map_num_proc or usual_count(num_local())) as readers:
            samples, report, eval_samples, images = self._on_first_rank(lambda: self._scan_all(readers))
            prompts = prompts_of(s.sample, images)
            everything = [*samples, *(sample for part in eval_samples.values() for sample in part)]
            texts = [(prompt.text, prompt.images) for prompt in prompts]
            keep_for_good(everything)
            cache = Cache(self._cache_folder, self.family, everything, s.uncond_fraction > 0, texts)
            failed = cache.fill(
                self.world.device,
                s.caching_batch_size,
                readers,
                self.control.progress,
                self.world.rank,
                self.world.size,
                self.control.meet,
                regenerate=s.regenerate_cache,
            )
        unreadable = {path: reason for part in self.world.gather(failed) for path, reason in part.items()}
        train = cache.part(_without(samples, unreadable, "dataset"))
        if self.world.rank == 0:
            self._report(train, report, unreadable)
        eval_sets = {
            name: cache.part(_without(part, unreadable, f"eval_datasets: {name}"))
            for name, part in eval_samples.items()
        }
        embeddings = {prompt: cache.text(prompt.text, prompt.images) for prompt in prompts}
        return Data(train, eval_sets, embeddings, images)

    def dump(self, target: Path) -> None:
        """Writes up to 100 samples, of all buckets alike, as the model will see them."""
        self._on_first_rank(lambda: self._dump(target))

    def _dump(self, target: Path) -> None:
        with Readers(usual_count(num_local())) as readers, closing(self._index(readers)) as index:
            samples, report = self._scan(index, self.dataset)
        report.log()
        count = preview.dump(preview.choose(samples, 100, self.settings.seed), target, self.family.fps)
        logger.info("%d samples were written to '%s', because dump_dataset is set: done", count, target)

    def _on_first_rank(self, work: Callable[[], Any]) -> Any:
        """What ``work`` gives on rank 0, on all; what it raises there is raised on all."""
        found: Any = None
        if self.world.rank == 0:
            try:
                found = work()
            except Exception as error:
                found = error
        return self.world.share(found)

    # -- finding ----------------------------------------------------------------------------------------

    @property
    def _cache_folder(self) -> Path:
        return cache_folder(self.settings)

    def _index(self, readers: Readers) -> Index:
        return Index(self._cache_folder / "index.sqlite", readers, forget=self.settings.regenerate_cache)

    def _scan_all(self, readers: Readers) -> tuple[list[Sample], Report, dict[str, list[Sample]], list[Media]]:
        """Samples of the dataset with the report on them, of the eval sets, and the pictures that drawing starts
        from."""
        with closing(self._index(readers)) as index:
            samples, report = self._scan(index, self.dataset)
            eval_samples = {}
            for name, settings in self.eval_sets.items():
                try:
                    eval_samples[name], other = self._scan(index, settings)
                except SettingsError as error:
                    raise SettingsError(f"eval_datasets: {name}: {error}") from None
                logger.info("eval set %s: %d samples, %d left out", name, len(eval_samples[name]), len(other.left_out))
            return samples, report, eval_samples, find_images(self.settings.sample, index, self.family)

    def _scan(self, index: Index, dataset: DatasetSettings) -> tuple[list[Sample], Report]:
        s = self.settings
        last = self._cache_folder / "scans" / f"{scan_name(dataset, self.family, s.video_clip_mode)}.json"
        samples = recall(last) if s.trust_cache else None
        if samples is not None:
            logger.info("dataset: %d samples as found last time, because trust_cache is on", len(samples))
            report = Report()
            report.count(samples)
            return samples, report
        samples, report = scan(dataset, index, self.family, s.video_clip_mode, self.control.progress)
        remember(last, samples)
        return samples, report

    # -- reporting --------------------------------------------------------------------------------------

    def _report(self, cache: Cache, report: Report, unreadable: Mapping[str, str]) -> None:
        s = self.settings
        report.left_out |= {printable(path): reason for path, reason in unreadable.items()}
        report.count(cache.samples)
        sampler = Sampler(cache.samples, self.global_batch, s.seed)
        report.steps_per_epoch = sampler.num_steps(0)
        report.total_steps = min(sampler.total_steps(s.epochs), s.max_steps or sys.maxsize)
        report.cache_bytes = cache.note_use(scan_name(self.dataset, self.family, s.video_clip_mode))
        report.log()
        logger.info("cache: %.0f MiB for this dataset in %s", report.cache_bytes / 2**20, self._cache_folder)
        text = json.dumps(report.as_dict(), indent=1, ensure_ascii=False)
        write_whole(self.folder.path / "dataset_report.json", text)


def cache_folder(settings: TrainSettings) -> Path:
    """Where encoded data are kept, and what is known of files."""
    return Path(settings.cache_dir or Path(settings.output_dir) / "cache").expanduser()


def _without(samples: Sequence[Sample], unreadable: Mapping[str, str], what: str) -> list[Sample]:
    """The samples that need no unreadable file.

    Raises:
        SettingsError: None is left.
    """
    kept = [s for s in samples if not unreadable or not any(str(media.source) in unreadable for media in s.files)]
    if not kept:
        reasons = "; ".join(f"{printable(path)}: {reason}" for path, reason in unreadable.items())
        raise SettingsError(f"{what}: no picture could be decoded: {reasons}")
    return kept
