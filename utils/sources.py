"""What a folder holds: its pictures and videos, what belongs to each, and the captions."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import captions
from .config import SettingsError
from .index import Index, Stamp, archive_members, stamp_of
from .media import PICTURE_SUFFIXES, Source
from .video import SUFFIXES as VIDEO_SUFFIXES

SUFFIXES = PICTURE_SUFFIXES | VIDEO_SUFFIXES
LISTED = SUFFIXES | {".txt", ".tar"}
BESIDES = frozenset({
    ".txt", ".json", ".jsonl", ".npz", ".npy", ".parquet", ".bak", ".db", ".tar", ".toml", ".md", ".ini", ".csv",
    ".yaml", ".yml", ".caption", ".safetensors", ".log",
})  # fmt: skip
"""Files that may lie among pictures without being named in the report."""
NO_FILE = "a pipe or device, not a file"
EDIT_LIST = "edit_instructions.jsonl"
_FILE_KEYS = ("file_name", "filename", "file", "image", "video", "path")
_TEXT_KEYS = ("text", "caption", "captions", "prompt", "instruction")
_TARGET_KEYS = ("target_image", "target_images", "target", "edited_image", "output_image", "output", "after")
_SOURCE_KEYS = ("source_image", "source_images", "source", "input_image", "input_images", "input", "control", "before")
_INSTRUCTION_KEYS = ("edit_instruction", "instruction", "edit_prompt", "prompt", "caption", "text")


@dataclass(slots=True)
class Item:
    """A picture or video to train, as it was found; nothing is known yet of what is in the file."""

    source: Source
    stamp: Stamp
    name: str
    """Path below the folder."""
    captions: list[str] = field(default_factory=list)
    problem: str | None = None
    """Why it cannot be trained."""
    controls: list[tuple[Source, Stamp]] | None = None
    """Named with it; None where they are to be looked for by stem."""


@dataclass
class Listing:
    """The files of a folder that matter, in the order of their names."""

    folder: str
    media: list[tuple[Source, Stamp]] = field(default_factory=list)
    texts: dict[str, Stamp] = field(default_factory=dict)
    archived_texts: dict[str, str] = field(default_factory=dict)
    """Captions inside of archives, by path without suffix."""
    problems: dict[str, str] = field(default_factory=dict)

    def name(self, source: Source) -> str:
        """Path of a file below the folder."""
        return str(source).removeprefix(f"{self.folder}/")

    def by_stem(self) -> dict[str, tuple[Source, Stamp]]:
        """The files by path below the folder without suffix, and by that path's last part where it is unique."""
        found: dict[str, tuple[Source, Stamp]] = {}
        short: dict[str, list[tuple[Source, Stamp]]] = {}
        for entry in self.media:
            stem = _stem(self.name(entry[0]))
            found.setdefault(stem, entry)
            short.setdefault(stem.rsplit("/", 1)[-1], []).append(entry)
        return {stem: entries[0] for stem, entries in short.items() if len(entries) == 1} | found


def list_folder(path: str, option: str, index: Index, recursive: bool = False, besides: Iterable[str] = ()) -> Listing:
    """What lies in a folder and its archives.

    Args:
        option: Names the setting in messages.
        besides: Folders inside that are not looked into.

    Raises:
        SettingsError: It is no folder.
    """
    folder = os.path.abspath(os.path.expanduser(path))
    if not os.path.isdir(folder):
        raise SettingsError(f"{option}: '{folder}' is not a folder; give the folder that holds the pictures")
    listing = Listing(folder)
    skipped = {os.path.realpath(os.path.expanduser(other)) for other in besides} - {os.path.realpath(folder)}
    archives: dict[str, Stamp] = {}
    for entry in _walk(folder, recursive, skipped):
        _sort_in(entry, listing, archives)
    for archive, members in index.texts(folder, archives.items(), archive_members):
        _add_members(archive, archives[archive], json.loads(members), listing)
    listing.media.sort(key=lambda found: str(found[0]))
    return listing


def find_items(listing: Listing, index: Index) -> list[Item]:
    """The pictures and videos of a folder with their captions.

    Raises:
        SettingsError: A list of captions is no such thing.
    """
    edits = Path(listing.folder) / EDIT_LIST
    if edits.is_file():
        return _edit_items(edits, listing)
    listed = _listed_captions(Path(listing.folder))
    stems = [_stem(str(source)) for source, _ in listing.media]
    with_media = set(stems)
    files = sorted((path, stamp) for path, stamp in listing.texts.items() if path[:-4] in with_media)
    beside = {path[:-4]: text for path, text in index.texts(listing.folder, files, _read_caption)}
    items = []
    for stem, (source, stamp) in zip(stems, listing.media, strict=True):
        item = Item(source, stamp, listing.name(source))
        texts = listed and (listed.get(item.name) or listed.get(source.name))
        _set_captions(item, texts or [listing.archived_texts.get(stem) or beside.get(stem, "")])
        items.append(item)
    if listed:
        there = {name for item in items for name in (item.name, item.source.name)}
        for name in listed.keys() - there:
            listing.problems[f"{listing.folder}/{name}"] = "has a caption in a list, but is not there"
    return items


def _walk(folder: str, recursive: bool, skipped: set[str]) -> Iterator[os.DirEntry[str]]:
    """Files below a folder; each folder once, however many links lead to it."""
    waiting, seen = [folder], set()
    while waiting:
        current = waiting.pop()
        known = os.stat(current)
        if (known.st_dev, known.st_ino) in seen or os.path.realpath(current) in skipped:
            continue
        seen.add((known.st_dev, known.st_ino))
        with os.scandir(current) as entries:
            for entry in entries:
                try:
                    is_folder = entry.is_dir()
                except OSError:  # a link to itself
                    is_folder = False
                if entry.name[0] == ".":
                    continue
                if not is_folder:
                    yield entry
                elif recursive:
                    waiting.append(entry.path)


def _sort_in(entry: os.DirEntry[str], listing: Listing, archives: dict[str, Stamp]) -> None:
    suffix = _suffix(entry.name)
    if suffix not in LISTED:
        if suffix not in BESIDES and entry.name != "README":
            listing.problems[entry.path] = "of an unknown kind; rename it if it is a picture or video"
        return
    try:
        stamp = stamp_of(entry.stat())
        if not entry.is_file():
            listing.problems[entry.path] = NO_FILE
            return
    except OSError as error:
        listing.problems[entry.path] = f"cannot be read: {error.strerror or error}"
        return
    if suffix == ".txt":
        listing.texts[entry.path] = stamp
    elif suffix == ".tar":
        archives[entry.path] = stamp
    else:
        listing.media.append((Source(entry.path), stamp))


def _add_members(archive: str, stamp: Stamp, members: Any, listing: Listing) -> None:
    if isinstance(members, str):
        listing.problems[archive] = members
        return
    for name, offset, length, text in members:
        source = Source(archive, name.removeprefix("./"), offset, length)
        suffix = _suffix(name)
        if text is not None:
            listing.archived_texts[_stem(str(source))] = text
        elif suffix in SUFFIXES:
            listing.media.append((source, stamp))


def _read_caption(path: str) -> str:
    """The caption in a file; after a NUL, why it cannot be used.

    Raises:
        OSError: It cannot be read.
    """
    try:
        return captions.decode(Path(path).read_bytes(), printable(os.path.basename(path)))
    except captions.UnusableCaption as problem:
        return f"\0{problem}"


def _set_captions(item: Item, texts: list[str]) -> None:
    item.captions = [text.strip() for text in texts]
    for text in texts:
        if text[:1] == "\0":
            item.problem = text[1:]
        elif not text.isascii() or len(text) > captions.LONGEST:  # archives and lists may hold anything
            try:
                captions.decode(text.encode("utf-8", "surrogateescape"), "text")
            except captions.UnusableCaption as problem:
                item.problem = str(problem)


def _listed_captions(folder: Path) -> dict[str, list[str]]:
    """Captions by file name from ``captions.json`` and ``metadata.jsonl``; they count before .txt files."""
    found: dict[str, list[str]] = {}
    for number, line in _lines(folder / "metadata.jsonl"):
        name, text = _first(line, _FILE_KEYS), _first(line, _TEXT_KEYS)
        if not isinstance(name, str):
            raise SettingsError(f"{folder / 'metadata.jsonl'}: line {number} names no file; give a 'file_name'")
        found[name.removeprefix("./")] = _texts(text, f"{folder / 'metadata.jsonl'}: line {number}")
    path = folder / "captions.json"
    if path.is_file():
        table = _json(path.read_bytes(), str(path))
        if not isinstance(table, dict):
            raise SettingsError(f'{path}: must be a table such as {{"a.png": ["a caption"]}}')
        found |= {name: _texts(text, f"{path}: '{name}'") for name, text in table.items()}
    return found


def _edit_items(path: Path, listing: Listing) -> list[Item]:
    """The layout with ``source_images/``, ``target_images/`` and instructions that name one of each or more: each
    target is made from all the sources."""
    items, folder = [], Path(listing.folder)
    for number, line in _lines(path):
        targets = _names(_first(line, _TARGET_KEYS))
        sources = _names(_first(line, _SOURCE_KEYS))
        if not targets or not sources:
            raise SettingsError(f"{path}: line {number} needs a 'target_image', a 'source_image' and an 'instruction'")
        text = _texts(_first(line, _INSTRUCTION_KEYS), f"{path}: line {number}")
        try:
            controls = [_stamped(_below(folder, "source_images", name)) for name in sources]
            found = [_stamped(_below(folder, "target_images", name)) for name in targets]
        except OSError as error:
            reason = " is not there" if isinstance(error, FileNotFoundError) else f": {error.strerror}"
            listing.problems[f"{path}:{number}"] = f"'{printable(str(error.filename))}'{reason}"
            continue
        for target, stamp in found:
            item = Item(target, stamp, listing.name(target), controls=controls)
            _set_captions(item, text)
            items.append(item)
    return items


def _below(folder: Path, sub: str, name: str) -> str:
    beside = folder / sub / name
    return str(beside if beside.is_file() else folder / name)


def _stamped(path: str) -> tuple[Source, Stamp]:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # a pipe, say, which nobody may ever write to
        raise OSError(errno.EINVAL, NO_FILE, path)
    return Source(path), stamp_of(status)


def _names(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [name for name in value or [] if isinstance(name, str)]


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if not path.is_file():
        return
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if line.strip():
            value = _json(line, f"{path}: line {number}")
            if not isinstance(value, dict):
                raise SettingsError(f"{path}: line {number} must be a table such as {{...}}")
            yield number, value


def _json(data: bytes, where: str) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except ValueError as error:
        raise SettingsError(f"{where}: not valid JSON: {error}") from None


def _first(table: dict[str, Any], keys: tuple[str, ...]) -> Any:
    return next((table[key] for key in keys if table.get(key) is not None), None)


def _texts(value: Any, where: str) -> list[str]:
    if value is None:
        return [""]
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise SettingsError(f"{where}: the caption must be a text or a list of texts")
    return texts


def _stem(path: str) -> str:
    """The path without its suffix; `os.path.splitext` takes five times as long, and this is asked of every file."""
    dot = path.rfind(".")
    return path[:dot] if dot > path.rfind("/") + 1 else path


def _suffix(name: str) -> str:
    dot = name.rfind(".")
    return name[dot:].lower() if dot > 0 else ""


def printable(text: str) -> str:
    """A name as it can be logged and written, whatever is in it."""
    text = os.fsencode(text).decode("utf-8", "backslashreplace")
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
