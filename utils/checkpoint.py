"""Checkpoints, from which training goes on, and exports, which other programs read.

Both are written beside their place and renamed, so a good one is never replaced by half of one. What a
checkpoint holds is named by parameter, so it can be read with another number of stages or ranks.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from .config import SettingsError, write_whole
from .ema import Ema
from .run_folder import RunFolder
from .tensor_file import Promise, TensorFiles, write_tensors
from .trained import Trained

logger = logging.getLogger(__name__)

FORMAT = 3


def save_checkpoint(
    run: RunFolder,
    step: int,
    part: str,
    is_writer: bool,
    is_main: bool,
    trained: Trained,
    progress: Mapping[str, Any],
    barrier: Callable[[], None],
    keep: int,
) -> Path:
    """Writes ``global_step<step>``; every process calls it, those that step weights of their own write.

    Args:
        part: Name of what this process writes, unlike that of any other.
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
    if is_writer or trained.collective:
        tensors, rest = trained.state()
        write_tensors(draft / f"weights-{part}.safetensors" if is_writer else None, trained.masters())
        write_tensors(draft / f"optimizer-{part}.safetensors" if is_writer else None, tensors)
        if trained.ema:
            values = {name: trained.promise(name, value) for name, value in trained.ema.values.items()}
            write_tensors(draft / f"ema-{part}.safetensors" if is_writer else None, values)
    if is_writer:
        torch.save(rest, draft / f"optimizer-{part}.pt")
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


def load_checkpoint(
    folder: Path,
    trained: Trained,
    check: Callable[[dict[str, Any]], None] = lambda _: None,
    *,
    optimizer_state: bool = True,
    optimizer_groups: bool = True,
) -> dict[str, Any]:
    """Takes over a checkpoint; returns its progress.

    Args:
        check: Looks at the progress before anything is taken over; raises what is wrong.
        optimizer_state: Also the optimizer's running averages.
        optimizer_groups: Also its numbers, such as weight decay, but never the learning rate.

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
    check(progress)
    rest: dict[str, Any] = {"values": {}, "groups": []}
    for file in sorted(folder.glob("optimizer-*.pt")):
        part = torch.load(file, map_location="cpu", weights_only=True)
        rest["values"] |= part["values"] if optimizer_state else {}
        rest["groups"] += part["groups"] if optimizer_groups else []
    weights = TensorFiles(sorted(folder.glob("weights-*.safetensors")))
    state = TensorFiles(sorted(folder.glob("optimizer-*.safetensors")) if optimizer_state else [])
    trained.load(weights, state, rest)
    if trained.ema:
        _load_ema(trained, trained.ema, TensorFiles(sorted(folder.glob("ema-*.safetensors"))), progress["step"])
    return progress


def _load_ema(trained: Trained, ema: Ema, stored: TensorFiles, step: int) -> None:
    """Takes over the average; begins one where the checkpoint has none."""
    ema.step = step
    if not all(name in stored for name in ema.values):
        logger.info("ema_decay: the checkpoint has no average; one begins with its weights")
        ema.begin()
        return
    for name, value in ema.values.items():
        value.copy_(trained.mine(name, stored.read(name)))


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
    copies: Sequence[Path],
) -> None:
    """Writes an adapter folder: ``adapter_model.safetensors``, ``adapter_config.json`` and ``copies``."""
    with _appearing_whole(target, copies) as draft:
        save_file(tensors, draft / "adapter_model.safetensors", metadata=dict(metadata))
        write_whole(draft / "adapter_config.json", json.dumps(config, indent=2))


def export_model(
    target: Path,
    mine: Mapping[str, Promise],
    convert: Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]],
    metadata: Mapping[str, str],
    copies: Sequence[Path],
    *,
    part: str | None,
    is_main: bool,
    barrier: Callable[[], None],
) -> None:
    """Writes a model folder: ``model.safetensors`` and ``copies``; every process calls it.

    Args:
        mine: The weights that this process has.
        convert: Makes the file's tensors of all weights by name.
        part: Name of what this process writes, unlike that of any other; None: it writes nothing.
    """
    draft = _draft(target)
    if is_main:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
    barrier()
    write_tensors(draft / f"part-{part}.safetensors" if part is not None else None, mine)
    barrier()
    if is_main:
        with _appearing_whole(target, copies):
            parts = sorted(draft.glob("part-*.safetensors"))
            stored = TensorFiles(parts)
            tensors = convert({name: stored.read(name) for name in stored.names()})
            write_tensors(draft / "model.safetensors", {n: Promise.of(t) for n, t in tensors.items()}, metadata)
            for file in parts:
                file.unlink()
    barrier()


def _draft(target: Path) -> Path:
    return target.with_name(f".{target.name}.part")


@contextmanager
def _appearing_whole(target: Path, copies: Sequence[Path]) -> Iterator[Path]:
    """The folder to write to; it takes the place of ``target`` when all is written."""
    draft = _draft(target)
    draft.mkdir(exist_ok=True)
    try:
        yield draft
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
