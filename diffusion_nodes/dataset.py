"""The dataset nodes: they end in the tables of a dataset.toml.

Changed defaults against the earlier package: ``output_path`` is empty (nothing is written but the run
folder's own copy).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from ..utils.config import SettingsError, Table, option
from ..utils.dataset_settings import DatasetSettings, Directory, FolderOptions, parse_dataset_settings
from ..utils.observation_settings import EvalDataset
from . import comfy
from .files import copy_path, write_copy
from .schema import AUTO, SettingsNode, Socket, Widget, further, widget, widgets

logger = logging.getLogger(__name__)

CATEGORY = "Diffusion-Pipe/dataset"
AS_THE_DATASET = "as the dataset."


class DatasetCopy(Table):
    """Where GeneralDatasetConfig writes besides the run folder."""

    output_path: str | None = option(
        None,
        "Also write the dataset's TOML to this file, relative to ComfyUI's output folder. "
        "Left out: only the run folder gets it.",
    )


class Folders(Table):
    """The folders of an edit dataset."""

    path: str = option(..., "Folder of the pictures as they should become; their captions say what is done.")
    control_paths: list[str] | None = option(
        None,
        "Folders of the pictures to start from, one per line; the one of a.png is called a in each.",
        multiline=True,
    )


class GeneralDatasetPathNode(SettingsNode):
    """A folder of pictures to train on. The caption of a.png is the text in a.txt beside it."""

    CATEGORY = CATEGORY
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


class EditModelDatasetPathNode(SettingsNode):
    """Two folders for edit models: pictures as they should become, and pictures to start from, of the same names.

    A folder with edit_instructions.jsonl, source_images and target_images holds both; leave control_path empty then.
    """

    CATEGORY = CATEGORY
    FUNCTION = "get_edit_dataset_paths"
    RETURN_TYPES = ("input_path",)
    RETURN_NAMES = ("input_path",)
    OUTPUT_TOOLTIPS = ("The folders, for General Dataset Config.",)
    REQUIRED: ClassVar = {
        "target_path": widget(Folders, "path", default=""),
        "control_path": widget(Directory, "control_path"),
    }
    OPTIONAL: ClassVar = widgets(Directory, "mask_path", "default_mask_file")

    def get_edit_dataset_paths(
        self, target_path: str, control_path: str = "", mask_path: str = "", default_mask_file: str = ""
    ) -> tuple[dict[str, Any]]:
        """The folders, as part of a [[directory]]."""
        return (_folders(target_path=target_path, control_path=control_path, mask_path=mask_path,
                         default_mask_file=default_mask_file),)  # fmt: skip

    @classmethod
    def VALIDATE_INPUTS(
        cls, target_path: str | None = None, control_path: str | None = None, mask_path: str | None = None,
        default_mask_file: str | None = None,
    ) -> bool | str:  # fmt: skip
        """Refuses missing folders before anything runs."""
        return _checked(target_path=target_path, control_path=control_path, mask_path=mask_path,
                        default_mask_file=default_mask_file)  # fmt: skip


class MultiImageEditDatasetPathNode(SettingsNode):
    """Folders for edit models that start from several pictures: what should become, and one folder for each start."""

    CATEGORY = CATEGORY
    FUNCTION = "get_multi_edit_dataset_paths"
    RETURN_TYPES = ("input_path",)
    RETURN_NAMES = ("input_path",)
    OUTPUT_TOOLTIPS = ("The folders, for General Dataset Config.",)
    REQUIRED: ClassVar = {
        "target_path": widget(Folders, "path", default=""),
        "control_paths": widget(Folders, "control_paths"),
    }
    OPTIONAL: ClassVar = widgets(Directory, "mask_path", "default_mask_file")

    def get_multi_edit_dataset_paths(
        self, target_path: str, control_paths: str = "", mask_path: str = "", default_mask_file: str = ""
    ) -> tuple[dict[str, Any]]:
        """The folders, as part of a [[directory]]."""
        return (_folders(target_path=target_path, control_paths=control_paths, mask_path=mask_path,
                         default_mask_file=default_mask_file),)  # fmt: skip

    @classmethod
    def VALIDATE_INPUTS(
        cls, target_path: str | None = None, control_paths: str | None = None, mask_path: str | None = None,
        default_mask_file: str | None = None,
    ) -> bool | str:  # fmt: skip
        """Refuses missing folders before anything runs."""
        return _checked(target_path=target_path, control_paths=control_paths, mask_path=mask_path,
                        default_mask_file=default_mask_file)  # fmt: skip


class MaskDatasetPathNode(SettingsNode):
    """A folder of pictures and one of masks of the same names, which say what of each is trained."""

    CATEGORY = CATEGORY
    FUNCTION = "get_mask_dataset_paths"
    RETURN_TYPES = ("input_path",)
    RETURN_NAMES = ("input_path",)
    OUTPUT_TOOLTIPS = ("The folders, for General Dataset Config.",)
    REQUIRED: ClassVar = {
        "dataset_path": widget(Directory, "path", default=""),
        "mask_path": widget(Directory, "mask_path"),
    }
    OPTIONAL: ClassVar = widgets(Directory, "default_mask_file")

    def get_mask_dataset_paths(
        self, dataset_path: str, mask_path: str = "", default_mask_file: str = ""
    ) -> tuple[dict[str, Any]]:
        """The folders, as part of a [[directory]]."""
        return (_folders(dataset_path=dataset_path, mask_path=mask_path, default_mask_file=default_mask_file),)

    @classmethod
    def VALIDATE_INPUTS(
        cls, dataset_path: str | None = None, mask_path: str | None = None, default_mask_file: str | None = None
    ) -> bool | str:
        """Refuses missing folders before anything runs."""
        return _checked(dataset_path=dataset_path, mask_path=mask_path, default_mask_file=default_mask_file)


class FrameBucketsNode(SettingsNode):
    """Lengths in frames that videos are cut to. Pictures have 1 frame."""

    CATEGORY = CATEGORY
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

    CATEGORY = CATEGORY
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


class _DatasetConfig(SettingsNode):
    """What the nodes that make a dataset of a folder share."""

    CATEGORY = CATEGORY
    FUNCTION = "generate_config"
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
    }
    OPTIONAL: ClassVar = {
        "frame_buckets": Socket(
            "frame_buckets", "Lengths of videos, from Frame Buckets. Not connected: pictures only."
        ),
        "ar_buckets": Socket("ar_buckets", "The shapes themselves, from Aspect Ratio Buckets, instead of the range."),
    }

    def tables(self, input_path: Any, frame_buckets: Any, ar_buckets: Any, values: Mapping[str, Any]) -> dict[str, Any]:
        """The checked tables of a dataset.toml."""
        settings = {key: value for key, value in self.read(values).items() if key not in ("output_path", "name")}
        directory = {**_directory(input_path), "num_repeats": settings.pop("num_repeats")}
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
        return settings


class GeneralDatasetConfig(_DatasetConfig):
    """How the pictures of a folder are sized, sorted by shape and repeated."""

    RETURN_TYPES = ("DATASET_CONFIG",)
    RETURN_NAMES = ("dataset_config",)
    OUTPUT_TOOLTIPS = ("The dataset, for General Training Config and Start Training.",)
    REQUIRED: ClassVar = {
        **_DatasetConfig.REQUIRED,
        "output_path": widget(DatasetCopy, "output_path", written=True),
    }
    OPTIONAL: ClassVar = {
        **_DatasetConfig.OPTIONAL,
        **widgets(DatasetSettings, "caption_prefix", "skip_empty_caption"),
    }

    def generate_config(self, input_path: Any, frame_buckets: list[int] | None = None,
                        ar_buckets: list[Any] | None = None, **values: Any) -> tuple[dict[str, Any]]:  # fmt: skip
        """The tables of a dataset.toml."""
        settings = self.tables(input_path, frame_buckets, ar_buckets, values)
        write_copy("output_path", str(values.get("output_path") or ""), settings)
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


class EvalDatasetConfig(_DatasetConfig):
    """A dataset that is not trained: its loss is measured while training, to see what the model has learnt."""

    RETURN_TYPES = ("EVAL_DATASET_CONFIG",)
    RETURN_NAMES = ("eval_dataset_config",)
    OUTPUT_TOOLTIPS = ("The dataset, for General Training Config.",)
    OPTIONAL: ClassVar = {
        **_DatasetConfig.OPTIONAL,
        "name": widget(EvalDataset, "name", default="validation_set"),
        "others": Socket("EVAL_DATASET_CONFIG", "Further evaluation datasets, from another of these nodes."),
    }

    def generate_config(
        self, input_path: Any, frame_buckets: list[int] | None = None, ar_buckets: list[Any] | None = None,
        name: str = "validation_set", others: list[dict[str, Any]] | None = None, **values: Any,
    ) -> tuple[list[dict[str, Any]]]:  # fmt: skip
        """Entries of eval_datasets with the tables themselves."""
        tables = self.tables(input_path, frame_buckets, ar_buckets, values)
        return (_with_another(others, name, tables),)

    @classmethod
    def VALIDATE_INPUTS(cls, resolutions: str | None = None) -> bool | str:
        """Refuses sizes that are no list."""
        return cls.check(resolutions=resolutions)


class DatasetOptionsNode(SettingsNode):
    """Every further option of a dataset, for all its folders. What stays as it is has no effect."""

    CATEGORY = CATEGORY
    FUNCTION = "options"
    RETURN_TYPES = ("DATASET_CONFIG",)
    RETURN_NAMES = ("dataset_config",)
    OUTPUT_TOOLTIPS = ("The dataset with these options, for General Training Config and Start Training.",)
    REQUIRED: ClassVar = {"dataset_config": Socket("DATASET_CONFIG", "The dataset, from General Dataset Config.")}
    OPTIONAL: ClassVar = {
        **widgets(DatasetSettings, *further(
            DatasetSettings, GeneralDatasetConfig.REQUIRED, GeneralDatasetConfig.OPTIONAL,
            without=("num_repeats", "frame_buckets", "ar_buckets"))),
        "first_folder_repeats": widget(
            Directory, "num_repeats", default=0, off=0,
            note="Of the first folder, also as a fraction. 0: as General Dataset Config says."),
    }  # fmt: skip

    def options(self, dataset_config: Any, **values: Any) -> tuple[dict[str, Any]]:
        """The tables of a dataset.toml with what differs from the defaults added to the top level."""
        before, read = _tables(dataset_config), self.read(values)
        first, *others = before["directory"]
        if "num_repeats" in read:
            first = {**first, "num_repeats": read.pop("num_repeats")}
        given = {key: value for key, value in read.items() if value != DatasetSettings.model_fields[key].default}
        tables = {**before, **given, "directory": [first, *others]}
        parse_dataset_settings(tables)
        return (tables,)

    @classmethod
    def VALIDATE_INPUTS(cls, size_buckets: str | None = None) -> bool | str:
        """Refuses sizes that are no list."""
        return cls.check(size_buckets=size_buckets)


def _overriding(key: str) -> Widget:
    """The input for a folder's own value of an option, with one value more that leaves the dataset's."""
    plain = widget(Directory, key)
    if plain.kind == "BOOLEAN":
        return widget(Directory, key, choices=("true", "false"), default=AUTO, off=AUTO, note=f"auto: {AS_THE_DATASET}")
    if plain.kind == "STRING":
        return widget(Directory, key, default="", off="", note=f"Empty: {AS_THE_DATASET}")
    off = 0 if plain.low else -1
    return widget(Directory, key, default=off, off=off, note=f"{off}: {AS_THE_DATASET}")


class AddDatasetFolderNode(SettingsNode):
    """A further folder for a dataset, with settings of its own; put several in a row for several folders."""

    CATEGORY = CATEGORY
    FUNCTION = "add_folder"
    RETURN_TYPES = ("DATASET_CONFIG",)
    RETURN_NAMES = ("dataset_config",)
    OUTPUT_TOOLTIPS = ("The dataset with this folder, for General Training Config and Start Training.",)
    REQUIRED: ClassVar = {
        "dataset_config": Socket(
            "DATASET_CONFIG", "The dataset so far: from General Dataset Config or a node like this."
        ),
        "input_path": Socket("input_path", "The folder, from a dataset path node."),
        "num_repeats": widget(Directory, "num_repeats"),
        "resolutions": widget(Directory, "resolutions", default="", off="", note=f"Empty: {AS_THE_DATASET}"),
    }
    OPTIONAL: ClassVar = {
        "frame_buckets": Socket("frame_buckets", "Lengths of this folder's videos. Not connected: as the dataset."),
        "ar_buckets": Socket("ar_buckets", "Shapes of this folder's pictures. Not connected: as the dataset."),
        **{key: widget(Directory, key, default="", off="", note=f"Empty: {AS_THE_DATASET}")
           for key in ("caption_prefix", "trigger_word")},
        **{key: _overriding(key) for key in (
            "enable_ar_bucket", "skip_empty_caption", "shuffle_tags", "horizontal_flip", "recursive", "keep_tokens",
            "tag_dropout", "caption_dropout")},
    }  # fmt: skip
    OPTIONAL |= {key: _overriding(key) for key in further(
        FolderOptions, REQUIRED, OPTIONAL, without=("frame_buckets", "ar_buckets"))}  # fmt: skip

    def add_folder(self, dataset_config: Any, input_path: Any, frame_buckets: list[int] | None = None,
                   ar_buckets: list[Any] | None = None, **values: Any) -> tuple[dict[str, Any]]:  # fmt: skip
        """The tables of a dataset.toml with one more [[directory]]."""
        before = _tables(dataset_config)
        directory = {**_directory(input_path), **self.read(values)}
        if "resolutions" in directory:
            directory["resolutions"] = as_sizes(directory["resolutions"])
        for key, value in (("frame_buckets", frame_buckets), ("ar_buckets", ar_buckets)):
            if value is not None:
                directory[key] = value
        tables = {**before, "directory": [*before["directory"], directory]}
        parse_dataset_settings(tables)
        return (tables,)

    @classmethod
    def VALIDATE_INPUTS(cls, resolutions: str | None = None, size_buckets: str | None = None) -> bool | str:
        """Refuses sizes that are no list."""
        return cls.check(resolutions=resolutions, size_buckets=size_buckets)


class EvalFromDatasetNode(SettingsNode):
    """Makes any dataset one that is not trained but measured, so that it may have folders and options of its own."""

    CATEGORY = CATEGORY
    FUNCTION = "as_evaluation"
    RETURN_TYPES = ("EVAL_DATASET_CONFIG",)
    RETURN_NAMES = ("eval_dataset_config",)
    OUTPUT_TOOLTIPS = ("The dataset, for General Training Config.",)
    REQUIRED: ClassVar = {
        "dataset_config": Socket("DATASET_CONFIG", "The dataset, from any node that gives one."),
        "name": widget(EvalDataset, "name", default="validation_set"),
    }
    OPTIONAL: ClassVar = {"others": EvalDatasetConfig.OPTIONAL["others"]}

    def as_evaluation(
        self, dataset_config: Any, name: str = "validation_set", others: list[dict[str, Any]] | None = None
    ) -> tuple[list[dict[str, Any]]]:
        """Entries of eval_datasets with the tables themselves."""
        tables = _tables(dataset_config)
        parse_dataset_settings(tables)
        return (_with_another(others, name, tables),)


def _with_another(others: list[dict[str, Any]] | None, name: str, tables: dict[str, Any]) -> list[dict[str, Any]]:
    """Evaluation datasets with one more."""
    if any(entry["name"] == name for entry in others or []):
        raise SettingsError(f"name: '{name}' is the name of another evaluation dataset; choose another")
    return [*(others or []), {"name": name, "config": tables}]


def as_sizes(resolutions: list[Any]) -> list[Any]:
    """What was typed as sizes in the unambiguous TOML form: a lone pair of numbers is one width and height."""
    if len(resolutions) == 2 and not any(isinstance(entry, list) for entry in resolutions):
        logger.info("resolutions: %s is read as one size, %sx%s", resolutions, *resolutions)
        return [resolutions]
    return resolutions


def _folder(text: str, name: str = "dataset_path") -> str:
    if not text.strip():
        raise SettingsError(f"{name}: required, but empty; give the folder of your pictures")
    path = comfy.resolve(text.strip())
    if not Path(path).is_dir():
        raise SettingsError(f"{name}: '{path}' is not a folder; give the folder of your pictures")
    return path


def _folders(**typed: str) -> dict[str, Any]:
    """Typed folders by input name as part of a [[directory]]."""
    found: dict[str, Any] = {}
    for name, text in typed.items():
        if name == "control_paths":
            lines = [line.strip() for line in re.split(r"[\n;]", text or "") if line.strip()]
            if lines:
                found[name] = [_folder(line, f"{name}, line {number}") for number, line in enumerate(lines, 1)]
        elif name in ("target_path", "dataset_path"):
            found["path"] = _folder(text, name)
        elif not (text or "").strip():
            continue
        elif name == "default_mask_file":
            found[name] = comfy.resolve(text.strip())
            if not Path(found[name]).is_file():
                raise SettingsError(f"{name}: '{found[name]}' is not a file; give a picture")
        else:
            found[name] = _folder(text, name)
    return found


def _checked(**typed: str | None) -> bool | str:
    """What VALIDATE_INPUTS answers; linked inputs are None."""
    try:
        _folders(**{name: text for name, text in typed.items() if text is not None})
    except SettingsError as error:
        return str(error)
    return True


def _tables(dataset_config: Any) -> dict[str, Any]:
    """What came through a link as the tables of a dataset.toml."""
    if not isinstance(dataset_config, Mapping) or "directory" not in dataset_config:
        raise SettingsError("dataset_config: must come from a dataset node of this package")
    return dict(dataset_config)


def _directory(input_path: Any) -> dict[str, Any]:
    """What a path node gave, as a [[directory]]: a folder, or several with their meaning."""
    if isinstance(input_path, str):
        return {"path": comfy.resolve(input_path)}
    if isinstance(input_path, Mapping) and "path" in input_path:
        return dict(input_path)
    raise SettingsError(f"input_path: must be a folder's path, got {input_path!r}")
