"""The run from settings to LoRA: dataset, cache, denoiser, engine, loop, export."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import attention
from .adapters import inject, load_existing
from .buckets import Bucket
from .cache import Cache
from .checkpoint import Trained, load_checkpoint, newest_checkpoint
from .config import SettingsError, write_toml, write_whole
from .control import Control, Stopped
from .dataset import Sample, recall, remember, scan, scan_name
from .dataset_report import Report
from .index import Index
from .loader import Loader
from .loop import Loop, Position
from .losses import loss_for
from .metrics import Curves
from .optimizers import build_optimizer
from .pipeline import Chain, Engine, build_engine, partition
from .readers import Readers, usual_count
from .run_folder import RunFolder, Status
from .sampler import Sampler
from .settings import DatasetSettings, Lora, TrainSettings, as_toml, family_of
from .sources import printable
from .world import World, num_local

logger = logging.getLogger(__name__)


class Trainer:
    """One training run; every process of it makes one and calls `run`."""

    def __init__(
        self, settings: TrainSettings, dataset: DatasetSettings, world: World, folder: RunFolder, resume: bool = False
    ) -> None:
        self.settings, self.dataset, self.world, self.folder = settings, dataset, world, folder
        self._resume = resume
        self.family = family_of(settings)
        status = folder.read_status() if resume else Status()
        status.state, status.error, status.epochs = "starting", None, settings.epochs
        self.control = Control(world, folder, status)
        self._check_stages()

    def _check_stages(self) -> None:
        stages = self.settings.pipeline_stages
        if self.world.size % stages:
            raise SettingsError(
                f"pipeline_stages: {stages} does not divide the {self.world.size} processes of this run; "
                f"start with a multiple of {stages} (--num_gpus)"
            )

    # -- the run ------------------------------------------------------------------------------------

    def run(self) -> None:
        """Trains from start or checkpoint to end or stop; leaves status "finished", "stopped" or "failed"."""
        with self.control:
            try:
                self._train()
            except Stopped:
                logger.info("stopped before the first step")
                self.control.say(state="stopped", phase="")
            except BaseException as error:
                self.control.fail(_describe(error))
                raise

    def _train(self) -> None:
        s = self.settings
        self.family.check_files()
        cache = self._prepare_data()
        if s.cache_only:
            logger.info("the cache is complete, and cache_only is on: done")
            self.control.say(state="finished", phase="")
            return
        engine, trained = self._build()
        global_batch = self._global_batch(cache.samples[0].bucket)
        sampler = Sampler(cache.samples, self._global_batch, s.seed)
        total = sampler.total_steps(s.epochs)
        total = min(total, s.max_steps or total)
        position = Position()
        if self._resume:
            progress = load_checkpoint(newest_checkpoint(self.folder), trained)
            _refuse_changed(progress, s, len(cache.samples))
            position = Position(**progress["position"])
            logger.info("resumed after step %d", position.step)
        loader = Loader(
            cache,
            self.family,
            s.seed,
            s.gradient_accumulation_steps,
            engine.grid.get_data_parallel_rank(),
            self.world.size // s.pipeline_stages,
            s.uncond_fraction,
        )
        logger.info("training %d steps over %d epochs, %d pictures a step", total, s.epochs, global_batch)
        self.control.say(
            state="training", phase="", eta=None, total_steps=total, step=position.step, epoch=position.epoch
        )
        loop = Loop(
            s,
            self.family,
            self.world,
            self.folder,
            self.control,
            engine,
            trained,
            sampler,
            loader,
            position,
            total,
            len(cache.samples),
        )
        folder = self.folder.path if self.world.rank == 0 else None
        with Curves(folder, s.x_axis_examples, global_batch, position.step if self._resume else None) as curves:
            loop.run(curves)

    def _global_batch(self, bucket: Bucket) -> int:
        """Samples of one step over all processes."""
        s = self.settings
        micro_batch = s.micro_batch(bucket.width, bucket.height, bucket.frames)
        return micro_batch * s.gradient_accumulation_steps * (self.world.size // s.pipeline_stages)

    def _prepare_data(self) -> Cache:
        s = self.settings
        folder = Path(s.cache_dir or Path(s.output_dir) / "cache").expanduser()
        self.control.say(state="caching")
        with Readers(s.map_num_proc or usual_count(num_local())) as readers:
            cache, report, unreadable = self._cached(folder, readers)
        cache.samples = cache.without(unreadable)
        if self.world.rank == 0:
            self._report_data(cache, report, unreadable)
        if not cache.samples:
            reasons = "; ".join(f"{printable(path)}: {reason}" for path, reason in unreadable.items())
            raise SettingsError(f"dataset: no picture could be decoded: {reasons}")
        return cache

    def _cached(self, folder: Path, readers: Readers) -> tuple[Cache, Report, dict[str, str]]:
        """The filled cache, the report of the scan, and the files that could not be decoded."""
        s = self.settings
        found: Any = None
        if self.world.rank == 0:
            try:
                found = self._scan(folder, readers)
            except (SettingsError, OSError, Stopped) as error:
                found = error
        samples, report = self.world.share(found)
        cache = Cache(folder, self.family, samples, uncond=s.uncond_fraction > 0)
        failed = cache.fill(
            self.world.device,
            s.caching_batch_size,
            readers,
            self.control.progress,
            self.world.rank,
            self.world.size,
            self.world.barrier,
            regenerate=s.regenerate_cache,
        )
        unreadable = {path: reason for part in self.world.gather(failed) for path, reason in part.items()}
        return cache, report, unreadable

    def _scan(self, folder: Path, readers: Readers) -> tuple[list[Sample], Report]:
        s = self.settings
        last = folder / "scans" / f"{scan_name(self.dataset, self.family, s.video_clip_mode)}.json"
        samples = recall(last) if s.trust_cache else None
        if samples is not None:
            logger.info("dataset: %d samples as found last time, because trust_cache is on", len(samples))
            report = Report()
            report.count(samples)
            return samples, report
        index = Index(folder / "index.sqlite", readers, forget=s.regenerate_cache)
        try:
            samples, report = scan(self.dataset, index, self.family, s.video_clip_mode, self.control.progress)
        finally:
            index.close()
        remember(last, samples)
        return samples, report

    def _report_data(self, cache: Cache, report: Report, unreadable: dict[str, str]) -> None:
        s = self.settings
        report.left_out |= {printable(path): reason for path, reason in unreadable.items()}
        report.count(cache.samples)
        sampler = Sampler(cache.samples, self._global_batch, s.seed)
        report.steps_per_epoch = sampler.num_steps(0)
        report.total_steps = min(sampler.total_steps(s.epochs), s.max_steps or sys.maxsize)
        report.cache_bytes = cache.note_use(scan_name(self.dataset, self.family, s.video_clip_mode))
        report.log()
        logger.info(
            "cache: %s for this dataset in %s",
            f"{report.cache_bytes / 2**20:.0f} MiB",
            s.cache_dir or "output_dir/cache",
        )
        text = json.dumps(report.as_dict(), indent=1, ensure_ascii=False)
        write_whole(self.folder.path / "dataset_report.json", text)

    def _build(self) -> tuple[Engine, Trained]:
        s = self.settings
        self.control.say(phase="loading the model")
        attention.choose(s.attention_backend, self.world.device)
        # With several stages each GPU holds only its own layers, so the whole model passes through main memory.
        device = self.world.device if s.pipeline_stages == 1 else torch.device("cpu")
        denoiser = self.family.load_denoiser(device)
        assert isinstance(s.adapter, Lora)  # settings refuse anything else
        inject(denoiser, self.family, s.adapter, s.seed)
        if s.adapter.init_from_existing:
            load_existing(denoiser, self.family, Path(s.adapter.init_from_existing).expanduser())
        layers = self.family.layers(denoiser)
        names = {parameter: name for name, parameter in denoiser.named_parameters()}
        bounds = partition(layers, s.pipeline_stages, s.partition_method, s.partition_split)
        chain = Chain(
            layers,
            s.pipeline_stages,
            bounds,
            loss_for(s),
            checkpointing=bool(s.activation_checkpointing),
            compiled=s.compile,
            memory_budget=s.activation_memory_budget,
            random=s.adapter.dropout > 0,
        )
        del denoiser, layers
        parameters = [p for p in chain.parameters() if p.requires_grad]
        if not parameters:  # DeepSpeed wants an optimizer on every stage
            parameters = [nn.Parameter(torch.zeros((), device=self.world.device), requires_grad=False)]
        optimizer = build_optimizer(s.optimizer, parameters, self.world.device)
        for group in optimizer.param_groups:
            group["initial_lr"] = s.force_constant_lr or group["lr"]
        engine = build_engine(
            chain,
            optimizer,
            self.world,
            micro_batch=s.micro_batch_size_per_gpu if isinstance(s.micro_batch_size_per_gpu, int) else 1,
            num_micro_batches=s.gradient_accumulation_steps,
            max_norm=s.gradient_clipping,
            use_graphs=s.cuda_graphs and not s.adapter.dropout,
        )
        return engine, Trained(names, chain, optimizer)


def prepare_folder(settings: TrainSettings, dataset: DatasetSettings, folder: RunFolder) -> None:
    """Puts both TOMLs, as used, into the run folder."""
    write_toml(folder.dataset_toml, as_toml(dataset))
    write_toml(folder.train_toml, as_toml(settings) | {"dataset": str(folder.dataset_toml)})


def _refuse_changed(progress: dict[str, Any], settings: TrainSettings, num_samples: int) -> None:
    """Order and noise of the rest depend on these; with others it would not be the same run."""
    if progress["seed"] != settings.seed:
        raise SettingsError(f"seed: the checkpoint was made with {progress['seed']}; set that to resume")
    if progress["num_samples"] != num_samples:
        logger.warning(
            "the dataset has %d samples, the checkpoint saw %d: the rest of this epoch differs",
            num_samples,
            progress["num_samples"],
        )


def _describe(error: BaseException) -> str:
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return (
            "out of GPU memory: use smaller pictures or micro_batch_size_per_gpu, activation_checkpointing = true "
            f"or transformer_dtype = 'float8' ({str(error).splitlines()[0]})"
        )
    if "No space left on device" in str(error):  # safetensors and torch have errors of their own for it
        return f"no space left on the disk; make room and resume the run ({error})"
    return f"{error}" if isinstance(error, SettingsError) else f"{type(error).__name__}: {error}"
