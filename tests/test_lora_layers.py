"""Frozen layers with adapters, in models of plain torch modules: what ComfyUI's own have in common with them."""

import copy
from typing import Any

import pytest
import torch
from diffusion_trainer.diffusion_nodes import lora_layers
from diffusion_trainer.diffusion_nodes.lora_layers import attached, shape_of, targets
from diffusion_trainer.diffusion_nodes.lora_norms import forward_of
from diffusion_trainer.diffusion_nodes.lora_recompute import Copies
from diffusion_trainer.utils.adapter_layers import Adapter, new_adapter
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

WIDTH = 16


class Fetching(nn.Module):
    """A norm whose weight lies elsewhere and is brought to a place that all of its kind share, one after another."""

    comfy_cast_weights = False
    weight_function: tuple[Any, ...] = ()
    bias_function: tuple[Any, ...] = ()

    def __init__(self, place: Tensor, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(WIDTH, device="meta"), requires_grad=False)
        self._place, self._value = place, value

    def forward(self, x: Tensor) -> Tensor:
        weight = self._place.fill_(self._value)
        for function in self.weight_function:
            weight = function(weight)
        return F.rms_norm(x, (WIDTH,), weight)


class Block(nn.Module):
    def __init__(self, norm: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.norm, self.after = norm, after
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(x + self.second(torch.tanh(self.first(self.norm(x)))))


def model_of(*norms: nn.Module) -> tuple[nn.Module, dict[str, Adapter]]:
    torch.manual_seed(0)
    model, denoiser = nn.Module(), nn.Module()
    denoiser.blocks = nn.ModuleList(Block(*pair) for pair in zip(norms[::2], norms[1::2], strict=True))
    model.diffusion_model = denoiser.requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    adapters = {}
    for name, module in targets(model, []).items():
        shape = shape_of(module)
        assert shape is not None
        adapters[name] = new_adapter("LoRA", shape, 4, 4.0, generator)
    return model, adapters


def run(model: nn.Module, x: Tensor) -> Tensor:
    for block in model.diffusion_model.blocks:
        x = block(x)
    return x


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_each_step_sees_what_those_before_learned(checkpointing: bool, fused: bool) -> None:
    losses = {}
    for dtype in (torch.float32, torch.float16):  # bfloat16 is computed in float32 where it is slow
        model, adapters = model_of(*(nn.Identity() for _ in range(4)))
        model.to(dtype)
        x, target = torch.randn(2, 32, WIDTH).to(dtype)
        weights = [parameter for adapter in adapters.values() for parameter in adapter.parameters()]
        optimizer = torch.optim.AdamW(weights, lr=0.02, fused=fused)
        found = losses[dtype] = []
        with attached(model, adapters, dtype, Copies(), checkpointing=checkpointing) as refresh:
            for _ in range(40):
                loss = (run(model, x) - target).float().square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                refresh()
                found.append(loss.item())
    exact, rounded = losses.values()
    assert exact[-1] < 0.8 * exact[0]
    assert rounded[-1] == pytest.approx(exact[-1], rel=0.05)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_weights_that_share_a_place(checkpointing: bool) -> None:
    place, values, gradients = torch.empty(WIDTH), (0.5, 2.0, 1.5, 0.8), []
    x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(2))
    still = [nn.RMSNorm(WIDTH) for _ in values]
    for norm, value in zip(still, values, strict=True):
        nn.init.constant_(norm.weight, value)
    for norms in (still, [Fetching(place, value) for value in values]):
        model, adapters = model_of(*norms)
        weights = [parameter for adapter in adapters.values() for parameter in adapter.parameters()]
        with torch.no_grad():
            for weight in weights:
                weight += 0.1
        with attached(model, adapters, torch.float32, Copies(), checkpointing=checkpointing):
            gradients.append(torch.autograd.grad(run(model, x).square().sum(), weights))
        assert all("weight_function" not in vars(norm) for norm in norms)
    for wanted, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weighs", [False, True])
def test_an_rms_norm_keeps_its_input_alone(weighs: bool, dtype: torch.dtype) -> None:
    """Against float64."""
    torch.manual_seed(4)
    norm = nn.RMSNorm(WIDTH, eps=1e-2, elementwise_affine=weighs).requires_grad_(False)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    x, weight_of_output = (torch.randn(2, 3, WIDTH).to(dtype) for _ in range(2))
    x.requires_grad_()
    norm.to(dtype)
    exact_x = x.detach().double().requires_grad_()
    exact = copy.deepcopy(norm).double()(exact_x)
    (exact_grad,) = torch.autograd.grad(exact, exact_x, weight_of_output.double())
    kept = []
    untouched = weight_of_output.clone()
    with saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value):
        output = forward_of(norm)(x)
    (grad,) = torch.autograd.grad(output, x, weight_of_output)
    assert [value.data_ptr() for value in kept] == [x.data_ptr()]
    assert torch.equal(weight_of_output, untouched) and grad.dtype == dtype
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(output.double(), exact, **tolerance)
    torch.testing.assert_close(grad.double(), exact_grad, **tolerance)


def test_a_norm_of_another_kind_is_left_alone() -> None:
    class Other(nn.RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    for norm in (Other(WIDTH, eps=1e-6), nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH), nn.RMSNorm((2, WIDTH), eps=1e-6)):
        assert forward_of(norm) == norm.forward


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("wide", [1, 40, 2**18])
def test_weights_widened_in_parts_give_what_they_give_whole(monkeypatch, wide, stride):
    """As on a CPU that is slow in bfloat16, against float64."""
    monkeypatch.setattr(lora_layers, "WIDE", wide)
    monkeypatch.setattr(lora_layers, "_multiplies_bfloat16", lambda: False)
    torch.manual_seed(3)
    convolution = nn.Conv2d(5, 6, 3, stride=stride, padding=1)
    for module, x in ((nn.Linear(WIDTH, 24), torch.randn(2, 3, WIDTH)), (convolution, torch.randn(2, 5, 8, 8))):
        module.to(torch.bfloat16).requires_grad_(False)
        x = x.to(torch.bfloat16).requires_grad_()
        shape = shape_of(module)
        assert shape is not None
        layer = lora_layers.Layer(module, shape, None)
        layer.hold()
        output = layer(x)
        weight_of_output = torch.randn_like(output)
        (grad,) = torch.autograd.grad(output, x, weight_of_output)
        exact_x = x.detach().double().requires_grad_()
        exact = copy.deepcopy(module).double()(exact_x)
        (exact_grad,) = torch.autograd.grad(exact, exact_x, weight_of_output.double())
        torch.testing.assert_close(output.double(), exact, atol=0.02, rtol=0.01)
        torch.testing.assert_close(grad.double(), exact_grad, atol=0.02, rtol=0.01)
