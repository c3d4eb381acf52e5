"""Frozen layers of a ComfyUI model that gradients pass through, with adapters added while it runs.

ComfyUI's weights cannot take part in autograd as they are: they were made under inference mode, may lie in
system RAM, be float8 or quantised, and may be streamed. So each linear layer and convolution computes its own
forward, whatever that is, outside autograd; its backward asks the layer for its weight again. That keeps no
copy of a weight between forward and backward and computes no gradient of any. Everything that is put into the
model is taken out again, in reverse order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn import grad as conv_grad

from ..utils.adapter_layers import Adapter, Lora, Shape
from .lora_norms import forward_of
from .lora_recompute import Copies, Recomputed
from .lora_weights import computes_as, dequantised, fetch, nothing, weight_of

_INPUT_GRADIENTS = (conv_grad.conv1d_input, conv_grad.conv2d_input, conv_grad.conv3d_input)
_MISSING = object()
_GIVES_FLOAT32 = "out_dtype" in (torch.mm.__doc__ or "")
"""Whether products of bfloat16 come in float32 where they are made, which saves a pass; since torch 2.8, on CUDA."""
WIDE = 2**18
"""Elements of a weight that are brought to float32 at a time, where a processor is slow otherwise."""


# -- which layers ----------------------------------------------------------------------------------------------


def shape_of(module: nn.Module) -> Shape | None:
    """The shape of a layer that can carry an adapter; None for any other module."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        if module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
            return None  # autograd goes through these itself
        return Shape(module.out_channels, module.in_channels, tuple(module.kernel_size), tuple(module.stride),
                     module.padding, tuple(module.dilation))  # fmt: skip
    # A quantised linear layer of ComfyUI is no nn.Linear.
    if isinstance(module, nn.Linear) or (type(module).__name__ == "Linear" and hasattr(module, "in_features")):
        return Shape(int(module.out_features), int(module.in_features))  # type: ignore[arg-type]
    return None


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer of the denoiser that can carry an adapter, by its name in the model."""
    return {
        name: module
        for name, module in model.named_modules()
        if name.startswith("diffusion_model.") and shape_of(module) is not None
    }


def targets(model: nn.Module, patterns: list[str]) -> dict[str, nn.Module]:
    """The layers that ``patterns`` choose.

    Args:
        patterns: Shell patterns of names below ``diffusion_model``; any part of the name may match. One that
            begins with ``-`` takes layers away. None at all: the linear layers of the repeated blocks; in a
            U-Net those of its attention, with the projections around them.
    """
    wanted = [pattern for pattern in patterns if not pattern.startswith("-")]
    unwanted = [pattern[1:] for pattern in patterns if pattern.startswith("-")]
    found = {}
    for name, module in layers(model).items():
        short = name.removeprefix("diffusion_model.")
        chosen = any(_matches(short, pattern) for pattern in wanted) if wanted else _is_usual(model, name, module)
        if chosen and not any(_matches(short, pattern) for pattern in unwanted):
            found[name] = module
    return found


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*{pattern}*")


def _is_usual(model: nn.Module, name: str, module: nn.Module) -> bool:
    if math.prod(shape_of(module).kernel) != 1:  # type: ignore[union-attr]  # layers only
        return False
    if hasattr(model.diffusion_model, "input_blocks"):
        return ".transformer_blocks." in name or name.endswith((".proj_in", ".proj_out"))
    return any(part.isdigit() for part in name.split("."))


def blocks(model: nn.Module) -> list[nn.Module]:
    """What gradient checkpointing recomputes piece by piece: the outermost repeated blocks.

    A U-Net calls the children of its blocks, not the blocks, and the deep ones hold transformer blocks.
    """
    found: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList):
                for block in child:
                    inner = _parts(block)
                    found.extend(inner if inner else [block])
            elif isinstance(child, nn.Sequential):
                found.extend(_parts(child))
            else:
                visit(child)

    visit(model.diffusion_model)  # type: ignore[arg-type]
    return [block for block in found if shape_of(block) is None and next(block.children(), None) is not None]


def _parts(block: nn.Module) -> list[nn.Module]:
    if not isinstance(block, nn.Sequential):
        return []
    return [
        part for child in block.children() for part in (getattr(child, "transformer_blocks", None) or [child])
        if not isinstance(part, nn.Identity)
    ]  # fmt: skip


# -- one layer -------------------------------------------------------------------------------------------------


class _Frozen(torch.autograd.Function):
    """A layer's own forward, and the gradient of its input from its weight; a LoRA of it in the same stroke.

    Products with the rank are ordered so that it is their first dimension: with few columns CPUs take up to four
    times as long for them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Layer, down_RI: Tensor | None, up_OR: Tensor | None) -> Tensor:
        output = layer.output(x.detach())
        ctx.layer, ctx.size, ctx.dtype = layer, x.shape, x.dtype
        if down_RI is None or up_OR is None:
            return _like(x, output)
        rows_MI = x.reshape(-1, x.shape[-1])
        rows = _fast(rows_MI)
        down, up = layer.factors(rows.dtype)
        inner_RM = down @ rows.t()
        added = output.view(-1, output.shape[-1])
        if output.dtype == rows.dtype:
            added.addmm_(inner_RM.t(), up.t(), alpha=layer.scale)
        else:
            added.add_(inner_RM.t() @ up.t(), alpha=layer.scale)
        ctx.save_for_backward(rows_MI, inner_RM)
        return _like(x, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None]:
        layer: Layer = ctx.layer
        needs_x = ctx.needs_input_grad[0]
        grad = _fast(grad.to(ctx.dtype))
        saved = ctx.saved_tensors
        if not saved:
            alone = layer.input_gradient(grad, ctx.size, ctx.dtype).to(ctx.dtype) if needs_x else None
            return alone, None, None, None
        rows_MI, inner_RM = saved
        rows_MI = _fast(rows_MI)
        down, up = layer.factors(grad.dtype)
        grad_MO = grad.reshape(-1, grad.shape[-1])
        grad_inner_RM = up.t() @ grad_MO.t()
        if layer.scale != 1.0:
            grad_inner_RM *= layer.scale
        grad_x = None
        if needs_x:
            grad_x = layer.input_gradient(grad_MO, rows_MI.shape, ctx.dtype)
            grad_x = grad_x.addmm_(grad_inner_RM.t(), down).reshape(ctx.size).to(ctx.dtype)
        if grad.is_cuda:
            grad_up = _product(grad_MO.t(), inner_RM.t())
        else:
            grad_up = (inner_RM @ grad_MO).t().to(torch.float32, memory_format=torch.contiguous_format)
        if layer.scale != 1.0:
            grad_up *= layer.scale
        return grad_x, None, _product(grad_inner_RM, rows_MI), grad_up


@cache
def _multiplies_bfloat16() -> bool:
    """Whether the processor has units for it; without, products take up to a hundred times as long as in float32."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, bool)() for check in checks)


def _is_slow(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not _multiplies_bfloat16()


def _fast(x: Tensor) -> Tensor:
    """``x`` in a type that its processor multiplies."""
    return x.float() if _is_slow(x) else x


def _like(x: Tensor, output: Tensor) -> Tensor:
    """The output for ``x`` as a layer gives it, if `_fast` has widened it."""
    return output.to(x.dtype) if _is_slow(x) else output


def _widened(x: Tensor, weight_OI: Tensor, bias: Tensor | None) -> Tensor:
    """The linear layer in float32, whose weight never lies there whole."""
    output = x.new_empty(*x.shape[:-1], len(weight_OI), dtype=torch.float32)
    rows, wide_MI = output.view(-1, len(weight_OI)), x.detach().reshape(-1, x.shape[-1]).float()
    some = max(1, WIDE // weight_OI.shape[1])
    for part_MO, part_OI in zip(rows.split(some, 1), weight_OI.detach().split(some), strict=True):
        torch.mm(wide_MI, part_OI.float().t(), out=part_MO)
    return output if bias is None else output.add_(bias.detach())


def _times_widened(grad: Tensor, weight_OI: Tensor) -> Tensor:
    """The product in float32, as `_widened`."""
    result = grad.new_zeros(*grad.shape[:-1], weight_OI.shape[1], dtype=torch.float32)
    rows_MI, grad_MO = result.view(-1, weight_OI.shape[1]), grad.reshape(-1, grad.shape[-1])
    some = max(1, WIDE // weight_OI.shape[1])
    for part_MO, part_OI in zip(grad_MO.split(some, 1), weight_OI.detach().split(some), strict=True):
        rows_MI.addmm_(part_MO, part_OI.float())
    return result


def _convolution_input_gradient(grad: Tensor, size: Any, weight: Tensor, shape: Shape) -> Tensor:
    """Gradient of an input of ``size``; the weight is brought to the type of ``grad`` some channels at a time."""
    of_size = _INPUT_GRADIENTS[len(shape.kernel) - 1]
    channels = weight.shape[1]
    some = channels if weight.dtype == grad.dtype else max(1, WIDE * channels // weight.numel())
    parts = [
        of_size([size[0], part.shape[1], *size[2:]], part.to(grad.dtype), grad,
                shape.stride, shape.padding, shape.dilation)
        for part in weight.split(some, 1)
    ]  # fmt: skip
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _product(first: Tensor, second: Tensor) -> Tensor:
    """In float32."""
    if first.is_cuda and first.dtype != torch.float32 and _GIVES_FLOAT32:
        return torch.mm(first, second, out_dtype=torch.float32)  # type: ignore[call-overload, no-any-return]
    return (first @ second).float()


class Layer:
    """A frozen layer and its adapter, if it has one."""

    def __init__(self, module: nn.Module, shape: Shape, adapter: Adapter | None) -> None:
        self.module, self.shape, self.adapter = module, shape, adapter
        self.base = module.forward
        fused = isinstance(adapter, Lora) and not shape.kernel
        self.lora: Lora | None = adapter if fused else None  # type: ignore[assignment]
        self.scale = adapter.scale if adapter is not None else 1.0
        self.held: tuple[Tensor, Tensor | None] | None = None
        """Weight and bias that stay where they are, ready for use; else the module is asked each time."""
        self.cast: tuple[Tensor, Tensor] | None = None
        """Both factors of the LoRA, down and up, in the dtype of the computation."""

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """What stands in for the module's ``forward``."""
        if args or kwargs or type(x) is not Tensor or not torch.is_grad_enabled():
            return self.base(x, *args, **kwargs)  # calls with more than an input have meanings of their own
        if self.lora is not None:
            return _Frozen.apply(x, self, self.lora.down, self.lora.up)
        output = _Frozen.apply(x, self, None, None) if x.requires_grad else _like(x, self.output(x))
        return output if self.adapter is None else output + self.adapter(_fast(x)).to(output.dtype)

    def output(self, x: Tensor) -> Tensor:
        """What the layer makes of ``x`` without an adapter, as a tensor of its own; of `_fast`'s type or that of x."""
        held = self.held
        ready = held is not None and held[0].dtype == x.dtype and held[0].device == x.device
        if held is not None and ready:
            output = _widened(x, *held) if _is_slow(x) else F.linear(x, *held)
        else:
            exact = x.dtype == torch.float32 and hasattr(self.module, "quant_format")
            output = self._dequantised(x) if exact else self.base(x)
        if output._is_view():  # models add to outputs in place, which autograd forbids for views made in here
            output = torch.ops.aten._unsafe_view(output, output.shape)
        return output

    def _dequantised(self, x: Tensor) -> Tensor:
        """The output of a quantised layer in float32; its own kernels may round the input, or know no float32."""
        weight, bias, release = fetch(self.module, x.dtype, x.device)
        smoothing = getattr(self.module, "pre_quant_scale", None)
        try:
            return F.linear(x if smoothing is None else x * smoothing.to(x), dequantised(weight, x.dtype), bias)
        finally:
            release()

    def hold(self) -> None:
        """Keeps the weight at hand, if it is an ordinary one, ready for use, of a layer that computes as usual."""
        module: Any = self.module
        if self.shape.kernel or not computes_as(module, nn.Linear):
            return
        both = [value for value in (module.weight, module.bias) if value is not None]
        plain = all(type(value) in (nn.Parameter, Tensor) and value.dtype == both[0].dtype for value in both)
        if plain and not (getattr(module, "weight_function", None) or getattr(module, "bias_function", None)):
            self.held = module.weight, module.bias

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Those of the LoRA in ``dtype``, down and up."""
        assert self.lora is not None
        if self.cast is not None and self.cast[0].dtype == dtype:
            return self.cast
        return self.lora.down.detach().to(dtype), self.lora.up.detach().to(dtype)

    def weight(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Callable[[], None]]:
        """The layer's weight as it takes part in the computation, dequantised if need be, and what is to be called
        after its last use."""
        if self.held is not None and self.held[0].device == device:
            return self.held[0].to(dtype), nothing
        return weight_of(self.module, dtype, device)

    def input_gradient(self, grad: Tensor, size: Any, dtype: torch.dtype) -> Tensor:
        """Gradient of an input of ``size`` and ``dtype`` from that of the output, which `_fast` may have widened."""
        weight, release = self.weight(dtype, grad.device)
        shape = self.shape
        try:
            if shape.kernel:
                return _convolution_input_gradient(grad, size, weight, shape)
            result = grad @ weight if weight.dtype == grad.dtype else _times_widened(grad, weight)
        finally:  # also when memory is short
            release()
        smoothing = getattr(self.module, "pre_quant_scale", None)  # some quantised layers scale their input
        return result if smoothing is None else result * smoothing.to(result)


# -- the whole model -------------------------------------------------------------------------------------------


@contextmanager
def attached(
    model: nn.Module, adapters: Mapping[str, Adapter], dtype: torch.dtype, copies: Copies, *, checkpointing: bool
) -> Iterator[Callable[[], None]]:
    """Inside, the model computes in ``dtype``, takes part in autograd and has the adapters.

    Args:
        model: ComfyUI's model, loaded. Outside it is exactly as it was, also after an error.
        adapters: They lie where it computes. Weights that do not are fetched by ComfyUI whenever a layer needs them.
        copies: Whether norms and blocks get copies of their inputs; may change between two calls of the model.
        checkpointing: Blocks keep only their inputs and compute again in backward.

    Yields:
        What must be called when the adapters' weights have changed.
    """
    with ExitStack() as undo:
        put = partial(_put, undo)
        device = next((parameter.device for adapter in adapters.values() for parameter in adapter.parameters()), None)
        fetched = {module for module in model.modules() if _lies_elsewhere(module, device)}
        for module in model.modules():
            _make_usable(module, put, module in fetched)
        put(model, "manual_cast_dtype", dtype)
        with_lora = []
        for name, module in layers(model).items():
            shape = shape_of(module)
            assert shape is not None
            layer = Layer(module, shape, adapters.get(name))
            if module not in fetched:
                layer.hold()
            put(module, "forward", layer)
            if layer.lora is not None:
                with_lora.append(layer)
        for module in model.modules():
            if "norm" in type(module).__name__.lower() and next(module.children(), None) is None:
                put(module, "forward", partial(copies.for_norm, forward_of(module)))
        if checkpointing:
            for block in blocks(model)[:-1]:  # what the last one keeps is needed at once
                put(block, "forward", partial(Recomputed.run, partial(copies.for_block, block.forward)))
        cast = _casting(with_lora, dtype)
        cast()
        yield cast


def _casting(layers: list[Layer], dtype: torch.dtype) -> Callable[[], None]:
    """What brings the weights of LoRAs to ``dtype`` for the layers' computation."""
    factors = [factor.detach() for layer in layers for factor in (layer.lora.down, layer.lora.up)]  # type: ignore[union-attr]
    same = not factors or dtype == factors[0].dtype
    copies = factors if same else [torch.empty_like(factor, dtype=dtype) for factor in factors]
    for layer, down, up in zip(layers, copies[::2], copies[1::2], strict=True):
        layer.cast = down, up
    return nothing if same else partial(torch._foreach_copy_, copies, factors)


def _put(undo: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Sets an attribute of an instance until ``undo`` closes."""
    before = vars(owner).get(name, _MISSING)
    vars(owner)[name] = value
    undo.callback(partial(_restore, owner, name, before))


def _restore(owner: Any, name: str, before: Any) -> None:
    if before is _MISSING:
        vars(owner).pop(name, None)
    else:
        vars(owner)[name] = before


def _lies_elsewhere(module: nn.Module, device: torch.device | None) -> bool:
    weight = getattr(module, "weight", None)
    return device is not None and isinstance(weight, Tensor) and weight.device != device


def _make_usable(module: nn.Module, put: Callable[[Any, str, Any], None], fetched: bool) -> None:
    """Lets a module work on inputs of another dtype and lets autograd keep its small weights."""
    for table in ("_parameters", "_buffers"):
        values = getattr(module, table)
        usable = {name: _outside_inference(value) for name, value in values.items()}
        if any(usable[name] is not values[name] for name in values):
            put(module, table, usable)
    if hasattr(module, "comfy_cast_weights"):
        put(module, "comfy_cast_weights", True)
        if fetched and shape_of(module) is None:  # the place of what is fetched is the next one's soon
            for name in ("weight_function", "bias_function"):
                put(module, name, [*getattr(module, name, ()), torch.clone])


def _can_be_kept(value: Tensor) -> bool:
    """Whether autograd can keep it for backward. One that was made in inference mode cannot, one that has been moved
    to another device within it neither, and one that was made within and moved outside has no count of changes,
    though it says then that it is none of those."""
    try:
        return not value.is_inference() and value._version >= 0
    except RuntimeError:
        return False


def _outside_inference(value: Tensor | None) -> Tensor | None:
    """The same memory as a tensor that autograd accepts."""
    if value is None or type(value) not in (Tensor, nn.Parameter) or value.is_meta or _can_be_kept(value):
        return value
    plain = torch.empty(0, dtype=value.dtype, device=value.device)
    plain.set_(value.untyped_storage(), value.storage_offset(), value.shape, value.stride())  # type: ignore[call-overload]
    return nn.Parameter(plain, requires_grad=False) if isinstance(value, nn.Parameter) else plain
