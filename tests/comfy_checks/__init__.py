"""Checks of training inside ComfyUI, run by its own Python with its own modules: one process, many checks.

Modules in here other than this one import ComfyUI's, so `enter_comfyui` comes first.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def enter_comfyui(base: Path, cpu: bool = True) -> None:
    """Makes ComfyUI's modules and this package importable, as main.py does."""
    sys.path.insert(0, os.environ["COMFYUI_DIR"])
    sys.argv = ["main.py", *(["--cpu"] if cpu else []), "--base-directory", str(base)]
    import comfy.options

    comfy.options.enable_args_parsing()
    import utils.extra_config  # noqa: F401  # before others claim the name

    # isort: split
    import server

    server.PromptServer.instance = None
    spec = importlib.util.spec_from_file_location(
        "diffusion_trainer", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])  # fmt: skip
    package = importlib.util.module_from_spec(spec)
    sys.modules["diffusion_trainer"] = package
    spec.loader.exec_module(package)
    sys.path.append(str(ROOT / "tests"))
    import folder_paths

    folder_paths.add_model_folder_path("loras", str(base / "output" / "loras"))  # as main.py does
    import torch

    torch.set_num_threads(1)
