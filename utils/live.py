"""The denoiser in training as a diffusers pipeline calls it, on one stage or over several.

With pipeline stages each process holds the weights of its own stage alone. All processes of a pipeline then run the
library's own forward together: where it calls a module of another stage, a stand-in receives the output that the
module's owner computes and broadcasts. So every family draws over stages without a line of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils import _pytree as pytree

from ..models.base import Layer


@dataclass(frozen=True)
class Stages:
    """The processes of one pipeline and what each holds."""

    owners: Mapping[nn.Module, int]
    """Stage of each module of the chain that has parameters or buffers."""
    mine: int
    """This process's stage."""
    group: Any
    """The process group of the pipeline."""
    ranks: Sequence[int]
    """Global rank of each stage."""


def owners_of(layers: Sequence[Layer], bounds: Sequence[int]) -> dict[nn.Module, int]:
    """Which stage has each module of a chain that is cut at ``bounds``; modules without weights are everywhere."""
    return {
        module: stage
        for stage, (start, stop) in enumerate(itertools.pairwise(bounds))
        for layer in layers[start:stop]
        for module in layer.submodules.values()
        if next(module.parameters(), None) is not None or next(module.buffers(), None) is not None
    }


class Live(nn.Module):
    """Passes for the denoiser; tells the precision that it computes in, whatever its weights are stored in.

    It computes only within `ready`. All processes of a pipeline enter it together and make the same calls. Of a
    denoiser that is a ModuleDict of networks, each passes for itself in the same way.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        dtype: torch.dtype,
        device: torch.device,
        hooked: Callable[[], AbstractContextManager[None]],
        stages: Stages | None = None,
    ) -> None:
        """``hooked``: makes a context within which the modules of this stage can be called by themselves."""
        super().__init__()
        self.denoiser = denoiser
        self._dtype, self._device, self._hooked, self._stages = dtype, device, hooked, stages

    @property
    def dtype(self) -> torch.dtype:
        """What the denoiser computes in."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._device

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            denoiser = super().__getattr__("denoiser")
        value = getattr(denoiser, name)
        if isinstance(denoiser, nn.ModuleDict) and isinstance(value, nn.Module):  # one of several networks
            return Live(value, self._dtype, self._device, self._hooked)
        return value

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the denoiser's own."""
        return self.denoiser(*args, **kwargs)

    @contextmanager
    def ready(self) -> Iterator[Live]:
        """Within it the denoiser draws: no dropout, no gradients, nothing compiled anew, no random state changed."""
        modes = {module: module.training for module in self.denoiser.modules()}
        devices = [self._device] if self._device.type == "cuda" else []
        try:
            self.denoiser.eval()
            with (
                self._hooked(),
                torch.no_grad(),
                torch.random.fork_rng(devices),
                torch.compiler.set_stance("force_eager"),
            ):
                if self._stages is None:
                    yield self
                else:
                    with _joined(self.denoiser, self._stages):
                        yield self
        finally:
            for module, training in modes.items():
                module.training = training


class _StandIn(nn.Module):
    """In the place of a module whose weights another process has."""

    def __init__(self, absent: nn.Module, stages: Stages, owner: int) -> None:
        super().__init__()
        self._absent = [absent]  # in a list, so that it is no part of this module
        self._stages, self._owner = stages, owner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_absent"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the owner's module gives for the same arguments."""
        return _receive(self._stages, self._owner)


@contextmanager
def _joined(denoiser: nn.Module, stages: Stages) -> Iterator[None]:
    """Within it modules of other stages are stand-ins, and those of this one tell the others what they give."""
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    hooks: list[Any] = []
    loose: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for name, module in list(denoiser.named_modules()):
            if module not in stages.owners:
                continue
            owner = stages.owners[module]
            if owner == stages.mine:
                hooks.append(module.register_forward_hook(_teller(stages)))
            else:
                parent, _, leaf = name.rpartition(".")
                holder = denoiser.get_submodule(parent)
                replaced.append((holder, leaf, module))
                setattr(holder, leaf, _StandIn(module, stages, owner))
        loose += _fetch_loose(denoiser, stages)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for holder, leaf, parameter in loose:
            setattr(holder, leaf, parameter)
        for holder, leaf, module in replaced:
            setattr(holder, leaf, module)


def _fetch_loose(denoiser: nn.Module, stages: Stages) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Parameters that the library's forward uses itself, outside any module of the chain, come from their owner.

    A family hands those to the chain in modules of its own. Gives what was replaced, to be put back.
    """
    owner_of = {parameter: stage for module, stage in stages.owners.items() for parameter in module.parameters()}
    told = {parameter for module in denoiser.modules() if module in stages.owners for parameter in module.parameters()}
    replaced = []
    for name, parameter in list(denoiser.named_parameters()):
        if parameter in told or parameter not in owner_of:
            continue
        parent, _, leaf = name.rpartition(".")
        holder, owner = denoiser.get_submodule(parent), owner_of[parameter]
        if owner == stages.mine:
            _tell(stages, parameter.detach())
        else:
            replaced.append((holder, leaf, parameter))
            setattr(holder, leaf, nn.Parameter(_receive(stages, owner), requires_grad=False))
    return replaced


@dataclass(frozen=True)
class _Announced:
    """A tensor that follows."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str


def _teller(stages: Stages) -> Any:
    return lambda module, inputs, output: _tell(stages, output)


def _tell(stages: Stages, value: Any) -> None:
    """Broadcasts any structure of tensors and plain values."""
    box = [pytree.tree_map_only(torch.Tensor, lambda t: _Announced(tuple(t.shape), t.dtype, t.device.type), value)]
    source = stages.ranks[stages.mine]
    dist.broadcast_object_list(box, source, stages.group)
    for tensor in pytree.tree_leaves(value):
        if isinstance(tensor, torch.Tensor):
            dist.broadcast(tensor.contiguous(), source, stages.group)


def _receive(stages: Stages, owner: int) -> Any:
    box: list[Any] = [None]
    source = stages.ranks[owner]
    dist.broadcast_object_list(box, source, stages.group)

    def fetch(announced: _Announced) -> torch.Tensor:
        device = torch.device(announced.device, torch.cuda.current_device()) if announced.device == "cuda" else "cpu"
        tensor = torch.empty(announced.shape, dtype=announced.dtype, device=device)
        dist.broadcast(tensor, source, stages.group)
        return tensor

    return pytree.tree_map_only(_Announced, fetch, box[0])
