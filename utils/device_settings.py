"""How the model is laid out over GPUs, and what saves memory or time there: options of the top level."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator

from .config import Table, option

ActivationCheckpointing = bool | int | Literal["selective", "unsloth"]


class Devices(Table):
    """GPUs, pipeline stages, and what is kept, recomputed, swapped or compiled."""

    number_of_gpus: int = option(
        1,
        "Processes, one per GPU. From the command line the launcher's --num_gpus counts instead.",
        ge=1,
        step=1,
        ui_max=1024,
    )
    pipeline_stages: int = option(1, "Into how many parts the model is cut, one GPU each.", ge=1, step=1, ui_max=64)
    zero_stage: int = option(
        0,
        "ZeRO: what the GPUs that train the same weights share out. 1: the optimizer's state and master weights; 2: "
        "gradients, too; 3: weights, too. 2 and 3 without adapter and pipeline stages.",
        ge=0,
        le=3,
        step=1,
        advanced=True,
    )
    partition_method: str = option(
        "cost",
        "How layers are shared out over stages: cost (equal time), parameters (equal weights), uniform (equal count), "
        "type:NAME (equal count of layers whose name matches), or manual.",
        advanced=True,
        also=("partition",),
    )
    partition_split: list[int] | None = option(
        None, "For partition_method manual: the number of the first layer of each stage after the first.", advanced=True
    )
    activation_checkpointing: ActivationCheckpointing = option(
        True,
        "Recompute each block in the backward pass instead of keeping activations: much less memory, a third more "
        "time. Also a number (2: every second block), 'selective' (keep results of matrix products and attention, "
        "recompute the rest) or 'unsloth' (recompute, and keep the blocks' inputs in main memory).",
        step=1,
        ui_min=1,
        ui_max=200,
    )
    reentrant_activation_checkpointing: bool = option(
        False,
        "Accepted from older files; checkpointing always takes the newer form, whose results are the same.",
        advanced=True,
    )
    blocks_to_swap: int = option(
        0,
        "Blocks whose frozen weights wait in main memory until they are needed. Two at a time are on the GPU.",
        ge=0,
        step=1,
        ui_max=200,
    )
    disable_block_swap_for_eval: bool = option(False, "Keep all blocks on the GPU during evaluation.", advanced=True)
    compile: bool = option(
        False, "Compile the blocks with torch.compile: faster steps after a slower start.", advanced=True
    )
    activation_memory_budget: float | None = option(
        None,
        "With compile: share of a block's activations that is kept, between 0 and 1; the cheapest of the rest are "
        "recomputed. Takes the place of activation_checkpointing.",
        ge=0,
        le=1,
        step=0.05,
        advanced=True,
    )
    cuda_graphs: bool = option(
        True,
        "Replay each step as CUDA graphs where that is possible: without dropout, and with several pipeline stages "
        "without what waits in main memory.",
        advanced=True,
    )
    attention_backend: Literal["auto", "native", "cudnn"] = option(
        "auto", "Attention kernel: torch's own choice, cuDNN's, or the faster one for this GPU.", advanced=True
    )
    transposed_weights: bool = option(
        False,
        "With quantized_matmul: keep a transposed copy of each weight for the backward pass, instead of making it each "
        "time. One more byte per weight of the model, for steps that are 1.4 % faster on an H200.",
        advanced=True,
    )

    @field_validator("activation_checkpointing", mode="before")
    @classmethod
    def _checkpointing(cls, value: Any) -> Any:
        if not (isinstance(value, int) and value >= 0) and value not in ("selective", "unsloth"):
            raise ValueError(f"must be true, false, a number of blocks, 'selective' or 'unsloth', got {value!r}")
        return value
