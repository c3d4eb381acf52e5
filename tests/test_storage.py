"""Weights stored in fewer bits: how far from the original, and that training through them works."""

import pytest
import torch
from diffusion_trainer.utils.settings import family_of, parse_train_settings
from diffusion_trainer.utils.storage import StoredLinear, convert
from torch import nn
from training import Bench


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("storage"))


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float8_e4m3fn, 2**-4), (torch.float8_e5m2, 2**-3), (torch.bfloat16, 2**-8)]
)
def test_layer_is_as_near_as_its_bits_allow(dtype: torch.dtype, error: float) -> None:
    generator = torch.Generator().manual_seed(0)
    plain = nn.Linear(64, 32)
    weight = torch.randn(32, 64, generator=generator) * torch.logspace(-6, 2, 32)[:, None]  # rows of any size
    layer = nn.Linear(64, 32)
    layer.__class__ = StoredLinear
    layer.store(weight, dtype)
    plain.weight.data, layer.bias = weight, plain.bias
    assert layer.weight.dtype == dtype
    largest = weight.abs().amax(1, keepdim=True)
    far = (convert(layer.weight, layer.weight_scale, torch.float32) - weight).abs() / largest
    assert far.max() <= error
    x = torch.randn(5, 64, generator=generator, requires_grad=True)
    exact = x @ convert(layer.weight, layer.weight_scale, torch.float32).t() + plain.bias
    torch.testing.assert_close(layer(x), exact)
    grad = torch.randn(5, 32, generator=generator)
    torch.testing.assert_close(torch.autograd.grad(layer(x), x, grad), torch.autograd.grad(exact, x, grad))


@pytest.mark.parametrize("name", ["float8", "float8_e5m2", "bfloat16"])
def test_model_is_stored_as_asked(bench: Bench, name: str) -> None:
    family = family_of(parse_train_settings(bench.settings(model={"transformer_dtype": name})))
    denoiser = family.load_denoiser(torch.device("cpu"))
    expected = {"float8": torch.float8_e4m3fn}.get(name) or getattr(torch, name)
    blocks = [p for n, p in denoiser.named_parameters() if "blocks." in n and n.endswith("weight") and p.ndim == 2]
    assert {p.dtype for p in blocks} == {expected}
    outside = [p for n, p in denoiser.named_parameters() if "blocks." not in n or p.ndim == 1]
    assert {p.dtype for p in outside} == {torch.float32}


def test_training_on_float8_follows_training_on_exact_weights(bench: Bench) -> None:
    exact, stored = bench.train().curve("loss"), bench.train(model={"transformer_dtype": "float8"}).curve("loss")
    assert stored != exact
    assert stored == pytest.approx(exact, rel=0.05)


def test_float8_also_where_no_adapter_is(bench: Bench) -> None:
    changes = {"adapter": {"target_modules": ["to_q"]}, "epochs": 1}
    exact = bench.train(**changes).curve("loss")
    stored = bench.train(**changes, model={"transformer_dtype": "float8"}).curve("loss")
    assert stored == pytest.approx(exact, rel=0.05)
