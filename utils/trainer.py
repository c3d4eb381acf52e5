"""The run from settings to LoRA or model: dataset, cache, denoiser, engine, loop, export."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..models.base import Layer
from . import attention
from .adapted import adapted_layers
from .adapter_files import fuse
from .adapters import inject
from .buckets import Bucket
from .checkpoint import load_checkpoint, newest_checkpoint
from .checkpointing import Checkpointing
from .config import SettingsError, write_toml
from .control import Control
from .ema import Ema
from .evaluation import Evaluation, read_sets
from .exports import Exporter
from .finetune import choose_weights
from .index import Stopped
from .live import Live, Stages, owners_of
from .loader import Loader
from .loop import Loop
from .losses import loss_for
from .metrics import Curves
from .observation import Observation
from .offload import BlockSwap, swapped
from .optimizers import build_optimizers, keeps_kahan_sums
from .pipeline import Chain, Engine, build_engine, partition
from .position import Position
from .preparation import Data, Preparation
from .run_folder import RunFolder, Status
from .sampler import Sampler
from .samples import Previews, requests_of
from .settings import DatasetSettings, TrainSettings, as_toml, family_of
from .trained import Trained
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
        if s.dump_dataset:
            self.preparation.dump(Path(s.dump_dataset).expanduser())
            self.control.say(state="finished", phase="")
            return
        data = self.preparation.run()
        cache = data.train
        if s.cache_only:
            logger.info("the cache is complete, and cache_only is on: done")
            self.control.say(state="finished", phase="")
            return
        engine, trained, exporter, live = self._build()
        sampler = Sampler(cache.samples, self._global_batch, s.seed)
        total = sampler.total_steps(s.epochs)
        total = min(total, s.max_steps or total)
        position = Position()
        if self._resume:
            progress = load_checkpoint(
                newest_checkpoint(self.folder),
                trained,
                optimizer_state=not s.reset_optimizer,
                optimizer_groups=not (s.reset_optimizer or s.reset_optimizer_params),
            )
            _refuse_changed(progress, s, len(cache.samples))
            position = Position(**progress["position"])
            if s.reset_dataloader:
                total = min(sampler.total_steps(s.epochs) + position.step_in_epoch, s.max_steps or sys.maxsize)
                position.step_in_epoch, position.epoch_loss = 0, 0.0
            logger.info("resumed after step %d", position.step)
        loader = Loader(
            cache,
            self.family,
            s.seed,
            s.gradient_accumulation_steps,
            engine.grid.get_data_parallel_rank(),
            self.world.size // s.pipeline_stages,
            s.uncond_fraction,
            self.world.device.type == "cuda",
        )
        global_batch = self._global_batch(cache.samples[0].bucket)
        logger.info("training %d steps over %d epochs, %d pictures a step", total, s.epochs, global_batch)
        self.control.say(
            state="training",
            phase="",
            phase_done=0,
            phase_total=0,
            eta=None,
            total_steps=total,
            step=position.step,
            epoch=position.epoch,
        )
        loop = Loop(
            s,
            self.family,
            self.world,
            self.folder,
            self.control,
            engine,
            trained,
            exporter,
            sampler,
            loader,
            self._observation(data, engine, live, trained),
            position,
            total,
            len(cache.samples),
        )
        folder = self.folder.path if self.world.rank == 0 else None
        purge_after = position.place(s.x_axis_examples) if self._resume else None
        with Curves(folder, purge_after) as curves:
            loop.run(curves)

    def _global_batch(self, bucket: Bucket) -> int:
        """Samples of one step over all processes."""
        s = self.settings
        micro_batch = s.micro_batch(bucket.width, bucket.height, bucket.frames)
        return micro_batch * s.gradient_accumulation_steps * (self.world.size // s.pipeline_stages)

    def _observation(self, data: Data, engine: Engine, live: Live, trained: Trained) -> Observation:
        s, grid = self.settings, engine.grid
        requests = requests_of(s.sample, self.family, data.embeddings, data.images)
        previews = Previews(
            self.family, live, requests, self.world, grid.get_data_parallel_rank(), grid.get_data_parallel_world_size()
        )
        evaluation = Evaluation(data.eval_sets, self.family, s, self.world, engine)
        return Observation(s, self.family, self.world, self.folder, self.control, evaluation, previews, trained)

    def _build(self) -> tuple[Engine, Trained, Exporter, Live]:
        s = self.settings
        self.control.report("loading the model")
        attention.choose(s.attention_backend, self.world.device)
        denoiser = self.family.build_denoiser()
        layers = self.family.layers(denoiser)
        bounds = partition(layers, s.pipeline_stages, s.partition_method, s.partition_split)
        stage = self.world.stage(s.pipeline_stages)
        swap = self._load_weights(denoiser, layers, layers[bounds[stage] : bounds[stage + 1]])
        rates = {**s.learning_rates, **self.family.learning_rates()}
        self._adapt(denoiser, rates)
        layers = self.family.layers(denoiser)  # some of their modules may be adapted ones now
        names = {parameter: name for name, parameter in denoiser.named_parameters()}
        dropout = bool(s.adapter and s.adapter.drops)
        if swap:
            swap.bind()
        chain = Chain(
            layers,
            s.pipeline_stages,
            bounds,
            loss_for(s),
            Checkpointing(
                s.activation_checkpointing if s.activation_memory_budget is None else False,
                self.world.device,
                random=dropout,
                compiled=s.compile,
            ),
            swap,
            compiled=s.compile,
            memory_budget=s.activation_memory_budget,
        )
        owners = owners_of(layers, bounds)
        adapted = adapted_layers(denoiser)  # of this stage: the others' weights were not read
        del layers
        trained = Trained(
            names,
            chain,
            lambda parameters: build_optimizers(s.optimizer, parameters, rates),
            kahan=keeps_kahan_sums(s.optimizer),
        )
        if s.ema_decay:
            trained.ema = Ema(trained.stepped, s.ema_decay, s.ema_start_step, s.ema_on_cpu)
        for group in trained.groups:
            group["initial_lr"] = s.force_constant_lr or group["lr"]
        engine = build_engine(
            chain,
            trained,
            self.world,
            micro_batch=s.micro_batch_size_per_gpu if isinstance(s.micro_batch_size_per_gpu, int) else 1,
            num_micro_batches=s.gradient_accumulation_steps,
            max_norm=s.gradient_clipping,
            use_graphs=s.cuda_graphs and not dropout,
        )
        exporter = Exporter(
            s,
            self.family,
            self.world,
            self.folder,
            trained,
            adapted,
            engine.grid.get_stage_id(),
            engine.grid.get_data_parallel_rank() == 0,
        )
        stages = None
        if s.pipeline_stages > 1:
            ranks = [engine.grid.stage_to_global(number) for number in range(s.pipeline_stages)]
            stages = Stages(owners, stage, engine.grid.get_pipe_parallel_group(), ranks)
        live = Live(denoiser, self.family.dtype, self.world.device, chain.hooked, stages)
        return engine, trained, exporter, live

    def _adapt(self, denoiser: nn.Module, rates: dict[str, float]) -> None:
        """Adds adapters to the base, then chooses what is trained."""
        s = self.settings
        merged = [(Path(path).expanduser(), 1.0) for path in s.model.merge_adapters or ()]
        fuse(denoiser, self.family, merged, "model.merge_adapters")
        if s.adapter is None:
            choose_weights(denoiser, s.train_only, s.freeze, rates)
            return
        fused = [(Path(entry.path).expanduser(), entry.weight) for entry in s.adapter.fuse_adapters]
        fuse(denoiser, self.family, fused, "adapter.fuse_adapters")
        inject(denoiser, self.family, s.adapter, s.seed)

    def _load_weights(self, denoiser: nn.Module, layers: Sequence[Layer], mine: Sequence[Layer]) -> BlockSwap | None:
        """Reads the weights of this stage, those of swapped blocks into main memory."""
        device = self.world.device
        waiting = swapped(layers, mine, self.settings.blocks_to_swap)
        apart = {layer.name for layer in waiting}
        self.family.load_denoiser(device, denoiser, _parameters(layer for layer in mine if layer.name not in apart))
        if not waiting:
            return None
        swap = BlockSwap(device)
        for layer in waiting:
            self.family.load_denoiser(device, denoiser, _parameters([layer]))
            swap.take(layer)
        return swap


def _parameters(layers: Iterable[Layer]) -> set[nn.Parameter]:
    return {parameter for layer in layers for m in layer.submodules.values() for parameter in m.parameters()}


def prepare_folder(settings: TrainSettings, dataset: DatasetSettings, folder: RunFolder) -> None:
    """Puts both TOMLs, as used, into the run folder."""
    write_toml(folder.dataset_toml, as_toml(dataset))
    sets = [{"name": name, "config": as_toml(values)} for name, values in read_sets(settings).items()]
    tables = as_toml(settings) | {"dataset": str(folder.dataset_toml), "eval_datasets": sets}
    write_toml(folder.train_toml, tables)


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
