"""Making the plan of a training before it begins, and counting its steps.

Reads names and shapes alone. Weights, adapter, gradients, optimizer state and the moving average are counted;
activations are measured by running the chain of layers on tensors without memory. torch.compile keeps less.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..models.base import Example, Family, Layer
from .activations import META, Activations, measure, measure_drawing
from .adapters import inject
from .config import SettingsError
from .dataset import Sample, scan
from .dataset_settings import DatasetSettings
from .finetune import choose_weights
from .footprint import Counter, Footprint
from .index import Index
from .offload import swapped
from .partitioning import layer_costs, partition
from .plan import OVERHEAD, Memory, Plan, Size, Stage, verdict
from .preparation import cache_folder
from .progress import Stopped, Unit
from .readers import Readers, usual_count
from .sampler import Sampler
from .samples import size_of
from .settings import TrainSettings, family_of
from .sources import EDIT_LIST
from .storage import keep_transposed

PATIENCE = 60.0
"""Seconds in which files that are not known yet are read to count samples."""


class _Planner:
    """Settings as shapes: the denoiser with its adapter, the largest batch, and where stages end."""

    def __init__(
        self,
        settings: TrainSettings,
        dataset: DatasetSettings,
        num_gpus: int,
        family: Family,
        samples: Sequence[Sample] | None,
    ) -> None:
        self.settings, self.dataset, self.num_gpus, self.family = settings, dataset, num_gpus, family
        self.size, self.micro_batch = _largest(settings, dataset, samples)
        self.batch = family.collate([self._blank(samples)] * self.micro_batch)
        self.denoiser = family.build_denoiser()
        plain = family.layers(self.denoiser)
        method, split = settings.partition_method, settings.partition_split
        by_cost = settings.pipeline_stages > 1 and method == "cost"
        self.bounds = partition(plain, settings.pipeline_stages, method, split, self._costs if by_cost else None)
        self._plain = plain
        self.total = sum(parameter.numel() for parameter in self.denoiser.parameters())
        self._prepare()
        self.layers = family.layers(self.denoiser)  # some of their modules are adapted ones now
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.denoiser.named_parameters()}
        self._counter = Counter(settings, family, names, max(1, num_gpus // settings.pipeline_stages))

    @cached_property
    def _costs(self) -> list[int]:
        return layer_costs(self.family, self.family.build_denoiser(), self.batch)

    def _prepare(self) -> None:
        """As the trainer does with weights."""
        s = self.settings
        rates = {**s.learning_rates, **self.family.learning_rates()}
        self.family.load_denoiser(META, self.denoiser)
        if s.adapter is None:
            choose_weights(self.denoiser, s.train_only, s.freeze, rates)
        else:
            inject(self.denoiser, self.family, s.adapter, s.seed, rates, shapes_alone=True)
        if s.transposed_weights:
            keep_transposed(self.denoiser)
        self.denoiser.train()

    def _blank(self, samples: Sequence[Sample] | None) -> Example:
        """An example of the largest size with as many controls as samples of the dataset may have."""
        if samples is not None:
            count = max(len(sample.controls) for sample in samples)
        else:
            counts = [len(directory.controls) for directory in self.dataset.directory]
            lists = [Path(directory.path).expanduser() / EDIT_LIST for directory in self.dataset.directory]
            count = max([*counts, int(any(file.is_file() for file in lists))])
        return self.family.with_controls(self.family.blank_example(*self.size), count)

    def footprints(self, blocks_to_swap: int) -> list[Footprint]:
        """Of each stage."""
        found = []
        for start, stop in itertools.pairwise(self.bounds):
            waiting = list[Layer]()
            if self.settings.zero_stage < 2 and blocks_to_swap:
                waiting = swapped(self._plain, self._plain[start:stop], blocks_to_swap, self._costs)
            found.append(self._counter.stage(self.layers[start:stop], {layer.name for layer in waiting}))
        return found

    def plan(self) -> Plan:
        """All of it."""
        s = self.settings
        activations = measure(s, self.layers, self.bounds, self.batch, self._counter.sums_wide)

        def memories(blocks_to_swap: int) -> list[Memory]:
            counted = zip(self.footprints(blocks_to_swap), activations, strict=True)
            return [self._memory(number, *pair) for number, pair in enumerate(counted)]

        stages = [
            Stage(self.layers[start].name, self.layers[stop - 1].name, _num_blocks(self.layers[start:stop]), memory)
            for (start, stop), memory in zip(itertools.pairwise(self.bounds), memories(s.blocks_to_swap), strict=True)
        ]
        return Plan(
            stages,
            self.num_gpus,
            self.micro_batch,
            s.gradient_accumulation_steps,
            self.size,
            sum(parameter.numel() for parameter in self.denoiser.parameters() if parameter.requires_grad),
            self.total,
            lambda count: max(memory.total for memory in memories(count)),
            _num_blocks(self.layers) if s.zero_stage < 2 else 0,
        )

    def _memory(self, number: int, footprint: Footprint, activations: Activations) -> Memory:
        s = self.settings
        under_way = min(s.pipeline_stages - number, s.gradient_accumulation_steps)
        messages = activations.received * under_way + activations.sent
        moved = {"activations": activations.moved * under_way} if activations.moved else {}
        # each place of a recorded stage has memory of its own
        work = activations.of(1) * under_way if self._recorded and s.pipeline_stages > 1 else activations.of(under_way)
        return Memory(footprint, work - messages, messages, {**footprint.main, **moved})

    @property
    def _recorded(self) -> bool:
        """Whether steps run as CUDA graphs, whose memory stays."""
        s = self.settings
        copies = s.blocks_to_swap or s.activation_checkpointing == "unsloth"
        return s.cuda_graphs and s.zero_stage < 2 and not (copies and s.pipeline_stages > 1)

    def drawing(self, plan: Plan) -> float:
        """Bytes on a GPU while samples are drawn."""
        s, family = self.settings, self.family
        width, height, frames = size_of(s.sample, family)
        example = family.with_controls(family.blank_example(width, height, frames), len(s.sample.images[:1]))
        batch = family.collate([example])
        pipeline = family.pipeline(self.denoiser, META, text_encoders=False)
        parts = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
        mine = set(self.denoiser.parameters())
        others = sum(p.nbytes for part in parts for p in part.parameters() if p not in mine)
        latents = family.vae_latents(example.media["latents"][None]).to(pipeline.vae.dtype)
        work = measure_drawing(self.layers, batch, pipeline.vae, latents)
        return max(self._while_drawing(stage.memory) for stage in plan.stages) + others + work

    def _while_drawing(self, memory: Memory) -> float:
        s = self.settings
        weights_before = memory.stays.stepped if s.ema_decay and s.ema_for_samples else 0.0
        return memory.stays.total + weights_before + (memory.activations if self._recorded else 0.0) + OVERHEAD


def make_plan(
    settings: TrainSettings,
    dataset: DatasetSettings,
    num_gpus: int,
    family: Family | None = None,
    samples: Sequence[Sample] | None = None,
) -> Plan:
    """The plan for these settings on so many GPUs.

    Args:
        samples: Of the dataset; left out, sizes are those that its settings name.

    Raises:
        SettingsError: The model's files are missing, or the stages do not fit the model.
    """
    return _Planner(settings, dataset, num_gpus, family or family_of(settings), samples).plan()


def plan_lines(settings: TrainSettings, dataset: DatasetSettings, num_gpus: int, gpu_bytes: float | None) -> list[str]:
    """All that can be said of a training before it begins.

    Args:
        gpu_bytes: Memory of the smallest GPU, if it is known.

    Raises:
        SettingsError: As `make_plan`.
    """
    family = family_of(settings)
    family.check_files()
    samples = find_samples(settings, dataset, family)
    planner = _Planner(settings, dataset, num_gpus, family, None if isinstance(samples, str) else samples)
    plan, besides = planner.plan(), {}
    if settings.sample.prompts:
        besides["drawing samples"] = planner.drawing(plan)
    for name in family.text_encoders:
        besides[f"encoding captions with {name}"] = _bytes_of(family.load_text_encoder(name, META)) + OVERHEAD
    return [*plan.lines(), *step_lines(samples, settings, num_gpus), *verdict(plan, besides, gpu_bytes)]


def _bytes_of(encoder: Any) -> float:
    """Of all networks that an encoder is made of."""
    parts = [encoder] if isinstance(encoder, nn.Module) else vars(encoder).values()
    networks = [part for part in parts if isinstance(part, nn.Module)]
    return float(sum(p.nbytes for network in networks for p in {*network.parameters(), *network.buffers()}))


def _num_blocks(layers: Sequence[Layer]) -> int:
    return sum(layer.is_block for layer in layers)


def _largest(settings: TrainSettings, dataset: DatasetSettings, samples: Sequence[Sample] | None) -> tuple[Size, int]:
    """Size of the batch that takes most, and its number of samples."""
    sizes: list[Size] = list({sample.bucket for sample in samples or ()})
    for directory in dataset.directory if not sizes else ():
        for entry in directory.resolutions:
            width, height = entry if isinstance(entry, list) and len(entry) == 2 else [_side(entry)] * 2
            sizes += [(width, height, frames) for frames in directory.frame_buckets]
        sizes += [(entry[0], entry[1], entry[2] if len(entry) > 2 else 1) for entry in directory.size_buckets or []]
    micro_batches = {size: settings.micro_batch(*size) for size in sizes}
    largest = max(sizes, key=lambda size: math.prod(size) * micro_batches[size])
    return largest, micro_batches[largest]


def _side(entry: Any) -> int:
    return entry[0] if isinstance(entry, list) else entry


def find_samples(
    settings: TrainSettings, dataset: DatasetSettings, family: Family, patience: float = PATIENCE
) -> list[Sample] | str:
    """The samples of a dataset, or why they cannot be counted; encodes nothing, and what it reads it reads once ever.

    Args:
        patience: Seconds that it may take.
    """
    until = time.monotonic() + patience

    def progress(phase: str, done: int, total: int, unit: Unit = "", /) -> None:
        if time.monotonic() > until:
            raise Stopped(f"{total - done} files that nobody has looked at yet would take too long; the training does")

    try:
        with (
            Readers(settings.map_num_proc or usual_count()) as readers,
            closing(Index(cache_folder(settings) / "index.sqlite", readers)) as index,
        ):
            return scan(dataset, index, family, settings.video_clip_mode, progress)[0]
    except (SettingsError, Stopped, OSError) as reason:
        return str(reason).splitlines()[0]


def step_lines(samples: Sequence[Sample] | str, settings: TrainSettings, num_gpus: int) -> list[str]:
    """Samples and steps in words; as the dataset's report counts them."""
    if isinstance(samples, str):
        return [f"steps: not known ({samples})"]
    ranks = max(1, num_gpus // settings.pipeline_stages) * settings.gradient_accumulation_steps
    sampler = Sampler(samples, lambda bucket: settings.micro_batch(*bucket) * ranks, settings.seed)
    total = min(sampler.total_steps(settings.epochs), settings.max_steps or sys.maxsize)
    sizes = len({sample.bucket for sample in samples})
    return [
        f"dataset: {len(samples)} samples of {sizes} sizes" if sizes > 1 else f"dataset: {len(samples)} samples",
        f"steps: {sampler.num_steps(0)} in the first epoch, {total} in all",
    ]
