"""ZeRO 2 and 3: each rank holds a share of every weight, its gradient and its optimizer state.

torch's `fully_shard` gathers the weights of a link before it computes. With ZeRO 2 they stay until its backward
pass is done, with ZeRO 3 they are let go of in between. Shares are rows of the weight, in float32: they are the
masters of what the model computes with. What the family keeps in float32 is not shared out: it is small.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from .gradients import Gradients
from .tensor_file import Promise
from .trained import Build, Share, Trained


class Sharding:
    """Shares out links over the ranks of a group as they are loaded.

    Args:
        dtype: What the model computes in.
        keep_gathered: ZeRO 2.
        float32: Parameters with one of these in their name are not shared out.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, keep_gathered: bool, float32: Sequence[str]) -> None:
        everybody: Any = dist.group.WORLD
        mesh = DeviceMesh.from_group(everybody, device.type)
        self._float32 = float32
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        self._options: dict[str, Any] = {
            "mesh": mesh,
            "reshard_after_forward": not keep_gathered,
            "mp_policy": policy,
        }
        self._whole: set[nn.Parameter] = set()

    def share_out(
        self,
        links: Sequence[nn.Module],
        load: Callable[[nn.Module], Any],
        names: Callable[[], Mapping[nn.Parameter, str]],
        trained: Container[str],
    ) -> None:
        """Loads each link and keeps this rank's share of it, so that one link at most is whole in memory.

        Args:
            load: Reads the weights of a link.
            names: Names of the parameters as they are.
            trained: Names of those that are trained.
        """
        for link in links:
            load(link)
            named = names()
            for parameter in link.parameters():
                parameter.requires_grad_(named[parameter] in trained)
                if any(part in named[parameter] for part in self._float32):
                    self._whole.add(parameter)
                else:
                    parameter.data = parameter.data.float()
            if any(parameter not in self._whole for parameter in link.parameters()):
                fully_shard(link, ignored_params=self._whole & set(link.parameters()), **self._options)

    def join(self, chain: nn.Module) -> None:
        """Lets the links of ``chain`` be gathered in turn, each while the one before computes."""
        fully_shard(chain, ignored_params=self._whole, **self._options)


class ShardedGradients(Gradients):
    """Gradients that `fully_shard` has averaged and shared out."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], group: Any) -> None:
        self.views: dict[str, torch.Tensor] = {}
        self._parameters, self._group = list(parameters.values()), group

    def _local(self) -> Iterator[tuple[torch.Tensor, bool]]:
        """Each gradient, and whether it is a share."""
        for parameter in self._parameters:
            if parameter.grad is not None:
                yield local(parameter.grad), isinstance(parameter.grad, DTensor)

    def zero(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def average(self, group: Any) -> None:
        for grad, is_share in self._local():
            if not is_share:
                dist.all_reduce(grad, group=group)
                grad /= dist.get_world_size(group)

    def squared_norm(self, device: torch.device) -> torch.Tensor:
        shares, whole = torch.zeros((), device=device), torch.zeros((), device=device)
        for grad, is_share in self._local():
            square = torch.linalg.vector_norm(grad, dtype=torch.float32).square()
            shares, whole = (shares + square, whole) if is_share else (shares, whole + square)
        dist.all_reduce(shares, group=self._group)
        return shares + whole

    def scale(self, factor: torch.Tensor) -> None:
        for grad, _ in self._local():
            grad.mul_(factor)


class ShardedTrained(Trained):
    """What this rank has of weights that are shared out."""

    collective = True

    def __init__(self, names: Mapping[nn.Parameter, str], module: nn.Module, build: Build) -> None:
        self.all = {names[p]: p for p in module.parameters()}
        self.parameters = {name: p for name, p in self.all.items() if p.requires_grad}
        self.share = Share()
        self.owner = dict.fromkeys(self.parameters, 0)
        self.stepped = {name: nn.Parameter(local(p.detach())) for name, p in self.parameters.items()}
        self.gradients = ShardedGradients(self.parameters, dist.group.WORLD)
        self.optimizers = build(self.stepped)
        self.ema = None

    @torch.no_grad()
    def step(self) -> None:
        for name, parameter in self.parameters.items():
            self.stepped[name].grad = None if parameter.grad is None else local(parameter.grad)
        for optimizer in self.optimizers:
            optimizer.step()
        if self.ema:
            self.ema.update()

    def publish(self) -> None:
        """Nothing to do: what is stepped is what the model gathers."""

    def promise(self, name: str, value: torch.Tensor, dtype: torch.dtype | None = None) -> Promise:
        """The whole of what ranks have shares of; all ranks make it together."""
        whole = self.all[name]
        if not isinstance(whole, DTensor) or value.shape != local(whole).shape:
            return Promise.of(value, dtype)
        shares = DTensor.from_local(
            value.detach(),
            whole.device_mesh,
            whole.placements,
            run_check=False,
            shape=whole.shape,
            stride=whole.stride(),
        )
        return Promise(tuple(whole.shape), dtype or value.dtype, shares.full_tensor)

    def mine(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """This rank's rows of a whole tensor."""
        whole = self.all[name]
        if not isinstance(whole, DTensor) or value.shape != whole.shape:
            return value
        rows = -(-whole.shape[0] // whole.device_mesh.size())
        start = min(rows * whole.device_mesh.get_local_rank(), whole.shape[0])
        return value[start : start + rows]

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: promise.make().cpu() for name, promise in self.masters().items()}


@contextmanager
def gathered(links: Sequence[nn.Module]) -> Iterator[None]:
    """Within it modules of links can be called by themselves, without gradients: a link is whole from the first call
    of one of its modules until one of another link is called. All ranks make the same calls."""
    shared: list[Any] = [link for link in links if isinstance(link, FSDPModule)]
    handles: list[Any] = []
    current: Any = None

    def before(link: Any) -> None:
        nonlocal current
        if link is not current:
            if current is not None:
                current.reshard()
            link.unshard()
            current = link

    for link in shared:
        if any(isinstance(module, nn.ParameterList) for module in link.children()):
            link.unshard()  # the library's forward uses those itself
            continue
        hooks = [module.register_forward_pre_hook(lambda *_, link=link: before(link)) for module in link.children()]
        handles += hooks
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for link in shared:
            link.reshard()


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's share of a tensor, in the same memory; all of one that is not shared out."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
