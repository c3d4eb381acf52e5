"""The DeepSpeed engine under a chain of layers: stages, data parallelism, and DeepSpeed's quirks.

Quirks of DeepSpeed 0.19.8 that are met here, each at its place:

* ``backward``: a stage runs backward once per output tensor; here once for all.
* ``buffers``: receive buffers ignore the dtype and every float must carry a gradient; here each message
  says shape, dtype and whether a gradient will come back, so any tensor may travel.
* ``partition``: layers are weighed by trainable weights alone, which is wrong for LoRA.
* ``broadcast``: at start it sends all weights to all ranks, though every rank read the same files.
* ``clipping``: the gradient's length is known only when clipping is on, and not over stages without gradients.
* ``print``: it prints where a library should log.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.module import PipelineModule
from torch import nn
from torch.distributed.fsdp import FSDPModule

from ..models.base import Batch, Layer
from .checkpointing import Checkpointing
from .compilation import compile_modules
from .graphs import Passage, StageGraphs, StepGraphs, Tensors
from .offload import BlockSwap
from .sharding import gathered
from .trained import Trained
from .world import World

logger = logging.getLogger(__name__)

HEADER = 256
"""Numbers in the message that announces tensors."""
DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)


class Link(nn.Module):
    """A `Layer` as a module: holds the submodules and runs the function over them."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer
        for name, module in layer.submodules.items():
            self.add_module(name, module)

    def forward(self, *tensors: torch.Tensor) -> Any:
        """The next tuple of tensors; the last link gives the prediction."""
        return self.layer.forward(self, *tensors)


class Chain(PipelineModule):
    """The links of this process's stage."""

    def __init__(
        self,
        layers: Sequence[Layer | Link],
        num_stages: int,
        bounds: Sequence[int],
        loss: Callable[[torch.Tensor, tuple[torch.Tensor, torch.Tensor]], torch.Tensor],
        checkpointing: Checkpointing,
        swap: BlockSwap | None = None,
        compiled: bool = False,
        memory_budget: float | None = None,
    ) -> None:
        self._bounds = list(bounds)
        self._checkpointing, self.swap = checkpointing, swap
        with contextlib.redirect_stdout(io.StringIO()):  # quirk print
            links = [layer if isinstance(layer, Link) else Link(layer) for layer in layers]
            super().__init__(links, num_stages=num_stages, loss_fn=loss, dynamic_shape=True)
        self._layer_specs = [None] * len(layers)  # lets go of the other stages' weights
        if compiled:
            blocks = [link for link in self.forward_funcs if link.layer.is_block]
            compile_modules((module for link in blocks for module in link.children()), memory_budget)

    def _partition_layers(self, method: str = "") -> None:  # quirk partition
        self.parts = self._bounds
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])

    def forward(self, inputs: Any) -> Any:
        """Runs this stage on a tuple of tensors."""
        self._checkpointing.start()
        if self.swap:
            self.swap.start()
        number = 0
        for link in self.forward_funcs:
            run: Callable[..., Any] = link
            if link.layer.is_block:
                run, number = partial(self._block, number, link), number + 1
            inputs = self.swap.run(link.layer.name, run, inputs) if self.swap else run(*inputs)
        return inputs

    def _block(self, number: int, link: Link, *inputs: torch.Tensor) -> Any:
        return self._checkpointing.run(number, link, inputs)

    @property
    def copies(self) -> bool:
        """Whether weights or activations come and go between the device and main memory."""
        return self.swap is not None or self._checkpointing.copies

    def settle(self) -> None:
        """What swapping and checkpointing copy meanwhile is done before work that is issued from now on."""
        self._checkpointing.finish()
        if self.swap:
            self.swap.settle()

    def at_rest(self) -> AbstractContextManager[None]:
        """All weights can be read."""
        return self.swap.at_rest() if self.swap else contextlib.nullcontext()

    def resident(self) -> AbstractContextManager[None]:
        """All blocks are on the device."""
        return self.swap.resident() if self.swap else contextlib.nullcontext()

    def hooked(self) -> AbstractContextManager[None]:
        """The modules of this stage can be called by themselves, without gradients."""
        return self.swap.hooked() if self.swap else gathered(self.forward_funcs)

    def let_go(self) -> None:
        """Weights that ranks share out are gathered anew when they are used again: the shares may change meanwhile."""
        for module in self.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def forget(self) -> None:
        """What was issued last may never have run."""
        if self.swap:
            self.swap.forget()


class Engine(PipelineEngine):
    """DeepSpeed's pipeline engine with its own schedule, and our messages between stages."""

    control: Any = None
    max_norm: float = 0.0
    trained: Trained
    total_loss: torch.Tensor | None
    grad_layer: list[torch.Tensor] | None
    grad_norm: torch.Tensor
    """Length of the last step's gradient before clipping, on the device."""
    _graphs: StepGraphs | None = None
    _stage_graphs: StageGraphs | None = None
    _under_way: dict[int, Passage]
    """By number of the buffer."""

    def prepare(self, trained: Trained, world: World, max_norm: float, use_graphs: bool) -> None:
        """What DeepSpeed's constructor has no place for."""
        self.trained, self.control, self.max_norm = trained, world.control, max_norm
        self._under_way = {}
        if not use_graphs or self.device.type != "cuda":
            return
        if self.num_stages == 1:
            self._graphs = StepGraphs(self._micro_step, self.module.forget)
        elif not self.module.copies:  # copies that run ahead would have to end with each pass
            self._stage_graphs = StageGraphs(self._stage)

    def register_compile_pass(self, *unused: Any) -> None:
        """Of DeepSpeed's own compiler, which is not used; with a GPU, importing it takes two seconds."""

    def train_batch(self, data_iter: Iterator[Any] | None = None) -> torch.Tensor:
        """One optimizer step over the micro-batches of ``data_iter``; the mean loss over all ranks."""
        self.module.train()
        self.total_loss = None
        if self.num_stages == 1:
            assert data_iter is not None
            self._single_stage(data_iter)
        else:
            self.set_dataiterator(data_iter)
            self._compute_loss = True
            self._exec_schedule(self._train_schedule())
        with torch.no_grad():
            return self._aggregate_total_loss()

    def _single_stage(self, data_iter: Iterator[Any]) -> None:
        run = self._graphs or self._micro_step
        for _ in range(self.micro_batches):
            inputs, labels = (self._to_device(part) for part in next(data_iter))
            self.module.settle()  # evaluation may have left it otherwise; a graph begins as it was recorded
            loss = run(inputs, labels)
            self.total_loss = loss if self.total_loss is None else self.total_loss + loss
        self._exec_reduce_grads()
        self._exec_optimizer_step()

    def _micro_step(self, inputs: tuple[torch.Tensor, ...], labels: tuple[torch.Tensor, ...]) -> torch.Tensor:
        loss = self.module.loss_fn(self.module(inputs), labels)
        (loss / self.micro_batches).backward()
        self.module.settle()
        return loss.detach()

    def measure(self, batches: Iterable[Batch], resident: bool = False) -> list[float]:
        """The loss of each sample of ``batches``, forward only, on the last stage; elsewhere nothing.

        All stages are given the same batches. Weights, gradients and random state stay as they are.

        Args:
            resident: Blocks that are swapped in training stay on the GPU meanwhile.
        """
        training = self.module.training
        self.module.eval()
        self._reserve_pipe_buffers(1)
        losses = []
        with torch.no_grad(), self.module.resident() if resident else contextlib.nullcontext():
            for inputs, labels in as_micro_batches(batches):
                if self.is_first_stage():
                    self.pipe_buffers["inputs"][0] = self._to_device(inputs)
                else:
                    self._exec_recv_activations(0)
                outputs = self.module(self.pipe_buffers["inputs"][0])
                if self.is_last_stage():
                    losses.append(self._losses(outputs, self._to_device(labels)))
                else:
                    self.pipe_buffers["outputs"][0] = outputs
                    self._exec_send_activations(0)
        self.pipe_buffers["inputs"][0] = self.pipe_buffers["outputs"][0] = None
        self.module.settle()
        self.module.let_go()
        self.module.train(training)
        return torch.cat(losses).tolist() if losses else []

    def _losses(self, outputs: torch.Tensor, labels: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """The loss of each row of a batch."""
        target, weight = labels
        rows = [weight[n : n + 1] if weight.ndim and len(weight) == len(target) else weight for n in range(len(target))]
        return torch.stack(
            [self.module.loss_fn(outputs[n : n + 1], (target[n : n + 1], row)) for n, row in enumerate(rows)]
        )

    def _to_device(self, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(tensor.to(self.device, non_blocking=True) for tensor in tensors)

    def _exec_reduce_grads(self) -> None:
        if self.is_data_parallel:
            self.trained.gradients.average(self.grid.get_data_parallel_group())

    def zero_grad(self, *unused: Any) -> None:
        """Empties the gradients in place; they stay where graphs and collectives expect them."""
        self.trained.gradients.zero()

    def _broadcast_model(self) -> None:  # quirk broadcast
        """Nothing to send: weights are read from the same files, adapters initialised by name."""

    def _exec_load_micro_batch(self, buffer_id: int) -> None:
        inputs, labels = self._next_batch()
        if self.is_first_stage():
            self.pipe_buffers["inputs"][buffer_id] = self._to_device(inputs)
        if self.is_last_stage():
            self.pipe_buffers["labels"][buffer_id] = self._to_device(labels)

    def _stage(self, inputs: Tensors, labels: Tensors) -> Tensors:
        """What this stage gives: on the last one, which alone has labels, the loss."""
        outputs = self.module(inputs)
        return (self.module.loss_fn(outputs, labels),) if labels else outputs

    def _exec_forward_pass(self, buffer_id: int) -> None:
        inputs = self.pipe_buffers["inputs"][buffer_id]
        labels = self.pipe_buffers["labels"][buffer_id] if self.is_last_stage() else ()
        if self._stage_graphs:  # on the last stage a pass follows the other at once
            passage = self._stage_graphs(0 if labels else buffer_id, inputs, labels)
        else:
            passage = Passage(inputs, self._stage(inputs, labels))
        self._under_way[buffer_id] = passage
        self.pipe_buffers["inputs"][buffer_id] = passage.inputs
        self.pipe_buffers["outputs"][buffer_id] = passage.outputs
        if labels:
            loss = passage.outputs[0].detach()
            self.pipe_buffers["outputs"][buffer_id] = None
            self.total_loss = loss + (0 if self.total_loss is None else self.total_loss)

    def _exec_backward_pass(self, buffer_id: int) -> None:  # quirk backward
        passage = self._under_way.pop(buffer_id)
        if self.is_last_stage():
            grads = [torch.full_like(loss, 1 / self.micro_batches) for loss in passage.with_grad()]
        else:
            grads = self.grad_layer or []
        self.pipe_buffers["outputs"][buffer_id] = self.grad_layer = None
        passage.backward(grads)

    def _exec_send_activations(self, buffer_id: int) -> None:  # quirk buffers
        outputs = self.pipe_buffers["outputs"][buffer_id]
        numbers = [len(outputs)]
        for tensor in outputs:
            numbers += [DTYPES.index(tensor.dtype), int(tensor.requires_grad), tensor.ndim, *tensor.shape]
        header = torch.zeros(HEADER, dtype=torch.int64)
        header[: len(numbers)] = torch.tensor(numbers)
        target = self.grid.stage_to_global(self.next_stage)
        dist.send(header, target, group=self.control)
        for tensor in outputs:
            dist.send(tensor.detach().contiguous(), target)

    def _exec_recv_activations(self, buffer_id: int) -> None:
        source = self.grid.stage_to_global(self.prev_stage)
        header = torch.zeros(HEADER, dtype=torch.int64)
        dist.recv(header, source, group=self.control)
        numbers = iter(header.tolist())
        received = []
        for _ in range(next(numbers)):
            dtype, needs_grad, ndim = DTYPES[next(numbers)], bool(next(numbers)), next(numbers)
            tensor = torch.empty([next(numbers) for _ in range(ndim)], dtype=dtype, device=self.device)
            dist.recv(tensor, source)
            received.append(tensor.requires_grad_(needs_grad))
        self.pipe_buffers["inputs"][buffer_id] = tuple(received)

    def _exec_send_grads(self, buffer_id: int) -> None:
        target = self.grid.stage_to_global(self.prev_stage)
        for tensor in self.pipe_buffers["inputs"][buffer_id]:
            if tensor.requires_grad:
                dist.send(torch.zeros_like(tensor) if tensor.grad is None else tensor.grad.contiguous(), target)
        self.pipe_buffers["inputs"][buffer_id] = None

    def _exec_recv_grads(self, buffer_id: int) -> None:
        source = self.grid.stage_to_global(self.next_stage)
        grads = [torch.empty_like(tensor) for tensor in self._under_way[buffer_id].with_grad()]
        for grad in grads:
            dist.recv(grad, source)
        self.grad_layer = grads

    def _exec_optimizer_step(self, *unused: Any) -> None:
        self._clip()
        self.trained.step()
        self.zero_grad()

    def _clip(self) -> None:  # quirk clipping
        """Measures the gradient's length over all stages and shortens it to `max_norm` (0: leaves it)."""
        square = self.trained.gradients.squared_norm(self.device)
        if self.is_pipe_parallel:
            dist.all_reduce(square, group=self.grid.get_pipe_parallel_group())
        self.grad_norm = square.sqrt()
        if self.max_norm > 0:
            self.trained.gradients.scale((self.max_norm / (self.grad_norm + 1e-6)).clamp(max=1.0))

    _INSTRUCTION_MAP: ClassVar[dict[type, Callable[..., None]]] = {
        **PipelineEngine._INSTRUCTION_MAP,
        schedule.OptimizerStep: _exec_optimizer_step,
        schedule.ReduceGrads: _exec_reduce_grads,
        schedule.LoadMicroBatch: _exec_load_micro_batch,
        schedule.ForwardPass: _exec_forward_pass,
        schedule.BackwardPass: _exec_backward_pass,
        schedule.SendActivation: _exec_send_activations,
        schedule.RecvActivation: _exec_recv_activations,
        schedule.SendGrad: _exec_send_grads,
        schedule.RecvGrad: _exec_recv_grads,
    }


def build_engine(
    chain: Chain,
    trained: Trained,
    world: World,
    *,
    micro_batch: int,
    num_micro_batches: int,
    max_norm: float,
    use_graphs: bool = False,
) -> Engine:
    """The engine that trains ``chain``; ``trained`` are this stage's weights."""
    config = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": num_micro_batches,
        "steps_per_print": 10**9,
    }
    mpu = chain.mpu()
    with contextlib.redirect_stdout(io.StringIO()):
        engine = Engine(
            args=None,
            model=chain,
            optimizer=torch.optim.SGD([torch.zeros(())]),  # DeepSpeed wants one; ours step in `Trained`
            mpu=mpu,
            config=config,
            config_class=DeepSpeedConfig(config, mpu),
            dont_change_device=True,
        )
    engine.prepare(trained, world, max_norm, use_graphs)
    return engine


def as_micro_batches(
    batches: Iterable[Batch],
) -> Iterator[tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, torch.Tensor]]]:
    """Batches in the form that the engine reads."""
    for batch in batches:
        yield batch.inputs, (batch.target, batch.weight)
