"""Weights & Biases beside TensorBoard: the same curves and pictures, through the wandb package where it is installed.

The key comes from the environment (or from ``wandb login``), and is written to no file here.
"""

from __future__ import annotations

import importlib.util
import netrc
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .config import SettingsError
from .settings import TrainSettings, as_toml

OFF = ("offline", "disabled", "dryrun")


def check_wandb(settings: TrainSettings) -> None:
    """Sees that a run can be logged there, before anything else is done.

    Raises:
        SettingsError: The package or a key is missing.
    """
    if not settings.monitoring.enable_wandb:
        return
    if importlib.util.find_spec("wandb") is None:
        raise SettingsError(
            f"monitoring.enable_wandb: the package wandb is not installed; install it with: {sys.executable} -m pip "
            "install wandb"
        )
    if not (os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") in OFF or _is_logged_in()):
        raise SettingsError(
            "monitoring.enable_wandb: no key; put it into the environment variable WANDB_API_KEY, or set "
            "WANDB_MODE=offline to log into the run folder alone"
        )


def _is_logged_in() -> bool:
    try:
        return any("wandb" in host for host in netrc.netrc().hosts)
    except (OSError, netrc.NetrcParseError):
        return False


class WandbRun:
    """One run there, resumed under the same name when the training is."""

    def __init__(self, settings: TrainSettings, folder: Path) -> None:
        import wandb

        self._wandb: Any = wandb
        asked = settings.monitoring
        try:
            self._run = wandb.init(
                project=asked.wandb_tracker_name or "diffusion-trainer",
                name=asked.wandb_run_name or folder.name,
                id=folder.name,
                resume="allow",
                dir=str(folder),
                config=as_toml(settings),
                settings=wandb.Settings(console="off", save_code=False, disable_git=True),
            )
        except wandb.errors.Error as error:
            raise SettingsError(
                f"monitoring.enable_wandb: {error}; see WANDB_API_KEY, or set WANDB_MODE=offline"
            ) from error
        self._run.define_metric("*", step_metric="place")

    def add_all(self, place: int, values: Mapping[str, float]) -> None:
        """One point of each curve."""
        self._run.log({"place": place, **values})

    def add_pictures(self, place: int, pictures: Sequence[Sequence[Image.Image]], files: Sequence[Path]) -> None:
        """Pictures, and clips from their ``files``."""
        shown = {}
        for number, (frames, file) in enumerate(zip(pictures, files, strict=True)):
            single = len(frames) == 1
            media = self._wandb.Image(np.asarray(frames[0])) if single else self._wandb.Video(str(file), format="mp4")
            shown[f"samples/{number:02d}"] = media
        self._run.log({"place": place, **shown})

    def close(self, failed: bool) -> None:
        """Sends what is left."""
        self._run.finish(exit_code=int(failed))
