"""Modules that load on first use, so that importing the package into ComfyUI stays cheap.

A family's file declares its options (needed when ComfyUI starts) and computes with torch and
diffusers (needed when training starts). It writes::

    if TYPE_CHECKING:
        import torch
    else:
        torch = lazy("torch")
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


class LazyModule(ModuleType):
    """Stands for a module and imports it when the first attribute is asked for."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self.__name__), name)


def lazy(name: str) -> Any:
    """The module called ``name`` (dotted names allowed), imported at the first attribute access."""
    return LazyModule(name)


@contextmanager
def hidden(*names: str) -> Iterator[None]:
    """Within it these packages seem not to be installed, unless they are loaded already.

    For libraries that look at their import which others there are, and load at once all that they find.
    """
    missing = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(missing))  # type: ignore[arg-type]  # None is Python's word for it
    try:
        yield
    finally:
        for name in missing:
            del sys.modules[name]
