"""The processes of a run and what they say to each other besides training."""

from __future__ import annotations

import importlib
import os
import re
import socket
import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.distributed import distributed_c10d

from .config import SettingsError

JOIN_SECONDS = 900.0
"""In which all processes have to meet; importing libraries over a busy network may take minutes."""


@dataclass(frozen=True)
class World:
    """This process among all of the run."""

    rank: int
    size: int
    device: torch.device
    control: Any
    """A gloo group of all ranks, for small messages between CPUs."""

    def stage(self, num_stages: int) -> int:
        """The pipeline stage that this process has, of ``num_stages``: DeepSpeed gives neighbours the same."""
        return self.rank * num_stages // self.size

    def barrier(self) -> None:
        """Waits for all ranks."""
        dist.barrier(group=self.control)

    def tell(self, word: str) -> None:
        """Lets all ranks know, whatever they do; see `was_told`."""
        distributed_c10d._get_default_store().set(word, "1")

    def was_told(self, word: str) -> bool:
        """Whether any rank has said it; unlike the rest, no rank waits for another."""
        return bool(distributed_c10d._get_default_store().check([word]))

    def leave(self) -> None:
        """Ends the connections; NCCL warns of those that a process takes along when it exits."""
        dist.destroy_process_group()

    def share(self, value: Any) -> Any:
        """Rank 0's value, on every rank. An exception that rank 0 gives is raised on all."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        if isinstance(box[0], BaseException):
            raise box[0]
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank, on every rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def all_see(self, folder: Path) -> None:
        """Sees that every machine has ``folder``, into which each writes its part.

        Raises:
            SettingsError: One has not.
        """
        blind = sorted({host for host, seen in self.gather((socket.gethostname(), folder.is_dir())) if not seen})
        if blind:
            raise SettingsError(
                f"output_dir: {', '.join(blind)} cannot see '{folder}'; with several machines choose a folder that all "
                "of them share under the same path, and the same for cache_dir, models and pictures"
            )

    def union(self, bits: int) -> int:
        """The bits that any rank sets."""
        tensor = torch.tensor([bits])
        dist.all_reduce(tensor, op=dist.ReduceOp.BOR, group=self.control)
        return int(tensor.item())


def join_world() -> World:
    """Joins the processes that a launcher started (DeepSpeed's, torchrun), or makes a world of one."""
    defaults = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    # On the CPU DeepSpeed 0.19.8 compiles a shared-memory collective at start, which needs a compiler; gloo does
    # the same work. ("import ... as" would find the torch that deepspeed.comm imports.)
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
    accelerator = get_accelerator()
    local = int(os.environ["LOCAL_RANK"])
    device = torch.device(accelerator.device_name(local) if accelerator.device_name() != "cpu" else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        _switch_off_what_gpus_lack()
        # Stages send and receive in the same order, so that one queue for both is enough.
        os.environ.setdefault("TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING", "false")
    else:  # ranks share the cores instead of each starting a thread on all of them
        torch.set_num_threads(max(1, torch.get_num_threads() // num_local()))
    watch = threading.Timer(JOIN_SECONDS, _give_up)  # the wait below has the timeout of all later ones
    watch.daemon = True
    watch.start()
    # Caching and loading may take an hour on one rank while the others wait.
    deepspeed.init_distributed(timeout=timedelta(hours=24), verbose=False)
    control = dist.new_group(backend="gloo", timeout=timedelta(hours=24))
    watch.cancel()
    return World(dist.get_rank(), dist.get_world_size(), device, control)


def _give_up() -> None:
    """Ends this process, whose main thread cannot be reached."""
    meeting = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    sys.stderr.write(
        f"rank {os.environ['RANK']}: the {os.environ['WORLD_SIZE']} processes did not meet at {meeting} within "
        f"{JOIN_SECONDS:.0f} s; see whether all machines are up, whether they reach each other at this address, and "
        "whether GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name their network interface\n"
    )
    sys.stderr.flush()
    os._exit(1)


def num_local() -> int:
    """How many of the run's processes are on this machine."""
    return int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _switch_off_what_gpus_lack() -> None:
    """GeForce cards of the 40 series have no direct way to each other, which NCCL may try all the same.

    Variables that are set already, to whatever, are left alone.
    """
    names = {torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())}
    reach = [torch.cuda.can_device_access_peer(0, other) for other in range(1, torch.cuda.device_count())]
    for name in needed_switches(names, all(reach)):
        os.environ.setdefault(name, "1")


def needed_switches(gpus: Iterable[str], reach_each_other: bool) -> list[str]:
    """NCCL's variables that must be 1 where these GPUs are."""
    lacking = any(re.search(r"RTX 40\d\d", name) for name in gpus) and not reach_each_other
    return ["NCCL_P2P_DISABLE", "NCCL_IB_DISABLE"] if lacking else []


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
