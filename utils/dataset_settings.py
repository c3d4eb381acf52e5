"""Every setting of the data: the top level of ``dataset.toml`` and its folders.

The order of fields is the order in documentation. Keys are those of the files that people already have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import field_validator, model_validator

from .config import Table, option, validate


class FolderOptions(Table):
    """What holds for a folder: given at the top of ``dataset.toml`` for all, or in a ``[[directory]]`` for that one."""

    unused: ClassVar = {
        "bucket_resolution_steps": "sizes are multiples of what the model needs",
        "caption_extension": "captions are read from .txt files, captions.json and metadata.jsonl",
    }

    resolutions: list[int | list[int]] = option(
        [512],
        "Sizes to train at: 512 means as many pixels as 512x512, [1280, 720] as many as that. "
        "Every picture is trained at each of them.",
    )
    enable_ar_bucket: bool = option(True, "Keep pictures' shapes, sorted into buckets; off crops all to squares.")
    min_ar: float = option(0.5, "Narrowest bucket: width / height.", gt=0, le=100, step=0.1)
    max_ar: float = option(2.0, "Widest bucket: width / height.", gt=0, le=100, step=0.1)
    num_ar_buckets: int = option(
        7, "Number of buckets between the two, evenly spaced on a logarithmic scale.", ge=1, le=1000, step=1
    )
    ar_buckets: list[float | list[int]] | None = option(
        None, "The buckets themselves, as ratios or [width, height] pairs, instead of range and number."
    )
    size_buckets: list[list[int]] | None = option(
        None,
        "The sizes themselves, as [width, height] or [width, height, frames], instead of resolutions, shapes and "
        "frame_buckets.",
        advanced=True,
    )
    frame_buckets: list[int] = option([1], "Lengths that videos are cut to, in frames; 1 is for pictures.")
    num_repeats: float = option(1, "How often each picture is trained in one epoch.", gt=0, step=0.1, ui_max=10000)
    recursive: bool = option(False, "Also look in the folders inside the folder.")
    horizontal_flip: bool = option(
        False, "Train each picture mirrored as often as not. Unfit for text and for what is not symmetric."
    )

    caption_prefix: str = option("", "Put before every caption.", spaces=True)
    trigger_word: str = option("", "Put before every caption that does not hold it yet; never shuffled or dropped.")
    skip_empty_caption: bool = option(
        False, "Leave out pictures without a caption instead of training them with an empty one."
    )
    shuffle_tags: bool = option(False, "Train captions with their tags in another order.", also=("shuffle_caption",))
    cache_shuffle_num: int = option(
        0,
        "How many variants of each caption are made, by shuffle_tags, tag_dropout and caption_wildcards, and cached; "
        "each epoch takes another. More than 0 shuffles tags. 0: one if shuffle_tags is on, eight if the others are.",
        ge=0,
        le=1000,
        step=1,
        advanced=True,
    )
    cache_shuffle_delimiter: str = option(
        ", ", "What stands between the tags of a caption.", spaces=True, advanced=True
    )
    keep_tokens: int = option(
        0, "Tags at the start of a caption that are neither shuffled nor dropped.", ge=0, step=1, ui_max=1000
    )
    tag_dropout: float = option(0.0, "Share of the tags that each variant of a caption lacks.", ge=0, lt=1, step=0.01)
    caption_dropout: float = option(
        0.0, "Share of the times that a picture is trained without its caption.", ge=0, le=1, step=0.01
    )
    caption_wildcards: bool = option(False, "In captions, {red|blue} stands for one of the two, another each time.")
    online_captions: bool = option(
        False,
        "Accepted from older files: captions are read anew at every start, and only new ones are encoded.",
        advanced=True,
    )
    shuffle_metadata: bool = option(
        True, "Accepted from older files: the order is drawn anew from the seed for every epoch.", advanced=True
    )

    @field_validator("resolutions")
    @classmethod
    def _resolutions(cls, value: list[Any]) -> list[Any]:
        for entry in value:
            sides = entry if isinstance(entry, list) else [entry]
            if len(sides) > 2 or any(side < 16 for side in sides) or not sides:
                raise ValueError(f"each must be a side of at least 16 or a [width, height] pair, got {entry}")
        if not value:
            raise ValueError("needs at least one, such as [512]")
        return value

    @field_validator("ar_buckets")
    @classmethod
    def _ar_buckets(cls, value: list[Any] | None) -> list[Any] | None:
        for entry in value or []:
            sides = entry if isinstance(entry, list) else [entry]
            if not 1 <= len(sides) <= 2 or min(sides) <= 0:
                raise ValueError(f"each must be a ratio above 0 or a [width, height] pair, got {entry}")
        return value

    @field_validator("size_buckets")
    @classmethod
    def _size_buckets(cls, value: list[list[int]] | None) -> list[list[int]] | None:
        for entry in value or []:
            if len(entry) not in (2, 3) or min(entry[:2]) < 16 or min(entry) < 1:
                raise ValueError(f"each must be [width, height] or [width, height, frames], got {entry}")
        return value

    @field_validator("frame_buckets")
    @classmethod
    def _frame_buckets(cls, value: list[int]) -> list[int]:
        if any(frames < 1 for frames in value):
            raise ValueError(f"each must be at least 1, got {value}")
        return value

    @field_validator("cache_shuffle_delimiter")
    @classmethod
    def _delimiter(cls, value: str) -> str:
        if not value:
            raise ValueError("must not be empty; ', ' is usual")
        return value


class Directory(FolderOptions):
    """One ``[[directory]]``: a folder of pictures or videos with its captions.

    Besides these, every option of the top level may be given for this folder alone.
    """

    path: str = option(..., "Folder of pictures; the caption of a.png is a.txt.")
    control_path: str | None = option(
        None, "For edit models: folder of the pictures to start from; the one of a.png is called a, too."
    )
    control_paths: list[str] | None = option(
        None, "For edit models that take several: one folder for each, in order, instead of control_path."
    )
    mask_path: str | None = option(
        None, "Folder of masks; the one of a.png is called a, too. White is trained, black is not."
    )
    default_mask_file: str | None = option(None, "The mask of pictures that have none in mask_path.")

    @model_validator(mode="after")
    def _either(self) -> Directory:
        if self.control_path and self.control_paths:
            raise ValueError("control_paths: give this or control_path, not both")
        return self

    @property
    def controls(self) -> list[str]:
        """Folders of control pictures, in order."""
        return self.control_paths or ([self.control_path] if self.control_path else [])


class DatasetSettings(FolderOptions):
    """The top level of ``dataset.toml``: defaults for all folders, then the folders."""

    subsample_ratio: float | None = option(
        None, "Train this share of the pictures only, always the same ones. Left out: all.", gt=0, le=1, step=0.01
    )
    directory: list[Directory] = option(..., "The folders, one [[directory]] each.", min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _image_text(cls, values: Any) -> Any:
        """``[[image_text]]`` with ``dataset_paths``, as the product documents it, is so many ``[[directory]]``."""
        if not isinstance(values, dict) or "image_text" not in values:
            return values
        tables = values["image_text"]
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            raise ValueError("image_text: must be tables, [[image_text]] with dataset_paths = [...]")
        found = []
        for table in tables:
            paths, rest = table.get("dataset_paths"), {k: v for k, v in table.items() if k != "dataset_paths"}
            if not isinstance(paths, list) or not paths:
                raise ValueError("image_text.dataset_paths: required, a list of folders")
            if "default_caption_prefix" in rest:
                rest["caption_prefix"] = rest.pop("default_caption_prefix")
            found += [{**rest, "path": path} for path in paths]
        kept = {key: value for key, value in values.items() if key != "image_text"}
        return kept | {"directory": [*values.get("directory", []), *found]}

    @model_validator(mode="after")
    def _inherited(self) -> DatasetSettings:
        """Gives each folder what the top level says and it does not."""
        shared = self.model_fields_set & set(FolderOptions.model_fields)
        for directory in self.directory:
            for key in shared - directory.model_fields_set:
                setattr(directory, key, getattr(self, key))
            if directory.min_ar > directory.max_ar:
                raise ValueError(f"min_ar: must not be above max_ar, got {directory.min_ar} and {directory.max_ar}")
        return self


def parse_dataset_settings(values: Mapping[str, Any]) -> DatasetSettings:
    """Settings from the tables of a ``dataset.toml``."""
    return validate(DatasetSettings, values)
