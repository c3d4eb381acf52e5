"""Ways of activation checkpointing: what each recomputes and keeps, and that training comes out the same."""

import gc
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from diffusion_trainer.models import families
from diffusion_trainer.utils import checkpointing
from diffusion_trainer.utils.checkpointing import Checkpointing
from test_offload import LateLane
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from training import Bench, Result

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_and_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs of miniatures count as large, and copies come as late as they may."""
    monkeypatch.setattr(checkpointing, "MIN_BYTES", 1)
    monkeypatch.setattr(checkpointing, "Lane", LateLane)


@pytest.fixture(scope="module", params=list(families()))
def bench(request, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("checkpointing"), request.param)


@pytest.fixture(scope="module")
def plain(bench: Bench) -> Result:
    return bench.train(epochs=1, activation_checkpointing=False, adapter={"dropout": 0.2})


@pytest.mark.parametrize(
    "changes",
    [
        {"activation_checkpointing": True},
        {"activation_checkpointing": 2},
        {"activation_checkpointing": "selective"},
        {"activation_checkpointing": "unsloth", "blocks_to_swap": 100},
    ],
    ids=["every block", "every second", "selective", "inputs in main memory and swapped"],
)
def test_training_is_the_same_to_the_bit(bench: Bench, plain: Result, changes: dict) -> None:
    result = bench.train(epochs=1, adapter={"dropout": 0.2}, **changes)
    assert result.curve("loss") == plain.curve("loss")
    assert result.curve("grad_norm") == plain.curve("grad_norm")


class Products(TorchDispatchMode):
    """Counts operators."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[operator._schema.name.split("::")[-1]] += 1
        return operator(*args, **(kwargs or {}))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (self.linear(x.tanh() * other).sigmoid(), other)


def run(mode: Any, blocks: list[Block], x: torch.Tensor) -> tuple[Counter[str], list[weakref.ref], torch.Tensor]:
    """Operators of a pass over the blocks in both directions; the blocks' inputs; a gradient."""
    way = Checkpointing(mode, CPU, random=False, compiled=False)
    tensors, inputs = (x, torch.ones(2, 8)), []
    with Products() as products:
        way.start()
        for number, block in enumerate(blocks):
            inputs.append(weakref.ref(tensors[0]))
            tensors = way.run(number, block, tensors)
        result = tensors[0]
        del tensors, block
        gc.collect()
        alive = [reference() is not None for reference in inputs]
        result.sum().backward()
        way.finish()
    return products.count, alive, blocks[0].linear.weight.grad


@pytest.mark.parametrize(
    ("mode", "products", "tanhs"), [(False, 4, 4), (True, 8, 8), (2, 6, 6), ("selective", 4, 8), ("unsloth", 8, 8)]
)
def test_recomputes_what_it_should(mode: Any, products: int, tanhs: int) -> None:
    torch.manual_seed(0)
    blocks, x = [Block() for _ in range(4)], torch.rand(2, 8)
    exact = run(False, [*blocks], x)[2].clone()
    for block in blocks:
        block.zero_grad()
    count, _, gradient = run(mode, blocks, x)
    assert (count["addmm"], count["tanh"]) == (products, tanhs)
    assert torch.equal(gradient, exact)


def test_inputs_leave_the_device() -> None:
    torch.manual_seed(0)
    blocks, x = [Block() for _ in range(4)], torch.rand(2, 8)
    assert run(True, blocks, x)[1] == [True] * 4
    assert run("unsloth", blocks, x)[1] == [True, False, False, True]  # x is ours; the last is needed at once


def test_pieces_of_main_memory_are_used_again() -> None:
    way = Checkpointing("unsloth", CPU, random=False, compiled=False)
    blocks = [Block() for _ in range(3)]
    for rows in (5, 2, 4):
        way.start()
        tensors = (torch.rand(rows, 8), torch.ones(8))
        for number, block in enumerate(blocks):
            tensors = way.run(number, block, tensors)
        tensors[0].sum().backward()
        way.finish()
        assert len(way._inputs._free) == 4  # `other` is the same for all blocks
