"""Writes for each check "" or what went wrong.

COMFYUI_DIR=... $COMFYUI_PYTHON tests/comfy_checks OUTPUT.json [CHECK ...]
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
import traceback
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))
from comfy_checks import enter_comfyui

MODULES = ("learning", "options", "untouched", "data", "weights", "resuming", "gguf_files")


def main() -> int:
    """Runs the checks named, or all."""
    output, wanted = Path(sys.argv[1]).resolve(), sys.argv[2:]
    with tempfile.TemporaryDirectory() as folder:
        for name in ("custom_nodes", "models", "input", "output/loras", "temp", "user"):
            (Path(folder) / name).mkdir(parents=True)
        enter_comfyui(Path(folder))
        modules = [importlib.import_module(f"comfy_checks.{name}") for name in MODULES]
        checks = {name.removeprefix("check_"): value for module in modules for name, value in vars(module).items()
                  if name.startswith("check_")}  # fmt: skip
        results = {}
        for name in wanted or checks:
            try:
                checks[name]()
                results[name] = ""
            except BaseException:  # a check may fail by ComfyUI's interrupt, which is none of Exception
                results[name] = traceback.format_exc()
            output.write_text(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
