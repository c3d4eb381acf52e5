"""Writes for each check "" or what went wrong.

COMFYUI_DIR=... $COMFYUI_PYTHON tests/comfy_checks [--gpu [--dynamic]] OUTPUT.json [CHECK ...]
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))
from comfy_checks import enter_comfyui

MODULES = ("learning", "options", "untouched", "data", "weights", "resuming", "gguf_files")


def same_every_time() -> None:
    """A GPU adds in the same order every time, as a CPU does; some checks compare bits."""
    import torch

    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    warnings.simplefilter("ignore")
    torch.backends.cudnn.allow_tf32 = False


def main() -> int:
    """Runs the checks named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("checks", nargs="*")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--dynamic", action="store_true", help="with ComfyUI's dynamic VRAM")
    options = parser.parse_args()
    output = options.output.resolve()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("custom_nodes", "models", "input", "output/loras", "temp", "user"):
            (Path(folder) / name).mkdir(parents=True)
        enter_comfyui(Path(folder), cpu=not options.gpu, dynamic=options.dynamic)
        if options.gpu:
            same_every_time()
        modules = [importlib.import_module(f"comfy_checks.{name}") for name in MODULES]
        checks = {name.removeprefix("check_"): value for module in modules for name, value in vars(module).items()
                  if name.startswith("check_")}  # fmt: skip
        results = {}
        for name in options.checks or checks:
            try:
                checks[name]()
                results[name] = ""
            except BaseException:  # a check may fail by ComfyUI's interrupt, which is none of Exception
                results[name] = traceback.format_exc()
            output.write_text(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
