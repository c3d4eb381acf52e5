"""Writing text of any script into a picture, with the fonts that this system has.

Each character takes the first font that has it: Pillow's own holds Latin letters alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import cache, lru_cache
from itertools import groupby
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

FOLDERS = (
    "/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts",
    "/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts",
    "$WINDIR/Fonts", "$LOCALAPPDATA/Microsoft/Windows/Fonts",
)  # fmt: skip
"""Where Linux, macOS and Windows keep fonts."""
PREFERRED = (
    "dejavusans", "notosans-regular", "segoeui", "arial", "helvetica", "liberationsans-regular",
    "notosanscjk-regular", "notosanscjksc", "sourcehansans", "wqy-microhei", "wqy-zenhei", "msyh", "pingfang",
    "hiragino", "simhei", "simsun", "droidsansfallback", "msgothic", "yugoth", "malgun", "applesdgothic",
    "nanumgothic", "unifont",
)  # fmt: skip
"""Beginnings of file names, the best first; then comes what else there is."""
MOST_FONTS = 150
"""Files that are tried for a character that none of the preferred has."""
_WORDS = re.compile(r"[\u2e80-\u9fff\uac00-\ud7a3\uf900-\ufaff\uff00-\uffef]|\s+|[^\s\u2e80-\u9fff\uac00-\ud7a3]+")


def width(text: str, size: int) -> float:
    """Pixels that ``text`` takes on one line."""
    return sum(_font(path, size).getlength(run) for path, run in _runs(text))


def write(picture: Image.Image, place: tuple[float, float], text: str, size: int, fill: str = "black") -> None:
    """Writes one line with its top left corner at ``place``."""
    draw, (left, top) = ImageDraw.Draw(picture), place
    for path, run in _runs(text):
        font = _font(path, size)
        draw.text((left, top + size), run, fill=fill, font=font, anchor="ls")
        left += font.getlength(run)


def wrap(text: str, size: int, most: float, num_lines: int) -> list[str]:
    """``text`` in lines of at most ``most`` pixels; what does not fit into so many lines ends in an ellipsis."""
    lines, line = list[str](), ""
    for word in _pieces(text, size, most):
        if line and width(line + word.rstrip(), size) > most:
            lines.append(line.rstrip())
            line = ""
        line += word if line else word.lstrip()
    lines += [line.rstrip()] if line.strip() else []
    if len(lines) <= num_lines:
        return lines
    last = lines[num_lines - 1]
    while last and width(last + "…", size) > most:
        last = last[:-1]
    return [*lines[: num_lines - 1], last + "…"]


def missing(text: str) -> set[str]:
    """Characters that no font of this system has."""
    return {
        character
        for character in text
        if character.isprintable() and not (character.isspace() or _path_for(character) or _has(None, character))
    }


def _pieces(text: str, size: int, most: float) -> Iterator[str]:
    """Words and blanks; single characters of scripts without blanks, and of words wider than a line."""
    for word in _WORDS.findall(text):
        if width(word, size) > most:
            yield from word
        else:
            yield " " if word.isspace() else word


def _runs(text: str) -> Iterator[tuple[str | None, str]]:
    """Stretches of text in one font each, so that letters which change by their neighbours stay together.

    Blanks go with what is before them: words of a script from right to left are one stretch.
    """
    fonts, path = [], None
    for character in text:
        path = path if character.isspace() else _path_for(character)
        fonts.append((path, character))
    for path, pairs in groupby(fonts, key=lambda pair: pair[0]):
        yield path, "".join(character for _, character in pairs)


@lru_cache(maxsize=20_000)
def _path_for(character: str) -> str | None:
    """The first font that has a character; blanks and the like need none."""
    if character.isspace() or not character.isprintable() or _has(None, character):
        return None
    return next((path for path in _files() if _has(path, character)), None)


def _has(path: str | None, character: str) -> bool:
    """Whether a font draws a character unlike one that it cannot have."""
    try:
        font = _font(path, 16)
        return bytes(font.getmask(character)) != bytes(font.getmask("\U0010fffe"))
    except (OSError, ValueError):  # fonts of bitmaps have one size
        return False


@lru_cache(maxsize=200)
def _font(path: str | None, size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size) if path is None else ImageFont.truetype(path, size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


@cache
def _files() -> list[str]:
    """Font files of this system, the best first."""
    found = []
    for folder in FOLDERS:
        for root, _, names in os.walk(os.path.expandvars(os.path.expanduser(folder))):
            found += [str(Path(root, name)) for name in names if name.lower().endswith((".ttf", ".otf", ".ttc"))]

    def rank(path: str) -> tuple[int, int, str]:
        name = os.path.basename(path).lower()
        place = next((n for n, start in enumerate(PREFERRED) if name.startswith(start)), len(PREFERRED))
        return place, len(name), name  # "dejavusans.ttf" before "dejavusans-bold.ttf"

    return sorted(found, key=rank)[:MOST_FONTS]
