"""The run from settings to LoRA: dataset, cache, denoiser, engine, loop, export."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import attention
from .adapters import inject, load_existing
from .cache import Cache
from .checkpoint import Trained, load_checkpoint, newest_checkpoint
from .config import SettingsError, write_toml, write_whole
from .control import Control, Stopped
from .dataset import MediaIndex, scan
from .loader import Loader
from .loop import Loop, Position
from .metrics import Curves
from .optimizers import build_optimizer
from .pipeline import Chain, Engine, build_engine, mean_squared_error, partition
from .run_folder import RunFolder, Status
from .sampler import Sampler
from .settings import DatasetSettings, Lora, TrainSettings, as_toml, family_of
from .world import World

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
        engine, trained = self._build()
        data_ranks = self.world.size // s.pipeline_stages
        global_batch = s.micro_batch_size_per_gpu * s.gradient_accumulation_steps * data_ranks
        sampler = Sampler(cache.samples, global_batch, s.seed)
        total = sum(sampler.num_steps(epoch) for epoch in range(s.epochs))
        total = min(total, s.max_steps or total)
        position = Position()
        if self._resume:
            progress = load_checkpoint(newest_checkpoint(self.folder), trained)
            _refuse_changed(progress, s, len(cache.samples))
            position = Position(**progress["position"])
            logger.info("resumed after step %d", position.step)
        rank = engine.grid.get_data_parallel_rank()
        loader = Loader(cache, self.family, s.seed, s.micro_batch_size_per_gpu, s.gradient_accumulation_steps, rank)
        logger.info("training %d steps over %d epochs, %d pictures a step", total, s.epochs, global_batch)
        self.control.say(state="training", phase="", total_steps=total, step=position.step, epoch=position.epoch)
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

    def _prepare_data(self) -> Cache:
        s = self.settings
        folder = Path(s.cache_dir or Path(s.output_dir) / "cache").expanduser()
        self.control.say(state="caching", phase="looking through the dataset")
        found: Any = None
        if self.world.rank == 0:
            try:
                index = MediaIndex(folder / "index.sqlite")
                samples, report = scan(self.dataset, index, self.family.size_multiple)
                index.close()
                report.log()
                write_whole(
                    self.folder.path / "dataset_report.json", json.dumps(report.as_dict(), indent=1, ensure_ascii=False)
                )
                found = samples
            except (SettingsError, OSError) as error:
                found = error
        samples = self.world.share(found)
        cache = Cache(folder, self.family, samples)
        failed = cache.fill(
            self.world.device,
            s.caching_batch_size,
            self.control.progress,
            self.world.rank,
            self.world.size,
            self.world.barrier,
        )
        unreadable = {path: reason for part in self.world.gather(failed) for path, reason in part.items()}
        if unreadable:
            for path, reason in unreadable.items():
                logger.warning("left out: %s: %s", path, reason)
            cache.samples = [sample for sample in cache.samples if sample.path not in unreadable]
            if not cache.samples:
                raise SettingsError(
                    "dataset: no picture could be decoded: " + "; ".join(f"{p}: {r}" for p, r in unreadable.items())
                )
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()
        return cache

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
            mean_squared_error,
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
            micro_batch=s.micro_batch_size_per_gpu,
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
