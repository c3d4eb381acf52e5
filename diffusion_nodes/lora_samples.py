"""What is trained on: each latent with its own caption, prepared as the model wants them, in random order.

Order, times and noise depend on the seed and on how many steps came before, on nothing else, so that a training
that goes on is the one that was never interrupted.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor

from ..utils.config import SettingsError

UNTRAINABLE = {"control": "a ControlNet", "gligen": "GLIGEN boxes", "hooks": "hooks"}
"""What a conditioning may carry that has no place in training."""

Conditioning = list[list[Any]]
"""ComfyUI's CONDITIONING: entries of a tensor and a dictionary."""


@dataclass
class Sample:
    """A latent as the model sees it, with what the model gets besides, all on the CPU.

    Shape legend of the latent: 1, channels, [frames,] height, width.
    """

    latent: Tensor
    conds: dict[str, Any]
    """ComfyUI's condition objects by the name of the model's argument."""
    dropped: dict[str, Any]
    """The same for no caption."""
    mask: Tensor | None = None
    """Weight of each place in the loss, of the latent's size with one channel."""


def generator(seed: int, *what: int | str) -> torch.Generator:
    """A CPU generator for one purpose."""
    text = "/".join(str(part) for part in (seed, *what))
    value = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
    return torch.Generator().manual_seed(value)


# -- from sockets to pairs ---------------------------------------------------------------------------------------


def split_latents(latents: Sequence[Mapping[str, Any]]) -> list[tuple[Tensor, Tensor | None]]:
    """Every single latent, batch dimension kept, with its mask.

    Raises:
        SettingsError: Something else than plain latents.
    """
    found: list[tuple[Tensor, Tensor | None]] = []
    for entry in latents:
        samples, mask = entry["samples"], entry.get("noise_mask")
        if not isinstance(samples, Tensor) or getattr(samples, "is_nested", False):
            raise SettingsError("latents: latents of sound and video together cannot be trained on; encode pictures")
        for index in range(samples.shape[0]):
            own = None if mask is None else mask[index % mask.shape[0]][None].clone().float()
            found.append((samples[index : index + 1].clone().float(), own))
    return found


def split_conditioning(positive: Sequence[Conditioning]) -> list[list[Any]]:
    """Every single caption's entry; an entry that holds a batch becomes as many."""
    found: list[list[Any]] = []
    for entry in (entry for conditioning in positive for entry in conditioning):
        tensor, extras = entry[0], entry[1]
        size = tensor.shape[0] if isinstance(tensor, Tensor) else 1
        for key, name in UNTRAINABLE.items():
            if extras.get(key) is not None:
                raise SettingsError(f"positive: the conditioning carries {name}; connect it without")
        for index in range(size):
            found.append([_at(tensor, index, size), {key: _at(value, index, size) for key, value in extras.items()}])
    return found


def _at(value: Any, index: int, size: int) -> Any:
    if isinstance(value, Tensor):
        one = value[index : index + 1] if size > 1 and value.ndim > 1 and value.shape[0] == size else value
        return one.clone()
    if isinstance(value, list):
        return [_at(item, index, size) for item in value]
    return value


def paired(num_latents: int, captions: list[list[Any]]) -> list[list[Any]]:
    """A caption for each latent.

    Raises:
        SettingsError: Neither one for all nor as many as latents.
    """
    if num_latents == 0 or not captions:
        raise SettingsError(f"latents: got {num_latents} latents and {len(captions)} conditionings; connect both")
    if len(captions) == 1:
        return captions * num_latents
    if len(captions) != num_latents:
        raise SettingsError(
            f"positive: {len(captions)} conditionings for {num_latents} latents; connect one for all, or one for each "
            "latent in the same order"
        )
    return captions


# -- as the model wants them ---------------------------------------------------------------------------------------


def prepare(
    model: Any, latents: Sequence[tuple[Tensor, Tensor | None]], captions: Sequence[list[Any]],
    negative: list[Any] | None, masks: Sequence[Tensor], device: torch.device,
) -> list[Sample]:  # fmt: skip
    """The samples, through the model's own latent format and its own reading of conditionings.

    Args:
        model: ComfyUI's model, loaded on ``device``.
        negative: The conditioning that stands for no caption; zeros where there is none.
        masks: None, one for all or one for each, (1, height, width) of pictures.
    """
    if len(masks) not in (0, 1, len(latents)):
        raise SettingsError(f"masks: {len(masks)} masks for {len(latents)} latents; connect one or one for each")
    samples = []
    for index, ((raw, own_mask), caption) in enumerate(zip(latents, captions, strict=True)):
        latent = model.process_latent_in(_fitting(raw, model.latent_format)).float()
        mask = masks[index % len(masks)] if masks else own_mask
        empty = negative if negative is not None else _zeroed(caption)
        conds, dropped = (_conds(model, entry, latent, own_mask, device) for entry in (caption, empty))
        samples.append(Sample(latent.cpu(), conds, dropped, _mask_of(mask, latent)))
    return samples


def _fitting(latent: Tensor, latent_format: Any) -> Tensor:
    """A picture as a video of one frame where the model wants videos."""
    dims = getattr(latent_format, "latent_dimensions", 2)
    latent = latent.unsqueeze(2) if dims == 3 and latent.ndim == 4 else latent
    channels = latent_format.latent_channels
    if latent.shape[1] != channels:
        raise SettingsError(
            f"latents: {latent.shape[1]} channels, the model wants {channels}; encode the pictures with the VAE that "
            "belongs to this model"
        )
    return latent


def _conds(model: Any, entry: list[Any], latent: Tensor, mask: Tensor | None, device: torch.device) -> dict[str, Any]:
    import comfy.sampler_helpers
    import comfy.samplers

    converted = comfy.sampler_helpers.convert_cond([entry])
    noise = torch.zeros_like(latent, device=device)
    encoded = comfy.samplers.encode_model_conds(
        model.extra_conds, converted, noise, device, "positive", latent_image=latent.to(device),
        denoise_mask=None if mask is None else mask.to(device), seed=0)  # fmt: skip
    found = encoded[0]["model_conds"]
    return {name: _on_cpu(cond.process_cond(batch_size=1, area=None)) for name, cond in found.items()}


def _on_cpu(cond: Any) -> Any:
    return cond._copy_with(_moved(cond.cond, torch.device("cpu")))


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to(device)
    return [_moved(item, device) for item in value] if isinstance(value, list) else value


def _zeroed(caption: list[Any]) -> list[Any]:
    extras = dict(caption[1])
    if isinstance(extras.get("pooled_output"), Tensor):
        extras["pooled_output"] = torch.zeros_like(extras["pooled_output"])
    return [torch.zeros_like(caption[0]), extras]


def _mask_of(mask: Tensor | None, latent: Tensor) -> Tensor | None:
    """Of the latent's size, for all its channels and frames alike."""
    if mask is None:
        return None
    flat = mask.detach().float().reshape(-1, 1, *mask.shape[-2:])[:1]
    sized = torch.nn.functional.interpolate(flat, latent.shape[-2:], mode="area").cpu()
    return sized.unsqueeze(2) if latent.ndim == 5 else sized


# -- order and batches ---------------------------------------------------------------------------------------------


def batches(samples: Sequence[Sample], batch_size: int, seed: int) -> Iterator[list[int]]:
    """Indices of full batches of equal latent sizes, without end; each sample once per epoch.

    A sample of a size that has too few for a batch waits for its next turn, so that no picture counts more.
    """
    waiting: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for epoch in count():
        for index in torch.randperm(len(samples), generator=generator(seed, "order", epoch)).tolist():
            queue = waiting[tuple(samples[index].latent.shape)]
            queue.append(index)
            if len(queue) == batch_size:
                yield queue[:]
                queue.clear()


def groups(conds: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Positions whose conditions can be computed together without changing any: all sizes are equal."""
    found: list[list[int]] = []
    for position, cond in enumerate(conds):
        home = next((group for group in found if _alike(conds[group[0]], cond)), None)
        if home is None:
            found.append([position])
        else:
            home.append(position)
    return found


def _alike(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    return first.keys() == second.keys() and all(
        type(first[key]) is type(second[key])
        and _sizes(first[key].cond) == _sizes(second[key].cond)
        and first[key].can_concat(second[key])
        for key in first
    )


def _sizes(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape)
    return [_sizes(item) for item in value] if isinstance(value, list) else None


def joined(conds: Sequence[Mapping[str, Any]], device: torch.device) -> dict[str, Any]:
    """The model's arguments for these samples together."""
    return {key: _moved(conds[0][key].concat([other[key] for other in conds[1:]]), device) for key in conds[0]}
