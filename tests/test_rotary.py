"""Norm and rotation as one operator: the values of plain operations, their gradients, and Flux's blocks with it."""

import copy
import importlib.util
import os
import shutil
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxSingleTransformerBlock
from diffusers.models.transformers.transformer_flux import FluxTransformerBlock as FluxDoubleBlock
from diffusion_trainer.models import flux_attention
from diffusion_trainer.models.flux_attention import FusedFluxAttention
from diffusion_trainer.utils import rotary
from torch.nn import functional as F

EPS = 1e-6
LENGTHS = [(5,), (3, 8)]
Tensors = list[torch.Tensor]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here")
interpreted = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs Triton and TRITON_INTERPRET=1",
)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device, dtype)


class Case:
    """Arguments of the operator, and a gradient of its result."""

    def __init__(self, lengths: Sequence[int], dtype: torch.dtype, heads: int = 3, d: int = 16, n: int = 2,
                 is_strided: bool = True, has_weights: bool = True, device: str = "cpu") -> None:  # fmt: skip
        total, of = sum(lengths), {"dtype": dtype, "device": device}
        # Strided: a part of the result of a wider layer, and a gradient as attention gives it
        extra = 1 if is_strided else 0
        wide = [random(n, t, heads + extra, d, seed=k, **of) for k, t in enumerate(lengths)]
        self.parts = [(2 * x)[:, :, :heads].requires_grad_() for x in wide]
        self.weights = [1 + 0.2 * random(d, seed=9 + k, **of) if has_weights else None for k in range(len(lengths))]
        angles = random(total, d // 2, seed=20, device=device).repeat_interleave(2, dim=1)
        self.cos, self.sin = angles.cos(), angles.sin()
        grad = random(n, heads, total, d, seed=30, **of).transpose(1, 2)
        self.grad = grad if is_strided else grad.contiguous()

    @property
    def rest(self) -> tuple[Any, ...]:
        return self.weights, self.cos, self.sin, EPS

    def through(self, function: Any) -> Tensors:
        """The result and the gradients of the parts."""
        result = function(self.parts, *self.rest)
        return [result.detach(), *torch.autograd.grad(result, self.parts, self.grad)]

    def exact(self) -> Tensors:
        parts = [part.detach().double().requires_grad_() for part in self.parts]
        weights = [None if weight is None else weight.double() for weight in self.weights]
        normed = [F.rms_norm(x, x.shape[-1:], weight, EPS) for x, weight in zip(parts, weights, strict=True)]
        x = torch.cat(normed, dim=1)
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(3)
        result = x * self.cos[:, None].double() + turned * self.sin[:, None].double()
        return [result.detach(), *torch.autograd.grad(result, parts, self.grad.double())]


def library(
    parts: Tensors, weights: Sequence[torch.Tensor | None], cos: torch.Tensor, sin: torch.Tensor, eps: float
) -> torch.Tensor:
    """As diffusers' processor has it."""
    normed = [F.rms_norm(part, part.shape[-1:], weight, eps) for part, weight in zip(parts, weights, strict=True)]
    return apply_rotary_emb(torch.cat(normed, dim=1), (cos, sin), sequence_dim=1)


def assert_no_worse(ours: Tensors, plain: Tensors, exact: Tensors, factor: float = 1.05) -> None:
    for our, other, reference in zip(ours, plain, exact, strict=True):
        assert our.dtype == other.dtype and our.shape == other.shape
        assert (our.double() - reference).norm() <= factor * (other.double() - reference).norm()


@pytest.mark.parametrize("has_weights", [True, False])
@pytest.mark.parametrize("is_strided", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_equals_plain_operations(lengths: tuple[int, ...], is_strided: bool, has_weights: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        case = Case(lengths, dtype, is_strided=is_strided, has_weights=has_weights)
        ours, plain = case.through(rotary.norm_rotate), case.through(library)
        assert all(tensor.is_contiguous() for tensor in ours)
        torch.testing.assert_close(ours[0], plain[0], rtol=0, atol=0)
        if dtype == torch.float32:
            torch.testing.assert_close(ours, plain)
        else:
            assert_no_worse(ours, plain, case.exact())


@pytest.mark.parametrize("lengths", LENGTHS)
def test_the_operators_are_well_formed(lengths: tuple[int, ...]) -> None:
    for has_weights in (True, False):
        case = Case(lengths, torch.float32, has_weights=has_weights)
        checks = torch.library.opcheck(torch.ops.diffusion_trainer.norm_rotate.default, (case.parts, *case.rest))
        assert set(checks.values()) == {"SUCCESS"}
        parts = [part.detach() for part in case.parts]
        arguments = (case.grad, parts, *case.rest)
        checks = torch.library.opcheck(torch.ops.diffusion_trainer.norm_rotate_backward.default, arguments)
        assert set(checks.values()) == {"SUCCESS"}


@needs_compiler
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("memory_budget", [1.0, 0.5])
def test_compiled_with_sizes_that_change(parts: int, memory_budget: float) -> None:
    torch._dynamo.reset()

    def attend(parts: Tensors, *rest: Any) -> torch.Tensor:
        query = rotary.norm_rotate([part * 2 for part in parts], *rest).transpose(1, 2)
        return F.scaled_dot_product_attention(query, query, query).transpose(1, 2).sin()

    with torch._functorch.config.patch(activation_memory_budget=memory_budget):
        compiled = torch.compile(attend, fullgraph=True)
        for length in (4, 6, 9, 12):
            case = Case((3, length)[-parts:], torch.float32)
            torch.testing.assert_close(case.through(compiled), case.through(attend))
    torch._dynamo.reset()


def blocks(dtype: torch.dtype, device: str = "cpu", heads: int = 2, d: int = 16) -> list[tuple[Any, tuple[Any, ...]]]:
    """A double and a single block of Flux, each with its inputs."""
    of = {"dtype": dtype, "device": device}
    torch.manual_seed(0)
    made = [
        kind(heads * d, heads, d).to(**of).requires_grad_(False)
        for kind in (FluxDoubleBlock, FluxSingleTransformerBlock)
    ]
    for block in made:
        for name, parameter in block.named_parameters():
            if "norm_" in name and parameter.ndim == 1 and name.endswith("weight"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    x, text, temb = (random(2, *shape, heads * d, seed=k, **of) for k, shape in enumerate([(40,), (24,), ()]))
    angles = random(64, d // 2, seed=3, device=device).repeat_interleave(2, dim=1)
    return [(block, (x, text, temb, (angles.cos(), angles.sin()))) for block in made]


def run(block: Any, inputs: tuple[Any, ...], processor: FluxAttnProcessor, compiled: bool = False) -> Tensors:
    """What comes out of a block, text before image, and the gradients of its inputs."""
    block.attn.set_processor(processor)
    x, text, temb, angles = inputs
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, text, temb)]
    results = (torch.compile(block, fullgraph=True) if compiled else block)(*leaves, angles)
    grads = [random(*result.shape, seed=8).to(result) for result in results]
    return [*(result.detach() for result in results), *torch.autograd.grad(results, leaves, grads)]


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_are_the_librarys(kind: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit without kernels; with the operator's plain operations, too, but for the rounding of gradients."""
    block, inputs = blocks(dtype)[kind]
    plain = run(block, inputs, FluxAttnProcessor())
    for ours, reference in zip(run(block, inputs, FusedFluxAttention()), plain, strict=True):
        assert torch.equal(ours, reference)
    monkeypatch.setattr(flux_attention, "is_fused", lambda *_: True)
    used = run(block, inputs, FusedFluxAttention())
    for number, (ours, reference) in enumerate(zip(used, plain, strict=True)):
        if number < 2:
            assert torch.equal(ours, reference)
        else:
            assert (ours - reference).norm() < (1e-5 if dtype == torch.float32 else 2e-2) * reference.norm()


@needs_compiler
@pytest.mark.parametrize("kind", [0, 1])
def test_a_compiled_block_is_one_graph(kind: int, monkeypatch: pytest.MonkeyPatch) -> None:
    block, inputs = blocks(torch.float32)[kind]
    plain = run(block, inputs, FluxAttnProcessor())
    for fused in (False, True):
        torch._dynamo.reset()
        if fused:
            monkeypatch.setattr(flux_attention, "is_fused", lambda *_: True)
        torch.testing.assert_close(run(block, inputs, FusedFluxAttention(), compiled=True), plain)
    torch._dynamo.reset()


# -- kernels ---------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the interpreter cuts bfloat16 off, unrounded
@pytest.mark.parametrize("has_weights", [True, False])
@pytest.mark.parametrize("is_strided", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_interpreted_kernels_equal_plain_operations(
    lengths: tuple[int, ...], is_strided: bool, has_weights: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for heads, d in ((3, 16), (9, 128), (2, 256)):
        case = Case(lengths, dtype, heads, d, is_strided=is_strided, has_weights=has_weights)
        plain = case.through(library)
        with monkeypatch.context() as patch:
            patch.setattr(rotary, "_has_kernels", lambda _: True)
            ours = case.through(rotary.norm_rotate)
        if dtype == torch.float32:
            torch.testing.assert_close(ours, plain)
        else:
            assert_no_worse(ours, plain, case.exact())


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("lengths", [(512, 4096), (4608,), (77, 1001), (3,)])
@pytest.mark.parametrize(("heads", "d", "dtype"), [(24, 128, torch.bfloat16), (5, 64, torch.float16)])
def test_kernels_are_as_good_as_plain_operations(
    compiled: bool, lengths: tuple[int, ...], heads: int, d: int, dtype: torch.dtype
) -> None:
    torch._dynamo.reset()

    def fused(parts: Tensors, *rest: Any) -> torch.Tensor:
        return rotary.norm_rotate([part * 1 for part in parts], *rest)

    for n, is_strided, has_weights in ((1, True, True), (2, False, True), (1, True, False)):
        case = Case(lengths, dtype, heads, d, n, is_strided, has_weights, device="cuda")
        assert rotary.is_fused(case.parts[0], d, case.weights, case.cos, case.sin)
        function = torch.compile(fused, fullgraph=True) if compiled else fused
        assert_no_worse(case.through(function), case.through(library), case.exact())


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", [0, 1])
def test_fused_blocks_are_as_good_as_the_librarys(compiled: bool, kind: int) -> None:
    torch._dynamo.reset()
    block, inputs = blocks(torch.bfloat16, "cuda", heads=4, d=128)[kind]
    plain = run(block, inputs, FluxAttnProcessor())
    ours = run(block, inputs, FusedFluxAttention(), compiled)
    *wide, angles = inputs
    exact_inputs = (*(tensor.double() for tensor in wide), angles)
    exact = run(copy.deepcopy(block).double(), exact_inputs, FluxAttnProcessor())
    assert_no_worse(ours, plain, exact, factor=1.1)
