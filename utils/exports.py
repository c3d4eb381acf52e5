"""What a training gives to other programs: an adapter, or the whole model in one file."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..models.base import Family
from .adapters import alpha_of, export_tensors
from .checkpoint import export_adapter, export_model
from .run_folder import RunFolder
from .settings import Lora, TrainSettings
from .trained import Trained
from .world import World

logger = logging.getLogger(__name__)


@dataclass
class Exporter:
    """Writes exports into a run folder; every process has one."""

    settings: TrainSettings
    family: Family
    world: World
    folder: RunFolder
    trained: Trained
    stage: int
    is_writer: bool
    """Whether this process is the first of those that train the same weights."""

    def write(self, name: str, step: int, epoch: int) -> Path:
        """Exports the weights as they are to ``<run folder>/<name>``; every process calls it."""
        target = self.folder.path / name
        about = {"base_model": self.settings.model.type, "steps": str(step), "epoch": str(epoch),
                 "seed": str(self.settings.seed), "trained_with": "diffusion-trainer"}  # fmt: skip
        copies = [self.folder.train_toml, self.folder.dataset_toml]
        with self.trained.averaged():
            if self.settings.adapter is None:
                self._write_model(target, about, copies)
            else:
                self._write_adapter(target, self.settings.adapter, about, copies)
        self.world.barrier()
        return target

    def _write_model(self, target: Path, about: Mapping[str, str], copies: list[Path]) -> None:
        dtype = getattr(torch, self.settings.save_dtype)
        export_model(
            target,
            self.trained.everything(dtype, self.family.float32) if self.is_writer else {},
            lambda weights: {**self.family.other_tensors(weights), **self.family.comfyui_tensors(weights)},
            about,
            copies,
            part=str(self.stage) if self.is_writer else None,
            is_main=self.world.rank == 0,
            barrier=self.world.barrier,
        )
        logger.info("model written to %s", target)

    def _write_adapter(self, target: Path, adapter: Lora, about: Mapping[str, str], copies: list[Path]) -> None:
        parts = self.world.gather(self.trained.weights() if self.is_writer else {})
        if self.world.rank == 0:
            weights = {key: value for part in parts for key, value in part.items()}
            dtype = getattr(torch, adapter.dtype or self.settings.save_dtype)
            metadata = {"format": "pt", "network_alpha": str(alpha_of(adapter)), "rank": str(adapter.rank), **about}
            config = _adapter_config(self.settings, adapter, weights)
            export_adapter(target, export_tensors(weights, self.family, adapter, dtype), metadata, config, copies)
            logger.info("LoRA written to %s", target)


def _adapter_config(settings: TrainSettings, adapter: Lora, weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What peft writes beside an adapter."""
    return {
        "peft_type": "LORA",
        "r": adapter.rank,
        "lora_alpha": alpha_of(adapter),
        "lora_dropout": adapter.dropout,
        "bias": "none",
        "target_modules": sorted({name.rsplit(".lora_", 1)[0] for name in weights}),
        "base_model_type": settings.model.type,
    }
