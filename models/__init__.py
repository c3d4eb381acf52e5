"""The model families: every other module in this folder that defines a `Family` is one.

Adding a family is adding a file, here or in a folder that the user's settings name as one of
``family_folders``: see "A model family of your own" in docs/guide.md.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, get_args

if TYPE_CHECKING:
    from .base import Family, ModelConfig

_NO_FAMILIES = ("__init__", "base", "flow", "flux_attention", "hunyuan_video_attention", "planned", "sd3_attention",
                "z_image_attention")  # fmt: skip
"""Not looked into for families; what is called attention needs torch, which would slow down the start of ComfyUI."""
_TYPE = re.compile(r'^    type: Literal\["([\w.-]+)"\]', re.MULTILINE)


@cache
def families() -> dict[str, type[Family]]:
    """The families by the ``type`` that names them in ``[model]``, in alphabetical order."""
    from .base import Family

    found: dict[str, type[Family]] = {}
    for path in family_files():
        module = _module(path)
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, Family) and value.__module__ == module.__name__:
                found[get_args(value.Config.model_fields["type"].annotation)[0]] = value
    return dict(sorted(found.items()))


@cache
def configs() -> dict[str, type[ModelConfig]]:
    """The ``[model]`` tables by ``type``: those of the families, and those that are only declared."""
    from .planned import CONFIGS

    return dict(sorted((CONFIGS | {kind: family.Config for kind, family in families().items()}).items()))


def family_named(kind: object) -> type[Family]:
    """The family of this ``type``.

    Raises:
        SettingsError: It is unknown, or this version cannot train it.
    """
    from ..utils.config import SettingsError

    if kind in families():
        return families()[str(kind)]
    known = ", ".join(families())
    if kind in configs():
        raise SettingsError(f"model.type: '{kind}' is not implemented in this version; it can train {known}")
    raise SettingsError(f"model.type: '{kind}' is unknown; known are {known}")


def family_files() -> list[Path]:
    """The files of families: ours, then those in the user's folders."""
    own = Path(__file__).parent
    found = [path for path in sorted(own.glob("*.py")) if path.stem not in _NO_FAMILIES]
    return found + [path for folder in _user_folders() for path in sorted(folder.glob("*.py"))]


def types_in_files() -> list[str]:
    """Each ``type`` that a family's file declares, without importing it: ComfyUI asks at every start."""
    return [kind for path in family_files() for kind in _TYPE.findall(path.read_text("utf-8"))]


def _user_folders() -> list[Path]:
    from ..utils.user_settings import settings_file, user_settings

    if not settings_file().is_file():
        return []
    return [Path(folder).expanduser() for folder in user_settings().family_folders]


def _module(path: Path) -> ModuleType:
    """The family's module; one from another folder imports ``.base`` and ``..utils`` as ours do."""
    name = f"{__name__}.{path.stem}"
    if path.parent == Path(__file__).parent:
        return importlib.import_module(name)
    if name in sys.modules or (Path(__file__).parent / path.name).exists():
        raise ImportError(f"{path}: there is a family file of this name already; give it another name")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
