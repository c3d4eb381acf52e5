"""Imports the package under its fixed name, whatever the clone is called."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if "diffusion_trainer" not in sys.modules:
    spec = importlib.util.spec_from_file_location(
        "diffusion_trainer", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    package = importlib.util.module_from_spec(spec)
    sys.modules["diffusion_trainer"] = package
    spec.loader.exec_module(package)
