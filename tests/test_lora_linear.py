"""The operators for layers with LoRA equal plain torch operations, forward and backward, also compiled."""

import pytest
import torch
from diffusion_trainer.utils import kernels
from diffusion_trainer.utils.lora_linear import lora_linears


def random(*shape: int, seed: int, requires_grad: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(requires_grad)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("needs_x", [True, False])
@pytest.mark.parametrize("ranks", [[2], [2, 3, 1]])
def test_equals_plain_operations(bias: bool, needs_x: bool, ranks: list[int]) -> None:
    x = random(7, 5, seed=0, requires_grad=needs_x)
    layers = range(len(ranks))
    weights = [random(6 + n, 5, seed=10 + n) for n in layers]
    biases = [random(6 + n, seed=20 + n) if bias else None for n in layers]
    downs = [random(rank, 5, seed=30 + n, requires_grad=True) for n, rank in enumerate(ranks)]
    ups = [random(6 + n, rank, seed=40 + n, requires_grad=True) for n, rank in enumerate(ranks)]
    nothing = [None for _ in layers]
    outputs = lora_linears(x, weights, nothing, nothing, biases, downs, ups)
    plain = [x @ weights[n].t() + x @ downs[n].t() @ ups[n].t() + (biases[n] if bias else 0) for n in layers]
    grads = [random(7, 6 + n, seed=50 + n) for n in layers]
    inputs = [*downs, *ups, *([x] if needs_x else [])]
    for ours, reference in zip(outputs, plain, strict=True):
        torch.testing.assert_close(ours, reference)
    for ours, reference in zip(
        torch.autograd.grad(outputs, inputs, grads), torch.autograd.grad(plain, inputs, grads), strict=True
    ):
        torch.testing.assert_close(ours, reference)


def test_an_unused_output_has_no_part_in_the_gradient() -> None:
    x, weights = random(7, 5, seed=0, requires_grad=True), [random(6, 5, seed=1), random(6, 5, seed=2)]
    downs, ups = [random(2, 5, seed=n) for n in (3, 4)], [random(6, 2, seed=n) for n in (5, 6)]
    _, used = lora_linears(x, weights, [None, None], [None, None], [None, None], downs, ups)
    plain = x @ weights[1].t() + x @ downs[1].t() @ ups[1].t()
    torch.testing.assert_close(torch.autograd.grad(used.sum(), x), torch.autograd.grad(plain.sum(), x))


@pytest.mark.parametrize("layers", [1, 2])
def test_operators_are_well_formed(layers: int) -> None:
    weights, ups = [random(6, 5, seed=1)] * layers, [random(6, 2, seed=2, requires_grad=True) for _ in range(layers)]
    x, down = random(7, 5, seed=0, requires_grad=True), random(2 * layers, 5, seed=4, requires_grad=True)
    scales, biases = [random(6, 1, seed=5)] * layers, [random(6, seed=6)] * layers
    arguments = (x, None, None, weights, scales, [None] * layers, biases, down, ups)
    torch.library.opcheck(torch.ops.diffusion_trainer.lora_linears.default, arguments)


def on_gpu(*shape: int, seed: int) -> torch.Tensor:
    return random(*shape, seed=seed).cuda().bfloat16()


def assert_rounded(ours: torch.Tensor, exact: torch.Tensor) -> None:
    """That values are right but for being rounded to bfloat16, themselves and what they were added up from."""
    torch.testing.assert_close(ours.double(), exact, rtol=2**-7, atol=2**-9 * exact.abs().max().item())


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [1, 16, 20, 64])
@pytest.mark.parametrize(("rows", "width"), [(4608, 3072), (33, 200), (1, 48)])
def test_kernels_of_low_rank(rows: int, width: int, rank: int) -> None:
    left, right, bias = on_gpu(rows, 2 * rank, seed=1)[:, rank:], on_gpu(width, rank, seed=2), on_gpu(width, seed=3)
    out, down = on_gpu(rows, width, seed=4), on_gpu(rank, width, seed=5)
    product = left.double() @ right.double().t()
    assert_rounded(kernels.low_rank(left, right, bias), product + bias.double())
    assert_rounded(kernels.low_rank(left, down.t()), left.double() @ down.double())
    expected = out.double() + product
    assert kernels.add_low_rank(out, left, right) is out
    assert_rounded(out, expected)


@pytest.mark.gpu
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


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 3072, 18432), (31, 200, 50)])
def test_kernel_of_few_rows(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    x, bias = on_gpu(rows, inputs, seed=1), on_gpu(outputs, seed=2)
    stored, scale = kernels.quantise_rows(on_gpu(outputs, inputs, seed=3), dtype)
    assert kernels.multiplies_few(x, dtype)
    exact = x.double() @ (stored.double() * scale).t() + bias.double()
    assert_rounded(kernels.multiply_few(x, stored, scale, bias), exact)
