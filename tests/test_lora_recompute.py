"""Blocks that compute again in backward: the same gradients, and nothing kept but their inputs."""

import gc
from functools import partial
from typing import Any

import pytest
import torch
from diffusion_trainer.diffusion_nodes.lora_recompute import Copies, Recomputed
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


class Block(nn.Module):
    """Changes its input in place, takes one by name, and gives two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)
        self.calls = 0

    def forward(self, x: Tensor, *, shift: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        self.calls += 1
        x += factor
        hidden = torch.nn.functional.gelu(self.first(x) + shift)
        return self.second(hidden) * factor + x, hidden * 2


def gradients(block: Block, recompute: bool) -> list[Tensor]:
    torch.manual_seed(0)
    x, shift = torch.randn(4, 8, requires_grad=True), torch.randn(16, requires_grad=True)
    given = {"shift": shift, "factor": 0.5}
    if recompute:
        out, more = Recomputed.run(partial(Copies(made=True).for_block, block), x * 1, **given)
    else:
        out, more = block(x * 1, **given)
    loss = out.square().sum() + more.sum()
    return list(torch.autograd.grad(loss, [x, shift, *block.parameters()]))


def test_gradients_are_those_of_the_block() -> None:
    torch.manual_seed(1)
    block = Block()
    plain, again = gradients(block, False), gradients(block, True)
    assert block.calls == 3
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


def test_only_inputs_are_kept_and_hooks_around_it_see_them() -> None:
    kept: list[Tensor] = []

    def note(value: Tensor) -> Tensor:
        kept.append(value)
        return value

    x, shift = torch.randn(4, 8, requires_grad=True), torch.randn(16)
    with saved_tensors_hooks(note, lambda value: value):
        Recomputed.run(Block(), x * 1, shift=shift, factor=0.5)
    assert [tuple(value.shape) for value in kept if value.ndim] == [(4, 8), (16,)]


def test_a_block_that_does_something_else_the_second_time_is_told() -> None:
    calls: list[int] = []

    def fickle(x: Tensor) -> Tensor:
        calls.append(0)
        return x.exp() if len(calls) == 1 else x[:1].exp()

    out = Recomputed.run(fickle, torch.randn(3, requires_grad=True) * 1)
    with pytest.raises(RuntimeError, match="gradient_checkpointing"):
        out.sum().backward()


def test_a_block_that_spoils_what_its_gradient_needs_is_told() -> None:
    def spoils(x: Tensor) -> Tensor:
        result = x.exp()
        doubled = result.square()
        result += 1
        return doubled.sin()

    out = Recomputed.run(spoils, torch.randn(3, requires_grad=True) * 1)
    with pytest.raises(RuntimeError, match="inplace"):
        out.sum().backward()


@pytest.mark.parametrize("recompute", [False, True])
def test_what_spoils_its_input_is_told_that_copies_would_help(recompute: bool) -> None:
    copies = Copies()
    norm = partial(copies.for_norm, torch.nn.LayerNorm(3))

    class Marked(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * 2

    def changes(x: Tensor) -> Tensor:
        x += Marked.apply(norm(x))
        return x

    def gradient() -> Tensor:
        x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
        out = Recomputed.run(partial(copies.for_block, changes), x * 1) if recompute else changes(x * 1)
        return torch.autograd.grad(out.square().sum(), x)[0]

    error = RuntimeError()
    try:
        gradient()
    except RuntimeError as raised:
        error = RuntimeError(str(raised))  # without the frames that hold what is looked for below
    gc.collect()
    assert not [one for one in gc.get_objects() if type(one).__name__ == "MarkedBackward"], "held for ever"
    assert copies.would_help(error) and not Copies(made=True).would_help(error)
    assert not copies.would_help(RuntimeError("CUDA out of memory"))
    copies.made = True
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (torch.nn.functional.layer_norm(x, (3,)) * 2 + x).square().sum().backward()
    torch.testing.assert_close(gradient(), x.grad)


def test_without_gradients_it_is_the_block() -> None:
    block = Block()
    with torch.no_grad():
        Recomputed.run(block, torch.randn(4, 8), shift=torch.zeros(16), factor=1.0)
    assert block.calls == 1
