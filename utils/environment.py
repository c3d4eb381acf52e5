"""Where and how the processes of a run live: ``[environment]`` in ``train.toml``.

The launcher takes GPUs, machines and port from here when the Train node starts it; from the command line they are
the launcher's own flags. The variables hold in both cases: train.py sets those that the shell has not set.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import field_validator, model_validator

from .config import Table, option

VARIABLES = (
    "NCCL_DEBUG", "NCCL_DEBUG_SUBSYS", "NCCL_SOCKET_IFNAME", "NCCL_P2P_LEVEL", "NCCL_SHM_DISABLE", "NCCL_NVLS_ENABLE",
    "NCCL_IB_HCA", "NCCL_IB_GID_INDEX", "NCCL_IB_TIMEOUT", "NCCL_CUMEM_ENABLE", "GLOO_SOCKET_IFNAME",
    "CUDA_DEVICE_ORDER", "CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_NO_CUDA_MEMORY_CACHING", "TORCH_NCCL_BLOCKING_WAIT",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_CPP_LOG_LEVEL", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM",
)  # fmt: skip
"""Variables that may be set besides: none of them loads code or names a file."""


class Environment(Table):
    """Where and how the processes run: GPUs, machines, and what CUDA and NCCL are told."""

    visible_gpus: list[int] | None = option(
        None, "The GPUs to use, by number, such as 0, 2. From the command line the launcher's --include counts "
        "instead. Left out: the first ones."
    )  # fmt: skip
    cuda_allocator: str | None = option(
        None, "PYTORCH_CUDA_ALLOC_CONF, such as expandable_segments:True against fragmented memory. Left out: torch's "
        "own choice."
    )  # fmt: skip
    nccl_p2p_disable: bool = option(
        False, "NCCL_P2P_DISABLE: GPUs do not talk to each other directly. Cards such as RTX 4090 may need it."
    )
    nccl_ib_disable: bool = option(False, "NCCL_IB_DISABLE: do not use InfiniBand.")
    cuda_launch_blocking: bool = option(
        False, "CUDA_LAUNCH_BLOCKING: errors name the right line; slow, to find faults only."
    )
    variables: list[str] = option(
        [], "Further variables as NAME=value, one per line, of those that concern CUDA, NCCL and threads.", lines=True
    )
    master_port: int | None = option(
        None, "Port that the processes meet at. Left out: a free one.", ge=1024, le=65535, step=1, advanced=True
    )
    hostfile: str | None = option(
        None, "DeepSpeed's list of machines, for training on several; they need the same paths, and ssh without a "
        "password. Left out: this machine alone.", advanced=True
    )  # fmt: skip
    num_nodes: int | None = option(
        None, "How many machines of the hostfile are used. Left out: all.", ge=1, step=1, ui_max=1024, advanced=True
    )
    master_addr: str | None = option(
        None, "Address of the first machine. Left out: as the hostfile says.", advanced=True
    )

    @field_validator("visible_gpus")
    @classmethod
    def _gpus(cls, value: list[int] | None) -> list[int] | None:
        if value is not None and (not value or min(value) < 0 or len(set(value)) < len(value)):
            raise ValueError(f"must be different numbers from 0, such as [0, 2], got {value}")
        return value

    @field_validator("cuda_allocator")
    @classmethod
    def _allocator(cls, value: str | None) -> str | None:
        if value and not all(":" in part for part in value.split(",")):
            raise ValueError(f"must be name:value pairs such as expandable_segments:True, got '{value}'")
        return value

    @field_validator("variables")
    @classmethod
    def _known(cls, value: list[str]) -> list[str]:
        for entry in value:
            name, equals, _ = entry.partition("=")
            if not equals or name.strip() not in VARIABLES:
                raise ValueError(
                    f"'{entry}' cannot be set here; give NAME=value with one of {', '.join(VARIABLES)}, and set others "
                    "in the shell that starts the training"
                )
        return value

    @model_validator(mode="after")
    def _machines(self) -> Environment:
        if self.hostfile and not Path(self.hostfile).expanduser().is_file():
            raise ValueError(f"environment.hostfile: '{self.hostfile}' is not a file")
        if (self.num_nodes or 1) > 1 and not self.hostfile:
            raise ValueError("environment.num_nodes: needs a hostfile that lists the machines")
        if self.hostfile and self.visible_gpus:
            raise ValueError("environment.visible_gpus: cannot be chosen here with a hostfile; name them in that file")
        return self

    def as_variables(self) -> dict[str, str]:
        """What the processes get."""
        switches = {
            "NCCL_P2P_DISABLE": self.nccl_p2p_disable,
            "NCCL_IB_DISABLE": self.nccl_ib_disable,
            "CUDA_LAUNCH_BLOCKING": self.cuda_launch_blocking,
        }
        found = {name: "1" for name, on in switches.items() if on}
        if self.cuda_allocator:
            found["PYTORCH_CUDA_ALLOC_CONF"] = self.cuda_allocator
        pairs = (entry.partition("=") for entry in self.variables)
        return found | {name.strip(): value.strip() for name, _, value in pairs}
