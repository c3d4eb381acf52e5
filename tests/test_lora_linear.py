"""The LoRA layer's operators equal plain torch operations, forward and backward, also compiled."""

import pytest
import torch
from diffusion_trainer.utils.lora_linear import lora_linear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("needs_x", [True, False])
def test_equals_plain_operations(bias: bool, needs_x: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 5, generator=generator, dtype=torch.float64, requires_grad=needs_x)
    weight = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    offset = torch.randn(6, generator=generator, dtype=torch.float64) if bias else None
    down = torch.randn(2, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    up = torch.randn(6, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    inputs = [down, up, x] if needs_x else [down, up]
    output, _ = lora_linear(x, weight, None, offset, down, up)
    plain = x @ weight.t() + x @ down.t() @ up.t() + (0 if offset is None else offset)
    torch.testing.assert_close(output, plain)
    grad = torch.randn(7, 6, generator=generator, dtype=torch.float64)
    for ours, reference in zip(
        torch.autograd.grad(output, inputs, grad), torch.autograd.grad(plain, inputs, grad), strict=True
    ):
        torch.testing.assert_close(ours, reference)


def test_operators_are_well_formed() -> None:
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in ((7, 5), (6, 5), (6, 1), (6,), (2, 5), (6, 2))]
    for index in (0, 4, 5):
        tensors[index].requires_grad_()
    torch.library.opcheck(torch.ops.diffusion_trainer.lora_linear.default, tuple(tensors))
