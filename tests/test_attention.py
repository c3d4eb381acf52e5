"""cuDNN attention gives the right output and gradients, in the layouts that the models use."""

import pytest
import torch
from diffusion_trainer.utils import attention
from torch.nn import functional as F

pytestmark = pytest.mark.gpu


@pytest.fixture
def _restored():
    yield
    F.scaled_dot_product_attention = attention._native
    torch.backends.cuda.enable_cudnn_sdp(True)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("length", "heads", "width"), [(4608, 24, 128), (1000, 4, 64), (77, 2, 40)])
@pytest.mark.usefixtures("_restored")
def test_cudnn_equals_exact_attention(compiled: bool, length: int, heads: int, width: int) -> None:
    device = torch.device("cuda")
    if attention.choose("auto", device) != "cudnn":
        pytest.skip("this GPU takes torch's own attention")

    def attend(q_NLHD: torch.Tensor, k_NLHD: torch.Tensor, v_NLHD: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.permute(0, 2, 1, 3) for x in (q_NLHD, k_NLHD, v_NLHD))
        return F.scaled_dot_product_attention(q, k, v).permute(0, 2, 1, 3).flatten(2, 3)

    generator = torch.Generator("cuda").manual_seed(length)
    inputs = [torch.randn(1, length, heads, width, device=device, generator=generator).bfloat16() for _ in range(4)]
    *qkv, grad = inputs
    grad = grad.flatten(2, 3)
    for tensor in qkv:
        tensor.requires_grad_()
    output = (torch.compile(attend) if compiled else attend)(*qkv)
    grads = torch.autograd.grad(output, qkv, grad)
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in qkv]
    q, k, v = (tensor.permute(0, 2, 1, 3) for tensor in exact_inputs)
    exact = ((q @ k.transpose(-1, -2) / width**0.5).softmax(-1) @ v).permute(0, 2, 1, 3).flatten(2, 3)
    exact_grads = torch.autograd.grad(exact, exact_inputs, grad.double())
    for value, reference in zip((output, *grads), (exact, *exact_grads), strict=True):
        assert (value.double() - reference).norm() / reference.norm() < 1e-2
