"""Kernels of our own equal plain torch."""

import pytest
import torch
from diffusion_trainer.utils import kernels

pytestmark = pytest.mark.gpu
FLOAT8 = torch.float8_e4m3fn


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


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


def on_gpu(*shape: int, seed: int) -> torch.Tensor:
    return random(*shape, seed=seed).cuda().bfloat16()


def assert_rounded(ours: torch.Tensor, exact: torch.Tensor) -> None:
    """That values are right but for being rounded to bfloat16, themselves and what they were added up from."""
    torch.testing.assert_close(ours.double(), exact, rtol=2**-7, atol=2**-9 * exact.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rank", [1, 16, 20, 64])
@pytest.mark.parametrize(("rows", "width"), [(4608, 3072), (33, 200), (1, 48)])
def test_kernels_of_low_rank(rows: int, width: int, rank: int, dtype: torch.dtype) -> None:
    left, bias = on_gpu(rows, 2 * rank, seed=1)[:, rank:], on_gpu(width, seed=3)
    right = on_gpu(width, rank, seed=2).to(dtype)
    out, down = on_gpu(rows, width, seed=4), on_gpu(rank, width, seed=5)
    product = left.double() @ right.double().t()
    assert_rounded(kernels.low_rank(left, right, bias), product + bias.double())
    assert_rounded(kernels.low_rank(left, down.t()), left.double() @ down.double())
    expected = out.double() + product
    assert kernels.add_low_rank(out, left, right) is out
    assert_rounded(out, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rank", [1, 16, 20, 64])
@pytest.mark.parametrize(("rows", "width"), [(4608, 3072), (100, 15360), (33, 208)])
def test_kernels_of_gradients(rows: int, width: int, rank: int, dtype: torch.dtype) -> None:
    grad, up = on_gpu(rows, width + 16, seed=1)[:, 16:], on_gpu(width, rank, seed=2).to(dtype)
    inner, into = on_gpu(rows, 2 * rank, seed=3)[:, rank:], torch.zeros(rows, 3 * rank, device="cuda").bfloat16()
    grad_up = kernels.low_rank_grads(grad, up, inner, into[:, rank : 2 * rank])
    assert grad_up.dtype == dtype
    assert_rounded(grad_up, grad.double().t() @ inner.double())
    assert_rounded(into[:, rank : 2 * rank], grad.double() @ up.double())
    assert not into[:, :rank].any() and not into[:, 2 * rank :].any()
    again = kernels.low_rank_grads(grad, up, inner, into[:, rank : 2 * rank])
    assert torch.equal(again, grad_up)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 3072, 18432), (31, 200, 50)])
def test_kernel_of_few_rows(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    x, bias = on_gpu(rows, inputs, seed=1), on_gpu(outputs, seed=2)
    stored, scale = kernels.quantise_rows(on_gpu(outputs, inputs, seed=3), dtype)
    assert kernels.multiplies_few(x, dtype)
    exact = x.double() @ (stored.double() * scale).t() + bias.double()
    assert_rounded(kernels.multiply_few(x, stored, scale, bias), exact)
