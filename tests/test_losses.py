"""Losses against their formulas, and weights in them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusion_trainer.utils.losses import loss_for
from diffusion_trainer.utils.settings import parse_train_settings
from training import Bench


def loss(**chosen: Any) -> Any:
    return loss_for(
        SimpleNamespace(**{"loss": "mse", "huber_delta": None, "smooth_l1_beta": None, "pseudo_huber_c": None} | chosen)
    )


@pytest.mark.parametrize(
    ("chosen", "small", "large"),
    [
        ({}, 0.01, 100.0),
        ({"loss": "l1"}, 0.1, 10.0),
        ({"huber_delta": 2.0}, 0.005, 2.0 * (10 - 1)),
        ({"smooth_l1_beta": 2.0}, 0.0025, 10 - 1),
        ({"pseudo_huber_c": 2.0}, 4 * ((1 + 0.0025) ** 0.5 - 1), 4 * (26**0.5 - 1)),
    ],
)
def test_equals_the_formula(chosen: dict, small: float, large: float) -> None:
    for error, expected in ((0.1, small), (10.0, large)):
        value = loss(**chosen)(torch.full((2, 3), error), (torch.zeros(2, 3), torch.ones(2, 1)))
        assert value.item() == pytest.approx(expected, rel=1e-5)


def test_weights_count() -> None:
    prediction = torch.tensor([[1.0], [3.0]])
    assert loss()(prediction, (torch.zeros(2, 1), torch.tensor([[2.0], [0.0]]))).item() == 1.0


def test_settings_choose_one(tmp_path: Any) -> None:
    bench = Bench(tmp_path)
    parse_train_settings(bench.settings(pseudo_huber_c=0.5))
    with pytest.raises(ValueError, match="only one loss"):
        parse_train_settings(bench.settings(pseudo_huber_c=0.5, huber_delta=1.0))
