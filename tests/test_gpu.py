"""The speed features of a GPU change no result."""

from pathlib import Path

import pytest
import torch
from diffusion_trainer.models import families
from diffusion_trainer.utils.graphs import StageGraphs, StepGraphs
from training import Bench, Result

pytestmark = pytest.mark.gpu
BENCHED = ("flux", "wan")
"""Families with which all of this is tried."""


@pytest.fixture(scope="module", params=BENCHED)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("gpu"), request.param)


@pytest.fixture(scope="module")
def plain(bench: Bench) -> Result:
    return bench.train(cuda_graphs=False)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"compile": True},
        {"compile": True, "cuda_graphs": False},
        {"micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2},
        {"blocks_to_swap": 100},
        {"blocks_to_swap": 100, "cuda_graphs": False},
        {"blocks_to_swap": 100, "compile": True},
        {"blocks_to_swap": 100, "activation_checkpointing": "unsloth"},
        {"activation_checkpointing": "selective"},
        {"activation_checkpointing": "unsloth", "compile": True},
    ],
    ids=[
        "graphs",
        "compiled graphs",
        "compiled",
        "accumulated graphs",
        "swapped graphs",
        "swapped",
        "compiled swapped graphs",
        "everything in main memory",
        "selective",
        "compiled, inputs in main memory",
    ],
)
def test_speed_and_memory_change_nothing(bench: Bench, plain: Result, changes: dict) -> None:
    result = bench.train(**changes)
    assert result.curve("loss") == pytest.approx(plain.curve("loss"), rel=2e-3)
    assert result.curve("grad_norm") == pytest.approx(plain.curve("grad_norm"), rel=2e-2)


def test_resumes_to_the_bit(bench: Bench, plain: Result) -> None:
    from diffusion_trainer.utils.run_folder import RunFolder

    first = bench.train(max_steps=7)
    resumed = bench.train(RunFolder(first.folder.path), resume=True, cuda_graphs=False)
    assert resumed.curve("loss") == pytest.approx(plain.curve("loss"), rel=1e-5)


@pytest.mark.parametrize("name", ["float8", "int8", "nf4"])
def test_stored_weights_swapped_and_compiled(bench: Bench, name: str) -> None:
    model = {"transformer_dtype": name, "dtype": "bfloat16"}
    exact, stored = bench.train(model={"dtype": "bfloat16"}).curve("loss"), bench.train(model=model).curve("loss")
    assert stored == pytest.approx(exact, rel=0.15)
    fast = bench.train(model=model, compile=True, blocks_to_swap=100)
    assert fast.curve("loss") == pytest.approx(stored, rel=2e-2)


@pytest.mark.parametrize("family", [name for name in families() if name not in BENCHED])
def test_each_family_compiled_and_swapped(family: str, tmp_path: Path) -> None:
    bench = Bench(tmp_path, family)
    plain = bench.train(cuda_graphs=False)
    for changes in ({}, {"compile": True}, {"compile": True, "blocks_to_swap": 100}):
        result = bench.train(**changes)
        assert result.curve("loss") == pytest.approx(plain.curve("loss"), rel=2e-3), changes
        assert result.curve("grad_norm") == pytest.approx(plain.curve("grad_norm"), rel=2e-2), changes


def stage_and_weight() -> tuple:
    generator = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn(16, 16, device="cuda", generator=generator).requires_grad_()
    weight.grad = torch.zeros_like(weight)

    def stage(inputs: tuple, labels: tuple) -> tuple:
        x, through = inputs
        return torch.tanh(x @ weight) * through + sum(labels), through

    return stage, weight


def test_passes_of_a_stage_as_graphs_in_the_order_of_a_pipeline() -> None:
    """Two micro-batches are under way at a time, of shapes that change, and their values differ."""

    def train(graphs: bool) -> list[torch.Tensor]:
        stage, weight = stage_and_weight()
        run, generator = StageGraphs(stage), torch.Generator("cuda").manual_seed(1)
        run._working = graphs
        under_way: dict[int, tuple] = {}
        seen = []
        for number in range(16):
            rows = 4 + number % 3
            x, through = torch.randn(2, rows, 16, device="cuda", generator=generator).requires_grad_().unbind()
            inputs = x.detach().requires_grad_(), through.detach()
            labels = (torch.full((), float(number), device="cuda"),)
            grad = torch.randn(rows, 16, device="cuda", generator=generator)
            place = number % 2
            if place in under_way:
                passage, of = under_way.pop(place)
                passage.backward([of])
                seen += [passage.outputs[0].detach().clone(), passage.inputs[0].grad.clone()]
            under_way[place] = run(place, inputs, labels), grad
        assert len(run._recorded) == (6 if graphs else 0)
        return [*seen, weight.grad]

    torch.testing.assert_close(train(True), train(False))


def test_a_recording_that_fails_leaves_no_trace() -> None:
    def train(asked: bool, graphs: bool) -> torch.Tensor:
        def step(inputs: tuple, labels: tuple) -> torch.Tensor:
            value = (inputs[0] * torch.rand(1024, device="cuda")).sum()
            if asked:
                value.item()  # the CPU cannot ask for a number that is not computed yet
            return value

        torch.manual_seed(0)
        run = StepGraphs(step)
        run._working = graphs
        losses = [run((torch.full((1024,), float(number), device="cuda"),), ()) for number in range(6)]
        assert bool(run._graphs) is (graphs and not asked)
        return torch.stack(losses)

    plain = train(asked=False, graphs=False)
    torch.testing.assert_close(train(asked=True, graphs=True), plain, rtol=0, atol=0)
    torch.testing.assert_close(train(asked=False, graphs=True), plain, rtol=0, atol=0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(
    "changes",
    [
        {"micro_batch_size_per_gpu": 1},
        {"pipeline_stages": 2, "micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2},
        {"pipeline_stages": 2, "cuda_graphs": False},
        {"pipeline_stages": 2, "compile": True},
        {"pipeline_stages": 2, "blocks_to_swap": 2},
    ],
    ids=["two ranks", "two stages", "two stages without graphs", "two compiled stages", "two stages and swapping"],
)
def test_two_gpus_change_nothing(bench: Bench, plain: Result, changes: dict) -> None:
    result = bench.launch(2, **changes)
    assert result.curve("loss") == pytest.approx(plain.curve("loss"), rel=2e-3)
    assert result.curve("grad_norm") == pytest.approx(plain.curve("grad_norm"), rel=2e-2)
