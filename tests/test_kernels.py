"""Kernels of our own equal plain torch, on a GPU or in Triton's interpreter; where none can be built, plain torch
computes."""

import importlib.util
import logging
import os
import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from diffusion_trainer.utils import kernels

FLOAT8 = torch.float8_e4m3fn
interpreted = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs Triton and TRITON_INTERPRET=1",
)
Make = Callable[..., torch.Tensor]


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4608, 3072), (100, 15360), (33, 21504), (64, 80)])
@pytest.mark.parametrize("dtype", [FLOAT8, torch.int8])
def test_kernels_equal_plain_torch(shape: tuple[int, int], dtype: torch.dtype, monkeypatch) -> None:
    x, columns = random(*shape, seed=0).cuda().bfloat16(), random(shape[1], seed=1).abs().cuda()
    bias, scales = random(shape[1], seed=2).cuda(), random(shape[1], 1, seed=3).abs().cuda()
    sums = torch.randint(-(10**6), 10**6, shape, dtype=torch.int32, device="cuda")

    def run() -> list[torch.Tensor]:
        stored, scale = kernels.quantise_rows(x, dtype)
        again, again_scale = kernels.quantise_rows(x, dtype, columns)
        values = kernels.dequantise_rows(stored, scale, torch.float32)
        return [stored.float() * scale, again.float() * again_scale, values, kernels.transpose(stored).float(), scale]

    fused = run()
    monkeypatch.setattr(kernels, "_fused", lambda *_: False)
    for ours, plain in zip(fused, run(), strict=True):
        # A value between two numbers may be rounded to either.
        torch.testing.assert_close(
            ours, plain, rtol=2**-3 if dtype == FLOAT8 else 0, atol=plain.abs().max().item() / 120
        )
        assert (ours != plain).float().mean() < 0.01
    if dtype == torch.int8:
        from diffusion_trainer.utils import triton_kernels

        plain = sums.float() * fused[4] * scales.t() + bias
        ours = triton_kernels.rescale(sums, fused[4], scales, bias, torch.float32)
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-3)


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu), pytest.param("cpu", marks=interpreted)])
def make(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes random tensors for which there are kernels."""
    dtype = torch.bfloat16
    if request.param == "cpu":
        from diffusion_trainer.utils import triton_products

        dtype = torch.float16  # the interpreter cuts bfloat16 off, unrounded
        monkeypatch.setattr(kernels, "_has_small_products", lambda *_: True)
        monkeypatch.setattr(kernels, "_fused", lambda *_: True)
        monkeypatch.setattr(triton_products, "_num_processors", lambda _: 12)
    return lambda *shape, seed: random(*shape, seed=seed).to(request.param, dtype)


def assert_rounded(ours: torch.Tensor, exact: torch.Tensor) -> None:
    """That values are right but for being rounded to bfloat16, themselves and what they were added up from."""
    torch.testing.assert_close(ours.double(), exact, rtol=2**-7, atol=2**-9 * exact.abs().max().item())


@pytest.mark.parametrize("is_wider", [False, True])
@pytest.mark.parametrize("rank", [1, 16, 20, 64])
@pytest.mark.parametrize(("rows", "width"), [(1152, 768), (33, 200), (1, 48)])
def test_products_of_low_rank(make: Make, rows: int, width: int, rank: int, is_wider: bool) -> None:
    left, right, bias = make(rows, 2 * rank, seed=1)[:, rank:], make(width, rank, seed=2), make(width, seed=3)
    right = right.float() if is_wider else right
    out, down = make(rows, width, seed=4), make(rank, width, seed=5)
    product = left.double() @ right.double().t()
    assert_rounded(kernels.low_rank(left, right, bias), product + bias.double())
    assert_rounded(kernels.low_rank(left, down.t()), left.double() @ down.double())
    expected = out.double() + product
    assert kernels.add_low_rank(out, left, right) is out
    assert_rounded(out, expected)


@pytest.mark.parametrize("is_wider", [False, True])
@pytest.mark.parametrize("rank", [1, 16, 20, 64])
@pytest.mark.parametrize(("rows", "width"), [(4608, 768), (100, 3000), (33, 208)])
def test_gradients_of_low_rank(make: Make, rows: int, width: int, rank: int, is_wider: bool) -> None:
    grad, up = make(rows, width + 16, seed=1)[:, 16:], make(width, rank, seed=2)
    up = up.float() if is_wider else up
    inner, into = make(rows, 2 * rank, seed=3)[:, rank:], torch.zeros_like(make(rows, 3 * rank, seed=4))
    grad_up = kernels.low_rank_grads(grad, up, inner, into[:, rank : 2 * rank])
    assert grad_up.dtype == up.dtype
    assert_rounded(grad_up, grad.double().t() @ inner.double())
    assert_rounded(into[:, rank : 2 * rank], grad.double() @ up.double())
    assert not into[:, :rank].any() and not into[:, 2 * rank :].any()
    again = kernels.low_rank_grads(grad, up, inner, into[:, rank : 2 * rank])
    assert torch.equal(again, grad_up)


@pytest.mark.parametrize("dtype", [torch.int8, pytest.param(FLOAT8, marks=pytest.mark.gpu), torch.float8_e5m2])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 3072, 1536), (31, 200, 50)])
def test_product_of_few_rows(make: Make, rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    x, bias = make(rows, inputs, seed=1), make(outputs, seed=2)
    stored, scale = kernels.quantise_rows(make(outputs, inputs, seed=3), dtype)
    assert kernels.multiplies_few(x, dtype)
    assert not kernels.multiplies_few(x, torch.uint8)
    exact = x.double() @ (stored.double() * scale).t() + bias.double()
    assert_rounded(kernels.multiply_few(x, stored, scale, bias), exact)


@pytest.fixture
def fresh() -> None:
    kernels._builds.cache_clear()
    yield
    kernels._builds.cache_clear()


@pytest.mark.usefixtures("fresh")
def test_without_a_compiler_plain_torch_computes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As Triton's own message comes, at the first kernel."""
    tried = list[torch.Tensor]()

    def transpose(x: torch.Tensor) -> torch.Tensor:
        tried.append(x)
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nmore")

    module, zeros = ModuleType("triton_kernels"), torch.zeros
    module.transpose = transpose  # type: ignore[attr-defined]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch, "zeros", lambda *size, dtype, device: zeros(*size, dtype=dtype))
    monkeypatch.setitem(sys.modules, "diffusion_trainer.utils.triton_kernels", module)
    monkeypatch.setattr(sys.modules["diffusion_trainer.utils"], "triton_kernels", module, raising=False)
    with caplog.at_level(logging.WARNING):
        assert [kernels.has_triton() for _ in range(3)] == [False] * 3
    assert len(tried) == 1
    (record,) = caplog.records
    assert "Failed to find C compiler" in record.message and "gcc and python3-dev" in record.message
    assert "more" not in record.message.split("(")[1].split(")")[0]


def test_compiled_code_takes_the_answer_as_it_is() -> None:
    def asks(x: torch.Tensor) -> torch.Tensor:
        return x * 2 if kernels.has_triton() else x * 3

    torch._dynamo.reset()
    kernels._builds.cache_clear()
    factor = 2 if kernels.has_triton() else 3
    x = torch.ones(3)
    assert torch.equal(torch.compile(asks, backend="eager", fullgraph=True)(x), x * factor)
