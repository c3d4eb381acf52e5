"""Adapter files in every spelling that ComfyUI loads: to start from, or to add to the base weights.

A key is a layer's name in one of several spellings and a part: ``lora_unet_double_blocks_0_img_attn_qkv`` and
``lora_down.weight``. The layer may be named as in ComfyUI's own model file, where it may be several layers of the
denoiser in one; which rows belong to which is found by sending numbered rows through `Family.comfyui_tensors`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..models.base import Family
from .adapted import frozen_weight, replace_frozen, shapes_of
from .adapter_layers import Adapter, Loha, Lokr, Lora, Shape
from .config import SettingsError

logger = logging.getLogger(__name__)

PARTS = {
    "up": (".lora_up.weight", "_lora.up.weight", ".lora.up.weight", ".lora_B.weight", ".lora_B.default.weight",
           ".lora_linear_layer.up.weight", ".lora_B"),
    "down": (".lora_down.weight", "_lora.down.weight", ".lora.down.weight", ".lora_A.weight", ".lora_A.default.weight",
             ".lora_linear_layer.down.weight", ".lora_A"),
    "mid": (".lora_mid.weight",),
    "alpha": (".alpha",),
    "dora_scale": (".dora_scale",),
    **{part: (f".hada_{part}",) for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{part}": (f".lokr_{part}",) for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    "diff": (".diff",),
    "diff_b": (".diff_b",),
}  # fmt: skip
"""How a key may end, for each part. Longer endings come before what they end in."""
KINDS = {"lora": ("up", "down"), "loha": ("w1_a", "w1_b", "w2_a", "w2_b"), "lokr": ("lokr_",)}
"""How the parts of each kind begin."""
TEXT_ENCODERS = ("lora_te", "text_encoder", "text_encoders", "clip_l.", "t5xxl.")
FILE_PREFIXES = ("model.diffusion_model.", "diffusion_model.")


@dataclass
class Addition:
    """What a file adds to one layer of the denoiser."""

    parts: dict[str, Tensor]
    rows: Tensor | None = None
    """The rows of the parts that are this layer's; None: all."""

    @property
    def kind(self) -> str:
        """As adapter.type, or "diff"."""
        for kind, needed in KINDS.items():
            if any(part.startswith(needed) for part in self.parts):
                return kind
        return "diff"

    @property
    def is_whole(self) -> bool:
        """Whether no matrix is missing."""
        has = self.parts.keys()
        if self.kind == "lokr":
            return all({f"lokr_{w}"} <= has or {f"lokr_{w}_a", f"lokr_{w}_b"} <= has for w in ("w1", "w2"))
        return self.kind == "diff" or set(KINDS[self.kind]) <= has

    @property
    def words(self) -> str:
        """The kind, for people."""
        return {"lora": "a LoRA", "loha": "a LoHa", "lokr": "a LoKr", "diff": "a whole difference"}[self.kind]

    @property
    def dora_scale(self) -> Tensor | None:
        """The length of each row, as ComfyUI reads it."""
        scale = self.parts.get("dora_scale")
        return scale if scale is None or self.rows is None else scale[self.rows]

    def adapter(self, shape: Shape) -> Adapter:
        """It as an adapter of a layer of ``shape``; LoHa and LoKr only as a whole layer."""
        p, alpha = self.parts, self.parts["alpha"].item() if "alpha" in self.parts else None
        if self.kind == "lora":
            up = p["up"] if self.rows is None else p["up"][self.rows]
            down = p["down"]
            if "mid" in p:  # a convolution in three: the small one's kernel goes into the first
                down = torch.einsum("rs...,si->ri...", p["mid"].float(), down.flatten(1).float())
            return Lora(shape, up, down, alpha)
        if self.kind == "loha":
            return Loha(shape, p["w1_a"], p["w1_b"], p["w2_a"], p["w2_b"], alpha)
        named = {part.removeprefix("lokr_"): value for part, value in p.items() if part.startswith("lokr_")}
        return Lokr(shape, named, alpha)

    def delta(self, shape: Shape, fused: Shape) -> Tensor:
        """What is added to the layer's weight, fp32, in its shape.

        Args:
            fused: The shape of the layer that the file means, of which this is some rows.
        """
        if self.kind == "diff":
            value = self.parts["diff"].float()
        else:
            whole = Addition(self.parts).adapter(fused)
            with torch.no_grad():
                value = whole.delta()
        value = value.reshape(value.shape[0], -1)
        return (value if self.rows is None else value[self.rows]).reshape(shape.weight)


def read_additions(path: Path, option: str, family: Family, denoiser: nn.Module) -> dict[str, Addition]:
    """What the adapter file at ``path``, or the only one in that folder, adds to the layers of ``denoiser``.

    Raises:
        SettingsError: There is no such file, or it belongs to another model or is of a kind that is not read.
    """
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if len(files) != 1 or not files[0].is_file():
        raise SettingsError(f"{option}: '{path}' must be a .safetensors file or a folder with exactly one")
    layers = layers_by_name(family, denoiser)
    shapes = shapes_of(denoiser)
    found: dict[str, Addition] = {}
    unknown: list[str] = []
    texts = 0
    for stem, parts in _by_layer(load_file(files[0])).items():
        if stem not in layers:
            texts += stem.startswith(TEXT_ENCODERS)
            unknown += [] if stem.startswith(TEXT_ENCODERS) else [stem]
            continue
        for name, rows in layers[stem]:
            if rows is None and "dora_scale" in parts:
                parts["dora_scale"] = family.comfyui_rows(name, parts["dora_scale"])
            found[name] = _checked(Addition(parts, rows), name, shapes[name], len(layers[stem]) > 1, files[0], option)
    if unknown or not found:
        said = f"'{unknown[0]}' is none of its layers" if unknown else "no key names one of its layers"
        raise SettingsError(f"{option}: '{files[0]}' does not fit this model: {said}")
    if texts:
        logger.warning("%s: '%s' also changes text encoders, which are not trained here; left out", option, files[0])
    return found


def _by_layer(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """A file's tensors by the layer that they name and the part that they are."""
    found: dict[str, dict[str, Tensor]] = {}
    pairs = [(ending, part) for part, endings in PARTS.items() for ending in endings]
    pairs.sort(key=lambda pair: -len(pair[0]))
    for key, value in tensors.items():
        ending, part = next((pair for pair in pairs if key.endswith(pair[0])), ("", ""))
        found.setdefault(key.removesuffix(ending), {})[part or "unknown"] = value
    return found


def _checked(addition: Addition, name: str, shape: Shape, is_part: bool, file: Path, option: str) -> Addition:
    """``addition``; raises SettingsError if it cannot be that of a layer of ``shape``."""
    wrong = ""
    if "unknown" in addition.parts or {"t1", "t2", "lokr_t2"} & addition.parts.keys():
        wrong = "is of a kind that is not read here"
    elif not addition.is_whole:
        wrong = "lacks one of its matrices"
    elif addition.kind == "lora":
        rows, columns = addition.parts["up"].shape[0], addition.parts["down"][0].numel()
        rows = rows if addition.rows is None else min(rows, int(addition.rows.numel()))
        if rows != shape.outputs or ("mid" not in addition.parts and columns != shape.columns):
            wrong = f"is for {columns} inputs and {rows} outputs, the model's has {shape.columns} and {shape.outputs}"
    elif is_part and option.endswith("init_from_existing"):
        wrong = f"is {addition.words} of several layers in one; give the file to adapter.fuse_adapters"
    if wrong:
        raise SettingsError(f"{option}: '{file}': what it has for '{name}' {wrong}")
    return addition


def layers_by_name(family: Family, denoiser: nn.Module) -> dict[str, list[tuple[str, Tensor | None]]]:
    """For every spelling of a layer's name: the denoiser's layers that it means, and which of its rows are theirs."""
    found: dict[str, list[tuple[str, Tensor | None]]] = {}
    for native, parts in native_layers(family, denoiser).items():
        flat = native.replace(".", "_")
        for stem in (f"diffusion_model.{native}", f"lora_unet_{flat}", native, f"transformer.{native}",
                     f"lycoris_{flat}", f"model.diffusion_model.{native}"):  # fmt: skip
            found.setdefault(stem, parts)
    for name in shapes_of(denoiser):
        for stem in (family.lora_keys(name), *_diffusers_spellings(name)):
            found.setdefault(stem, [(name, None)])
    return found


def _diffusers_spellings(name: str) -> Iterable[str]:
    inner = name.removeprefix("unet.")
    for plain in (inner, inner.replace(".to_out.0", ".processor.to_out").replace(".to_", ".processor.to_")):
        flat = plain.replace(".", "_")
        yield from (f"transformer.{plain}", f"unet.{plain}", plain, f"diffusion_model.{plain}",
                    f"base_model.model.{plain}", f"lora_transformer_{flat}", f"lora_unet_{flat}",
                    f"lycoris_{flat}")  # fmt: skip


def native_layers(family: Family, denoiser: nn.Module) -> dict[str, list[tuple[str, Tensor | None]]]:
    """For each layer of ComfyUI's own file: the denoiser's layers in it, and which of its rows are theirs."""
    start, starts, numbered = 0, {}, {}
    for name, parameter in denoiser.named_parameters():
        count = parameter.shape[0] if parameter.ndim else 1
        starts[name] = start
        numbered[name] = torch.arange(start, start + count).view(-1, *[1] * (parameter.ndim - 1))
        start += count
    owners = {f"{name}.weight": name for name in shapes_of(denoiser)}
    found: dict[str, list[tuple[str, Tensor | None]]] = {}
    order = sorted((first, name) for name, first in starts.items())
    firsts = torch.tensor([first for first, _ in order])
    for key, rows in family.comfyui_tensors(numbered).items():
        if not key.endswith(".weight") or rows.numel() != rows.shape[0]:
            continue
        rows = rows.flatten().long()
        which = torch.searchsorted(firsts, rows, right=True) - 1
        names = [order[index][1] for index in which.unique().tolist()]
        if not all(name in owners for name in names):
            continue
        native = key.removesuffix(".weight")
        for prefix in FILE_PREFIXES:
            native = native.removeprefix(prefix)
        whole = len(names) == 1 and bool((rows.diff() == 1).all())
        found[native] = [
            (owners[name], None if whole else _places(rows, starts[name], numbered[name].shape[0])) for name in names
        ]
    return found


def _places(rows: Tensor, start: int, count: int) -> Tensor:
    """Where in ``rows`` the numbers from ``start`` on are, in order."""
    mine = ((rows >= start) & (rows < start + count)).nonzero().flatten()
    return mine[rows[mine].argsort()]


@torch.no_grad()
def fuse(denoiser: nn.Module, family: Family, entries: Sequence[tuple[Path, float]], option: str) -> None:
    """Adds adapter files to the weights of ``denoiser``, each times its factor, as ComfyUI's loader would.

    Raises:
        SettingsError: A file does not fit the model.
    """
    shapes = shapes_of(denoiser)
    for path, strength in entries:
        additions = read_additions(path, option, family, denoiser)
        totals = _totals(additions, shapes)
        for name, addition in additions.items():
            layer: Any = denoiser.get_submodule(name)
            if layer.weight.is_meta:  # another stage's
                continue
            if "diff" in addition.parts or addition.kind != "diff":
                before = frozen_weight(layer)
                delta = addition.delta(shapes[name], totals[id(addition.parts)]).to(before.device)
                after = before + delta
                if addition.dora_scale is not None:
                    length = before.flatten(1).norm(dim=1).view(-1, *[1] * (before.ndim - 1))
                    after = after * addition.dora_scale.to(before).view_as(length) / length
                replace_frozen(layer, before + strength * (after - before))
            if "diff_b" in addition.parts and layer.bias is not None:
                value = addition.parts["diff_b"] if addition.rows is None else addition.parts["diff_b"][addition.rows]
                layer.bias.add_((strength * value.float()).to(layer.bias))
        logger.info("%s added to %d layers, times %g", path, len(additions), strength)


def _totals(additions: Mapping[str, Addition], shapes: Mapping[str, Shape]) -> dict[int, Shape]:
    """For each layer that the file means: its shape, all rows of it."""
    found: dict[int, Shape] = {}
    for name, addition in additions.items():
        known, shape = found.get(id(addition.parts)), shapes[name]
        rows = shape.outputs + (known.outputs if known else 0)
        found[id(addition.parts)] = Shape(rows, shape.inputs, *(getattr(shape, key) for key in (
            "kernel", "stride", "padding", "dilation")))  # fmt: skip
    return found
