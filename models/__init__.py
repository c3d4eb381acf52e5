"""The model families: every other module in this folder that defines a `Family` is one.

Adding a family is adding a file: see "Adding a model family" in the README.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import get_args

from .base import Family


@cache
def families() -> dict[str, type[Family]]:
    """The families by the ``type`` that names them in ``[model]``, in alphabetical order."""
    found: dict[str, type[Family]] = {}
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
        if module.name == "base":
            continue
        for value in vars(importlib.import_module(f".{module.name}", __name__)).values():
            if isinstance(value, type) and issubclass(value, Family) and value.__module__.endswith(f".{module.name}"):
                found[get_args(value.Config.model_fields["type"].annotation)[0]] = value
    return found
