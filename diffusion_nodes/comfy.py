"""ComfyUI as the nodes see it, and the same without it. Nothing else imports ComfyUI's modules.

Inside ComfyUI its folders, progress bar and Cancel are used. Elsewhere (the headless runner, tests) a
base directory with input/, output/, models/, user/ and temp/ stands in, and progress goes to the log.
"""

from __future__ import annotations

import importlib
import logging
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..utils.paths import local_path

logger = logging.getLogger(__name__)

_MODEL_FILES = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
_base = Path.cwd()
_interrupt = threading.Event()


class Interrupted(BaseException):
    """Cancel, outside ComfyUI. Like ComfyUI's own it passes by ``except Exception``."""


def inside() -> bool:
    """Whether ComfyUI is what imported us; it always has its folders by then."""
    return "folder_paths" in sys.modules


def _module(name: str) -> Any:
    return importlib.import_module(name)


# -- folders -------------------------------------------------------------------------------------------


def set_base_directory(path: Path) -> None:
    """Where input/, output/ and models/ lie when there is no ComfyUI."""
    global _base
    _base = Path(path).resolve()


def base_directory() -> Path:
    """ComfyUI's folder."""
    return Path(_module("folder_paths").base_path) if inside() else _base


def input_directory() -> Path:
    """Where people put what they want to use."""
    return Path(_module("folder_paths").get_input_directory()) if inside() else _base / "input"


def output_directory() -> Path:
    """Where results go."""
    return Path(_module("folder_paths").get_output_directory()) if inside() else _base / "output"


def temp_directory() -> Path:
    """Emptied when ComfyUI starts."""
    return Path(_module("folder_paths").get_temp_directory()) if inside() else _base / "temp"


def user_directory() -> Path:
    """Settings and workflows of users."""
    return Path(_module("folder_paths").get_user_directory()) if inside() else _base / "user"


def dataset_directories() -> list[Path]:
    """Where newer versions of ComfyUI keep datasets."""
    return model_folders("datasets") if inside() else [_base / "datasets"]


def models_directory() -> Path:
    """The folder of model folders; `model_folders` knows also those elsewhere."""
    return Path(_module("folder_paths").models_dir) if inside() else _base / "models"


def runs_directory() -> Path:
    """Where runs go unless the user says otherwise."""
    return output_directory() / "training"


def resolve(text: str, kind: str | None = None) -> str:
    """What was typed as an absolute path; what it names need not exist.

    The name of a model of ``kind``, as `model_names` has it, means that one. Any other relative path is
    looked for in ComfyUI's folder, in its input, output and models folders and in the working directory.
    One that is nowhere lies in ComfyUI's folder. A path that begins with ``input``, ``output`` or ``models``
    means that folder, wherever ComfyUI was told to have it.
    """
    path = Path(local_path(text))
    if path.is_absolute():
        return str(path)
    places = [base_directory(), input_directory(), output_directory(), models_directory(), *_all_model_folders()]
    named = {"input": input_directory, "output": output_directory, "models": models_directory}
    own = path.parts and path.parts[0] in named
    default = named[path.parts[0]]().joinpath(*path.parts[1:]) if own else base_directory() / path
    candidates = [default, *(place / path for place in (*places, Path.cwd()))]
    if kind and not own:
        candidates = [*(folder / path for folder in model_folders(kind)), *candidates]
    return str(next((candidate for candidate in candidates if candidate.exists()), default).absolute())


def _all_model_folders() -> list[Path]:
    if inside():
        known = _module("folder_paths").folder_names_and_paths
        return [Path(folder) for kind in known if kind != "custom_nodes" for folder in known[kind][0]]
    return sorted(entry for entry in models_directory().glob("*") if entry.is_dir())


def model_folders(kind: str) -> list[Path]:
    """The folders of models of a kind, such as ``loras``; empty if ComfyUI knows no such kind."""
    if not inside():
        return [models_directory() / kind]
    known = _module("folder_paths").folder_names_and_paths
    return [Path(folder) for folder in known[kind][0]] if kind in known else []


def model_files(kind: str) -> list[str]:
    """Names of the models of a kind, as ComfyUI's pickers show them."""
    if inside():
        return list(_module("folder_paths").get_filename_list(kind)) if model_folders(kind) else []
    found = [(folder, path) for folder in model_folders(kind) for path in folder.rglob("*")]
    return sorted(str(path.relative_to(folder)) for folder, path in found if path.suffix in _MODEL_FILES)


def model_names(kind: str | None) -> list[str]:
    """What can be typed for a model of this kind: `model_files`, and folders in diffusers layout."""
    if not kind:
        return []
    folders = [path.parent for folder in model_folders(kind) if folder.is_dir()
               for path in folder.glob("*/model_index.json")]  # fmt: skip
    return sorted({folder.name for folder in folders} | set(model_files(kind)))


def model_path(kind: str, name: str) -> Path | None:
    """The file that `model_files` calls ``name``; None if it is gone."""
    for folder in model_folders(kind):
        path = folder / name
        if path.is_file() and path.resolve().is_relative_to(folder.resolve()):
            return path
    return None


def before_prompts(change: Callable[[dict[str, Any]], None]) -> None:
    """Lets ``change`` alter each prompt that is sent, before ComfyUI checks it."""
    server = _module("server").PromptServer.instance if "server" in sys.modules else None
    if server is None:
        return

    def handle(data: dict[str, Any]) -> dict[str, Any]:
        if isinstance(data.get("prompt"), dict):
            change(data["prompt"])
        return data

    server.add_on_prompt_handler(handle)


# -- what a node tells and asks while it runs ------------------------------------------------------------


def progress(node_id: str | None, done: int, total: int, picture: Any = None) -> None:
    """Shows ``done`` of ``total`` on the node and in ComfyUI's progress bar. May raise Cancel.

    Args:
        picture: A Pillow image to show on the node meanwhile.
    """
    if inside():
        preview = None if picture is None else ("JPEG", picture, 512)
        _module("comfy.utils").ProgressBar(total, node_id=node_id).update_absolute(done, total, preview)


def progress_text(text: str, node_id: str | None) -> None:
    """Shows ``text`` on the node."""
    server = _module("server").PromptServer.instance if inside() else None
    if server is not None and node_id is not None and hasattr(server, "send_progress_text"):  # came in May 2025
        server.send_progress_text(text, node_id)
    else:
        logger.info("%s", text)


def free_vram() -> None:
    """Makes ComfyUI let go of the GPU memory that its models hold."""
    if inside():
        management = _module("comfy.model_management")
        management.unload_all_models()
        management.soft_empty_cache()


def check_interrupted() -> None:
    """Raises if the user pressed Cancel, once for each time.

    ComfyUI's exception derives from BaseException in new versions and from Exception in old ones; clean
    up after either.
    """
    if inside():
        _module("comfy.model_management").throw_exception_if_processing_interrupted()
    elif _interrupt.is_set():
        _interrupt.clear()
        raise Interrupted


def interrupt() -> None:
    """Cancel, outside ComfyUI; may be called from any thread."""
    _interrupt.set()
