"""The run from settings to LoRA or model: dataset, cache, denoiser, engine, loop, export."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import kernels, resuming
from .assembly import Assembled, Assembly
from .buckets import Bucket
from .checkpoint import load_checkpoint, newest_checkpoint
from .config import SettingsError, write_toml
from .control import Control
from .dataset import Sample
from .dataset_settings import DatasetSettings
from .evaluation import Evaluation, read_sets
from .loader import Loader
from .loop import Loop
from .metrics import Curves
from .observation import Observation
from .pipeline import Engine
from .planning import make_plan
from .position import Position
from .preparation import Data, Preparation
from .progress import Stopped
from .run_folder import RunFolder, Status
from .sampler import Sampler
from .samples import Previews, requests_of
from .settings import TrainSettings, as_toml, family_of
from .trained import Trained
from .wandb_run import WandbRun, check_wandb
from .watch import Watch
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
        self.preparation = Preparation(
            settings, dataset, read_sets(settings), self.family, world, folder, self.control, self._global_batch
        )
        self._check_stages()
        check_wandb(settings)

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
        if s.model.quantized_matmul and s.model.transformer_dtype != "int8":
            kernels.spare_workspace(self.world.device)  # before anything is computed
        self.family.check_files()
        if s.dump_dataset:
            self.preparation.dump(Path(s.dump_dataset).expanduser())
            self.control.say(state="finished", phase="")
            return
        data = self.preparation.run()
        if s.cache_only:
            logger.info("the cache is complete, and cache_only is on: done")
            self.control.say(state="finished", phase="")
            return
        loop = self._loop(data, self._build(data))
        folder = self.folder.path if self.world.rank == 0 else None
        purge_after = loop.position.place(s.x_axis_examples) if self._resume else None
        mirror = WandbRun(s, folder) if folder and s.monitoring.enable_wandb else None
        with Curves(folder, purge_after, mirror) as curves:
            loop.run(curves)

    def _build(self, data: Data) -> Assembled:
        return Assembly(self.settings, self.family, self.world, self.folder, self.control, data.train).build()

    def _loop(self, data: Data, model: Assembled) -> Loop:
        """The steps to be made, from the start or from the checkpoint on."""
        s, samples = self.settings, data.train.samples
        sampler = Sampler(samples, self._global_batch, s.seed)
        about = resuming.identity(s, model.identity, samples, sampler)
        position = self._resumed(model.trained, about) if self._resume else Position()
        total = min(sampler.total_from(position, s.epochs), s.max_steps or sys.maxsize)
        if s.test_sample:
            total = position.step
        self._say_training(position, total, self._global_batch(samples[0].bucket))
        return Loop(
            settings=s,
            family=self.family,
            world=self.world,
            folder=self.folder,
            control=self.control,
            engine=model.engine,
            trained=model.trained,
            exporter=model.exporter,
            sampler=sampler,
            loader=self._loader(data, model.engine),
            observation=self._observation(data, model),
            position=position,
            total=total,
            identity=about,
            watch=Watch(self.world.device, lambda: self._planned(samples)),
        )

    def _say_training(self, position: Position, total: int, global_batch: int) -> None:
        epochs = self.settings.epochs
        logger.info("training %d steps over %d epochs, %d pictures a step", total, epochs, global_batch)
        self.control.say(
            state="training",
            phase="",
            phase_done=0,
            phase_total=0,
            phase_unit="",
            eta=None,
            total_steps=total,
            step=position.step,
            epoch=position.epoch,
        )

    def _loader(self, data: Data, engine: Engine) -> Loader:
        s = self.settings
        return Loader(
            data.train,
            self.family,
            s.seed,
            s.gradient_accumulation_steps,
            engine.grid.get_data_parallel_rank(),
            self.world.size // s.pipeline_stages,
            s.uncond_fraction,
            self.world.device.type == "cuda",
        )

    def _resumed(self, trained: Trained, about: dict[str, Any]) -> Position:
        """Takes over the newest checkpoint; gives where it stands."""
        s = self.settings
        progress = load_checkpoint(
            newest_checkpoint(self.folder),
            trained,
            lambda found: resuming.refuse_changed(found, about, s),
            optimizer_state=not s.reset_optimizer,
            optimizer_groups=not (s.reset_optimizer or s.reset_optimizer_params),
        )
        position = resuming.go_on(progress, about, s)
        logger.info("resumed after step %d", position.step)
        return position

    def _planned(self, samples: Sequence[Sample]) -> float:
        """Bytes that the plan expects on this GPU."""
        plan = make_plan(self.settings, self.dataset, self.world.size, self.family, samples)
        return plan.stages[self.world.stage(self.settings.pipeline_stages)].memory.total

    def _global_batch(self, bucket: Bucket) -> int:
        """Samples of one step over all processes."""
        s = self.settings
        micro_batch = s.micro_batch(bucket.width, bucket.height, bucket.frames)
        return micro_batch * s.gradient_accumulation_steps * (self.world.size // s.pipeline_stages)

    def _observation(self, data: Data, model: Assembled) -> Observation:
        s, grid = self.settings, model.engine.grid
        requests = requests_of(s.sample, self.family, data.embeddings, data.images)
        rank, size = grid.get_data_parallel_rank(), grid.get_data_parallel_world_size()
        previews = Previews(self.family, model.live, requests, self.world, rank, size)
        evaluation = Evaluation(data.eval_sets, self.family, s, self.world, model.engine)
        return Observation(s, self.family, self.world, self.folder, self.control, evaluation, previews, model.trained)


def prepare_folder(settings: TrainSettings, dataset: DatasetSettings, folder: RunFolder) -> None:
    """Puts both TOMLs, as used, into the run folder."""
    write_toml(folder.dataset_toml, as_toml(dataset))
    sets = [{"name": name, "config": as_toml(values)} for name, values in read_sets(settings).items()]
    tables = as_toml(settings) | {"dataset": str(folder.dataset_toml), "eval_datasets": sets}
    write_toml(folder.train_toml, tables)


def _describe(error: BaseException) -> str:
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return (
            "out of GPU memory: use smaller pictures or micro_batch_size_per_gpu, activation_checkpointing = true "
            f"or transformer_dtype = 'float8' ({str(error).splitlines()[0]})"
        )
    if "No space left on device" in str(error):  # safetensors and torch have errors of their own for it
        return f"no space left on the disk; make room and resume the run ({error})"
    return f"{error}" if isinstance(error, SettingsError) else f"{type(error).__name__}: {error}"
