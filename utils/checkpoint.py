"""Checkpoints, from which training goes on, and exports, which other programs read.

Both are written beside their place and renamed, so a good one is never replaced by half of one. What a
checkpoint holds is named by parameter, so it can be read with another number of stages or ranks.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from .config import SettingsError, write_whole
from .run_folder import RunFolder

logger = logging.getLogger(__name__)

FORMAT = 1


class Trained:
    """The trainable parameters of this stage, by their name in the denoiser, with their optimizer."""

    def __init__(self, names: Mapping[nn.Parameter, str], module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.parameters = {names[p]: p for p in module.parameters() if p.requires_grad}
        self.optimizer = optimizer
        index = {id(p): name for name, p in self.parameters.items()}
        self._order = [index[id(p)] for group in optimizer.param_groups for p in group["params"] if id(p) in index]

    def weights(self) -> dict[str, torch.Tensor]:
        """Copies on the CPU."""
        return {name: p.detach().cpu().clone() for name, p in self.parameters.items()}

    def optimizer_state(self) -> dict[str, Any]:
        """Optimizer state by parameter name, and what the optimizer keeps per group."""
        state = self.optimizer.state_dict()
        own = {name: state["state"][n] for n, name in enumerate(self._order) if n in state["state"]}
        groups = [{key: value for key, value in group.items() if key != "params"} for group in state["param_groups"]]
        return {"state": own, "groups": groups}

    def load(self, weights: Mapping[str, torch.Tensor], state: Mapping[str, Any], groups: list[dict[str, Any]]) -> None:
        """Takes over this stage's part of a checkpoint.

        Raises:
            SettingsError: The checkpoint was made with other adapter settings.
        """
        for name, parameter in self.parameters.items():
            if name not in weights or weights[name].shape != parameter.shape:
                raise SettingsError(
                    f"resume_from_checkpoint: the checkpoint has no '{name}' of shape {list(parameter.shape)}; "
                    "resume with the model and adapter settings that it was made with"
                )
            parameter.data.copy_(weights[name])
        whole = self.optimizer.state_dict()
        whole["state"] = {n: state[name] for n, name in enumerate(self._order) if name in state}
        for group, stored in zip(whole["param_groups"], groups, strict=True):
            group.update({key: value for key, value in stored.items() if key not in ("lr", "initial_lr")})
        self.optimizer.load_state_dict(whole)


def save_checkpoint(
    run: RunFolder,
    step: int,
    stage: int,
    is_writer: bool,
    is_main: bool,
    trained: Trained,
    progress: Mapping[str, Any],
    barrier: Callable[[], None],
    keep: int,
) -> Path:
    """Writes ``global_step<step>``; every process calls it, the first data-parallel rank of a stage writes.

    Args:
        progress: Where training stands: plain values.
        keep: Older checkpoints beyond this many are removed, after the new one is complete.

    Raises:
        OSError: No space, say; earlier checkpoints are as they were.
    """
    target = run.path / f"global_step{step}"
    draft = run.path / f".global_step{step}.part"
    if is_main:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
    barrier()
    if is_writer:
        save_file(trained.weights(), draft / f"weights-{stage}.safetensors")
        torch.save(trained.optimizer_state(), draft / f"optimizer-{stage}.pt")
    barrier()
    if is_main:
        write_whole(draft / "progress.json", json.dumps({"format": FORMAT, "step": step, **progress}))
        _sync_folder(draft)
        if target.exists():
            shutil.rmtree(target)
        os.replace(draft, target)
        write_whole(run.latest, target.name)
        for old in [c for c in run.checkpoints() if c != target][: -keep + 1 or None]:
            shutil.rmtree(old)
    barrier()
    return target


def load_checkpoint(folder: Path, trained: Trained) -> dict[str, Any]:
    """Takes over a checkpoint; returns its progress.

    Raises:
        SettingsError: It is incomplete, of another format, or does not fit the settings.
    """
    try:
        progress = json.loads((folder / "progress.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"resume_from_checkpoint: '{folder}' is no complete checkpoint of this trainer ({error})"
        ) from None
    if progress.get("format") != FORMAT:
        raise SettingsError(
            f"resume_from_checkpoint: '{folder}' has format {progress.get('format')}, this version reads {FORMAT}"
        )
    weights: dict[str, torch.Tensor] = {}
    state: dict[str, Any] = {}
    groups: list[dict[str, Any]] = []
    for file in sorted(folder.glob("weights-*.safetensors")):
        weights |= load_file(file)
    for file in sorted(folder.glob("optimizer-*.pt")):
        part = torch.load(file, map_location="cpu", weights_only=True)
        state |= part["state"]
        groups = part["groups"] if len(part["groups"]) >= len(groups) else groups
    trained.load(weights, state, groups)
    return progress


def newest_checkpoint(run: RunFolder) -> Path:
    """The checkpoint that ``latest`` names, or the newest there is.

    Raises:
        SettingsError: The run has none.
    """
    if run.latest.is_file() and (run.path / run.latest.read_text().strip()).is_dir():
        return run.path / run.latest.read_text().strip()
    found = run.checkpoints()
    if not found:
        raise SettingsError(
            f"resume_from_checkpoint: '{run.path}' has no checkpoint; start a new run, or choose another"
        )
    return found[-1]


def export_adapter(
    target: Path,
    tensors: dict[str, torch.Tensor],
    metadata: Mapping[str, str],
    config: Mapping[str, Any],
    copies: list[Path],
) -> None:
    """Writes an adapter folder: ``adapter_model.safetensors``, ``adapter_config.json`` and ``copies``."""
    draft = target.with_name(f".{target.name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        save_file(tensors, draft / "adapter_model.safetensors", metadata=dict(metadata))
        write_whole(draft / "adapter_config.json", json.dumps(config, indent=2))
        for file in copies:
            shutil.copy(file, draft / file.name)
        _sync_folder(draft)
        if target.exists():
            shutil.rmtree(target)
        os.replace(draft, target)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _sync_folder(folder: Path) -> None:
    """Asks the disk to hold the folder's files before a rename makes them count."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
