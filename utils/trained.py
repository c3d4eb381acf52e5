"""What a stage trains: parameters by name, the copies that the optimizers step, and the optimizers.

How bfloat16 weights are trained: optimizers that keep a Kahan sum of their own (`optimizers.KAHAN`) step them
as they are; all others step float32 master copies, and gradients are summed in float32, too. float32 weights
(adapters, and what a family keeps in float32) are stepped as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .config import SettingsError
from .ema import Ema
from .gradients import Gradients
from .tensor_file import Promise, TensorFiles

Build = Callable[[Mapping[str, nn.Parameter]], list[torch.optim.Optimizer]]


@dataclass(frozen=True)
class Share:
    """The data-parallel ranks that train the same weights, and which of them this is."""

    rank: int = 0
    size: int = 1
    group: Any = None


class Trained:
    """The weights of this stage and how they are stepped.

    Args:
        names: Names in the denoiser of at least the parameters of ``module``.
        module: The stage.
        build: Makes the optimizers for the parameters that they step, by name.
        kahan: The optimizers step bfloat16 weights as they are.
        offload: Masters and optimizer state live in main memory, and are stepped there.
        owners: ZeRO 1: the ranks among which stepping is shared out, each whole parameter to one of them.
    """

    collective = False
    """Whether all ranks take part when one writes."""

    def __init__(
        self,
        names: Mapping[nn.Parameter, str],
        module: nn.Module,
        build: Build,
        *,
        kahan: bool = False,
        offload: bool = False,
        owners: Share | None = None,
    ) -> None:
        self.all = {names[p]: p for p in module.parameters()}
        self.parameters = {name: p for name, p in self.all.items() if p.requires_grad}
        self.share = owners or Share()
        self.owner = shared_out(self.parameters, self.share.size)
        self.stepped = {
            name: _stepped(p, kahan, offload)
            for name, p in self.parameters.items()
            if self.owner[name] == self.share.rank
        }
        self.gradients = self._bind_gradients(wide=not kahan and not offload)
        self.optimizers = build(self.stepped)
        self.ema: Ema | None = None
        """Their moving average, where one is kept."""

    def _bind_gradients(self, wide: bool) -> Gradients:
        """Where gradients are summed, and what the optimizers find them in.

        Args:
            wide: Sum them in float32.
        """
        gradients = Gradients(self.parameters, torch.float32 if wide else None)
        for name, stepped in self.stepped.items():
            view = gradients.views[name]
            apart = stepped.device != view.device or stepped.dtype != view.dtype
            if apart:
                stepped.grad = torch.empty_like(stepped)
        return gradients

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The groups of all optimizers: what has a learning rate of its own."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @torch.no_grad()
    def step(self) -> None:
        """One update from the gradients as they are."""
        for name, stepped in self.stepped.items():
            view = self.gradients.views[name]
            if stepped.grad is None:
                stepped.grad = view
            else:
                stepped.grad.copy_(view, non_blocking=True)
        if any(p.is_pinned() for p in self.stepped.values()):
            torch.cuda.current_stream().synchronize()  # the gradients are here
        for optimizer in self.optimizers:
            optimizer.step()
        for name, stepped in self.stepped.items():
            if stepped.grad is self.gradients.views[name]:
                stepped.grad = None  # else the next pass would add to it one by one
        if self.ema:
            self.ema.update()
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Puts the stepped values where the model computes with them, on all ranks that share them."""
        for name, stepped in self.stepped.items():
            if stepped is not self.parameters[name]:
                self.parameters[name].copy_(stepped, non_blocking=True)
        if self.share.size > 1:
            for name, parameter in self.parameters.items():
                dist.broadcast(parameter.data, group=self.share.group, group_src=self.owner[name])

    def curves(self) -> dict[str, float]:
        """What optimizers that find their own learning rate have found."""
        found = {}
        if distances := [float(group["d"]) for group in self.groups if "d" in group]:
            found["prodigy_d"] = max(distances)
        if rates := self.rates():
            found["automagic_avg_lr"] = (sum(r.sum() for r in rates) / sum(r.numel() for r in rates)).item()  # type: ignore[union-attr]
        return found

    def rates(self) -> list[torch.Tensor]:
        """The learning rate of every weight, of optimizers that have one for each."""
        states = [optimizer.state[p] for optimizer in self.optimizers for p in optimizer.state]
        return [state["rates"] for state in states if "rates" in state]

    @contextmanager
    def averaged(self, ema: bool = False) -> Iterator[None]:
        """The weights that are for use: those of schedule-free optimizers are averages; others stay as they are.

        Args:
            ema: The moving average instead, where there is one.
        """
        modes = [optimizer for optimizer in self.optimizers if hasattr(optimizer, "eval")]
        average = self.ema if ema and self.ema and self.ema.has_begun else None
        changed = bool(modes or average)
        before = {name: p.detach().clone() for name, p in self.stepped.items()} if changed else {}
        for optimizer in modes:
            optimizer.eval()  # type: ignore[attr-defined]
        if average:
            average.put_in()
        if changed:
            self.publish()
        try:
            yield
        finally:
            for optimizer in modes:
                optimizer.train()  # type: ignore[attr-defined]
            for name, value in before.items():  # exactly as they were: going there and back rounds
                self.stepped[name].data.copy_(value)
            if changed:
                self.publish()

    # -- out and in -----------------------------------------------------------------------------------

    def promise(self, name: str, value: torch.Tensor, dtype: torch.dtype | None = None) -> Promise:
        """``value``, which belongs to parameter ``name``, to be written."""
        return Promise.of(value, dtype)

    def mine(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """What this rank needs of ``value``, which was written for parameter ``name``."""
        return value

    def weights(self) -> dict[str, torch.Tensor]:
        """Copies on the CPU of what is trained, as precise as it is stepped."""
        return {name: self.stepped.get(name, p).detach().cpu().clone() for name, p in self.parameters.items()}

    def masters(self) -> dict[str, Promise]:
        """What this rank steps, to be written."""
        return {name: self.promise(name, p) for name, p in self.stepped.items()}

    def everything(self, dtype: torch.dtype, float32: Sequence[str] = ()) -> dict[str, Promise]:
        """All weights of the stage as ``dtype``, those with one of ``float32`` in their name in float32."""
        found = {}
        for name, parameter in self.all.items():
            value = self.stepped.get(name, parameter)
            kept = any(part in name for part in float32)
            found[name] = self.promise(name, value, torch.float32 if kept else dtype)
        return found

    def state(self) -> tuple[dict[str, Promise], dict[str, Any]]:
        """Optimizer state: tensors named ``<parameter>|<key>``, and the rest as plain values."""
        tensors: dict[str, Promise] = {}
        rest: dict[str, Any] = {"values": {}, "groups": []}
        names = {p: name for name, p in self.stepped.items()}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                values = {key: value for key, value in group.items() if key != "params"}
                rest["groups"].append({"names": [names[p] for p in group["params"]], "values": values})
                for parameter in group["params"]:
                    name, state = names[parameter], optimizer.state.get(parameter, {})
                    for key, value in state.items():
                        if isinstance(value, torch.Tensor):
                            tensors[f"{name}|{key}"] = self.promise(name, value)
                    plain = {key: value for key, value in state.items() if not isinstance(value, torch.Tensor)}
                    rest["values"][name] = plain
        return tensors, rest

    def load(self, weights: TensorFiles, state: TensorFiles, rest: Mapping[str, Any]) -> None:
        """Takes over this rank's part of a checkpoint, whatever ranks and stages wrote it.

        Raises:
            SettingsError: The checkpoint was made with other settings of model or adapter.
        """
        for name, parameter in self.parameters.items():
            if name not in weights or weights.shape(name) != tuple(parameter.shape):
                raise SettingsError(
                    f"resume_from_checkpoint: the checkpoint has no '{name}' of shape {list(parameter.shape)}; "
                    "resume with the model and adapter settings that it was made with"
                )
            value = self.mine(name, weights.read(name))
            for target in (self.stepped.get(name), parameter):
                if target is not None and target.shape == value.shape:
                    target.data.copy_(value)
        keys: dict[str, list[str]] = {}
        for full in state.names():
            name, _, key = full.rpartition("|")
            keys.setdefault(name, []).append(key)
        groups = {name: group["values"] for group in rest["groups"] for name in group["names"]}
        names = {p: name for name, p in self.stepped.items()}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                self._load_group(group, next((groups[names[p]] for p in group["params"] if names[p] in groups), {}))
                for parameter in group["params"]:
                    name = names[parameter]
                    found = dict(rest["values"].get(name, {}))
                    for key in keys.get(name, ()):
                        # torch's optimizers keep the number of steps on the CPU unless their kernels count it
                        here = key != "step" or group.get("fused") or group.get("capturable")
                        value = self.mine(name, state.read(f"{name}|{key}"))
                        found[key] = value.to(parameter.device if here else "cpu", copy=True)
                    if found:
                        optimizer.state[parameter] = found

    @staticmethod
    def _load_group(group: dict[str, Any], values: Mapping[str, Any]) -> None:
        for key, value in values.items():
            if key in ("lr", "initial_lr"):
                continue
            if isinstance(value, torch.Tensor) and isinstance(group.get(key), torch.Tensor):
                value = value.to(group[key].device)
            group[key] = value


def _stepped(parameter: nn.Parameter, kahan: bool, offload: bool) -> nn.Parameter:
    """The parameter itself, or its float32 copy."""
    if offload:
        value = parameter.detach().to("cpu", torch.float32, copy=True)
        return nn.Parameter(value.pin_memory() if torch.cuda.is_available() else value)
    if kahan or parameter.dtype == torch.float32:
        return parameter
    return nn.Parameter(parameter.detach().float())


def shared_out(parameters: Mapping[str, nn.Parameter], num_owners: int) -> dict[str, int]:
    """An owner for each parameter, so that all own nearly the same number of weights."""
    loads = [0] * num_owners
    owner = {}
    for name, parameter in sorted(parameters.items(), key=lambda item: (-item[1].numel(), item[0])):
        owner[name] = loads.index(min(loads))
        loads[owner[name]] += parameter.numel()
    return owner
