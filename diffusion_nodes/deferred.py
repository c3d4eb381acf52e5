"""Node classes that are made when they are first looked at.

ComfyUI imports the package at every start, in which most people train nothing. So the table of nodes
holds stand-ins; whatever is asked of one is answered by the class that it stands for.
"""

from __future__ import annotations

import importlib
from typing import Any


class Deferred(type):
    """The type of stand-ins. What ComfyUI sets on a stand-in stays there."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):  # abc, typing and others ask every class for such names
            raise AttributeError(name)
        return getattr(real(cls), name)

    def __call__(cls, *args: Any, **values: Any) -> Any:
        return real(cls)(*args, **values)

    def __dir__(cls) -> list[str]:
        return dir(real(cls))


def deferred(module: str, name: str) -> type:
    """Stands for class ``name`` of the sibling ``module``."""
    return Deferred(name, (), {"_place": (f"{__package__}.{module}", name), "__module__": f"{__package__}.{module}"})


def real(node: type) -> type:
    """The class that ``node`` stands for, or ``node`` itself."""
    place = vars(node).get("_place")
    return getattr(importlib.import_module(place[0]), place[1]) if place else node
