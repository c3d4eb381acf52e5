"""Weights stored in fewer bits: how far from the original, and that training through them works."""

from collections.abc import Callable

import bitsandbytes
import pytest
import torch
from diffusion_trainer.models import families
from diffusion_trainer.utils import kernels
from diffusion_trainer.utils.lora_linear import lora_linears
from diffusion_trainer.utils.settings import family_of, parse_train_settings
from diffusion_trainer.utils.storage import (
    DTYPES,
    Storage,
    StoredLinear,
    convert,
    multiply_quantised,
    quantise,
    stored_linear,
    stored_linear_backward,
    use_storage,
)
from diffusion_trainer.utils.weights import Weights, build, fill
from safetensors.torch import save_file
from torch import nn
from training import Bench

CPU = torch.device("cpu")
FLOAT8 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("storage"))


@pytest.fixture(scope="module", params=list(families()))
def any_bench(request, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("storage"), request.param)


@pytest.fixture
def quantised():
    multiply_quantised(True)
    yield
    multiply_quantised(False)


def random(*shape: int, seed: int = 0, requires_grad: bool = False) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(requires_grad)


@pytest.mark.parametrize(
    ("name", "error"),
    [("float8", 2**-4), ("float8_e5m2", 2**-3), ("int8", 0.5 / 127 * 1.001), ("nf4", 0.16), ("bfloat16", 2**-8)],
)
def test_layer_is_as_near_as_its_bits_allow(name: str, error: float) -> None:
    weight = random(32, 64) * torch.logspace(-6, 2, 32)[:, None]  # rows of any size
    layer, plain = nn.Linear(64, 32), nn.Linear(64, 32)
    use_storage(nn.Sequential(layer), Storage.named(name))
    assert isinstance(layer, StoredLinear)
    dtype = Storage.named(name).dtype
    layer.store(weight, dtype)
    assert layer.weight.dtype == dtype
    value = convert(layer.weight, layer.weight_scale, torch.float32)
    assert ((value - weight).abs() / weight.abs().amax(1, keepdim=True)).max() <= error
    x, grad = random(2, 5, 64, seed=1, requires_grad=True), random(2, 5, 32, seed=2)
    exact = x @ value.t() + layer.bias
    torch.testing.assert_close(layer(x), exact)
    torch.testing.assert_close(torch.autograd.grad(layer(x), x, grad), torch.autograd.grad(exact, x, grad))
    assert plain.weight.shape == (layer.out_features, layer.in_features)


@pytest.mark.parametrize("shape", [(32, 64), (7, 10), (1, 6), (128, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_is_that_of_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = random(*shape)
    stored, scales = quantise(weight, torch.uint8)
    packed, state = bitsandbytes.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert torch.equal(stored.view(-1), packed.view(-1))
    assert stored.nbytes == weight.numel() // 2
    state.dtype = dtype
    theirs = bitsandbytes.functional.dequantize_4bit(packed, state)
    assert torch.equal(convert(stored, scales, dtype), theirs.view(shape))


def test_nf4_leaves_rows_of_odd_length_alone() -> None:
    model = build(lambda: nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 4)))
    fill(model, lambda name: torch.ones(dict(model.named_parameters())[name].shape), torch.float32, CPU,
         storage=Storage.named("nf4"))  # fmt: skip
    assert [type(layer) for layer in model] == [nn.Linear, StoredLinear]


@pytest.mark.parametrize("scales", [1, 8], ids=["one scale", "a scale for each row"])
def test_scaled_float8_files_keep_their_bits(tmp_path, scales: int) -> None:
    stored = random(8, 16).mul(100).to(FLOAT8)
    scale = torch.rand(scales, generator=torch.Generator().manual_seed(1)) + 0.01
    plain = random(8, 16, seed=3).to(FLOAT8)
    save_file({"0.weight": stored, "0.scale_weight": scale, "1.weight": plain}, tmp_path / "m.safetensors")
    model = build(lambda: nn.Sequential(nn.Linear(16, 8, bias=False), nn.Linear(16, 8, bias=False)))
    weights = Weights(tmp_path / "m.safetensors", "model.path")
    fill(model, weights.read, torch.float32, CPU, storage=Storage(FLOAT8))
    assert torch.equal(model[0].weight.view(torch.uint8), stored.view(torch.uint8))
    assert torch.equal(convert(model[0].weight, model[0].weight_scale, torch.float32), weights.read("0.weight"))
    assert torch.equal(model[1].weight.view(torch.uint8), plain.view(torch.uint8))
    rows = weights.read("0.weight", slice(2, 5))
    again, again_scale = quantise(rows, FLOAT8, rows.stored_scale)
    assert torch.equal(again.view(torch.uint8), stored[2:5].view(torch.uint8))
    assert torch.equal(convert(again, again_scale, torch.float32), rows)


@pytest.mark.parametrize("name", [*DTYPES, "bfloat16"])
def test_model_is_stored_as_asked(bench: Bench, name: str) -> None:
    family = family_of(parse_train_settings(bench.settings(model={"transformer_dtype": name})))
    expected = family.denoiser_bytes(family.build_denoiser())
    denoiser = family.load_denoiser(CPU)
    assert sum(p.nbytes for p in denoiser.parameters()) == expected
    blocks = [p for n, p in denoiser.named_parameters() if "blocks." in n and n.endswith("weight") and p.ndim == 2]
    assert {p.dtype for p in blocks} == {Storage.named(name).dtype}
    outside = [p for n, p in denoiser.named_parameters() if "blocks." not in n or p.ndim == 1]
    assert {p.dtype for p in outside} == {torch.float32}


# How far losses of miniatures, whose weights are random and so as hard to store as any, may move.
STORED = {"flux": ("float8", 0.05), "sdxl": ("int8", 0.02), "wan": ("nf4", 0.15)}


def test_training_follows_training_on_exact_weights(any_bench: Bench) -> None:
    name, error = STORED.get(any_bench.model["type"], ("float8", 0.05))
    exact = any_bench.train(epochs=1).curve("loss")
    changes = {"epochs": 1, "model": {"transformer_dtype": name}}
    stored = any_bench.train(**changes)
    assert stored.curve("loss") != exact
    assert stored.curve("loss") == pytest.approx(exact, rel=error)
    swapped = any_bench.train(**changes, blocks_to_swap=100, activation_checkpointing="selective")
    assert swapped.curve("loss") == stored.curve("loss")


@pytest.mark.parametrize("name", ["float8", "nf4"])
def test_also_where_no_adapter_is(bench: Bench, name: str) -> None:
    changes = {"adapter": {"target_modules": ["to_q"]}, "epochs": 1}
    exact = bench.train(**changes).curve("loss")
    stored = bench.train(**changes, model={"transformer_dtype": name}).curve("loss")
    assert stored == pytest.approx(exact, rel=0.15)


@pytest.mark.parametrize(("name", "error"), [("float8", 0.2), ("int8", 0.1), ("nf4", 0.6)])
def test_text_encoders(any_bench: Bench, name: str, error: float) -> None:
    if any_bench.model["type"] == "sdxl":
        pytest.skip("its text encoders are small")

    def encoded(**changes: str) -> dict[str, torch.Tensor]:
        family = family_of(parse_train_settings(any_bench.settings(model=changes)))
        found = {}
        for part in family.text_encoders:
            found |= family.encode_text(part, family.load_text_encoder(part, CPU), ["a red cat"])
        return {key: value[0].float() for key, value in found.items()}

    exact, stored = encoded(), encoded(text_encoder_dtype=name)
    far = {key: ((stored[key] - value).norm() / value.norm()).item() for key, value in exact.items()}
    assert 0 < max(far.values()) < error, far


# -- products of quantised operands -------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "error"), [(FLOAT8, 0.06), (torch.int8, 0.03)])
def test_quantised_products(quantised, dtype: torch.dtype, error: float, bias: bool) -> None:
    """Against exact products: the relative error of random vectors is that of a number, 2.6 % in float8."""
    x, grad = random(64, 96, requires_grad=True) * torch.logspace(-3, 3, 64)[:, None], random(64, 48, seed=2)
    weight = random(48, 96, seed=1) * torch.logspace(-0.5, 0.5, 48)[:, None]
    offset = random(48, seed=4) if bias else None
    stored, scale = quantise(weight, dtype)
    output = stored_linear(x, None, None, stored, scale, None, offset)
    exact = x @ weight.t() + (0 if offset is None else offset)
    (ours,) = torch.autograd.grad(output, x, grad)
    assert far_rows(output, exact) < error
    assert far_rows(ours, grad @ weight) < error
    assert not torch.equal(output, x @ convert(stored, scale, torch.float32).t())


def far_rows(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return ((ours - exact).norm(dim=1) / exact.norm(dim=1)).max().item()


class Adapted(torch.nn.Module):
    """Layers of one input with LoRA, and what they should give."""

    def __init__(self, dtype: torch.dtype, layers: int) -> None:
        super().__init__()
        self.exact = [random(48, 96, seed=10 + n) for n in range(layers)]
        self.stored, self.scales = zip(*(quantise(weight, dtype) for weight in self.exact), strict=True)
        self.biases = [random(48, seed=20 + n) for n in range(layers)]
        self.downs = [random(4, 96, seed=30 + n, requires_grad=True) for n in range(layers)]
        self.ups = [random(48, 4, seed=40 + n, requires_grad=True) for n in range(layers)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs = lora_linears(
            x * 2, self.stored, self.scales, [None for _ in self.stored], self.biases, self.downs, self.ups
        )
        return torch.stack([output * (n + 1) for n, output in enumerate(outputs)])

    def expected(self, x: torch.Tensor) -> torch.Tensor:
        layers = zip(self.exact, self.biases, self.downs, self.ups, strict=True)
        values = (2 * x @ weight.t() + bias + 2 * x @ down.t() @ up.t() for weight, bias, down, up in layers)
        return torch.stack([value * (n + 1) for n, value in enumerate(values)])


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("dtype", [FLOAT8, torch.int8])
def test_quantised_lora(quantised, dtype: torch.dtype, layers: int) -> None:
    model, x, grad = Adapted(dtype, layers), random(64, 96, requires_grad=True), random(layers, 64, 48, seed=5)
    inputs = (x, *model.downs, *model.ups)
    output, exact = model(x), model.expected(x)
    assert far_rows(output.flatten(0, 1), exact.flatten(0, 1)) < 0.05
    for ours, reference in zip(
        torch.autograd.grad(output, inputs, grad), torch.autograd.grad(exact, inputs, grad), strict=True
    ):
        assert far_rows(ours, reference) < 0.05


@pytest.mark.parametrize("dtype", [FLOAT8, torch.int8])
def test_compiled_code_quantises_by_itself(quantised, dtype: torch.dtype) -> None:
    """The same as the operators do going forward, but in the kernels that compute what is quantised."""
    model, x, grad = Adapted(dtype, 2), random(64, 96, requires_grad=True), random(2, 64, 48, seed=5)
    inputs = (x, *model.downs, *model.ups)

    def run(call: Callable[[torch.Tensor], torch.Tensor]) -> tuple[list[torch.Tensor], set[str]]:
        with torch.profiler.profile() as profile:
            output = call(x)
        return [output, *torch.autograd.grad(output, inputs, grad)], {event.key for event in profile.key_averages()}

    eager, of_eager = run(model)
    compiled = torch.compile(model, fullgraph=True)
    run(compiled)
    ours, of_ours = run(compiled)
    assert "aten::amax" in of_eager
    assert "aten::amax" not in of_ours
    for value, reference in zip(ours, eager, strict=True):
        assert far_rows(value.flatten(0, -2), reference.flatten(0, -2)) < 0.02


def test_few_rows_are_multiplied_exactly(quantised) -> None:
    weight = random(48, 96)
    stored, scale = quantise(weight, FLOAT8)
    x = random(4, 96)
    torch.testing.assert_close(
        stored_linear(x, None, None, stored, scale, None, None), x @ convert(stored, scale, torch.float32).t()
    )


def test_training_with_quantised_products(bench: Bench) -> None:
    changes = {"epochs": 2, "model": {"transformer_dtype": "float8"}}
    exact = bench.train(**changes).curve("loss")
    ours = bench.train(epochs=2, model={"transformer_dtype": "float8", "quantized_matmul": True}).curve("loss")
    assert ours != exact
    assert ours == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("adapter", [{}, {"exclude_modules": ["attn"]}], ids=["all adapted", "some"])
def test_transposed_weights_are_kept_and_change_nothing(bench: Bench, adapter: dict, monkeypatch) -> None:
    changes = {"epochs": 2, "adapter": adapter, "model": {"transformer_dtype": "float8", "quantized_matmul": True}}
    plain = bench.train(**changes)
    transpose, kept = kernels.transpose, list[torch.Tensor]()

    def counted(weight: torch.Tensor) -> torch.Tensor:
        assert not torch.is_grad_enabled() or not any(weight.data_ptr() == other.data_ptr() for other in kept)
        kept.append(weight)
        return transpose(weight)

    monkeypatch.setattr(kernels, "transpose", counted)
    ours = bench.train(**changes, transposed_weights=True)
    assert ours.curve("loss") == plain.curve("loss")
    assert ours.curve("grad_norm") == plain.curve("grad_norm")
    assert len({weight.data_ptr() for weight in kept}) == len(kept)  # each once, none in a backward pass


@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_operators_are_well_formed(name: str) -> None:
    stored, scale = quantise(random(48, 96), DTYPES[name])
    x = random(64, 96, requires_grad=True)
    torch.library.opcheck(
        torch.ops.diffusion_trainer.stored_linear.default, (x, None, None, stored, scale, None, random(48))
    )
    assert stored_linear_backward(random(64, 48), stored, scale, None).shape == (64, 96)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "error"), [(FLOAT8, 0.05), (torch.int8, 0.03)])
@pytest.mark.parametrize("width", [(3072, 3072), (3072, 12288), (15360, 3072)])
def test_quantised_products_on_the_gpu(quantised, width: tuple[int, int], dtype: torch.dtype, error: float) -> None:
    inputs, outputs = width
    x = random(4608, inputs).cuda().bfloat16().requires_grad_()
    weight, bias = (random(outputs, inputs, seed=1) * 0.02).cuda(), random(outputs).cuda().bfloat16()
    stored, scale = quantise(weight, dtype)
    output = stored_linear(x, None, None, stored, scale, None, bias)
    grad = random(4608, outputs, seed=2).cuda().bfloat16()
    assert far_rows(output.float(), x.float() @ weight.t() + bias.float()) < error
    assert far_rows(torch.autograd.grad(output, x, grad)[0].float(), grad.float() @ weight) < error
