"""Gradients are summed where the optimizers find them, many at a time."""

import pytest
import torch
from diffusion_trainer.utils import gradients
from diffusion_trainer.utils.gradients import Gradients
from torch import nn


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (3, 4), "b": (5,), "c": (2, 2), "unused": (7,)}
    return {n: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for n, shape in shapes.items()}


def loss(of: dict[str, nn.Parameter], factor: float) -> torch.Tensor:
    return factor * (of["a"].square().sum() + (of["b"] * torch.arange(5)).sum() + of["c"].prod() + of["c"].sum())


def expected(of: dict[str, nn.Parameter], factor: float) -> dict[str, torch.Tensor]:
    names = [name for name in of if name != "unused"]
    found = torch.autograd.grad(loss(of, factor), [of[name] for name in names])
    return {"unused": torch.zeros(7), **dict(zip(names, found, strict=True))}


@pytest.mark.parametrize(("most_waiting", "times"), [(2**25, 1), (0, 3)])
def test_passes_are_added_up(most_waiting: int, times: int, monkeypatch) -> None:
    added, add = list[int](), torch._foreach_add_
    monkeypatch.setattr(gradients, "MOST_WAITING", most_waiting)
    monkeypatch.setattr(torch, "_foreach_add_", lambda views, grads: (added.append(len(views)), add(views, grads)))
    of = parameters()
    one, two = expected(of, 1.0), expected(of, 3.0)
    summed = Gradients(of)
    loss(of, 1.0).backward()
    assert added == [3 // times] * times
    loss(of, 3.0).backward()
    for name, parameter in of.items():
        torch.testing.assert_close(summed.views[name], one[name] + two[name])
        assert parameter.grad is None
    summed.zero()
    loss(of, 3.0).backward()
    for name, view in summed.views.items():
        torch.testing.assert_close(view, two[name])


def test_bfloat16_is_summed_in_float32() -> None:
    of = parameters(torch.bfloat16)
    summed = Gradients(of, torch.float32)
    for _ in range(300):
        loss(of, 1.0).backward()
    for name, value in expected(of, 1.0).items():
        torch.testing.assert_close(summed.views[name], 300 * value.float())


class Passed(torch.autograd.Function):
    """A value past a parameter, as recomputing does with one of no part in the loss."""

    @staticmethod
    def forward(ctx, value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


def test_a_parameter_without_a_part_in_the_loss_keeps_zeros() -> None:
    of = parameters()
    one = expected(of, 1.0)
    summed = Gradients(of)
    Passed.apply(loss(of, 1.0), of["unused"]).backward()
    for name, view in summed.views.items():
        torch.testing.assert_close(view, one[name])


def test_a_pass_that_failed_leaves_nothing_for_the_next() -> None:
    of = parameters()
    summed = Gradients(of)

    def fail(_: torch.Tensor) -> None:
        raise RuntimeError("in the middle")

    failing = of["a"] * 1
    failing.register_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        (loss(of, 5.0) + failing.sum()).backward()
    summed.zero()
    loss(of, 1.0).backward()
    for name, value in expected(of, 1.0).items():
        torch.testing.assert_close(summed.views[name], value)


def test_parameters_can_be_let_go() -> None:
    of = parameters()
    summed = Gradients(of)
    summed.let_go()
    loss(of, 1.0).backward()
    assert of["a"].grad is not None
    assert not summed.views["a"].any()
