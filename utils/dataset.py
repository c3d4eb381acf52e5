"""Finding what to train: folders of pictures and captions become samples in buckets."""

from __future__ import annotations

import hashlib
import logging
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .buckets import Bucket, areas, aspect_ratios, bucket_for
from .config import SettingsError
from .media import SUFFIXES, UnreadableMedia, picture_size
from .settings import DatasetSettings, Directory

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """One picture at one size with its caption."""

    path: str
    digest: str
    """Identifies the file's content."""
    bucket: Bucket
    caption: str
    num_repeats: float = 1.0

    @property
    def key(self) -> str:
        """Names the sample for randomness and order, whatever else the dataset holds."""
        return f"{self.digest}:{self.bucket}:{self.path.rsplit('/', 1)[-1]}"


@dataclass
class Report:
    """What was found and what was left out; goes to the log and to ``dataset_report.json``."""

    pictures: int = 0
    samples: int = 0
    without_caption: int = 0
    upscaled: int = 0
    buckets: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    """Files that are not trained, each with the reason."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def log(self) -> None:
        """Says it in the log."""
        logger.info(
            "dataset: %d pictures, %d samples, %d without caption, %d enlarged",
            self.pictures,
            self.samples,
            self.without_caption,
            self.upscaled,
        )
        for bucket, count in sorted(self.buckets.items()):
            logger.info("  bucket %s: %d", bucket, count)
        for path, reason in self.left_out.items():
            logger.warning("left out: %s: %s", path, reason)


class MediaIndex:
    """Remembers content digest and size of files, so that an unchanged file is read only once ever."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS media (path TEXT PRIMARY KEY, size INTEGER, mtime_ns INTEGER, "
            "digest TEXT, width INTEGER, height INTEGER, problem TEXT)"
        )

    def lookup(self, paths: Iterable[Path]) -> Iterator[tuple[Path, str, int, int, str | None]]:
        """Digest, width, height and problem (None: readable) of each file, reading the new and changed ones."""
        known = {row[0]: row[1:] for row in self._db.execute("SELECT * FROM media")}
        with ThreadPoolExecutor(4) as pool:
            rows = pool.map(lambda path: self._row(path, known), paths, chunksize=64)
            fresh = []
            for path, row, changed in rows:
                if changed:
                    fresh.append((_storable(path), *row))
                yield path, row[2], row[3], row[4], row[5]
        self._db.execute("BEGIN")
        self._db.executemany("INSERT OR REPLACE INTO media VALUES (?,?,?,?,?,?,?)", fresh)
        self._db.execute("COMMIT")

    def close(self) -> None:
        """Releases the database file."""
        self._db.close()

    @staticmethod
    def _row(path: Path, known: dict[str, tuple[Any, ...]]) -> tuple[Path, tuple[Any, ...], bool]:
        try:
            stat = path.stat()
            old = known.get(_storable(path))
            if old and old[:2] == (stat.st_size, stat.st_mtime_ns):
                return path, old, False
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
            width, height = picture_size(path)
            return path, (stat.st_size, stat.st_mtime_ns, digest, width, height, None), True
        except OSError as error:
            return path, (0, 0, "", 0, 0, f"cannot be read: {error.strerror}"), False
        except UnreadableMedia as error:
            return path, (stat.st_size, stat.st_mtime_ns, digest, 0, 0, str(error)), True


def scan(settings: DatasetSettings, index: MediaIndex, size_multiple: int) -> tuple[list[Sample], Report]:
    """The samples of all folders, in an order that depends on names alone, and the report on them.

    Raises:
        SettingsError: A folder is missing or no usable picture is in any of them.
    """
    report = Report()
    samples: list[Sample] = []
    for number, directory in enumerate(settings.directory):
        samples += _scan_directory(settings, directory, f"directory[{number}].path", index, size_multiple, report)
    if not samples:
        folders = ", ".join(f"'{directory.path}'" for directory in settings.directory)
        reasons = "".join(f"\n  {path}: {reason}" for path, reason in list(report.left_out.items())[:10])
        raise SettingsError(
            f"dataset: no usable picture in {folders}; put pictures (png, jpg, webp ...) there, "
            f"captions beside them as .txt{reasons}"
        )
    report.samples = len(samples)
    report.buckets = {str(bucket): count for bucket, count in Counter(s.bucket for s in samples).items()}
    return samples, report


def _scan_directory(
    settings: DatasetSettings,
    directory: Directory,
    option_path: str,
    index: MediaIndex,
    size_multiple: int,
    report: Report,
) -> Iterator[Sample]:
    folder = Path(directory.path).expanduser()
    if not folder.is_dir():
        raise SettingsError(f"{option_path}: '{folder}' is not a folder; give the folder that holds the pictures")
    prefix = settings.caption_prefix if directory.caption_prefix is None else directory.caption_prefix
    repeats = settings.num_repeats if "num_repeats" not in directory.model_fields_set else directory.num_repeats
    ratios = aspect_ratios(settings, directory)
    pictures = sorted(
        (p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file()), key=lambda p: p.name
    )
    for path, digest, width, height, problem in index.lookup(pictures):
        shown = _printable(path)
        if problem:
            report.left_out[shown] = problem
            continue
        try:
            caption = _caption(path)
        except UnicodeDecodeError:
            report.left_out[shown] = f"its caption {path.with_suffix('.txt').name} is not UTF-8; save it as UTF-8"
            continue
        if not caption:
            report.without_caption += 1
            if settings.skip_empty_caption:
                report.left_out[shown] = "no caption, and skip_empty_caption is on"
                continue
        report.pictures += 1
        for area in areas(settings, directory):
            bucket = bucket_for(width / height, ratios, area, size_multiple)
            report.upscaled += width < bucket.width or height < bucket.height
            yield Sample(str(path), digest, bucket, prefix + caption, repeats)


def _caption(path: Path) -> str:
    text = path.with_suffix(".txt")
    return text.read_text("utf-8-sig").strip() if text.is_file() else ""


def _storable(path: Path) -> str:
    """The path as text that SQLite takes, also when the name is not UTF-8."""
    return str(path).encode("utf-8", "surrogateescape").decode("latin-1")


def _printable(path: Path) -> str:
    return str(path).encode("utf-8", "backslashreplace").decode("utf-8")
