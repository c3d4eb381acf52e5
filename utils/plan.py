"""What a training will take: stages, memory of each GPU and of main memory, bubble, effective batch; in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import psutil
import torch

from .footprint import Footprint

GIB = 2**30
OVERHEAD = 0.6 * GIB
"""What CUDA, its libraries and the allocator's rounding take besides."""
Size = tuple[int, int, int]
"""Width, height and frames."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU while training."""

    stays: Footprint
    activations: float
    """Of all micro-batches that are under way at once, and of the block at work."""
    messages: float
    """What has come from the stages beside this one."""
    main: Mapping[str, float]
    """In main memory, by what it is."""

    @property
    def total(self) -> float:
        return self.stays.total + self.activations + self.messages + OVERHEAD

    @property
    def parts(self) -> dict[str, float]:
        """What the total is made of."""
        kept = ("weights", "adapter", "gradients", "optimizer", "average", "gathered")
        parts = {name: getattr(self.stays, name) for name in kept}
        return parts | {"activations": self.activations, "messages": self.messages, "besides": OVERHEAD}


@dataclass(frozen=True)
class Stage:
    """What sits on the GPUs of one pipeline stage."""

    first: str
    last: str
    num_blocks: int
    memory: Memory

    def lines(self, number: int) -> list[str]:
        """In words."""
        memory, count = self.memory, self.memory.stays.num_swapped
        text = [
            f"stage {number}: {self.first} to {self.last}, {self.num_blocks} blocks"
            + f", {count} swapped" * bool(count)
        ]
        text.append(f"  GPU {_sum(memory.parts)}")
        if memory.main:
            text.append(f"  main memory {_sum(memory.main)}")
        return text


def _sum(parts: Mapping[str, float]) -> str:
    named = {name: f"{value / GIB:.1f}" for name, value in parts.items() if value}
    few = " + ".join(f"{name} {value}" for name, value in named.items() if value != "0.0")
    return f"{sum(parts.values()) / GIB:.1f} GiB" + (f" = {few}" if few else "")


@dataclass(frozen=True)
class Plan:
    """What a training will take."""

    stages: Sequence[Stage]
    num_gpus: int
    micro_batch: int
    num_micro_batches: int
    size: Size
    """Of the largest batch."""
    trained: int
    """Trained weights."""
    total: int
    """Weights of the denoiser."""
    most_with_swapped: Callable[[int], float] = field(repr=False, compare=False)
    """Bytes on the fullest GPU if so many blocks were swapped."""
    num_blocks: int

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

    @property
    def most(self) -> float:
        """Bytes on the fullest GPU while training."""
        return max(stage.memory.total for stage in self.stages)

    @property
    def main(self) -> float:
        """Bytes of main memory that all processes take for training."""
        return sum(sum(stage.memory.main.values()) for stage in self.stages) * self.data_parallel

    def lines(self) -> list[str]:
        """In words."""
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
            text += stage.lines(number)
        return text

    def least_swapped(self, gpu_bytes: float) -> int | None:
        """The least blocks_to_swap with which training fits; None if it never does."""
        low, high = 0, self.num_blocks
        if self.most_with_swapped(high) > gpu_bytes:
            return None
        while low < high:  # more swapped blocks never take more, but for the pool of the first two
            middle = (low + high) // 2
            low, high = (low, middle) if self.most_with_swapped(middle) <= gpu_bytes else (middle + 1, high)
        return low


def verdict(plan: Plan, besides: Mapping[str, float], gpu_bytes: float | None) -> list[str]:
    """Whether it fits.

    Args:
        besides: Bytes on a GPU at other times than while training, by what is done then.
        gpu_bytes: Memory of the smallest GPU, if it is known.
    """
    text = []
    if gpu_bytes is not None:
        for what, needed in {"training": plan.most, **besides}.items():
            fits = needed <= gpu_bytes
            line = f"{'fits' if fits else 'does not fit'}: {what}, {needed / GIB:.1f} of {gpu_bytes / GIB:.1f} GiB"
            text.append(line if fits else f"{line}; {_remedy(plan, what, gpu_bytes)}")
    here = psutil.virtual_memory().total
    if plan.main > here:
        text.append(
            f"does not fit: {plan.main / GIB:.1f} GiB in the main memory of all processes, of which this machine has "
            f"{here / GIB:.1f}; swap fewer blocks, or leave out optimizer.offload and ema_on_cpu"
        )
    return text


def _remedy(plan: Plan, what: str, gpu_bytes: float) -> str:
    if what.startswith("encoding"):
        return "use model.text_encoder_dtype = 'float8' or 'nf4'"
    if what.startswith("drawing"):
        return "draw smaller pictures or fewer frames, or leave [sample] out"
    count = plan.least_swapped(gpu_bytes)
    swapping = f"blocks_to_swap = {count} would do, or use" if count else "use"
    return (
        f"{swapping} activation_checkpointing, transformer_dtype = 'float8' or 'nf4', an 8-bit optimizer, more "
        "pipeline_stages or smaller pictures"
    )


def smallest_gpu() -> float | None:
    """Bytes of the smallest GPU here; None without one."""
    count = torch.cuda.device_count()
    return min((torch.cuda.get_device_properties(n).total_memory for n in range(count)), default=None)
