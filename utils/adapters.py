"""The adapter of a run: which layers get one, of what rank, and the file that it becomes."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..models.base import Family
from .adapted import Adapted, Together, adapted_layers, shapes_of
from .adapter_files import Addition, read_additions
from .adapter_layers import Adapter, Loha, Lokr, Lora, Shape
from .adapter_settings import AdapterTable
from .adapter_settings import Lokr as LokrTable
from .adapter_settings import Lora as LoraTable
from .config import SettingsError
from .finetune import rate_of
from .randomness import generator

logger = logging.getLogger(__name__)
KINDS: dict[str, type[Adapter]] = {"lora": Lora, "loha": Loha, "lokr": Lokr}


def inject(
    denoiser: nn.Module,
    family: Family,
    settings: AdapterTable,
    seed: int,
    rates: Mapping[str, float] | None = None,
    shapes_alone: bool = False,
) -> nn.Module:
    """Freezes ``denoiser`` and adds trainable fp32 adapters to its target layers, in place.

    Layers on the meta device, which other stages have, get none. Initial values depend on ``seed`` and the layer's
    name alone; with init_from_existing those of the file's layers are the file's, and so is their rank.

    Args:
        rates: Learning rates by regular expression of names; layers that would have 0 get none.
        shapes_alone: Layers on the meta device get one, too, which has no values either.

    Raises:
        SettingsError: target_modules or exclude_modules name no layer; the existing file does not fit.
    """
    denoiser.requires_grad_(False)
    shapes = shapes_of(denoiser)
    existing = _existing(denoiser, family, settings)
    targets = [name for name in target_names(denoiser, family, settings) if rate_of(f"{name}.weight", rates or {}) != 0]
    names = sorted({*targets, *existing})
    for name in names:
        base: Any = denoiser.get_submodule(name)
        if base.weight.is_meta and not shapes_alone:
            continue
        adapter = _adapter(settings, name, shapes[name], seed, existing.get(name)).to(base.weight.device)
        adapted = Adapted(
            base,
            adapter,
            settings.dropout,
            settings.rank_dropout if isinstance(settings, LokrTable) else 0.0,
            isinstance(settings, LoraTable) and settings.use_dora,
        )
        if name in existing and (scale := existing[name].dora_scale) is not None:
            adapted.scale_rows(scale)
        owner, _, leaf = name.rpartition(".")
        setattr(denoiser.get_submodule(owner), leaf, adapted.train(base.training))
    _join(denoiser, family)
    logger.info("%s of rank %d on %d layers", settings.title, settings.rank, len(names))
    return denoiser


def _join(denoiser: nn.Module, family: Family) -> None:
    layers = adapted_layers(denoiser)
    for group in family.shared_inputs:
        owners = {name.removesuffix(end) for end in group for name in layers if f".{name}".endswith(f".{end}")}
        for owner in owners:
            Together.join([layers[owner + end] for end in group if owner + end in layers])


def _adapter(settings: AdapterTable, name: str, shape: Shape, seed: int, existing: Addition | None) -> Adapter:
    if existing is not None:
        return existing.adapter(shape)
    rank, alpha = rank_and_alpha(settings, name)
    source = generator("lora", seed, name)
    if isinstance(settings, LokrTable):
        factor = settings.decompose_factor
        return Lokr.new(shape, rank, alpha, source, None if factor == -1 else factor)
    return (Loha if settings.type == "loha" else Lora).new(shape, rank, alpha, source)


def rank_and_alpha(settings: AdapterTable, name: str) -> tuple[int, float]:
    """Rank of layer ``name`` and the alpha that a file with it says; the update is scaled by their ratio."""
    rank = next((r for pattern, r in settings.rank_pattern.items() if re.search(pattern, name)), settings.rank)
    given = settings.alpha if settings.alpha is not None else rank
    alpha = next((a for pattern, a in settings.alpha_pattern.items() if re.search(pattern, name)), given)
    if isinstance(settings, LoraTable) and settings.use_rslora:
        return rank, float(alpha) * math.sqrt(rank)
    return rank, float(alpha)


def target_names(denoiser: nn.Module, family: Family, settings: AdapterTable) -> list[str]:
    """Full names of the layers that get an adapter."""
    shapes = shapes_of(denoiser)
    if settings.target_modules is None:
        blocks = [name for name, module in denoiser.named_modules() if type(module).__name__ in family.adapter_blocks]
        chosen = {
            name
            for name, shape in shapes.items()
            if (settings.convolutions or not shape.kernel) and any(name.startswith(f"{block}.") for block in blocks)
        }
    else:
        chosen = _named("adapter.target_modules", settings.target_modules, shapes, family)
    if settings.exclude_modules:
        chosen -= _named("adapter.exclude_modules", settings.exclude_modules, shapes, family)
    if not chosen:
        raise SettingsError("adapter.exclude_modules: no layer is left to get an adapter")
    return sorted(chosen)


def _named(option: str, entries: Sequence[str], layers: Mapping[str, Shape], family: Family) -> set[str]:
    """Layers whose name ends in an entry; where there is none, in whose name it is found as a regular expression;
    where there is none either, those that are so called in the exported file, as older files name them."""
    found: set[str] = set()
    for entry in entries:
        matches = _called(entry, {name: name for name in layers})
        matches = matches or _called(entry, {family.lora_keys(name): name for name in layers})
        if not matches:
            known = sorted({name.rsplit(".", 1)[-1] for name in layers})
            raise SettingsError(
                f"{option}: '{entry}' is neither the end of a layer's name nor a regular expression that is found in "
                f"one; layers end in {', '.join(known)}"
            )
        found |= matches
    return found


def _called(entry: str, layers: Mapping[str, str]) -> set[str]:
    """Of ``layers``, by the name that is looked at."""
    found = {layer for name, layer in layers.items() if name == entry or name.endswith(f".{entry}")}
    try:
        return found or {layer for name, layer in layers.items() if re.search(entry, name)}
    except re.error:
        return set()


def _existing(denoiser: nn.Module, family: Family, settings: AdapterTable) -> dict[str, Addition]:
    if not settings.init_from_existing:
        return {}
    option = "adapter.init_from_existing"
    found = read_additions(Path(settings.init_from_existing).expanduser(), option, family, denoiser)
    for name, addition in found.items():
        if addition.kind != settings.type:
            raise SettingsError(
                f"{option}: '{settings.init_from_existing}' holds {addition.words} for '{name}', and adapter.type is "
                f"'{settings.type}'; set that to match, or give the file to adapter.fuse_adapters"
            )
        if addition.dora_scale is not None and not (isinstance(settings, LoraTable) and settings.use_dora):
            raise SettingsError(f"{option}: '{settings.init_from_existing}' is a DoRA; set adapter.use_dora = true")
    return found


FIRST_FACTORS = ("lora_up.weight", "hada_w1_a", "lokr_w1", "lokr_w1_a")
"""Each adapter has one of these."""


def _scaled(layer: Adapted) -> dict[str, torch.Tensor]:
    """What goes into a file without alpha: a factor of what is added is as large as it makes it."""
    tensors = {part: value for part, value in layer.tensors().items() if part != "alpha"}
    scale = layer.adapter.scale
    return {part: value * scale if part in FIRST_FACTORS else value for part, value in tensors.items()}


def export_tensors(layers: Mapping[str, Adapted], family: Family, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What goes into the adapter's file, under the keys that ComfyUI reads.

    Args:
        layers: Adapted layers by their name in the denoiser.
    """
    down, up = family.lora_sides
    spelled = {"lora_down.weight": f"{down}.weight", "lora_up.weight": f"{up}.weight"}
    tensors: dict[str, torch.Tensor] = {}
    for name, layer in sorted(layers.items()):
        parts = layer.tensors() if family.lora_alpha else _scaled(layer)
        for part, value in parts.items():
            kept = part in ("alpha", "dora_scale")
            value = family.comfyui_rows(name, value) if part == "dora_scale" else value
            key = f"{family.lora_keys(name)}.{spelled.get(part, part)}"
            tensors[key] = value.detach().to("cpu", torch.float32 if kept else dtype).contiguous().clone()
    return tensors
