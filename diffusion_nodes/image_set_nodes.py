"""Nodes that load sets of pictures, with captions if wanted, for training inside ComfyUI."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.config import SettingsError
from . import comfy

if TYPE_CHECKING:
    from PIL.Image import Image

CATEGORY = "Diffusion-Pipe/LoRA"
RESIZE = ["None", "Stretch", "Crop", "Pad"]
ARRANGE = ["one by one", "by size"]
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
_RESIZE_INPUTS: dict[str, Any] = {
    "resize_method": (RESIZE, {"default": "None", "tooltip":
        "None: sizes stay. Stretch: forced to the size. Crop: scaled to cover it, the middle is kept. Pad: scaled to "
        "fit into it, the rest is black."}),
    "width": ("INT", {"default": -1, "min": -1, "max": 16384, "step": 1,
                      "tooltip": "Width of resized pictures; -1: that of the first."}),
    "height": ("INT", {"default": -1, "min": -1, "max": 16384, "step": 1,
                       "tooltip": "Height of resized pictures; -1: that of the first."}),
    "arrange": (ARRANGE, {"default": "one by one", "tooltip":
        "one by one: a list in the order of names. by size: pictures of equal size together in a batch."}),
}  # fmt: skip


class LoadImageSetNode:
    """Loads several pictures of the input folder."""

    CATEGORY = CATEGORY
    DESCRIPTION = "Loads several pictures from ComfyUI's input folder, uploaded ones too, as a set for training."
    FUNCTION = "load"
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("images",)
    OUTPUT_IS_LIST = (True,)
    OUTPUT_TOOLTIPS = ("The pictures, as a list.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:
        names = [path.name for path in _pictures(comfy.input_directory())]
        return {
            "required": {"images": (names, {"image_upload": True, "allow_batch": True,
                                            "tooltip": "Pictures of the input folder."})},
            "optional": dict(_RESIZE_INPUTS),
        }  # fmt: skip

    @classmethod
    def VALIDATE_INPUTS(cls, images: Any) -> bool | str:
        """Whether all pictures are there."""
        try:
            _named(images)
        except SettingsError as error:
            return str(error)
        return True

    @classmethod
    def IS_CHANGED(cls, images: Any, **_: Any) -> str:
        return _fingerprint(_named(images))

    def load(
        self, images: Any, resize_method: str = "None", width: int = -1, height: int = -1, arrange: str = ARRANGE[0]
    ) -> tuple[list[Any]]:
        """The pictures as IMAGE tensors (count, height, width, 3)."""
        return (_tensors(_named(images), resize_method, width, height, arrange)[0],)


class LoadImageSetFromFolderNode:
    """Loads all pictures of a folder."""

    CATEGORY = CATEGORY
    DESCRIPTION = "Loads all pictures of a folder, as a set for training."
    FUNCTION = "load"
    RETURN_TYPES: tuple[str, ...] = ("IMAGE",)
    RETURN_NAMES: tuple[str, ...] = ("images",)
    OUTPUT_IS_LIST: tuple[bool, ...] = (True,)
    OUTPUT_TOOLTIPS: tuple[str, ...] = ("The pictures, as a list.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:
        root = comfy.input_directory()
        folders = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
        return {
            "required": {"folder": (folders, {"tooltip": "A folder in ComfyUI's input folder."})},
            "optional": {
                **_RESIZE_INPUTS,
                "dataset_folder": ("STRING", {"default": "", "multiline": False, "tooltip":
                                   "Another folder, such as that of a dataset; used instead of 'folder'."}),
            },
        }  # fmt: skip

    @classmethod
    def VALIDATE_INPUTS(cls, folder: Any, dataset_folder: Any = "") -> bool | str:
        """Whether there are pictures."""
        try:
            _in_folder(folder, dataset_folder or "")
        except SettingsError as error:
            return str(error)
        return True

    @classmethod
    def IS_CHANGED(cls, folder: str = "", dataset_folder: str = "", **_: Any) -> str:
        paths = _in_folder(folder, dataset_folder)
        return _fingerprint([*paths, *(path.with_suffix(".txt") for path in paths)])

    def load(
        self, folder: str, resize_method: str = "None", width: int = -1, height: int = -1, arrange: str = ARRANGE[0],
        dataset_folder: str = "",
    ) -> tuple[Any, ...]:  # fmt: skip
        """The pictures as IMAGE tensors (count, height, width, 3)."""
        return (_tensors(_in_folder(folder, dataset_folder), resize_method, width, height, arrange)[0],)


class LoadCaptionedImageSetNode(LoadImageSetFromFolderNode):
    """Loads all pictures of a folder with their captions."""

    DESCRIPTION = (
        "Loads all pictures of a folder, and for each the text of the file of the same name ending in .txt, in the "
        "same order."
    )
    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("images", "captions")
    OUTPUT_IS_LIST = (True, True)
    OUTPUT_TOOLTIPS = ("The pictures, as a list.", "The captions, as a list: one for each picture.")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:
        declared = super().INPUT_TYPES()
        declared["optional"] |= {
            "default_caption": ("STRING", {"default": "", "multiline": False,
                                           "tooltip": "Caption of pictures that have no text file."}),
            "caption_prefix": ("STRING", {"default": "", "multiline": False,
                                          "tooltip": "Put before every caption, such as a trigger word."}),
        }  # fmt: skip
        return declared

    def load(
        self, folder: str, resize_method: str = "None", width: int = -1, height: int = -1, arrange: str = ARRANGE[0],
        dataset_folder: str = "", default_caption: str = "", caption_prefix: str = "",
    ) -> tuple[Any, ...]:  # fmt: skip
        """The pictures, and their captions in the same order."""
        paths = _in_folder(folder, dataset_folder)
        images, order = _tensors(paths, resize_method, width, height, arrange)
        return images, [caption_prefix + _caption(paths[index], default_caption) for index in order]


def _pictures(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES and path.is_file())


def _named(images: Any) -> list[Path]:
    names = images.get("__value__", []) if isinstance(images, dict) else images
    names = [names] if isinstance(names, str) else list(names or [])
    root = comfy.input_directory()
    if not names:
        raise SettingsError("images: none is chosen; upload some")
    paths = [root / name for name in names]
    for name, path in zip(names, paths, strict=True):
        if not path.resolve().is_relative_to(root.resolve()) or not path.is_file():
            raise SettingsError(f"images: '{name}' is not in ComfyUI's input folder; upload it again")
    return paths


def _in_folder(folder: Any, dataset_folder: str) -> list[Path]:
    if dataset_folder.strip():
        place = Path(comfy.resolve(dataset_folder))
    else:
        root = comfy.input_directory()
        place = root / str(folder or "")
        if not folder or not place.resolve().is_relative_to(root.resolve()):
            raise SettingsError(f"folder: '{folder}' is not a folder in ComfyUI's input folder; choose one")
    found = _pictures(place)
    if not found:
        raise SettingsError(f"folder: no pictures in '{place}'; choose another folder")
    return found


def _fingerprint(paths: Iterable[Path]) -> str:
    states = [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in paths if path.is_file()]
    return repr(states)


def _caption(path: Path, default: str) -> str:
    text = path.with_suffix(".txt")
    return text.read_text("utf-8-sig").strip() if text.is_file() else default


def resized(picture: Image, method: str, size: tuple[int, int]) -> Image:
    """The picture at ``size`` (width, height); ``None`` leaves it as it is."""
    from PIL import Image as pillow
    from PIL import ImageOps

    if method == "None" or picture.size == size:
        return picture
    if method == "Stretch":
        return picture.resize(size, pillow.Resampling.LANCZOS)
    if method == "Crop":
        return ImageOps.fit(picture, size, pillow.Resampling.LANCZOS)
    return ImageOps.pad(picture, size, pillow.Resampling.LANCZOS)


def _tensors(paths: Sequence[Path], method: str, width: int, height: int, arrange: str) -> tuple[list[Any], list[int]]:
    """The pictures as tensors, and which path each picture in them is of."""
    import numpy
    import torch
    from PIL import Image as pillow
    from PIL import ImageOps

    pictures: list[Any] = []
    size = (width, height)
    for path in paths:
        with pillow.open(path) as file:
            picture = ImageOps.exif_transpose(file).convert("RGB")
        size = tuple(own if wanted < 1 else wanted for wanted, own in zip(size, picture.size, strict=True))  # type: ignore[assignment]
        made = resized(picture, method, size)
        pictures.append(torch.from_numpy(numpy.asarray(made).astype("float32") / 255)[None])
    if arrange == ARRANGE[0]:
        return pictures, list(range(len(pictures)))
    sizes: dict[tuple[int, ...], list[int]] = {}
    for index, tensor in enumerate(pictures):
        sizes.setdefault(tuple(tensor.shape), []).append(index)
    batches = [torch.cat([pictures[index] for index in group]) for group in sizes.values()]
    return batches, [index for group in sizes.values() for index in group]
