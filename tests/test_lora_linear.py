"""The operators for layers with LoRA equal plain torch operations, forward and backward, also compiled."""

import pytest
import torch
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
    checks = torch.library.opcheck(torch.ops.diffusion_trainer.lora_linears.default, arguments)
    assert set(checks.values()) == {"SUCCESS"}
