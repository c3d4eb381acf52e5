"""What the weights of a stage and their training take, by shapes alone: on the GPU and in main memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..models.base import Family, Layer
from .activations import parameters_of
from .offload import frozen_bytes, pool_bytes
from .optimizers import build_optimizers, is_offloaded, keeps_kahan_sums
from .settings import TrainSettings
from .trained import shared_out

LARGE = 2**16
"""Weights from which a smaller stand-in tells how much an optimizer keeps for each."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of one process that stay for the whole training, and what weights take besides while they are used."""

    weights: float
    """On the GPU, swapped ones where they are used included."""
    adapter: float
    gradients: float
    optimizer: float
    """With the float32 masters of weights that are stepped."""
    average: float
    """The moving average."""
    gathered: float
    """ZeRO 2 and 3: weights and gradients that are whole while they are used."""
    stepped: float
    """Of weights that are stepped, as another copy of them would take."""
    main: Mapping[str, float] = field(default_factory=dict)
    """In main memory, by what it is."""
    num_swapped: int = 0

    @property
    def total(self) -> float:
        return self.weights + self.adapter + self.gradients + self.optimizer + self.average + self.gathered


@dataclass(frozen=True)
class _Share:
    """What one rank has of a trained weight."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    """In which it is stepped."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class Counter:
    """Counts for a denoiser whose weights are on the meta device, with what is trained chosen.

    Args:
        names: Of its parameters.
        num_ranks: That train the same weights.
    """

    def __init__(self, settings: TrainSettings, family: Family, names: Mapping[Tensor, str], num_ranks: int) -> None:
        self._settings, self._family, self._names, self._ranks = settings, family, names, num_ranks
        self._kahan = keeps_kahan_sums(settings.optimizer)
        self._offload = is_offloaded(settings.optimizer)
        self._sharded = settings.zero_stage >= 2
        self.sums_wide = not self._kahan and not self._offload
        """Gradients are summed in float32."""
        self._averages_in_main = settings.ema_on_cpu or self._offload

    def stage(self, mine: Sequence[Layer], swapped: Container[str] = ()) -> Footprint:
        """Of the stage that has layers ``mine``, of which those named ``swapped`` wait in main memory."""
        waiting = [layer for layer in mine if layer.name in swapped]
        sizes = [size for layer in waiting if (size := frozen_bytes(layer))]
        parameters = parameters_of(mine)
        buffers = {b for layer in mine for module in layer.submodules.values() for b in module.buffers()}
        trained = {self._names[p]: p for p in parameters if p.requires_grad}
        apart = {p for layer in waiting for p in parameters_of([layer]) if not p.requires_grad}
        apart_buffers = {b for layer in waiting for m in layer.submodules.values() for n, b in m.named_buffers()
                         if n.endswith("weight_scale")}  # fmt: skip
        here = sum(self._held(p) for p in parameters if p not in apart) + pool_bytes(sizes)
        here += sum(buffer.nbytes for buffer in buffers - apart_buffers)
        adapter = sum(p.nbytes for p in trained.values()) if self._settings.adapter else 0
        stepped = self._stepped(trained)
        masters = sum(s.numel * s.dtype.itemsize for n, s in stepped.items() if self._has_master(trained[n]))
        state = state_bytes(self._settings, list(stepped.values()))
        average = 4 * sum(share.numel for share in stepped.values()) if self._settings.ema_decay else 0
        in_main = {
            "swapped blocks": float(sum(sizes)),
            # masters, the gradients that are copied to them, and what the optimizer keeps
            "optimizer": 2.0 * masters + state if self._offload else 0.0,
            "average": float(average) if self._averages_in_main else 0.0,
        }
        return Footprint(
            weights=float(here - adapter),
            adapter=float(adapter),
            gradients=float(self._gradients(trained, stepped)),
            optimizer=0.0 if self._offload else masters + state,
            average=0.0 if self._averages_in_main else float(average),
            gathered=float(self._gathered(mine)),
            stepped=float(sum(share.numel * share.dtype.itemsize for share in stepped.values())),
            main={what: size for what, size in in_main.items() if size},
            num_swapped=len(sizes),
        )

    def _is_whole(self, parameter: Tensor) -> bool:
        return any(part in self._names[parameter] for part in self._family.float32)

    def _rows(self, parameter: Tensor) -> tuple[int, ...]:
        """Shape of this rank's share with ZeRO 2 and 3."""
        return (math.ceil(parameter.shape[0] / self._ranks), *parameter.shape[1:])

    def _held(self, parameter: Tensor) -> int:
        if not self._sharded or self._is_whole(parameter):
            return parameter.nbytes
        return 4 * math.prod(self._rows(parameter))  # in float32, the master at once

    def _has_master(self, parameter: Tensor) -> bool:
        return self._offload or not (self._sharded or self._kahan or parameter.dtype == torch.float32)

    def _stepped(self, trained: Mapping[str, nn.Parameter]) -> dict[str, _Share]:
        """What the rank that steps most steps."""
        if self._sharded:
            return {n: _Share(tuple(p.shape) if self._is_whole(p) else self._rows(p), torch.float32)
                    for n, p in trained.items()}  # fmt: skip
        dtypes = {n: p.dtype if self._kahan and not self._offload else torch.float32 for n, p in trained.items()}
        owner = shared_out(trained, self._ranks if self._settings.zero_stage == 1 else 1)
        loads: dict[int, int] = {}
        for name, rank in owner.items():
            loads[rank] = loads.get(rank, 0) + trained[name].numel()
        most = max(loads, key=lambda rank: loads[rank], default=0)
        return {n: _Share(tuple(p.shape), dtypes[n]) for n, p in trained.items() if owner[n] == most}

    def _gradients(self, trained: Mapping[str, nn.Parameter], stepped: Mapping[str, _Share]) -> int:
        if self._settings.optimizer.gradient_release:  # one at a time, and as it is stepped
            return max((p.nbytes + 4 * p.numel() for p in trained.values()), default=0)
        if self._sharded:
            return sum(4 * share.numel for share in stepped.values())
        return sum(p.numel() * (4 if self.sums_wide else p.dtype.itemsize) for p in trained.values())

    def _gathered(self, mine: Sequence[Layer]) -> float:
        """With ZeRO 2 all weights are whole until the backward pass, with ZeRO 3 one link's at work and the next
        one's; and beside each one's that is on its way, what is sent or received; and a link's gradients, in the
        model's precision and as float32 to be sent."""
        if not self._sharded:
            return 0.0
        links = [sum(p.numel() for p in parameters_of([layer]) if not self._is_whole(p)) for layer in mine]
        size = self._family.dtype.itemsize
        whole = sum(links) if self._settings.zero_stage == 2 else max(map(sum, itertools.pairwise(links)))
        return size * whole + max(links) * (size + size + 4)


def state_bytes(settings: TrainSettings, shares: Sequence[_Share]) -> float:
    """What the optimizer keeps for such weights: the real one steps them, or stand-ins for large ones, once."""
    kinds = list(dict.fromkeys(shares))
    stand_ins = {
        f"{n}": nn.Parameter(torch.zeros(_small(kind.shape), dtype=kind.dtype)) for n, kind in enumerate(kinds)
    }
    for parameter in stand_ins.values():
        parameter.grad = torch.zeros_like(parameter)
    lasting = settings.optimizer.model_copy(update={"offload": False, "gradient_release": False})
    optimizers = build_optimizers(lasting, stand_ins)
    for optimizer in optimizers:
        optimizer.step()
    kept = {}
    for kind, parameter in zip(kinds, stand_ins.values(), strict=True):
        tensors = [v for o in optimizers for v in o.state.get(parameter, {}).values() if isinstance(v, Tensor)]
        kept[kind] = sum(t.nbytes for t in tensors) * kind.numel / max(1, parameter.numel())
    return float(sum(kept[share] for share in shares))


def _small(shape: Sequence[int]) -> list[int]:
    """The same number of dimensions, but no more weights than `LARGE`."""
    sides = list(shape)
    while math.prod(sides) > LARGE:
        longest = sides.index(max(sides))
        sides[longest] = math.ceil(sides[longest] / 2)
    return sides
