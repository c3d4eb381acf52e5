"""What a training will take, before it begins: stages, memory of each GPU, bubble, effective batch.

Reads names and shapes alone. Weights, adapter, gradients and optimizer state are counted; activations are measured by
running the chain of layers on tensors without memory and adding up what autograd keeps. torch.compile keeps less.
"""

from __future__ import annotations

import itertools
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ..models.base import Batch, Example, Family, Layer
from .adapted import shapes_of
from .adapters import _adapter, target_names
from .checkpointing import is_dear
from .finetune import choose_weights
from .offload import NUM_PLACES, swapped
from .optimizers import is_offloaded
from .partitioning import layer_costs, partition
from .settings import ActivationCheckpointing, DatasetSettings, TrainSettings, family_of
from .sources import EDIT_LIST
from .storage import DTYPES, NF4_BLOCK

logger = logging.getLogger(__name__)

GIB = 2**30
STATE_BYTES = {
    "adamw": 8, "adamw_optimi": 8, "stableadamw": 8, "adam": 8, "adamw8bit": 2, "adamw8bitkahan": 4, "lion": 4,
    "adafactor": 0.1, "prodigy": 16, "automagic": 5.1, "sgd": 4, "muon": 4,
}  # fmt: skip
"""Bytes of optimizer state for each trained weight."""
OVERHEAD = 0.6 * GIB
"""What CUDA, its libraries and the allocator's rounding take besides."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU."""

    weights: float
    adapter: float
    gradients: float
    optimizer: float
    activations: float
    """Of all micro-batches that are under way at once, and of the block at work."""
    main_memory: float
    """Of swapped blocks."""

    @property
    def total(self) -> float:
        return self.weights + self.adapter + self.gradients + self.optimizer + self.activations + OVERHEAD


@dataclass(frozen=True)
class Stage:
    """What sits on the GPUs of one pipeline stage."""

    first: str
    last: str
    num_blocks: int
    num_swapped: int
    memory: Memory


@dataclass(frozen=True)
class Plan:
    """What a training will take."""

    stages: Sequence[Stage]
    num_gpus: int
    micro_batch: int
    num_micro_batches: int
    size: tuple[int, int, int]
    """Width, height and frames of the largest batch."""
    trained: int
    """Trained weights."""
    total: int
    """Weights of the denoiser."""

    @property
    def data_parallel(self) -> int:
        return max(1, self.num_gpus // len(self.stages))

    @property
    def effective_batch(self) -> int:
        """Samples of one optimizer step."""
        return self.micro_batch * self.num_micro_batches * self.data_parallel

    @property
    def bubble(self) -> float:
        """Share of the time in which a GPU waits for others."""
        return (len(self.stages) - 1) / (self.num_micro_batches + len(self.stages) - 1)

    def lines(self, gpu_bytes: float | None) -> list[str]:
        """The plan in words; ``gpu_bytes`` is the memory of the smallest GPU, if it is known."""
        width, height, frames = self.size
        text = [
            f"GPUs: {self.num_gpus} (pipeline stages: {len(self.stages)}, data-parallel: {self.data_parallel})",
            f"a step: {self.micro_batch} x {self.num_micro_batches} micro-batches x {self.data_parallel} = "
            f"{self.effective_batch} samples",
            f"largest batch: {self.micro_batch} of {width}x{height}" + (f", {frames} frames" if frames > 1 else ""),
            f"trained: {self.trained / 1e6:.1f} million weights of {self.total / 1e9:.2f} billion",
        ]
        if len(self.stages) > 1:
            text.append(f"bubble: {self.bubble:.0%} of the time; more gradient_accumulation_steps make it smaller")
        for number, stage in enumerate(self.stages):
            text += _stage_lines(number, stage)
        if gpu_bytes is not None:
            text.append(self._verdict(gpu_bytes))
        return text

    def _verdict(self, gpu_bytes: float) -> str:
        most = max(stage.memory.total for stage in self.stages)
        if most <= gpu_bytes:
            return f"fits: {most / GIB:.1f} of {gpu_bytes / GIB:.1f} GiB"
        return (
            f"does not fit: {most / GIB:.1f} of {gpu_bytes / GIB:.1f} GiB; use activation_checkpointing, "
            "blocks_to_swap, transformer_dtype = 'float8' or 'nf4', an 8-bit optimizer, more pipeline_stages or "
            "smaller pictures"
        )


def _stage_lines(number: int, stage: Stage) -> list[str]:
    memory = stage.memory
    parts = {"weights": memory.weights, "adapter": memory.adapter, "gradients": memory.gradients,
             "optimizer": memory.optimizer, "activations": memory.activations, "besides": OVERHEAD}  # fmt: skip
    swap = f"; {stage.num_swapped} swapped, {memory.main_memory / GIB:.1f} GiB of main memory" * bool(stage.num_swapped)
    return [
        f"stage {number}: {stage.first} to {stage.last}, {stage.num_blocks} blocks{swap}",
        f"  {memory.total / GIB:.1f} GiB = "
        + " + ".join(f"{name} {value / GIB:.1f}" for name, value in parts.items() if value),
    ]


def make_plan(settings: TrainSettings, dataset: DatasetSettings, num_gpus: int, family: Family | None = None) -> Plan:
    """The plan for these settings on so many GPUs.

    Raises:
        SettingsError: The model's files are missing, or the stages do not fit the model.
    """
    family = family or family_of(settings)
    denoiser = family.build_denoiser()
    for name, parameter in denoiser.named_parameters():
        is_float32 = any(part in name for part in family.float32)
        parameter.data = parameter.data.to(torch.float32 if is_float32 else family.dtype)
    adapters = _choose(denoiser, family, settings)
    layers = family.layers(denoiser.to("meta"))
    names: dict[Tensor, str] = {parameter: name for name, parameter in denoiser.named_parameters()}
    size, micro_batch = _largest(settings, dataset)
    batch = family.collate([_blank(family, dataset, size)] * micro_batch)
    costs = None
    if settings.pipeline_stages > 1 and settings.partition_method == "cost":
        costs = layer_costs(family, denoiser, batch)
    bounds = partition(layers, settings.pipeline_stages, settings.partition_method, settings.partition_split, costs)
    kept = _Activations(settings.activation_checkpointing).measure(layers, batch)
    count = _Count(family, settings, names, adapters, max(1, num_gpus // settings.pipeline_stages))
    stages = []
    for number, (start, stop) in enumerate(itertools.pairwise(bounds)):
        under_way = min(settings.pipeline_stages - number, settings.gradient_accumulation_steps)
        memory, waiting = count.stage(layers, layers[start:stop])
        held, at_work = kept.between(start, stop)
        stages.append(Stage(
            layers[start].name, layers[stop - 1].name, sum(layer.is_block for layer in layers[start:stop]), waiting,
            replace(memory, activations=held * under_way + at_work),
        ))  # fmt: skip
    trained = sum(adapters.values()) or sum(p.numel() for p in denoiser.parameters() if p.requires_grad)
    return Plan(
        stages, num_gpus, micro_batch, settings.gradient_accumulation_steps, size, trained,
        sum(parameter.numel() for parameter in denoiser.parameters()),
    )  # fmt: skip


def smallest_gpu() -> float | None:
    """Bytes of the smallest GPU here; None without one."""
    count = torch.cuda.device_count()
    return min((torch.cuda.get_device_properties(n).total_memory for n in range(count)), default=None)


def _choose(denoiser: nn.Module, family: Family, settings: TrainSettings) -> dict[str, int]:
    """Marks what is trained; the number of adapter weights by layer.

    A layer with an adapter keeps its input as one whose weight is trained does.
    """
    if settings.adapter is None:
        choose_weights(denoiser, settings.train_only, settings.freeze, settings.learning_rates)
        return {}
    shapes, found = shapes_of(denoiser), {}
    denoiser.requires_grad_(False)
    for name in target_names(denoiser, family, settings.adapter):
        adapter = _adapter(settings.adapter, name, shapes[name], settings.seed, None)
        found[name] = sum(parameter.numel() for parameter in adapter.parameters())
        layer: Any = denoiser.get_submodule(name)
        layer.weight.requires_grad_(True)
    return found


def _largest(settings: TrainSettings, dataset: DatasetSettings) -> tuple[tuple[int, int, int], int]:
    """Width, height and frames of the batch that takes most, and its number of samples."""
    sizes: list[tuple[int, int, int]] = []
    for directory in dataset.directory:
        for entry in directory.resolutions:
            width, height = entry if isinstance(entry, list) and len(entry) == 2 else [_side(entry)] * 2
            sizes += [(width, height, frames) for frames in directory.frame_buckets]
        sizes += [(entry[0], entry[1], entry[2] if len(entry) > 2 else 1) for entry in directory.size_buckets or []]
    micro_batches = {size: settings.micro_batch(*size) for size in sizes}
    largest = max(sizes, key=lambda size: math.prod(size) * micro_batches[size])
    return largest, micro_batches[largest]


def _blank(family: Family, dataset: DatasetSettings, size: tuple[int, int, int]) -> Example:
    """An example of this size with as many controls as samples of the dataset may have."""
    counts = [len(directory.controls) for directory in dataset.directory]
    if any((Path(directory.path).expanduser() / EDIT_LIST).is_file() for directory in dataset.directory):
        counts.append(1)
    example = family.blank_example(*size)
    example.controls = (example.media,) * min(family.max_controls, max(counts))
    return example


def _side(entry: Any) -> int:
    return entry[0] if isinstance(entry, list) else entry


@dataclass
class _Count:
    """Adds up what weights take."""

    family: Family
    settings: TrainSettings
    names: Mapping[Tensor, str]
    adapters: Mapping[str, int]
    num_ranks: int
    """Among which ZeRO shares out."""

    def stage(self, layers: Sequence[Layer], mine: Sequence[Layer]) -> tuple[Memory, int]:
        """Memory of a stage without activations, and its number of swapped blocks."""
        waiting = swapped(layers, mine, self.settings.blocks_to_swap) if self.adapters else []
        apart = {layer.name for layer in waiting}
        sizes = [self._weights(layer) for layer in waiting]
        pool = max((sum(sizes[n : n + NUM_PLACES]) for n in range(len(sizes))), default=0.0)
        weights = pool + sum(self._weights(layer) for layer in mine if layer.name not in apart)
        parameters = [p for layer in mine for p in _parameters(layer)]
        if self.adapters:
            trained = sum(self.adapters.get(self.names[p].removesuffix(".weight"), 0) for p in parameters)
            adapter, master = 4.0 * trained, 0.0
        else:
            trained = sum(p.numel() for p in parameters if p.requires_grad)
            adapter = 0.0
            master = 4.0 * sum(p.numel() for p in parameters if p.requires_grad and p.dtype != torch.float32)
        state = master + STATE_BYTES.get(self.settings.optimizer.type.lower(), 8) * trained
        zero = self.settings.zero_stage
        weights, gradients, state = (
            size / (self.num_ranks if zero >= stage else 1)
            for size, stage in ((weights, 3), (4.0 * trained, 2), (state, 1))
        )
        state = 0.0 if is_offloaded(self.settings.optimizer) else state
        return Memory(weights, adapter, gradients, state, 0.0, sum(sizes)), len(waiting)

    def _weights(self, layer: Layer) -> float:
        return sum(self._stored(parameter, owner) for parameter, owner in _parameters(layer).items())

    def _stored(self, parameter: Tensor, owner: nn.Module) -> float:
        storage, name = self.family.storage, self.names[parameter]
        is_linear = isinstance(owner, nn.Linear) and name.endswith(".weight")
        if storage is None or not is_linear or any(re.search(pattern, name) for pattern in storage.kept):
            return parameter.nbytes
        if storage.dtype == DTYPES["nf4"]:
            return parameter.numel() * (0.5 + 4 / NF4_BLOCK)
        return parameter.numel() * storage.dtype.itemsize + 4 * len(parameter) * (storage.dtype.itemsize == 1)


def _parameters(layer: Layer) -> dict[Tensor, nn.Module]:
    """Each parameter of a layer with the module that has it."""
    modules = (module for part in layer.submodules.values() for module in part.modules())
    return {parameter: module for module in modules for parameter in module.parameters(recurse=False)}


@dataclass(frozen=True)
class _Kept:
    """Bytes that one micro-batch leaves for the backward pass."""

    held: Sequence[float]
    """By layer, until its backward pass."""
    at_work: Sequence[float]
    """By layer, while its backward pass runs."""

    def between(self, start: int, stop: int) -> tuple[float, float]:
        """Of some layers: what is held for one micro-batch, and the most that work takes besides."""
        return sum(self.held[start:stop]), max(self.at_work[start:stop])


def _flash(query: Tensor, key: Tensor, value: Tensor, *unused: Any, scale: float | None = None, **more: Any) -> Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)[0]


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Attention keeps what it does on a GPU; without memory torch would choose the form that keeps all products."""
    before = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = _flash  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = before


class _Dear(TorchDispatchMode):
    """Adds up the results that selective checkpointing keeps."""

    num_bytes = 0.0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        if is_dear(operator):
            first = result[0] if isinstance(result, tuple) else result
            self.num_bytes += first.nbytes
        return result


class _Activations:
    """Measures what the backward pass needs, on tensors without memory."""

    def __init__(self, mode: ActivationCheckpointing) -> None:
        self._mode = mode

    def measure(self, layers: Sequence[Layer], batch: Batch) -> _Kept:
        """For a batch like this."""
        tensors = tuple(value.to("meta") for value in batch.inputs)
        weights = {p.untyped_storage()._cdata for layer in layers for p in _parameters(layer)}
        every = 1 if isinstance(self._mode, str) else int(self._mode)
        held, at_work, number = [], [], 0
        passing: set[int] = set()
        alive: list[Any] = []  # an address must not be given to another tensor
        for layer in layers:
            alive.append(tensors)
            given = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
            saved: dict[int, float] = {}
            with _Dear() as dear:
                outputs = self._run(layer, tensors, saved, weights, alive)
            new_inputs = sum(size for key, size in given.items() if key not in passing)
            passing |= set(given)
            everything = sum(saved.values()) + sum(t.nbytes for t in outputs)
            if layer.is_block and every and number % every == 0:
                dear_bytes = dear.num_bytes if self._mode == "selective" else 0.0
                held.append((0.0 if self._mode == "unsloth" else new_inputs) + dear_bytes)
                at_work.append(max(0.0, everything - dear_bytes))
            else:
                held.append(sum(size for key, size in saved.items() if key not in passing) + new_inputs)
                at_work.append(max(saved.values(), default=0.0))
            number += layer.is_block
            tensors = outputs
        return _Kept(held, at_work)

    @staticmethod
    def _run(
        layer: Layer, tensors: Iterable[Tensor], saved: dict[int, float], weights: set[int], alive: list[Any]
    ) -> Any:
        def pack(tensor: Tensor) -> Tensor:
            key = tensor.untyped_storage()._cdata
            alive.append(tensor)
            if key not in weights:
                saved[key] = tensor.untyped_storage().nbytes()
            return tensor

        with _fused_attention(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = layer.forward(SimpleNamespace(**layer.submodules), *tensors)
        return outputs if isinstance(outputs, tuple) else (outputs,)
