"""Finding what to train: folders of pictures, videos and captions become samples in buckets."""

from __future__ import annotations

import gc
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..models.base import Family
from .buckets import Bucket, Buckets, Grid
from .captions import variants
from .config import SettingsError, write_whole
from .dataset_report import Report
from .dataset_settings import DatasetSettings, Directory
from .index import Index, Media, Stamp, stamp_of
from .media import Properties, Source
from .progress import Progress
from .randomness import derive_seed
from .sources import Item, find_items, list_folder, printable
from .video import ClipMode, clip_starts, num_frames

Kind = tuple[Bucket, int]
"""Bucket and number of control pictures."""

MANY = 20_000
"""Samples; for as many the garbage collector takes noticeable time."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One picture or clip at one size, with all that belongs to it."""

    media: Media
    bucket: Bucket
    captions: tuple[str, ...] = ("",)
    """Variants, of which each time one is trained."""
    num_repeats: float = 1.0
    name: str = ""
    """Path below its folder."""
    start: float | None = None
    """Where the clip begins, in seconds; None for pictures."""
    flip: bool = False
    """May also be trained mirrored."""
    caption_dropout: float = 0.0
    """Share of the times that it is trained without a caption."""
    mask: Media | None = None
    controls: tuple[Media, ...] = ()
    copy: int = 0
    """Tells apart samples that are alike in all else."""

    @property
    def path(self) -> str:
        """Where it lies."""
        return str(self.media.source)

    @property
    def key(self) -> str:
        """Names the sample for randomness and order, whatever else the dataset holds."""
        key = f"{self.media.digest}:{self.bucket}:{self.name}"
        return key + (f":{self.start}" if self.start else "") + (f":{self.copy}" if self.copy else "")

    @property
    def kind(self) -> Kind:
        """What all samples of a batch have in common."""
        return self.bucket, len(self.controls)

    @property
    def files(self) -> Iterator[Media]:
        """All that is read for it."""
        yield self.media
        yield from self.controls
        if self.mask:
            yield self.mask


def grid_of(family: Family | type[Family]) -> Grid:
    """Sizes and lengths that a family takes."""
    return Grid(family.size_multiple, family.fps, family.frame_multiple, family.frame_remainder)


def scan(
    settings: DatasetSettings,
    index: Index,
    family: Family | type[Family],
    clip_mode: ClipMode = "none",
    progress: Progress = lambda *_: None,
) -> tuple[list[Sample], Report]:
    """The samples of all folders, in an order that depends on names alone, and the report on them.

    Raises:
        SettingsError: A folder is missing, or no usable picture is in any of them.
    """
    report, samples = Report(), list[Sample]()
    with collector_off():
        for number, directory in enumerate(settings.directory):
            folder = _Folder(directory, f"directory[{number}]", index, family, clip_mode, report, progress)
            samples += folder.samples()
        samples = _told_apart(samples)
        report.count(samples)
    if not samples:
        folders = ", ".join(f"'{directory.path}'" for directory in settings.directory)
        reasons = "".join(f"\n  {path}: {reason}" for path, reason in list(report.left_out.items())[:10])
        raise SettingsError(
            f"dataset: no usable picture in {folders}; put pictures (png, jpg, webp ...) there, "
            f"captions beside them as .txt{reasons}"
        )
    if settings.subsample_ratio:
        samples = _subsample(samples, settings.subsample_ratio)
        report.count(samples)
    return samples, report


@contextmanager
def collector_off() -> Iterator[None]:
    """Without the garbage collector, which would look a dozen times at the millions of objects that are made."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def keep_for_good(samples: Sequence[Sample]) -> None:
    """Has the collector never look at very many samples again: they stay, and each look holds up a step."""
    if len(samples) > MANY:
        gc.collect()
        gc.freeze()


class _Folder:
    """One ``[[directory]]`` while it is looked through."""

    def __init__(
        self,
        options: Directory,
        option: str,
        index: Index,
        family: Family | type[Family],
        clip_mode: ClipMode,
        report: Report,
        progress: Progress,
    ) -> None:
        self._options, self._option, self._index, self._family = options, option, index, family
        self._clip_mode, self._report, self._progress = clip_mode, report, progress
        self._buckets = Buckets(options, grid_of(family))

    def samples(self) -> list[Sample]:
        """What is to be trained of it; the report gets what is not."""
        options = self._options
        besides = [path for path in (options.mask_path, *options.controls) if path]
        listing = list_folder(options.path, f"{self._option}.path", self._index, options.recursive, besides)
        items = find_items(listing, self._index)
        for path, reason in listing.problems.items():
            self._leave_out(path, reason)
        media = self._examined(listing.folder, [(item.source, item.stamp) for item in items])
        controls, masks = self._controls(items), self._masks(items)
        found = []
        for number, item in enumerate(items):
            try:
                found += self._of_item(item, media[item.source], controls[number], masks[number])
            except _LeftOut as reason:
                self._leave_out(str(item.source), str(reason))
        return found

    def _of_item(
        self, item: Item, media: Media | str, controls: list[Media | str], mask: Media | str | None
    ) -> list[Sample]:
        if isinstance(media, str) or item.problem:
            raise _LeftOut(media if isinstance(media, str) else item.problem)
        for part in (*controls, mask):
            if isinstance(part, str):
                raise _LeftOut(part)
        texts = [text for text in item.captions if text]
        if not texts:
            self._report.without_caption.append(printable(str(item.source)))
            if self._options.skip_empty_caption:
                raise _LeftOut("no caption, and skip_empty_caption is on")
        options = self._options
        captions = variants((texts or [""])[0], options)
        if len(texts) > 1:
            captions = tuple(dict.fromkeys(v for text in texts for v in variants(text, options)))
        places = self._places(media.properties)
        self._report.add(media, [bucket for bucket, _ in places])
        return [
            Sample(media, bucket, captions, options.num_repeats, item.name, start, options.horizontal_flip,
                   options.caption_dropout, mask, tuple(controls))  # type: ignore[arg-type]
            for bucket, start in places
        ]  # fmt: skip

    def _places(self, found: Properties) -> list[tuple[Bucket, float | None]]:
        """Bucket and start of each sample that a picture or video makes."""
        fps = self._family.fps
        if found.seconds is None and not self._family.takes_pictures:
            raise _LeftOut(f"a picture, and this {self._family.title} model trains videos alone")
        if found.seconds is None:
            places: list[tuple[Bucket, float | None]] = [
                (b, None) for b in self._buckets.choose(found.width, found.height)
            ]
            if not places:
                raise _LeftOut("a picture, and size_buckets has none for pictures (1 frame)")
            return places
        if fps is None:
            raise _LeftOut(f"a video, and {self._family.title} trains pictures; use a video model")
        frames = num_frames(found.seconds, fps)
        if not self._buckets.lengths:
            raise _LeftOut("a video, and frame_buckets has no length for videos; add one, such as 33")
        buckets = self._buckets.choose(found.width, found.height, frames) if frames > 1 else []
        if not buckets:
            shortest = self._buckets.lengths[0]
            raise _LeftOut(
                f"too short: {frames} frames at {fps:g} a second ({found.seconds:.2f} s), the shortest of "
                f"frame_buckets is {shortest} ({shortest / fps:.2f} s)"
            )
        return [
            (bucket, start)
            for bucket in buckets
            for start in clip_starts(found.seconds, fps, bucket.frames, self._clip_mode)
        ]

    def _controls(self, items: Sequence[Item]) -> list[list[Media | str]]:
        """The control pictures of each item, or why one is missing."""
        folders = self._options.controls
        named = any(item.controls for item in items)
        if (folders or named) and not self._family.max_controls:
            option = "control_paths" if self._options.control_paths else "control_path"
            raise SettingsError(
                f"{self._option}.{option if folders else 'path'}: {self._family.title} takes no control pictures; "
                "leave them out, or train an edit model"
            )
        if named:
            return self._named_controls(items)
        if len(folders) > self._family.max_controls:
            raise SettingsError(
                f"{self._option}.control_paths: {self._family.title} takes {self._family.max_controls} control "
                f"pictures, got {len(folders)} folders"
            )
        result: list[list[Media | str]] = [[] for _ in items]
        for number, folder in enumerate(folders):
            option = f"control_paths[{number}]" if self._options.control_paths else "control_path"
            for entry, found in zip(result, self._matched(items, folder, option), strict=True):
                entry.append(found or f"no control picture of its name in '{folder}'")
        return result

    def _named_controls(self, items: Sequence[Item]) -> list[list[Media | str]]:
        entries = [entry for item in items for entry in item.controls or []]
        known = self._examined(os.path.abspath(os.path.expanduser(self._options.path)), entries)
        most = self._family.max_controls
        return [
            [_named(source, known[source]) for source, _ in item.controls or []]
            if len(item.controls or []) <= most
            else [f"names {len(item.controls or [])} control pictures; {self._family.title} takes {most}"]
            for item in items
        ]

    def _masks(self, items: Sequence[Item]) -> list[Media | str | None]:
        options = self._options
        masks: list[Media | str | None] = [None] * len(items)
        if options.mask_path:
            masks = self._matched(items, options.mask_path, "mask_path")
        if options.default_mask_file:
            path = os.path.abspath(os.path.expanduser(options.default_mask_file))
            if not os.path.isfile(path):
                raise SettingsError(f"{self._option}.default_mask_file: '{path}' is not a file; give a picture")
            source = Source(path)
            found = self._examined(os.path.dirname(path), [(source, stamp_of(os.stat(path)))])
            default = _named(source, found[source])
            masks = [mask or default for mask in masks]
        return masks

    def _matched(self, items: Sequence[Item], folder: str, option: str) -> list[Media | str | None]:
        """For each item the file of the same name in ``folder``; others there are reported."""
        listing = list_folder(folder, f"{self._option}.{option}", self._index, self._options.recursive)
        by_stem = listing.by_stem()
        entries = []
        for item in items:
            stem = os.path.splitext(item.name)[0]
            entries.append(by_stem.get(stem) or by_stem.get(stem.rsplit("/", 1)[-1]))
        wanted = {entry[0]: entry[1] for entry in entries if entry}
        self._report.orphans += [printable(str(source)) for source, _ in listing.media if source not in wanted]
        known = self._examined(listing.folder, list(wanted.items()))
        return [_named(entry[0], known[entry[0]]) if entry else None for entry in entries]

    def _examined(self, folder: str, entries: Iterable[tuple[Source, Stamp]]) -> dict[Source, Media | str]:
        return self._index.media(folder, entries, self._progress)

    def _leave_out(self, path: str, reason: str) -> None:
        self._report.left_out[printable(path)] = reason


class _LeftOut(Exception):
    """Something is not trained; the text says why."""


def _named(source: Source, found: Media | str) -> Media | str:
    """Why a mask or control picture cannot be used says which."""
    return f"{printable(source.name)}: {found}" if isinstance(found, str) else found


def _told_apart(samples: list[Sample]) -> list[Sample]:
    """The samples; those that would share a key are numbered."""
    seen: dict[str, int] = {}
    result = []
    for sample in samples:
        before = seen.get(key := sample.key, 0)
        seen[key] = before + 1
        result.append(replace(sample, copy=before) if before else sample)
    return result


def _subsample(samples: list[Sample], ratio: float) -> list[Sample]:
    """``ratio`` of each bucket, at least one sample, chosen by key: the same ones whatever else there is."""
    by_bucket: dict[Bucket, list[int]] = {}
    for index, sample in enumerate(samples):
        by_bucket.setdefault(sample.bucket, []).append(index)
    kept = set()
    for members in by_bucket.values():
        members.sort(key=lambda index: derive_seed("subsample", samples[index].key))
        kept.update(members[: max(1, round(len(members) * ratio))])
    return [sample for index, sample in enumerate(samples) if index in kept]


# -- the scan of last time, for trust_cache -----------------------------------------------------------------


def scan_name(settings: DatasetSettings, family: Family | type[Family], clip_mode: ClipMode) -> str:
    """Names what `scan` depends on besides the files."""
    limits = family.max_controls, family.takes_pictures
    parts = [settings.model_dump(mode="json"), repr(grid_of(family)), limits, clip_mode]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=10).hexdigest()


def remember(path: Path, samples: Sequence[Sample]) -> None:
    """Writes samples to a file, for `recall`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with collector_off():
        write_whole(path, json.dumps([_row(sample) for sample in samples]))


def recall(path: Path) -> list[Sample] | None:
    """What `remember` wrote; None if there is no such file."""
    try:
        rows = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    with collector_off():
        return [_sample(row) for row in rows]


def _row(sample: Sample) -> list[Any]:
    return [_media_row(sample.media), sample.bucket, sample.captions, sample.num_repeats, sample.name,
            sample.start, sample.flip, sample.caption_dropout, sample.mask and _media_row(sample.mask),
            [_media_row(control) for control in sample.controls], sample.copy]  # fmt: skip


def _media_row(media: Media) -> list[Any]:
    return [*media.source, media.digest, *media.properties]


def _sample(row: list[Any]) -> Sample:
    media, bucket, captions, repeats, name, start, flip, dropout, mask, controls, copy = row
    return Sample(_media(media), Bucket(*bucket), tuple(captions), repeats, name, start, flip, dropout,
                  _media(mask) if mask else None, tuple(map(_media, controls)), copy)  # fmt: skip


def _media(row: list[Any]) -> Media:
    return Media(Source(*row[:4]), row[4], Properties(*row[5:]))
