"""The model of a run, ready to be trained: weights and adapters, this stage's chain, optimizers, engine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ..models.base import Family, Layer, ModelConfig
from . import attention, kernels, resuming, storage
from .adapted import adapted_layers
from .adapter_files import fuse
from .adapters import inject
from .cache import Cache
from .checkpointing import Checkpointing
from .config import SettingsError
from .control import Control
from .ema import Ema
from .exports import Exporter
from .finetune import choose_weights
from .live import Live, Stages, owners_of
from .loader import Loader
from .losses import loss_for
from .offload import BlockSwap, swapped
from .optimizers import build_optimizers, is_offloaded, keeps_kahan_sums
from .partitioning import layer_costs, partition
from .pipeline import Chain, Engine, Link, build_engine
from .progress import Stopped
from .release import ReleasedTrained
from .run_folder import RunFolder
from .sampler import Draw
from .settings import TrainSettings
from .sharding import ShardedTrained, Sharding
from .trained import Share, Trained
from .weights import counted
from .world import World

logger = logging.getLogger(__name__)


@dataclass
class Assembled:
    """A model that can be trained, exported and drawn with."""

    engine: Engine
    trained: Trained
    exporter: Exporter
    live: Live
    identity: str
    """As `resuming.model_identity` has it."""


@dataclass
class Assembly:
    """Makes the model of a run; every process has one and makes its stage."""

    settings: TrainSettings
    family: Family
    world: World
    folder: RunFolder
    control: Control
    cache: Cache
    """Whose largest sample tells what each layer costs."""

    def build(self) -> Assembled:
        """Reads the weights, adds what is trained, and puts an engine around it.

        Raises:
            SettingsError: These settings and this GPU, or these files, do not go together.
            Stopped: The run was asked to end.
        """
        s = self.settings
        self.control.report("loading the model")
        attention.choose(s.attention_backend, self.world.device)
        if self.world.device.type == "cuda":
            kernels.has_triton()  # found out before anything is compiled or recorded
        storage.multiply_quantised(_can_multiply(s.model, self.world.device))
        denoiser = self.family.build_denoiser()
        identity = resuming.model_identity(self.family, denoiser)
        rates = {**s.learning_rates, **self.family.learning_rates()}
        chain, sharding, owners = self._chain(denoiser, rates)
        adapted = adapted_layers(denoiser)  # of this stage: the others' weights were not read
        trained = self._trained(denoiser, chain, rates, sharding)
        engine = self._engine(chain, trained, sharding is not None)
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
        live = Live(denoiser, self.family.dtype, self.world.device, chain.hooked, self._stages(engine, owners))
        return Assembled(engine, trained, exporter, live, identity)

    # -- the chain of this stage --------------------------------------------------------------------------

    def _costs(self, denoiser: nn.Module) -> list[int]:
        """Arithmetic of each layer for the largest sample."""
        cache = self.cache
        sizes = [sample.bucket.width * sample.bucket.height * sample.bucket.frames for sample in cache.samples]
        plan = [[Draw(sizes.index(max(sizes)), 0, 1.0)]]
        batch = next(iter(Loader(cache, self.family, self.settings.seed, 1).steps(0, plan)))[0]
        return layer_costs(self.family, denoiser, batch)

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
            with self._loading(self.family.denoiser_bytes(denoiser)):
                links = self._share_out(sharding, denoiser, layers, rates)
        else:
            mine = layers[bounds[stage] : bounds[stage + 1]]
            with self._loading(self.family.denoiser_bytes(denoiser, _parameters(mine))):
                swap = self._load_weights(denoiser, layers, mine, costs)
            self._adapt(denoiser, rates)
            if s.transposed_weights:
                storage.keep_transposed(denoiser)
            links = layers = self.family.layers(denoiser)  # some of their modules may be adapted ones now
            if swap:
                swap.bind()
        checkpointing = Checkpointing(
            s.activation_checkpointing if s.activation_memory_budget is None else False,
            self.world.device,
            random=self._drops,
            compiled=s.compile,
        )
        chain = Chain(
            links,
            s.pipeline_stages,
            bounds,
            loss_for(s),
            checkpointing,
            swap,
            compiled=s.compile,
            memory_budget=s.activation_memory_budget,
        )
        return chain, sharding, owners_of(layers, bounds)

    @contextmanager
    def _loading(self, size: int) -> Iterator[None]:
        """Says how far the reading of ``size`` bytes of weights is; all processes leave it together.

        Raises:
            Stopped: The run was asked to end.
        """
        with suppress(Stopped), counted(partial(self.control.progress, "loading the model", unit="bytes"), size):
            yield
        self.control.meet()

    @property
    def _drops(self) -> bool:
        """Whether a training step draws what it leaves out."""
        return bool(self.settings.adapter and self.settings.adapter.drops)

    def _share_out(
        self, sharding: Sharding, denoiser: nn.Module, layers: Sequence[Layer], rates: dict[str, float]
    ) -> list[Link]:
        """Reads the weights link by link, each rank keeping its share."""
        s = self.settings
        choose_weights(denoiser, s.train_only, s.freeze, rates)
        chosen = {name for name, parameter in denoiser.named_parameters() if parameter.requires_grad}
        names = {parameter: name for name, parameter in denoiser.named_parameters()}
        links = [Link(layer) for layer in layers]

        def load(link: nn.Module) -> None:
            lists = [module for module in link.children() if isinstance(module, nn.ParameterList)]
            loose = [(held, place, names[p]) for held in lists for place, p in enumerate(held)]
            self.family.load_denoiser(self.world.device, denoiser, set(link.parameters()))
            for held, place, name in loose:  # parameters that lie in no module of the link have been replaced
                held[place] = denoiser.get_parameter(name)

        sharding.share_out(
            links,
            load,
            lambda: {parameter: name for name, parameter in denoiser.named_parameters()},
            chosen,
        )
        return links

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

    # -- what trains it -----------------------------------------------------------------------------------

    def _trained(
        self, denoiser: nn.Module, chain: Chain, rates: dict[str, float], sharding: Sharding | None
    ) -> Trained:
        """What is trained of this stage, with its optimizers and the moving average."""
        s = self.settings
        names = {parameter: name for name, parameter in denoiser.named_parameters()}
        global_batch = self._largest_batch()

        def build(parameters: Mapping[str, nn.Parameter]) -> list[torch.optim.Optimizer]:
            return build_optimizers(s.optimizer, parameters, rates, global_batch)

        trained: Trained
        if sharding:
            sharding.join(chain)
            trained = ShardedTrained(names, chain, build)
        else:
            trained = self._whole(names, chain, build)
        if s.ema_decay:
            trained.ema = Ema(trained.stepped, s.ema_decay, s.ema_start_step, s.ema_on_cpu)
        for group in trained.groups:
            group["initial_lr"] = s.force_constant_lr or group["lr"]
        return trained

    def _largest_batch(self) -> int:
        """Most samples of one step over all processes, as some optimizers want to know."""
        s = self.settings
        sizes = s.micro_batch_size_per_gpu
        micro_batch = sizes if isinstance(sizes, int) else max(size for _, size in sizes)
        return micro_batch * s.gradient_accumulation_steps * (self.world.size // s.pipeline_stages)

    def _whole(
        self,
        names: dict[nn.Parameter, str],
        chain: Chain,
        build: Callable[[Mapping[str, nn.Parameter]], list[torch.optim.Optimizer]],
    ) -> Trained:
        """`_trained` where each process holds its stage's weights whole."""
        s, grid = self.settings, chain.mpu()
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

    def _engine(self, chain: Chain, trained: Trained, is_sharded: bool) -> Engine:
        s = self.settings
        return build_engine(
            chain,
            trained,
            self.world,
            micro_batch=s.micro_batch_size_per_gpu if isinstance(s.micro_batch_size_per_gpu, int) else 1,
            num_micro_batches=s.gradient_accumulation_steps,
            max_norm=0.0 if s.optimizer.gradient_release else s.gradient_clipping,
            use_graphs=s.cuda_graphs and not self._drops and not is_sharded and not s.optimizer.gradient_release,
        )

    def _stages(self, engine: Engine, owners: dict[nn.Module, int]) -> Stages | None:
        """Who holds what of a pipeline; None where there is one stage."""
        count, grid = self.settings.pipeline_stages, engine.grid
        if count == 1:
            return None
        ranks = [grid.stage_to_global(number) for number in range(count)]
        return Stages(owners, grid.get_stage_id(), grid.get_pipe_parallel_group(), ranks)


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
