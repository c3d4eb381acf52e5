"""What a training step computes, and how much of a step's time the GPU does it."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

PEAK_TFLOPS = {"NVIDIA H200": 790.0, "NVIDIA H100": 790.0}
"""Measured dense bf16 matrix rates, by the start of the GPU's name."""


def step_flops(family: Any, size: tuple[int, int, int], batch: int, adapter: bool) -> float:
    """Floating-point operations that a step needs: nothing is computed twice, and adapters count nothing.

    A backward pass multiplies matrices twice as often as the forward pass, or as often where weights are frozen;
    attention has no weights.

    Args:
        size: Width, height and frames in pixels.
        batch: Samples of a step.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    layers = family.layers(family.build_denoiser().to("meta").float())
    inputs = family.collate([family.blank_example(*size)] * batch).inputs
    tensors = tuple(value.to("meta", torch.float32 if value.is_floating_point() else value.dtype) for value in inputs)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for layer in layers:
            result = layer.forward(SimpleNamespace(**layer.submodules), *tensors)
            tensors = result if isinstance(result, tuple) else (result,)
    counts = counter.get_flop_counts()["Global"]
    attention = sum(
        value for operator, value in counts.items() if "bmm" in str(operator) or "dot_prod" in str(operator)
    )
    return float((sum(counts.values()) - attention) * (2 if adapter else 3) + attention * 3)


def utilisation(flops: float, seconds: float, device: str) -> float | None:
    """Share of the GPU's peak; None for a GPU whose peak nobody measured."""
    peak = next((rate for name, rate in PEAK_TFLOPS.items() if device.startswith(name)), None)
    return None if peak is None else flops / seconds / peak / 1e12


class StepProfile:
    """Kernels of a training's last steps."""

    STEPS = 2
    _APART = ("adam", "multi_tensor", "memcpy", "memset", "nccl")

    def __init__(self, num_steps: int) -> None:
        import torch

        self._first, self._step = num_steps - self.STEPS, 0
        self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self._wall = 0.0

    def around(self, run: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """``run``, which trains one step."""
        import torch

        def profiled(batches: Any) -> Any:
            if self._step == self._first:
                torch.cuda.synchronize()
                self._profiler.start()
                self._wall = time.perf_counter()
            loss = run(batches)
            self._step += 1
            if self._step == self._first + self.STEPS:
                torch.cuda.synchronize()
                self._wall = (time.perf_counter() - self._wall) / self.STEPS
                self._profiler.stop()
            return loss

        return profiled

    def rows(self) -> list[tuple[float, int, str]]:
        """Milliseconds and number in a step, and the kernel's name; the longest first."""
        events = (event for event in self._profiler.key_averages() if event.self_device_time_total)
        rows = [
            (event.self_device_time_total / 1000 / self.STEPS, event.count // self.STEPS, event.key) for event in events
        ]
        return sorted(rows, reverse=True)

    def gaps(self) -> list[tuple[float, str, str]]:
        """Milliseconds of a step in which the GPU did nothing, by the kernels before and after; the longest first."""
        import torch

        events = self._profiler.profiler.kineto_results.events()
        kernels = sorted(
            (event.start_ns(), event.start_ns() + event.duration_ns(), event.name())
            for event in events
            if event.device_type() == torch.autograd.DeviceType.CUDA
        )
        idle: dict[tuple[str, str], float] = {}
        end, last = kernels[0][0], ""
        for start, stop, name in kernels:
            if start > end:
                idle[last, name] = idle.get((last, name), 0.0) + (start - end) / 1e6 / self.STEPS
            if stop > end:
                end, last = stop, name
        return sorted(((milliseconds, *names) for names, milliseconds in idle.items()), reverse=True)

    def outside(self) -> float:
        """Share of the time in which no kernel of the model ran: the GPU waited, or the optimizer stepped."""
        inside = sum(ms for ms, _, name in self.rows() if not any(part in name.lower() for part in self._APART))
        return 1 - inside / 1000 / self._wall
