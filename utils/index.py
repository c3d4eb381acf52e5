"""What is known of files, on disk, so that an unchanged file is read only once ever."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sqlite3
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from .media import Properties, Source, UnreadableMedia, picture_properties
from .progress import Progress
from .readers import ReaderDied
from .video import SUFFIXES as VIDEO_SUFFIXES
from .video import video_properties

logger = logging.getLogger(__name__)

Stamp = tuple[int, int, int]
"""Size and times of modification and of change of a file; others mean that it may hold something else."""

LARGE = 64 * 2**20
"""Bytes from which a video is identified by blocks of it: any edit moves what follows it."""
SETTLED = 2_000_000_000
"""Nanoseconds after which a file's times are sure to differ when it is written again."""
BATCH = 2000
"""Files after which what was learnt is kept, should the process be ended."""
AT_ONCE = 16
"""Files of one call of a reader."""
UNREAD = "cannot be read"
"""How reasons begin that may not hold next time."""
Found = tuple[str, int, int, float | None, str | None]
"""Digest, width, height, seconds and problem of a file."""


class Media(NamedTuple):
    """A readable picture or video."""

    source: Source
    digest: str
    """Identifies the content."""
    properties: Properties


class Index:
    """A database of files by folder and name. Several processes may use one at a time."""

    def __init__(self, path: Path, readers: Executor, forget: bool = False) -> None:
        """``readers`` look into files; ``forget``: as if nothing were known yet."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._readers, self._forget = readers, forget
        try:
            self._db = _connect(path)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):  # locked, or the disk is full
                raise
            logger.warning("cache: %s is damaged (%s) and will be made again", path, error)
            for name in (path, path.with_name(path.name + "-wal"), path.with_name(path.name + "-shm")):
                name.unlink(missing_ok=True)
            self._db = _connect(path)

    def media(
        self, folder: str, sources: Iterable[tuple[Source, Stamp]], progress: Progress = lambda *_: None
    ) -> dict[Source, Media | str]:
        """Each source of ``folder`` as `Media`, or why it is none; reads the new and changed ones."""
        known = {} if self._forget else self._known("media", folder)
        rows: dict[Source, tuple[Any, ...] | None] = {}
        new = []
        for source, stamp in sources:
            row = known.get(_name(source, folder))
            rows[source] = row if row and row[1:4] == stamp else None
            if rows[source] is None:
                new.append((source, stamp))
        rows.update(self._looked_into(folder, new, progress))
        return {source: _media(source, row) for source, row in rows.items() if row}

    def _looked_into(
        self, folder: str, new: Sequence[tuple[Source, Stamp]], progress: Progress
    ) -> Iterator[tuple[Source, tuple[Any, ...]]]:
        """Rows for files that are not known; kept, except where another look may say something else."""
        parts = [new[start : start + AT_ONCE] for start in range(0, len(new), AT_ONCE)]
        waiting = [self._readers.submit(examine, [source for source, _ in part]) for part in parts]
        learnt: list[tuple[Any, ...]] = []
        done = 0
        if new:
            progress("reading new files", 0, len(new))
        for part, future in zip(parts, waiting, strict=True):
            for (source, stamp), found in zip(part, self._result(part, future), strict=True):
                row = (_name(source, folder), *stamp, *found)
                if _settled(stamp) and not str(row[-1]).startswith(UNREAD):
                    learnt.append((_storable(folder), *row))
                yield source, row
            done += len(part)
            if len(learnt) >= BATCH or done == len(new):
                self._keep("media", learnt)
                learnt = []
            progress("reading new files", done, len(new))

    def _result(self, part: Sequence[tuple[Source, Stamp]], future: Future[list[Found]]) -> list[Found]:
        """What was found in each file; which one a process died of is found out one by one."""
        found = []
        try:
            return future.result()
        except ReaderDied:
            for source, _ in part:
                try:
                    found += self._readers.submit(examine, [source]).result()
                except ReaderDied as error:
                    found.append(_problem(f"{UNREAD}: {error}"))
        return found

    def texts(
        self, folder: str, files: Iterable[tuple[str, Stamp]], read: Callable[[str], str]
    ) -> Iterator[tuple[str, str]]:
        """The path and text of each file of ``folder``, by ``read`` where it is new or has changed.

        Where there is none: NUL and the reason.
        """
        known = {} if self._forget else self._known("texts", folder)
        rows: list[tuple[Any, ...]] = []
        for path, stamp in files:
            name = _storable(path.removeprefix(folder))
            row = known.get(name)
            if row and row[1:4] == stamp:
                yield path, row[4]
                continue
            try:
                text = read(path)
            except OSError as error:
                yield path, f"\0its caption {UNREAD}: {error.strerror or error}"
                continue
            if _settled(stamp):
                rows.append((_storable(folder), name, *stamp, text))
            yield path, text
        self._keep("texts", rows)

    def close(self) -> None:
        """Releases the database file."""
        self._db.close()

    def _known(self, table: str, folder: str) -> dict[bytes, tuple[Any, ...]]:
        columns = {"media": "digest, width, height, seconds, problem", "texts": "text"}[table]
        return {
            row[0]: row
            for row in self._db.execute(
                f"SELECT name, size, mtime_ns, ctime_ns, {columns} FROM {table} WHERE folder = ?", (_storable(folder),)
            )
        }

    def _keep(self, table: str, rows: list[tuple[Any, ...]]) -> None:
        if rows:
            marks = ",".join("?" * len(rows[0]))
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany(f"INSERT OR REPLACE INTO {table} VALUES ({marks})", rows)
            self._db.execute("COMMIT")


def stamp_of(stat: os.stat_result) -> Stamp:
    """What changes when a file is written, replaced or moved over."""
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def archive_members(path: str) -> str:
    """The files in an uncompressed .tar, as JSON: a list of [name, offset, length, text or None].

    Captions are read along; pictures only listed. A damaged archive gives a JSON text, the reason.
    """
    found: list[list[Any]] = []
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.isreg() and not member.sparse:
                    is_text = member.name.lower().endswith(".txt") and member.size <= 2**20
                    file = archive.extractfile(member) if is_text else None
                    text = file.read().decode("utf-8-sig", "surrogateescape") if file else None
                    found.append([member.name, member.offset_data, member.size, text])
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        if not found:
            return json.dumps(f"not a readable .tar archive: {error}")
        logger.warning("%s: damaged after %d files: %s", path, len(found), error)
    return json.dumps(found)


def _connect(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
    with suppress(sqlite3.OperationalError):  # some network file systems cannot
        database.execute("PRAGMA journal_mode=WAL")
    stamp = "folder BLOB, name BLOB, size INTEGER, mtime_ns INTEGER, ctime_ns INTEGER"
    database.execute(
        f"CREATE TABLE IF NOT EXISTS media ({stamp}, digest TEXT, width INTEGER, height INTEGER, seconds REAL, "
        "problem TEXT, PRIMARY KEY (folder, name)) WITHOUT ROWID"
    )
    database.execute(f"CREATE TABLE IF NOT EXISTS texts ({stamp}, text TEXT, PRIMARY KEY (folder, name)) WITHOUT ROWID")
    return database


def examine(sources: Sequence[Source]) -> list[Found]:
    """What is in each file; runs in a reader's process."""
    return [_examine(source) for source in sources]


def _examine(source: Source) -> Found:
    is_video = os.path.splitext(source.name)[1].lower() in VIDEO_SUFFIXES
    try:
        digest = _digest(source, is_video)
        found = video_properties(source) if is_video else picture_properties(source)
        return digest, found.width, found.height, found.seconds, None
    except OSError as error:
        return _problem(f"{UNREAD}: {error.strerror or error}")
    except UnreadableMedia as problem:
        return _problem(str(problem))


def _problem(reason: str) -> Found:
    return "", 0, 0, None, reason


def _media(source: Source, row: tuple[Any, ...]) -> Media | str:
    digest, width, height, seconds, problem = row[4:]
    return problem or Media(source, digest, Properties(width, height, seconds))


def _digest(source: Source, is_video: bool) -> str:
    with source.open() as file:
        digest = hashlib.blake2b(digest_size=16)
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        if not is_video or size <= LARGE:
            while block := file.read(2**20):
                digest.update(block)
            return digest.hexdigest()
        digest.update(f"{size};".encode())
        for part in range(64):
            file.seek(part * (size - 2**16) // 63)
            digest.update(file.read(2**16))
        return digest.hexdigest()


def _settled(stamp: Stamp) -> bool:
    return time.time_ns() - max(stamp[1:]) > SETTLED


def _name(source: Source, folder: str) -> bytes:
    return _storable(str(source).removeprefix(folder))


def _storable(text: str) -> bytes:
    """SQLite takes no text that is not UTF-8; names of files may be such."""
    return text.encode("utf-8", "surrogateescape")
