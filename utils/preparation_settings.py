"""What happens to the dataset before the first step: options of the top level, most of them flags of train.py, too."""

from __future__ import annotations

from typing import Literal

from .config import Table, option


class Preparation(Table):
    """How pictures, videos and captions are encoded and cached."""

    caching_batch_size: int = option(
        1, "Pictures or captions encoded at once while caching.", ge=1, step=1, ui_max=1024
    )
    cache_dir: str | None = option(
        None, "Where encoded pictures and captions are kept. Left out: 'cache' in output_dir.", advanced=True
    )
    map_num_proc: int | None = option(
        None,
        "Processes of each GPU that read pictures while caching. Left out: up to eight, as there are cores.",
        ge=1,
        step=1,
        advanced=True,
    )
    video_clip_mode: Literal["none", "single_beginning", "single_middle", "multiple_overlapping"] = option(
        "none", "Which part of a video that is longer than its frame bucket is trained."
    )

    uncond_fraction: float = option(
        0.0,
        "Share of the times that a picture is trained without its caption, for guidance. Adds to caption_dropout.",
        ge=0,
        le=1,
        step=0.01,
    )


class Start(Table):
    """What concerns one start: the cache made anew or trusted, something else done than training, a check left out."""

    regenerate_cache: bool = option(
        False, "Encode everything of this dataset again although it is cached.", advanced=True
    )
    trust_cache: bool = option(
        False, "Take the dataset as it was found last time, without looking at its files.", advanced=True
    )
    cache_only: bool = option(False, "Fill the cache and stop.", advanced=True)
    test_sample: bool = option(
        False,
        "Draw the samples of [sample] with the model as it is and stop; without prompts one picture of 512x512.",
        advanced=True,
    )
    dump_dataset: str | None = option(
        None,
        "Write up to 100 samples as the model will see them, cropped and resized, into this folder and stop. "
        "Left out: train.",
        advanced=True,
    )
    i_know_what_i_am_doing: bool = option(
        False,
        "Go on from a checkpoint although seed, model, adapter or kind of optimizer are others now. Sizes and numbers "
        "of resolutions are not limited anyway.",
        advanced=True,
    )
