"""The node that says what a training will take before it begins."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..utils.config import SettingsError, write_toml
from .train import checked_tables

SCRIPT = Path(__file__).resolve().parent.parent / "train.py"
LONGEST = 300
"""Seconds."""


class TrainingPlan:
    """The plan of a training as text."""

    CATEGORY = "Diffusion-Pipe/Train"
    DESCRIPTION = (
        "Says what a training will take, without starting it: what sits on each GPU, memory, samples a step, and "
        "whether it fits. Reads names and shapes of the model's files alone."
    )
    SEARCH_ALIASES = ("memory", "vram", "estimate", "plan")
    FUNCTION = "plan"
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("plan",)
    OUTPUT_TOOLTIPS = ("The plan, for Preview Any.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:
        return {
            "required": {
                "dataset_config": ("DATASET_CONFIG", {"tooltip": "From General Dataset Config."}),
                "train_config": ("TRAIN_CONFIG", {"tooltip": "From General Training Config."}),
                "gpu_memory": ("FLOAT", {
                    "default": 0.0, "min": 0.0, "max": 10000.0, "step": 0.5,
                    "tooltip": "GiB of each GPU. 0: of the smallest one here."}),
            },
        }  # fmt: skip

    @classmethod
    def IS_CHANGED(cls, **_: Any) -> float:
        """Unlike anything, itself included: files change without the graph."""
        return float("nan")

    def plan(
        self, dataset_config: Mapping[str, Any], train_config: Mapping[str, Any], gpu_memory: float = 0.0
    ) -> tuple[str]:
        """The plan.

        Raises:
            SettingsError: A setting or a file cannot be used; in the trainer's own words.
        """
        train, dataset = checked_tables(train_config, dataset_config)
        with tempfile.TemporaryDirectory() as folder:  # a process of its own: the trainer's libraries stay out of here
            write_toml(Path(folder) / "train.toml", train)
            write_toml(Path(folder) / "dataset.toml", dataset)
            command = [sys.executable, "-P", str(SCRIPT), "--config", str(Path(folder) / "train.toml"), "--plan"]
            memory = ["--gpu_memory", str(gpu_memory)] if gpu_memory else []
            done = subprocess.run(
                command + memory, capture_output=True, encoding="utf-8", timeout=LONGEST, check=False, cwd=folder
            )
        if done.returncode:
            raise SettingsError(f"the plan could not be made: {done.stderr.strip()[-2000:]}")
        return (done.stdout.strip(),)
