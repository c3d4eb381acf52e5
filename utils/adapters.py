"""LoRA on a denoiser: injected through peft, initialised by name, exported with the keys ComfyUI reads."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as PeftLinear
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from ..models.base import Family
from .config import SettingsError
from .lora_linear import lora_linear
from .randomness import generator
from .settings import Lora

logger = logging.getLogger(__name__)
NAME = "default"


class LoraLinear(PeftLinear):
    """peft's LoRA linear layer whose float32 weights compute in the precision of the layer's input.

    peft would compute the update in the weights' own precision, at a fraction of the speed.
    """

    def forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """The layer's output with the update added; shapes as for ``nn.Linear``."""
        layer, scaling = self.base_layer, self.scaling[NAME]
        down = _weight(self.lora_A).to(x.dtype)
        up = _weight(self.lora_B).to(x.dtype)
        up = up if scaling == 1.0 else up * scaling  # the small matrix instead of the large output
        if self.training and isinstance(self.lora_dropout[NAME], nn.Dropout):
            return layer(x) + F.linear(F.linear(self.lora_dropout[NAME](x), down), up)
        output, _ = lora_linear(
            x.flatten(0, -2), layer.weight, getattr(layer, "weight_scale", None), layer.bias, down, up
        )
        return output.view(*x.shape[:-1], output.shape[-1])


def inject(denoiser: nn.Module, family: Family, settings: Lora, seed: int) -> nn.Module:
    """Freezes ``denoiser`` and adds trainable float32 LoRA weights to its target layers, in place.

    Initial values depend on ``seed`` and the layer's name alone.

    Raises:
        SettingsError: target_modules or exclude_modules name no layer.
    """
    denoiser.requires_grad_(False)
    names = target_names(denoiser, family, settings)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=alpha_of(settings),  # type: ignore[arg-type]  # peft only divides it by the rank
        lora_dropout=settings.dropout,
        target_modules=names,
        init_lora_weights=False,
    )
    config._register_custom_module({nn.Linear: LoraLinear})
    inject_adapter_in_model(config, denoiser, adapter_name=NAME)
    for name, module in lora_layers(denoiser).items():
        down, up = _weight(module.lora_A), _weight(module.lora_B)
        bound = 1 / math.sqrt(down.shape[1])  # what kaiming_uniform with a = sqrt(5) comes to
        values = torch.rand(down.shape, generator=generator("lora", seed, name)) * 2 * bound - bound
        module.lora_A[NAME].weight = nn.Parameter(values.to(down.device))
        module.lora_B[NAME].weight = nn.Parameter(torch.zeros(up.shape, device=up.device))
    logger.info("LoRA of rank %d on %d layers", settings.rank, len(names))
    return denoiser


def target_names(denoiser: nn.Module, family: Family, settings: Lora) -> list[str]:
    """Full names of the linear layers that get an adapter."""
    linear = {name for name, module in denoiser.named_modules() if isinstance(module, nn.Linear)}
    if settings.target_modules is None:
        blocks = [name for name, module in denoiser.named_modules() if type(module).__name__ in family.adapter_blocks]
        chosen = {name for name in linear if any(name.startswith(f"{block}.") for block in blocks)}
    else:
        chosen = _named("adapter.target_modules", settings.target_modules, linear)
    if settings.exclude_modules:
        chosen -= _named("adapter.exclude_modules", settings.exclude_modules, linear)
    return sorted(chosen)


def _named(option: str, endings: list[str], linear: set[str]) -> set[str]:
    found: set[str] = set()
    for ending in endings:
        matches = {name for name in linear if name == ending or name.endswith(f".{ending}")}
        if not matches:
            known = sorted({name.rsplit(".", 1)[-1] for name in linear})
            raise SettingsError(
                f"{option}: '{ending}' is the end of no linear layer's name; layers end in {', '.join(known)}"
            )
        found |= matches
    return found


def _weight(layers: nn.ModuleDict) -> torch.Tensor:
    """Of our adapter, among those that peft can hold."""
    return cast(nn.Linear, layers[NAME]).weight


def lora_layers(denoiser: nn.Module) -> dict[str, LoraLinear]:
    """The adapted layers by name."""
    return {name: module for name, module in denoiser.named_modules() if isinstance(module, LoraLinear)}


def alpha_of(settings: Lora) -> float:
    """Alpha; equal to the rank when it is not given."""
    return float(settings.alpha if settings.alpha is not None else settings.rank)


def load_existing(denoiser: nn.Module, family: Family, path: Path) -> None:
    """Starts the adapter from a LoRA file, or from a folder with one such file.

    Raises:
        SettingsError: The file is missing, belongs to another model, or has another rank.
    """
    option = "adapter.init_from_existing"
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if len(files) != 1 or not files[0].is_file():
        raise SettingsError(f"{option}: '{path}' must be a .safetensors file or a folder with exactly one")
    stored = load_file(files[0])
    layers = lora_layers(denoiser)
    sides = dict(zip("AB", family.lora_sides, strict=True))
    expected = {
        f"{family.lora_keys(name)}.{sides[side]}.weight": (layer, side)
        for name, layer in layers.items()
        for side in "AB"
    }
    unknown = sorted(key for key in stored if key not in expected and not key.endswith(".alpha"))
    if unknown or not expected.keys() & stored.keys():
        raise SettingsError(
            f"{option}: '{files[0]}' does not fit model and target_modules: {unknown[:3] or 'no key matches'}"
        )
    for key, (layer, side) in expected.items():
        if key not in stored:
            continue
        weight = getattr(layer, f"lora_{side}")[NAME].weight
        if stored[key].shape != weight.shape:
            dimension = 0 if side == "A" else 1
            raise SettingsError(
                f"{option}: '{files[0]}' has rank {stored[key].shape[dimension]}; set adapter.rank to that"
            )
        scale = 1.0
        if side == "B":
            alpha = stored.get(key.replace(f".{sides['B']}.weight", ".alpha"))
            rank = weight.shape[1]
            scale = (alpha.item() / rank if alpha is not None else 1.0) / layer.scaling[NAME]
        weight.data.copy_(stored[key].float() * scale)


def export_tensors(
    weights: Mapping[str, torch.Tensor], family: Family, settings: Lora, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """What goes into the LoRA file: A and B of each layer and its alpha, under the keys ComfyUI reads.

    Args:
        weights: Trained parameters by their name in the denoiser (``....lora_A.default.weight``).
    """
    sides = dict(zip("AB", family.lora_sides, strict=True))
    tensors: dict[str, torch.Tensor] = {}
    for name, value in sorted(weights.items()):
        module, side = name.removesuffix(f".{NAME}.weight").rsplit(".lora_", 1)
        key = family.lora_keys(module)
        tensors[f"{key}.{sides[side]}.weight"] = value.detach().to("cpu", dtype).contiguous()
        tensors[f"{key}.alpha"] = torch.tensor(alpha_of(settings))
    return tensors
