"""What a training gives to other programs: an adapter, or the whole model in one file."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..models.base import Family
from .adapted import Adapted
from .adapter_settings import AdapterTable
from .adapters import export_tensors, rank_and_alpha
from .checkpoint import export_adapter, export_model
from .run_folder import RunFolder
from .settings import TrainSettings
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
    adapted: Mapping[str, Adapted]
    """The adapted layers of this stage, by their name in the denoiser."""
    stage: int
    is_writer: bool
    """Whether this process is the first of those that train the same weights."""

    def write(self, name: str, step: int, epoch: int) -> list[Path]:
        """Exports to ``<run folder>/<name>``, and the moving average, if both are wanted, to ``<name>_ema``; every
        process calls it. Gives the folders, the best last."""
        ema, wanted = self.trained.ema, self.settings.ema_export
        if ema is None or not ema.has_begun or wanted == "trained":
            return [self._write(name, step, epoch, ema=False)]
        if wanted == "ema":
            return [self._write(name, step, epoch, ema=True)]
        return [self._write(name, step, epoch, ema=False), self._write(f"{name}_ema", step, epoch, ema=True)]

    def _write(self, name: str, step: int, epoch: int, ema: bool) -> Path:
        target = self.folder.path / name
        about = {"base_model": self.settings.model.type, "steps": str(step), "epoch": str(epoch),
                 "seed": str(self.settings.seed), "trained_with": "diffusion-trainer"}  # fmt: skip
        if ema:
            about["ema_decay"] = str(self.settings.ema_decay)
        copies = [self.folder.train_toml, self.folder.dataset_toml]
        with self.trained.averaged(ema):
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
            self.trained.everything(dtype, self.family.float32) if self.is_writer or self.trained.collective else {},
            lambda weights: {**self.family.other_tensors(weights), **self.family.comfyui_tensors(weights)},
            {**about, **self.family.exported_metadata()},
            copies,
            part=str(self.stage) if self.is_writer else None,
            is_main=self.world.rank == 0,
            barrier=self.world.barrier,
        )
        logger.info("model written to %s", target)

    def _write_adapter(self, target: Path, adapter: AdapterTable, about: Mapping[str, str], copies: list[Path]) -> None:
        dtype = getattr(torch, adapter.dtype or self.settings.save_dtype)
        mine = export_tensors(self.adapted, self.family, dtype) if self.is_writer else {}
        parts = self.world.gather((mine, sorted(self.adapted)))
        if self.world.rank == 0:
            tensors = {key: value for part, _ in parts for key, value in part.items()}
            layers = sorted({name for _, names in parts for name in names})
            config = adapter_config(self.settings.model.type, adapter, layers)
            if adapter.type == "lora" and not self.family.says_alpha:
                config |= {"lora_alpha": float(adapter.rank), "alpha_pattern": config["rank_pattern"]}
            metadata = {"format": "pt", "network_alpha": str(config["lora_alpha"]), "rank": str(adapter.rank), **about}
            export_adapter(target, tensors, metadata, config, copies)
            logger.info("%s written to %s", adapter.title, target)


def adapter_config(base_model: str, adapter: AdapterTable, layers: list[str]) -> dict[str, Any]:
    """What peft writes beside an adapter."""
    patterns = {name: rank_and_alpha(adapter, name) for name in layers}
    alpha = adapter.rank if adapter.alpha is None else adapter.alpha
    return {
        "peft_type": adapter.title.upper(),
        "r": adapter.rank,
        "lora_alpha": float(alpha),
        "lora_dropout": adapter.dropout,
        "bias": "none",
        "target_modules": layers,
        "rank_pattern": {name: rank for name, (rank, _) in patterns.items() if rank != adapter.rank},
        "base_model_type": base_model,
    }
