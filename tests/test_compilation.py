"""Compiled blocks: the same losses, few compilations however many buckets, and a way on where compiling fails."""

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusion_trainer.utils.compilation import compile_modules
from PIL import Image
from training import Bench

SIZES = [(64, 64), (96, 64), (64, 96), (128, 64), (64, 128), (112, 64)]
OTHERS = [(80, 64), (64, 80), (96, 96), (128, 96), (112, 96)]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing compiled before counts, and settings of torch are as they were."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with (
        torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256),
        torch._functorch.config.patch(force_non_lazy_backward_lowering=False, activation_memory_budget=1.0),
    ):
        yield
    torch._dynamo.reset()


def write_sizes(bench: Bench, sizes: list[tuple[int, int]]) -> dict[str, Any]:
    """A dataset whose pictures fall into buckets of their own sizes."""
    folder = bench.root / f"sizes{len(sizes)}"
    folder.mkdir()
    for number, size in enumerate(sizes):
        Image.effect_noise(size, 50 + number).convert("RGB").save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("picture of ball", "utf-8")
    return {"resolutions": [64], "directory": [{"path": str(folder), "size_buckets": [[*size, 1] for size in sizes]}]}


@needs_compiler
@pytest.mark.parametrize(
    "family", ["flux", pytest.param("sdxl", marks=pytest.mark.slow), pytest.param("wan", marks=pytest.mark.slow)]
)
def test_further_buckets_compile_nothing(family: str, tmp_path: Path) -> None:
    bench = Bench(tmp_path, family)
    changes = {"epochs": 2, "micro_batch_size_per_gpu": 1, "model": {"dtype": "float32"}}
    sizes = write_sizes(bench, SIZES)
    plain = bench.train(dataset=sizes, **changes).curve("loss")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
    compiled = bench.train(dataset=sizes, compile=True, **changes).curve("loss")
    assert len(plain) == 2 * len(SIZES)
    assert compiled == pytest.approx(plain, rel=1e-5)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    bench.train(dataset=write_sizes(bench, OTHERS), compile=True, **changes)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs > 0


@needs_compiler
def test_further_sizes_of_a_convolution_compile_nothing() -> None:
    module = ResnetBlock2D(in_channels=8, out_channels=8, temb_channels=16, groups=4)
    compile_modules([module])
    graphs = []
    for height, width in [(8, 8), (12, 16), (8, 12), (16, 16), (10, 14), (24, 16), (4, 4)]:
        x, emb = torch.randn(1, 8, height, width, requires_grad=True), torch.randn(1, 16)
        found, wanted = module(x, emb), module.forward(x, emb)
        torch.testing.assert_close(found, wanted)
        gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (found, wanted)]
        torch.testing.assert_close(*gradients)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs == [1, 2, 2, 2, 2, 2, 2]


@pytest.mark.parametrize("backward", [False, True])
def test_what_cannot_be_compiled_runs_as_it_is(
    backward: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from torch._inductor.graph import GraphLowering

    def fail(graph: GraphLowering) -> None:
        raise RuntimeError("no compiler here")

    generate = GraphLowering.codegen
    monkeypatch.setattr(
        GraphLowering, "codegen", lambda graph: (fail if graph.is_backward == backward else generate)(graph)
    )
    bench = Bench(tmp_path)
    plain = bench.train(epochs=1).curve("loss")
    with caplog.at_level(logging.WARNING), torch.compiler.config.patch(force_disable_caches=True):
        assert bench.train(epochs=1, compile=True).curve("loss") == pytest.approx(plain, rel=1e-5)
    said = [record.getMessage() for record in caplog.records if "torch.compile failed" in record.getMessage()]
    assert len(said) == 1
    assert "set compile = false" in said[0]
