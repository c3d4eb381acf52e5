"""Swapped blocks: the same training to the bit, however late copies arrive, and never more on the device than said."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusion_trainer.models import families
from diffusion_trainer.models.base import Layer
from diffusion_trainer.utils import offload
from diffusion_trainer.utils.checkpointing import Checkpointing
from diffusion_trainer.utils.offload import BlockSwap, Lane, swapped
from safetensors.torch import load_file
from torch import nn
from training import Bench, Result

CPU = torch.device("cpu")


class LateLane(Lane):
    """The worst that a stream may do: the target is spoilt when a copy is asked for, and filled when waited for."""

    def copy(self, target, source):
        target.detach().view(torch.uint8).fill_(0xFF)  # not a number, in every float
        return target.detach(), source.detach()

    def wait(self, copy):
        if copy is not None:
            copy[0].copy_(copy[1])


@pytest.fixture(autouse=True)
def late(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(offload, "Lane", LateLane)


@pytest.fixture(scope="module", params=list(families()))
def bench(request, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("offload"), request.param)


@pytest.fixture(scope="module")
def plain(bench: Bench) -> Result:
    return bench.train(epochs=1)


def assert_same(first: Result, second: Result) -> None:
    assert first.curve("loss") == second.curve("loss")
    assert first.curve("grad_norm") == second.curve("grad_norm")
    assert all(torch.equal(value, second.lora()[name]) for name, value in first.lora().items())


@pytest.mark.parametrize(
    "changes",
    [
        {"blocks_to_swap": 2},
        {"blocks_to_swap": 100, "activation_checkpointing": False},
    ],
    ids=["two", "all, without checkpointing"],
)
def test_swapping_changes_no_bit(bench: Bench, plain: Result, changes: dict) -> None:
    assert_same(plain, bench.train(epochs=1, **changes))


def test_weights_that_stay_frozen_are_exported(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    part = {"epochs": 1, "adapter": None, "train_only": ["norm", r"^transformer_blocks\.0"], "optimizer": {"lr": 1e-3}}
    files = [
        load_file(next(Path(bench.train(**part, blocks_to_swap=count).status.exports[-1]).glob("*.safetensors")))
        for count in (0, 100)
    ]
    assert all(torch.equal(value, files[1][name]) for name, value in files[0].items())
    assert not any(value.isnan().any() for value in files[0].values())


class Block(nn.Module):
    def __init__(self, width: int, number: int) -> None:
        super().__init__()
        self.inner = nn.Linear(4, width)
        self.outer = nn.Linear(width, 4)
        self.gate = nn.Parameter(torch.full((4,), 1.0 + number))
        self.requires_grad_(False)
        self.gate.requires_grad_(True)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (x + self.gate * self.outer(self.inner(x).tanh()),)


def chain(widths: list[int]) -> tuple[list[Block], list[Layer]]:
    torch.manual_seed(0)
    blocks = [Block(width, number) for number, width in enumerate(widths)]
    return blocks, [
        Layer(f"b{n}", lambda m, x: m.block(x), {"block": block}, is_block=True) for n, block in enumerate(blocks)
    ]


def passes(layers: list[Layer], swap: BlockSwap | None, blocks: list[Block], kinds: str) -> list[torch.Tensor]:
    """Runs forward (F) and backward (B) passes, the oldest forward pass first; the outputs and gradients."""
    values, waiting = [], []
    x = torch.linspace(-1, 1, 8).view(2, 4).requires_grad_()
    for kind in kinds:
        if kind == "F":
            if swap:
                swap.start()
            tensors = (x * (1 + len(values)),)
            for layer, block in zip(layers, blocks, strict=True):
                tensors = swap.run(layer.name, block, tensors) if swap else block(*tensors)
            waiting.append(tensors[0])
            values.append(tensors[0].detach().clone())
        else:
            waiting.pop(0).square().sum().backward()
    return [*values, x.grad, *(block.gate.grad for block in blocks)]


@pytest.mark.parametrize("kinds", ["FB", "FBFB", "FFBB", "FFBFBB", "FFFBFBB"])
@pytest.mark.parametrize(
    "widths", [[8] * 6, [64, 8, 8, 8], [8, 64, 8, 64, 8], [8, 16, 32, 64, 128], [128, 64, 32, 16, 8, 8, 8], [8], [8, 9]]
)
def test_blocks_of_any_size_and_passes_in_any_order(widths: list[int], kinds: str) -> None:
    blocks, layers = chain(widths)
    expected = passes(layers, None, blocks, kinds)
    blocks, layers = chain(widths)
    swap = BlockSwap(CPU)
    for layer in layers:
        swap.take(layer)
    swap.bind()
    assert swap.pool_bytes <= max(sum(len(u.host) for u in swap._units[n : n + 2]) for n in range(len(widths)))
    for ours, exact in zip(passes(layers, swap, blocks, kinds), expected, strict=True):
        assert torch.equal(ours, exact)


def test_blocks_are_there_before_they_are_needed() -> None:
    blocks, layers = chain([16, 16, 8, 8, 8, 16, 8, 24])
    swap = BlockSwap(CPU)
    for layer in layers:
        swap.take(layer)
    swap.bind()
    loads, needed, load, need = [], [], swap._load, swap._need

    def load_and_note(number: int) -> None:
        if number not in swap._loaded:
            loads.append(number)
            assert not needed or needed[-1] < 0, "sent for only when it was needed"
        load(number)

    def need_and_note(number: int, *first: object) -> None:
        needed.append(number)
        need(number, *first)
        needed.append(-1)

    swap._load, swap._need = load_and_note, need_and_note
    passes(layers, swap, blocks, "FBFB")
    there = len(blocks) - min(len(swap._first), len(swap._last))
    assert len(needed) == 2 * 4 * len(blocks)
    assert len(loads) <= 4 * there


def test_network_works_outside_of_the_chain() -> None:
    blocks, layers = chain([8, 16, 8, 8])
    x = torch.linspace(-1, 1, 8).view(2, 4)
    with torch.no_grad():
        expected = blocks[3](*blocks[2](*blocks[1](*blocks[0](x))))[0]
        swap = BlockSwap(CPU)
        for layer in layers:
            swap.take(layer)
        swap.bind()
        for context in (swap.hooked, swap.resident, swap.hooked):
            with context():
                for _ in range(2):
                    assert torch.equal(blocks[3](*blocks[2](*blocks[1](*blocks[0](x))))[0], expected)
    assert all(not block._forward_pre_hooks for block in blocks)


def test_only_frozen_weights_leave() -> None:
    blocks, layers = chain([8, 8, 8])
    swap = BlockSwap(CPU)
    for layer in layers:
        swap.take(layer)
    swap.bind()
    pool = range(swap._pool.data_ptr(), swap._pool.data_ptr() + swap.pool_bytes)
    for block in blocks:
        assert all((parameter.data_ptr() in pool) != parameter.requires_grad for parameter in block.parameters())


@pytest.mark.parametrize(
    ("count", "expected"), [(0, []), (1, [5]), (2, [2, 5]), (3, [1, 3, 5]), (9, [0, 1, 2, 3, 4, 5])]
)
def test_swapped_blocks_are_spread(count: int, expected: list[int]) -> None:
    layers = chain([8] * 6)[1]
    assert [layer.name for layer in swapped(layers, layers, count)] == [f"b{n}" for n in expected]


class Double(Block):
    """Another kind."""


class Tiny(Block):
    """And one more."""


def kinds(*counts: tuple[type[Block], int, int]) -> list[Layer]:
    """Layers of so many blocks of each kind and width, without values."""
    with torch.device("meta"):
        blocks = [kind(width, 0) for kind, width, count in counts for _ in range(count)]
    return [Layer(f"{n}", lambda *_: None, {"block": block}, is_block=True) for n, block in enumerate(blocks)]


def test_each_kind_copies_as_much_for_the_time_it_computes() -> None:
    """Like Flux: double blocks have more than twice the weights of single ones, which compute nearly as long."""
    layers, costs = kinds((Double, 680, 19), (Block, 280, 38)), [182] * 19 + [159] * 38
    for count in range(58):
        chosen = [int(layer.name) for layer in swapped(layers, layers, count, costs)]
        assert len(chosen) == count
        doubles, singles = (sum(n < 19 for n in chosen), sum(n >= 19 for n in chosen))
        loads = [doubles * 680 / (19 * 182), singles * 280 / (38 * 159)]
        if doubles < 19 and singles < 38:
            assert abs(loads[0] - loads[1]) <= max(680 / (19 * 182), 280 / (38 * 159)) + 0.01
    assert [len(swapped(layers, layers, count, costs)) for count in (55, 57, 100)] == [55, 57, 57]


def test_kinds_of_small_blocks_are_swapped_last() -> None:
    layers = kinds((Tiny, 8, 4), (Block, 280, 4))
    costs = [1000] * 4 + [1] * 4
    assert [layer.name for layer in swapped(layers, layers, 5, costs)] == ["3", "4", "5", "6", "7"]


def test_stages_share_the_number() -> None:
    layers = chain([8] * 6)[1]
    assert [len(swapped(layers, part, 3)) for part in (layers[:2], layers[2:])] == [1, 2]


def test_two_stages_with_swapping(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    common = {"epochs": 1, "micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2}
    stages = bench.launch(2, **common, pipeline_stages=2, blocks_to_swap=100)
    assert stages.curve("loss") == pytest.approx(bench.train(**common).curve("loss"), rel=1e-5)


# -- on a GPU: real streams ---------------------------------------------------------------------------------


class Wide(nn.Module):
    """A block of 32 MiB that computes for longer or for less time than its copy takes, by the number of rows."""

    def __init__(self, number: int) -> None:
        super().__init__()
        generator = torch.Generator("cuda").manual_seed(number)
        weight = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16, generator=generator) / 64
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.gate = nn.Parameter(torch.ones(4096, device="cuda", dtype=torch.bfloat16))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (x + self.gate * nn.functional.linear(x, self.weight).tanh(),)


def wide_step(blocks: list[Wide], x: torch.Tensor, way: Checkpointing, swap: BlockSwap | None) -> torch.Tensor:
    way.start()
    if swap:
        swap.start()
    tensors = (x,)
    for number, block in enumerate(blocks):
        run = partial(way.run, number, block)
        tensors = swap.run(f"b{number}", lambda *t, run=run: run(t), tensors) if swap else run(tensors)
    tensors[0].float().square().mean().backward()
    way.finish()
    if swap:
        swap.settle()
    return tensors[0].detach()


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("mode", [False, True, "unsloth", "selective"])
@pytest.mark.parametrize("rows", [1, 64, 8192], ids=["copying takes longest", "between", "computing takes longest"])
def test_streams_do_not_race(rows: int, mode: Any, graph: bool) -> None:
    device = torch.device("cuda")
    plain, blocks = ([Wide(number) for number in range(10)] for _ in range(2))
    swap = BlockSwap(device)
    for number, block in enumerate(blocks):
        swap.take(Layer(f"b{number}", lambda *_: None, {"block": block}, is_block=True))
    swap.bind()
    assert all(unit.host.is_pinned() for unit in swap._units)
    assert swap.pool_bytes < 80 * 2**20
    for block in (*plain, *blocks):
        block.gate.grad = torch.zeros_like(block.gate)
    ways = [Checkpointing(kind, device, random=False, compiled=False) for kind in (False, mode)]
    x = torch.zeros(rows, 4096, device=device, dtype=torch.bfloat16)
    run: Any = lambda: wide_step(blocks, x, ways[1], swap)  # noqa: E731
    for _ in range(2):
        run()
    if graph:
        recording = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recording):
            result = run()

        def run() -> torch.Tensor:
            recording.replay()
            return result

    for step in range(12):
        x.copy_(torch.randn(rows, 4096, device=device, generator=torch.Generator("cuda").manual_seed(step)))
        for block in (*plain, *blocks):
            block.gate.grad.zero_()
        ours, exact = run(), wide_step(plain, x, ways[0], None)
        assert torch.equal(ours, exact), step
        assert all(torch.equal(a.gate.grad, b.gate.grad) for a, b in zip(plain, blocks, strict=True)), step
