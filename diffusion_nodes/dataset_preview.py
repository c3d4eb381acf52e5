"""The DatasetPreview node: what a training will really see of a dataset, and the report on it. Uses no GPU."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from typing import Any, ClassVar

from ..models import family_named
from ..utils.dataset_settings import parse_dataset_settings
from . import comfy


class DatasetPreview:
    CATEGORY = "Diffusion-Pipe/dataset"
    DESCRIPTION = (
        "Shows pictures as the model will see them, cropped and resized, with captions, control pictures and masks "
        "(red is not trained), and tells what was found and left out. Uses no GPU."
    )
    SEARCH_ALIASES = ("check dataset", "buckets", "captions")
    FUNCTION = "preview"
    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("contact_sheet", "report")
    OUTPUT_TOOLTIPS = (
        "Samples of all buckets on one sheet.",
        "Counts, buckets, every file that is left out with the reason, and the captions of what is shown.",
    )
    DEFAULT_FAMILY: ClassVar[str] = "flux"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:
        return {
            "required": {
                "dataset_config": ("DATASET_CONFIG", {"tooltip": "From General Dataset Config."}),
                "max_pictures": ("INT", {
                    "default": 16, "min": 1, "max": 256, "step": 1, "tooltip": "Most samples on the sheet."}),
                "selection": ("INT", {
                    "default": 0, "min": 0, "max": 2**31 - 1, "step": 1,
                    "tooltip": "Another number shows other samples."}),
            },
            "optional": {
                "train_config": ("TRAIN_CONFIG", {
                    "tooltip": "From General Training Config: its model decides which sizes and videos are taken. "
                    "Not connected: as for Flux."}),
            },
        }  # fmt: skip

    @classmethod
    def IS_CHANGED(cls, **_: Any) -> float:
        """Unlike anything, itself included: files change without the graph."""
        return float("nan")

    def preview(
        self,
        dataset_config: Mapping[str, Any],
        max_pictures: int = 16,
        selection: int = 0,
        train_config: Mapping[str, Any] | None = None,
    ) -> tuple[Any, str]:
        """The contact sheet as an image tensor NHWC in [0, 1], and the report.

        Raises:
            SettingsError: The dataset cannot be used.
        """
        import numpy as np
        import torch

        from ..utils import preview
        from ..utils.dataset import scan
        from ..utils.index import Index
        from ..utils.readers import Readers, usual_count

        train = train_config or {}
        kind = (train.get("model") or {}).get("type", self.DEFAULT_FAMILY)
        family = family_named(kind)
        settings, clip_mode = parse_dataset_settings(dataset_config), train.get("video_clip_mode", "none")
        with (
            Readers(usual_count()) as readers,
            closing(Index(comfy.temp_directory() / "dataset_preview.sqlite", readers)) as index,
        ):
            samples, report = scan(settings, index, family, clip_mode, _progress)
        shown = preview.choose(samples, max_pictures, selection)
        sheet = np.asarray(preview.contact_sheet(shown, family.fps), dtype=np.float32) / 255.0
        return torch.from_numpy(sheet)[None], "\n".join([*report.lines(), "", *preview.legend(shown)])


def _progress(*_: Any) -> None:
    comfy.check_interrupted()
