"""The run from settings to LoRA or model: dataset, cache, denoiser, engine, loop, export."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..models.base import Layer, ModelConfig
from . import attention, resuming, storage
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
from .optimizers import build_optimizers, is_offloaded, keeps_kahan_sums
from .partitioning import layer_costs, partition
from .pipeline import Chain, Engine, Link, build_engine
from .planning import make_plan
from .position import Position
from .preparation import Data, Preparation
from .release import ReleasedTrained
from .run_folder import RunFolder, Status
from .sampler import Draw, Sampler
from .samples import Previews, requests_of
from .settings import DatasetSettings, TrainSettings, as_toml, family_of
from .sharding import ShardedTrained, Sharding
from .trained import Share, Trained
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
        self._cache = cache
        engine, trained, exporter, live = self._build()
        sampler = Sampler(cache.samples, self._global_batch, s.seed)
        about = resuming.identity(s, self._model, cache.samples, sampler)
        position = self._resumed(trained, about) if self._resume else Position()
        total = min(sampler.total_from(position, s.epochs), s.max_steps or sys.maxsize)
        if s.test_sample:
            total = position.step
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
            about,
            Watch(self.world.device, self._planned),
        )
        folder = self.folder.path if self.world.rank == 0 else None
        purge_after = position.place(s.x_axis_examples) if self._resume else None
        mirror = WandbRun(s, folder) if folder and s.monitoring.enable_wandb else None
        with Curves(folder, purge_after, mirror) as curves:
            loop.run(curves)

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

    def _planned(self) -> float:
        """Bytes that the plan expects on this GPU."""
        plan = make_plan(self.settings, self.dataset, self.world.size, self.family, self._cache.samples)
        return plan.stages[self.world.stage(self.settings.pipeline_stages)].memory.total

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
        storage.multiply_quantised(_can_multiply(s.model, self.world.device))
        denoiser = self.family.build_denoiser()
        self._model = resuming.model_identity(self.family, denoiser)
        rates = {**s.learning_rates, **self.family.learning_rates()}
        chain, sharding, owners = self._chain(denoiser, rates)
        adapted = adapted_layers(denoiser)  # of this stage: the others' weights were not read
        names = {parameter: name for name, parameter in denoiser.named_parameters()}
        trained = self._trained(names, chain, rates, sharding)
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
            max_norm=0.0 if s.optimizer.gradient_release else s.gradient_clipping,
            use_graphs=s.cuda_graphs and not self._drops and not sharding and not s.optimizer.gradient_release,
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
            stages = Stages(owners, engine.grid.get_stage_id(), engine.grid.get_pipe_parallel_group(), ranks)
        live = Live(denoiser, self.family.dtype, self.world.device, chain.hooked, stages)
        return engine, trained, exporter, live

    @property
    def _drops(self) -> bool:
        """Whether a training step draws what it leaves out."""
        return bool(self.settings.adapter and self.settings.adapter.drops)

    def _chain(
        self, denoiser: nn.Module, rates: dict[str, float]
    ) -> tuple[Chain, Sharding | None, dict[nn.Module, int]]:
        """This stage of ``denoiser`` with its weights, how they are shared out, and which stage has which module."""
        s = self.settings
        layers = self.family.layers(denoiser)
        by_cost = s.pipeline_stages > 1 and s.partition_method == "cost"
        costs = self._costs(denoiser) if by_cost or s.blocks_to_swap else None
        bounds = partition(layers, s.pipeline_stages, s.partition_method, s.partition_split, costs)
        stage = self.world.stage(s.pipeline_stages)
        sharding = None
        swap = None
        links: Sequence[Layer | Link]
        if s.zero_stage >= 2:
            sharding = Sharding(self.world.device, self.family.dtype, s.zero_stage == 2, self.family.float32)
            links = self._share_out(sharding, denoiser, layers, rates)
        else:
            swap = self._load_weights(denoiser, layers, layers[bounds[stage] : bounds[stage + 1]], costs)
            self._adapt(denoiser, rates)
            links = layers = self.family.layers(denoiser)  # some of their modules may be adapted ones now
            if swap:
                swap.bind()
        chain = Chain(
            links,
            s.pipeline_stages,
            bounds,
            loss_for(s),
            Checkpointing(
                s.activation_checkpointing if s.activation_memory_budget is None else False,
                self.world.device,
                random=self._drops,
                compiled=s.compile,
            ),
            swap,
            compiled=s.compile,
            memory_budget=s.activation_memory_budget,
        )
        return chain, sharding, owners_of(layers, bounds)

    def _costs(self, denoiser: nn.Module) -> list[int]:
        """Arithmetic of each layer for the largest sample."""
        cache = self._cache
        sizes = [sample.bucket.width * sample.bucket.height * sample.bucket.frames for sample in cache.samples]
        plan = [[Draw(sizes.index(max(sizes)), 0, 1.0)]]
        batch = next(iter(Loader(cache, self.family, self.settings.seed, 1).steps(0, plan)))[0]
        return layer_costs(self.family, denoiser, batch)

    def _trained(
        self, names: dict[nn.Parameter, str], chain: Chain, rates: dict[str, float], sharding: Sharding | None
    ) -> Trained:
        s = self.settings
        ranks = self.world.size // s.pipeline_stages
        sizes = s.micro_batch_size_per_gpu
        micro_batch = sizes if isinstance(sizes, int) else max(size for _, size in sizes)
        global_batch = micro_batch * s.gradient_accumulation_steps * ranks

        def build(parameters: Mapping[str, nn.Parameter]) -> list[torch.optim.Optimizer]:
            return build_optimizers(s.optimizer, parameters, rates, global_batch)

        if sharding:
            sharding.join(chain)
            return ShardedTrained(names, chain, build)
        grid = chain.mpu()
        share = Share(
            grid.get_data_parallel_rank(), grid.get_data_parallel_world_size(), grid.get_data_parallel_group()
        )
        kahan = keeps_kahan_sums(s.optimizer)
        parted = s.pipeline_stages > 1 or s.optimizer.gradient_release or (s.zero_stage == 1 and share.size > 1)
        if parted and s.optimizer.type.lower().startswith(("prodigy", "dadapt")):
            logger.warning(
                "optimizer.type: %s finds one rate from all weights that it sees; here it sees parts of them, each of "
                "which gets a rate of its own, and losses differ from those of one process",
                s.optimizer.type,
            )
        if s.optimizer.gradient_release:
            if share.size > 1:
                raise SettingsError(
                    "optimizer.gradient_release: steps before the processes that train the same weights have shared "
                    "gradients; start one process per pipeline stage, or use zero_stage"
                )
            return ReleasedTrained(names, chain, build, kahan=kahan)
        offload, owners = is_offloaded(s.optimizer), share if s.zero_stage == 1 else None
        return Trained(names, chain, build, kahan=kahan, offload=offload, owners=owners)

    def _share_out(
        self, sharding: Sharding, denoiser: nn.Module, layers: Sequence[Layer], rates: dict[str, float]
    ) -> list[Link]:
        """Reads the weights link by link, each rank keeping its share."""
        s = self.settings
        choose_weights(denoiser, s.train_only, s.freeze, rates)
        chosen = {name for name, parameter in denoiser.named_parameters() if parameter.requires_grad}
        links = [Link(layer) for layer in layers]
        sharding.share_out(
            links,
            lambda link: self.family.load_denoiser(self.world.device, denoiser, set(link.parameters())),
            lambda: {parameter: name for name, parameter in denoiser.named_parameters()},
            chosen,
        )
        return links

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
        inject(denoiser, self.family, s.adapter, s.seed, rates)

    def _load_weights(
        self, denoiser: nn.Module, layers: Sequence[Layer], mine: Sequence[Layer], costs: Sequence[int] | None
    ) -> BlockSwap | None:
        """Reads the weights of this stage, those of swapped blocks into main memory."""
        device, read = self.world.device, self.family.denoiser_reader()
        waiting = swapped(layers, mine, self.settings.blocks_to_swap, costs)
        apart = {layer.name for layer in waiting}
        rest = _parameters(layer for layer in mine if layer.name not in apart)
        self.family.load_denoiser(device, denoiser, rest, read)
        if not waiting:
            return None
        swap = BlockSwap(device)
        for layer in waiting:
            self.family.load_denoiser(device, denoiser, _parameters([layer]), read)
            swap.take(layer)
        return swap


def _parameters(layers: Iterable[Layer]) -> set[nn.Parameter]:
    return {parameter for layer in layers for m in layer.submodules.values() for parameter in m.parameters()}


def _can_multiply(model: ModelConfig, device: torch.device) -> bool:
    """Whether the matmuls shall run in the precision of the stored weights.

    Raises:
        SettingsError: This GPU cannot.
    """
    is_float8 = model.quantized_matmul and model.transformer_dtype != "int8"
    if is_float8 and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise SettingsError(
            "model.quantized_matmul: this GPU has no float8 arithmetic (RTX 40 and newer have); use "
            "transformer_dtype = 'int8' or switch it off"
        )
    return model.quantized_matmul


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
