"""The dataset nodes: they end in the tables of a dataset.toml.

Changed defaults against the earlier package: ``output_path`` is empty (nothing is written but the run
folder's own copy).
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, ClassVar

from ..utils.config import SettingsError, Table, option
from ..utils.settings import DatasetSettings, Directory, parse_dataset_settings
from . import comfy
from .files import copy_path, write_copy
from .schema import SettingsNode, Socket, widget, widgets

logger = logging.getLogger(__name__)


class DatasetCopy(Table):
    """Where GeneralDatasetConfig writes besides the run folder."""

    output_path: str | None = option(
        None,
        "Also write the dataset's TOML to this file, relative to ComfyUI's output folder. "
        "Left out: only the run folder gets it.",
    )


class GeneralDatasetPathNode(SettingsNode):
    """A folder of pictures to train on. The caption of a.png is the text in a.txt beside it."""

    CATEGORY = "Diffusion-Pipe/dataset"
    FUNCTION = "get_dataset_path"
    RETURN_TYPES = ("input_path",)
    RETURN_NAMES = ("input_path",)
    OUTPUT_TOOLTIPS = ("The folder, for General Dataset Config.",)
    REQUIRED: ClassVar = {
        "dataset_path": widget(Directory, "path", default="", note="A name below ComfyUI's input folder is enough.")
    }

    def get_dataset_path(self, dataset_path: str) -> tuple[str]:
        """The absolute path of the folder."""
        return (_folder(dataset_path),)

    @classmethod
    def VALIDATE_INPUTS(cls, dataset_path: str | None = None) -> bool | str:
        """Refuses a missing folder before anything runs."""
        try:
            return dataset_path is None or bool(_folder(dataset_path))
        except SettingsError as error:
            return str(error)


class FrameBucketsNode(SettingsNode):
    """Lengths in frames that videos are cut to. Pictures have 1 frame."""

    CATEGORY = "Diffusion-Pipe/dataset"
    FUNCTION = "process_frame_buckets"
    RETURN_TYPES = ("frame_buckets",)
    RETURN_NAMES = ("frame_buckets",)
    OUTPUT_TOOLTIPS = ("The lengths, for General Dataset Config.",)
    REQUIRED: ClassVar = {"frame_buckets": widget(DatasetSettings, "frame_buckets", default="[1, 33, 81, 97]")}

    def process_frame_buckets(self, frame_buckets: Any) -> tuple[list[int]]:
        """The list that was typed."""
        return (self.read({"frame_buckets": frame_buckets}).get("frame_buckets", [1]),)

    @classmethod
    def VALIDATE_INPUTS(cls, frame_buckets: str | None = None) -> bool | str:
        """Refuses what is no list of whole numbers."""
        return cls.check(frame_buckets=frame_buckets)


class ArBucketsNode(SettingsNode):
    """The shapes that pictures are sorted into: ratios of width to height, or [width, height] pairs."""

    CATEGORY = "Diffusion-Pipe/dataset"
    FUNCTION = "process_ar_buckets"
    RETURN_TYPES = ("ar_buckets",)
    RETURN_NAMES = ("ar_buckets",)
    OUTPUT_TOOLTIPS = ("The shapes, for General Dataset Config.",)
    REQUIRED: ClassVar = {"ar_buckets": widget(DatasetSettings, "ar_buckets", default="[[512, 512], [448, 576]]")}

    def process_ar_buckets(self, ar_buckets: Any) -> tuple[list[Any] | None]:
        """The list that was typed; None when it is empty, for buckets by range and number."""
        return (self.read({"ar_buckets": ar_buckets}).get("ar_buckets"),)

    @classmethod
    def VALIDATE_INPUTS(cls, ar_buckets: str | None = None) -> bool | str:
        """Refuses what is no list of numbers and pairs."""
        return cls.check(ar_buckets=ar_buckets)


class GeneralDatasetConfig(SettingsNode):
    """How the pictures of a folder are sized, sorted by shape and repeated."""

    CATEGORY = "Diffusion-Pipe/dataset"
    FUNCTION = "generate_config"
    RETURN_TYPES = ("DATASET_CONFIG",)
    RETURN_NAMES = ("dataset_config",)
    OUTPUT_TOOLTIPS = ("The dataset, for General Training Config and Start Training.",)
    REQUIRED: ClassVar = {
        "input_path": Socket("input_path", "The folder, from a dataset path node."),
        "resolutions": widget(
            DatasetSettings,
            "resolutions",
            note="In this field a lone pair such as [1280, 720] is "
            "one size, width and height; two square sizes are [[512, 512], [768, 768]].",
        ),
        **widgets(DatasetSettings, "enable_ar_bucket", "min_ar", "max_ar", "num_ar_buckets"),
        "num_repeats": widget(Directory, "num_repeats", kind="INT"),
        "output_path": widget(DatasetCopy, "output_path", written=True),
    }
    OPTIONAL: ClassVar = {
        "frame_buckets": Socket(
            "frame_buckets", "Lengths of videos, from Frame Buckets. Not connected: pictures only."
        ),
        "ar_buckets": Socket("ar_buckets", "The shapes themselves, from Aspect Ratio Buckets, instead of the range."),
        **widgets(DatasetSettings, "caption_prefix", "skip_empty_caption"),
    }

    def generate_config(self, input_path: Any, frame_buckets: list[int] | None = None,
                        ar_buckets: list[Any] | None = None, **values: Any) -> tuple[dict[str, Any]]:  # fmt: skip
        """The tables of a dataset.toml."""
        settings = self.read(values)
        copy = settings.pop("output_path", "")
        if not isinstance(input_path, str):
            raise SettingsError(f"input_path: must be a folder's path, got {input_path!r}")
        directory = {"path": comfy.resolve(input_path), "num_repeats": settings.pop("num_repeats")}
        settings["resolutions"] = as_sizes(settings["resolutions"])
        if not settings["enable_ar_bucket"]:
            settings = {
                key: value for key, value in settings.items() if key not in ("min_ar", "max_ar", "num_ar_buckets")
            }
        for key, value in (("frame_buckets", frame_buckets), ("ar_buckets", ar_buckets)):
            if value is not None:
                settings[key] = value
        settings["directory"] = [directory]
        parse_dataset_settings(settings)
        write_copy("output_path", copy, settings)
        return (settings,)

    @classmethod
    def VALIDATE_INPUTS(cls, resolutions: str | None = None, output_path: str | None = None) -> bool | str:
        """Refuses sizes that are no list and places that may not be written."""
        try:
            if (output_path or "").strip():
                copy_path("output_path", str(output_path))
        except SettingsError as error:
            return str(error)
        return cls.check(resolutions=resolutions)


def as_sizes(resolutions: list[Any]) -> list[Any]:
    """What was typed as sizes in the unambiguous TOML form: a lone pair of numbers is one width and height."""
    if len(resolutions) == 2 and not any(isinstance(entry, list) for entry in resolutions):
        logger.info("resolutions: %s is read as one size, %sx%s", resolutions, *resolutions)
        return [resolutions]
    return resolutions


def _folder(text: str) -> str:
    if not text.strip():
        raise SettingsError("dataset_path: required, but empty; give the folder of your pictures")
    path = comfy.resolve(text.strip())
    if not Path(path).is_dir():
        raise SettingsError(f"dataset_path: '{path}' is not a folder; give the folder of your pictures")
    return path
