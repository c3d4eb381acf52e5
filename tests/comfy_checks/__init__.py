"""Checks of training inside ComfyUI, run by its own Python with its own modules: one process, many checks.

Modules in here other than this one import ComfyUI's, so `enter_comfyui` comes first.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def enter_comfyui(base: Path, cpu: bool = True, dynamic: bool = False) -> None:
    """Makes ComfyUI's modules and this package importable, as main.py does.

    Args:
        dynamic: Weights are streamed to the GPU as they are used (dynamic VRAM), as newer versions do on their own.
    """
    sys.path.insert(0, os.environ["COMFYUI_DIR"])
    sys.argv = ["main.py", *(["--cpu"] if cpu else []), "--base-directory", str(base)]
    import comfy.options

    comfy.options.enable_args_parsing()
    if dynamic:
        stream_weights()
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


def stream_weights() -> None:
    """Switches dynamic VRAM on; it must be ready before torch is."""
    import comfy_aimdo.control

    comfy_aimdo.control.init()
    import comfy.memory_management
    import comfy.model_management
    import comfy.model_patcher

    devices = comfy.model_management.get_all_torch_devices()
    try:
        ready = comfy_aimdo.control.init_devices((device.index, 0) for device in devices)
    except TypeError:  # 0.4.9 and older
        ready = comfy_aimdo.control.init_devices(device.index for device in devices)
    if not ready:
        raise RuntimeError("dynamic VRAM does not work on this machine")
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy.memory_management.aimdo_enabled = True
