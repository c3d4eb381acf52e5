"""LoRA files: reading every spelling that ComfyUI loads, to go on from; writing what it loads everywhere.

What an existing file holds beyond trainable low-rank parts (text encoders, biases, norms, DoRA) is kept: it
works during training as ComfyUI applies it, and goes into the new file as it was.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ..utils.adapter_layers import Adapter, Loha, Lokr, Lora, Shape
from ..utils.config import SettingsError
from .lora_layers import layers, shape_of

OPTIMIZER_SUFFIX = ".optimizer"
"""Added to a LoRA's file name; no ending that model pickers list."""
STEPS_KEY = "training_steps"


class TrainedLora(dict[str, Tensor]):
    """A LoRA's tensors by key, as ComfyUI's LORA_MODEL, with what a saver may write beside them."""

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], optimizer: Mapping[str, Tensor]):
        super().__init__(tensors)
        self.metadata, self.optimizer = dict(metadata), dict(optimizer)


@dataclass
class Existing:
    """A LoRA file, made ready to go on with."""

    adapters: dict[str, Adapter] = field(default_factory=dict)
    """By layer, named as in the model."""
    kept: dict[str, Tensor] = field(default_factory=dict)
    """Tensors that are not trained, under their keys in the file."""
    steps: int = 0
    optimizer: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class _Part:
    """A LoRA of some rows of a layer: q of a fused qkv has its own in some files."""

    up: Tensor
    down: Tensor
    scale: float
    rows: slice


def read_existing(path: Path, model: nn.Module) -> Existing:
    """The LoRA in the file at ``path`` for ComfyUI's ``model``.

    Raises:
        SettingsError: Nothing in it fits the model.
    """
    import comfy.utils

    tensors = comfy.utils.load_torch_file(str(path), safe_load=True)
    existing = parse(tensors, model)
    if not existing.adapters:
        raise SettingsError(
            f"existing_lora: none of the {len(tensors)} tensors of '{path.name}' is a LoRA, LoHa or LoKr of this "
            "model; choose a file that was trained for this kind of model, or [None]"
        )
    existing.steps = steps_of(path)
    beside = path.with_name(path.name + OPTIMIZER_SUFFIX)
    if beside.is_file():
        existing.optimizer = safetensors.torch.load_file(beside)
    return existing


def steps_of(path: Path) -> int:
    """Steps that a file was trained for: from its metadata, else from ``_500_steps`` in its name, else 0."""
    if path.suffix == ".safetensors":
        with safetensors.safe_open(path, "pt") as file:
            told = (file.metadata() or {}).get(STEPS_KEY, "")
        if told.isdigit():
            return int(told)
    found = re.findall(r"(?:^|[_\-])(\d+)_?steps", path.stem)
    return int(found[-1]) if found else 0


def parse(tensors: Mapping[str, Tensor], model: nn.Module) -> Existing:
    """What of ``tensors`` can be trained on in ``model``, and the rest."""
    import comfy.lora
    import comfy.lora_convert

    converted: dict[str, Tensor] = comfy.lora_convert.convert_lora(dict(tensors))
    modules = layers(model)
    used: set[str] = set()
    existing = Existing()
    parts: dict[str, list[_Part]] = {}
    stems = {_stem(key) for key in converted}
    for key, target in comfy.lora.model_lora_keys_unet(model, {}).items():
        if key not in stems:
            continue
        for found in comfy.lora.load_lora(converted, {key: target}, log_missing=False).values():
            name, rows = _layer_of(target, modules)
            keys = set(getattr(found, "loaded_keys", ()))
            if name is None or keys & used:
                continue
            shape = shape_of(modules[name])
            assert shape is not None
            made = _adapter(found, shape, rows)
            if made is None:
                continue
            used |= keys
            if isinstance(made, _Part):
                parts.setdefault(name, []).append(made)
            else:
                existing.adapters[name] = made
    for name, pieces in parts.items():
        existing.adapters[name] = _joined(pieces, shape_of(modules[name]))  # type: ignore[arg-type]
    existing.kept = {key: value for key, value in converted.items() if key not in used}
    return existing


def _stem(key: str) -> str:
    """What ComfyUI's map of keys has for a tensor's key."""
    ending = (r"(_lora\.(up|down)|[._]?lora[._](up|down|mid|A|B|linear_layer\.(up|down))(\.default)?)(\.weight)?$"
              r"|\.(alpha|dora_scale|(hada|lokr)_\w+)$")  # fmt: skip
    return re.sub(ending, "", key)


def _layer_of(target: Any, modules: Mapping[str, nn.Module]) -> tuple[str | None, slice | None]:
    """The layer that ComfyUI's map names, and which of its rows; None for what cannot be trained so."""
    key, offset = (target, None) if isinstance(target, str) else (target[0], target[1])
    if not isinstance(target, str) and len(target) > 2:  # a function of the weight
        return None, None
    name = key.removesuffix(".weight")
    if name not in modules or (offset is not None and offset[0] != 0):
        return None, None
    return name, None if offset is None else slice(offset[1], offset[1] + offset[2])


def _adapter(found: Any, shape: Shape, rows: slice | None) -> Adapter | _Part | None:
    """One of ours that computes what ComfyUI's ``found`` does; None if ours cannot."""
    kind: Any = getattr(found, "name", None)
    weights: Any = getattr(found, "weights", ())
    if kind == "lora":
        up, down, alpha, middle, dora, reshape = weights
        if dora is not None or reshape is not None:
            return None
        if middle is not None:  # a convolution in three steps is one in two
            down = torch.einsum("rs...,sc->rc...", middle.float(), down.float().flatten(1))
        if down.flatten(1).shape[1] != shape.columns:
            return None
        if rows is None:
            return Lora(shape, up, down, alpha)
        return _Part(up.flatten(1), down.flatten(1), 1.0 if alpha is None else alpha / down.shape[0], rows)
    if kind == "loha" and rows is None:
        w1_a, w1_b, alpha, w2_a, w2_b, tucker, _, dora = weights
        if tucker is None and dora is None:
            return Loha(shape, w1_a, w1_b, w2_a, w2_b, alpha)
    if kind == "lokr" and rows is None:
        w1, w2, alpha, w1_a, w1_b, w2_a, w2_b, tucker, dora = weights
        if tucker is None and dora is None:
            parts = {"w1": w1, "w1_a": w1_a, "w1_b": w1_b, "w2": w2, "w2_a": w2_a, "w2_b": w2_b}
            return Lokr(shape, {name: value for name, value in parts.items() if value is not None}, alpha)
    return None


def _joined(parts: list[_Part], shape: Shape) -> Lora:
    """Several LoRAs of a layer's rows as one of the whole layer, of their ranks together."""
    rank = sum(part.down.shape[0] for part in parts)
    up = torch.zeros(shape.outputs, rank)
    start = 0
    scales = {part.scale for part in parts}
    common = scales.pop() if len(scales) == 1 else 1.0
    for part in parts:
        end = start + part.down.shape[0]
        up[part.rows, start:end] = part.up.float() * (part.scale / common)
        start = end
    return Lora(shape, up, torch.cat([part.down.float() for part in parts]), common * rank)


# -- writing -----------------------------------------------------------------------------------------------------


def state_of(adapters: Mapping[str, Adapter], kept: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """A file's tensors by key, on the CPU, weights in ``dtype``; alpha stays fp32."""
    result = {}
    for name, adapter in adapters.items():
        for part, value in adapter.tensors().items():
            result[f"{name}.{part}"] = value.detach().to("cpu", dtype, copy=True).contiguous()
        result[f"{name}.alpha"] = torch.tensor(adapter.alpha)
    return result | {key: value.detach().cpu().clone().contiguous() for key, value in kept.items()}


def optimizer_state(optimizer: torch.optim.Optimizer, adapters: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """What the optimizer remembers and the exact weights, by layer, part and name."""
    result = {}
    for name, adapter in adapters.items():
        for part, parameter in adapter.named_parameters():
            result[f"{name}/{part}/weight"] = parameter.detach().cpu().clone()
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    result[f"{name}/{part}/{key}"] = value.detach().cpu().clone()
    return result


def restore_optimizer(
    optimizer: torch.optim.Optimizer, adapters: Mapping[str, Adapter], saved: Mapping[str, Tensor]
) -> bool:
    """Gives the optimizer and the weights back what `optimizer_state` took; False if it is of something else.

    The weights of the file are those rounded; others mean that the file was exchanged.
    """
    wanted = {f"{name}/{part}/weight": p for name, a in adapters.items() for part, p in a.named_parameters()}
    if not wanted or any(
        key not in saved
        or saved[key].shape != p.shape
        or not torch.allclose(saved[key], p.detach().cpu(), rtol=2**-6, atol=1e-6)
        for key, p in wanted.items()
    ):
        return False
    kinds = {key.rpartition("/")[2] for key in saved} - {"weight"}
    if kinds != _memory_of(optimizer):
        return False
    with torch.no_grad():
        for key, parameter in wanted.items():
            parameter.copy_(saved[key])
            stem = key.removesuffix("weight")
            memory = {kind: saved[stem + kind].clone() for kind in kinds if stem + kind in saved}
            device = {"step": parameter.device if optimizer.defaults.get("fused") else torch.device("cpu")}
            optimizer.state[parameter] = {
                kind: value.to(device.get(kind, parameter.device)) for kind, value in memory.items()
            }
    return True


def _memory_of(optimizer: torch.optim.Optimizer) -> set[str]:
    kinds = {"Adam": {"step", "exp_avg", "exp_avg_sq"}, "RMSprop": {"step", "square_avg"}, "SGD": set[str]()}
    return kinds[type(optimizer).__name__.removesuffix("W")]


def save(lora: Mapping[str, Tensor], path: Path) -> None:
    """Writes a LORA_MODEL with its metadata, and beside it what its optimizer remembers; whole or not at all.

    Raises:
        OSError: The place cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", **getattr(lora, "metadata", {})}
    remembered = getattr(lora, "optimizer", {})
    if remembered:
        _write(dict(remembered), path.with_name(path.name + OPTIMIZER_SUFFIX), {})
    _write({key: value.contiguous() for key, value in lora.items()}, path, metadata)


def _write(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    part = path.with_name(path.name + ".part")
    safetensors.torch.save_file(tensors, part, metadata)
    os.replace(part, path)
