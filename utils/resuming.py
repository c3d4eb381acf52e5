"""What a checkpoint remembers of its run, and how a run goes on from it with other settings.

Learning rate, epochs, batch sizes, number of processes and stages, intervals and the like may change. What makes it
another training - seed, model, adapter, kind of optimizer - is refused by name.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from ..models.base import Family
from .config import SettingsError
from .dataset import Sample
from .position import Position
from .sampler import Sampler
from .settings import TrainSettings, as_toml

logger = logging.getLogger(__name__)

NUM_TENSORS = 16
LARGEST = 1_000_000
"""Elements of the largest tensor that is read to know a model by."""
FREE = ("adapter.dropout", "adapter.dtype", "adapter.init_from_existing")
"""Settings of the adapter that may change."""


def model_identity(family: Family, denoiser: nn.Module) -> str:
    """Tells models apart by some of their weights, read from disk.

    Args:
        denoiser: As `Family.build_denoiser` gives it.
    """
    names = [name for name, p in denoiser.named_parameters() if p.numel() <= LARGEST]
    chosen = [names[n * len(names) // NUM_TENSORS] for n in range(NUM_TENSORS)] if names else []
    digest, read = hashlib.blake2b(digest_size=16), family.denoiser_reader()
    for name in dict.fromkeys(chosen):
        digest.update(name.encode() + read(name).float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def identity(settings: TrainSettings, model: str, samples: Sequence[Sample], sampler: Sampler) -> dict[str, Any]:
    """What a checkpoint remembers, as plain values."""
    digest = hashlib.blake2b(digest_size=16)
    for sample in samples:
        digest.update(f"{sample.key}\x1f{sample.num_repeats}\x1e".encode("utf-8", "surrogatepass"))
    return {
        "seed": settings.seed,
        "model": model,
        "dataset": digest.hexdigest(),
        "num_samples": len(samples),
        "batch": sampler.batch_sizes(),
        "settings": as_toml(settings),
    }


def go_on(progress: Mapping[str, Any], now: Mapping[str, Any], settings: TrainSettings) -> Position:
    """Where a run goes on whose checkpoint holds ``progress``.

    Args:
        now: The `identity` of the run as it is set now.
    """
    position = Position(**progress["position"])
    if settings.reset_dataloader:
        position.restart_epoch()
    elif progress["dataset"] != now["dataset"]:
        logger.warning(
            "the dataset has changed since the checkpoint (%d samples then, %d now): this epoch begins again",
            progress["num_samples"],
            now["num_samples"],
        )
        position.restart_epoch()
    elif progress["batch"] != now["batch"]:
        position.cut_otherwise(progress["batch"])
    return position


def refuse_changed(progress: Mapping[str, Any], now: Mapping[str, Any], settings: TrainSettings) -> None:
    """Sees that a run with ``progress`` may go on as it is set now.

    Raises:
        SettingsError: It would be another training.
    """
    problems = []
    for key, before, after in _changes(progress["settings"], now["settings"]):
        if _is_fixed(key, settings):
            problems.append(f"{key}: the checkpoint was made with {before!r}, not {after!r}; set that to resume")
        else:
            logger.info("resumed with another setting: %s was %r, is %r", key, before, after)
    if progress["model"] != now["model"] and not problems:
        problems.append("model: these are not the weights that the checkpoint was made with; give the same files")
    if not problems:
        return
    if settings.i_know_what_i_am_doing:
        for problem in problems:
            logger.warning("%s (gone on, because i_know_what_i_am_doing is set)", problem)
        return
    raise SettingsError("\n".join(problems))


def _is_fixed(key: str, settings: TrainSettings) -> bool:
    if key == "optimizer.type":
        return not settings.reset_optimizer
    return key in ("seed", "model.type") or (key.startswith("adapter") and key not in FREE)


def _changes(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted path, earlier and new value of each setting that differs; None stands for left out."""
    for key in dict.fromkeys([*before, *after]):
        old, new = before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _changes(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key}", old, new
