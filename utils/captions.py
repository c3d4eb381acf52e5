"""Captions: what a file says becomes the variants that are cached, of which each step takes one."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Iterator

from .dataset_settings import FolderOptions
from .randomness import derive_seed

LONGEST = 100_000
"""Characters; no text encoder sees a hundredth of it."""
USUAL_VARIANTS = 8
_WILDCARD = re.compile(r"\{([^{}|]*(?:\|[^{}|]*)+)\}")


class UnusableCaption(Exception):
    """A caption that cannot be trained; the text says why."""


def decode(data: bytes, name: str) -> str:
    """The caption in a file's bytes.

    Raises:
        UnusableCaption: It is no UTF-8, or far too long to be a caption.
    """
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise UnusableCaption(f"its caption {name} is not UTF-8; save it as UTF-8") from None
    return checked(text, name)


def checked(text: str, name: str) -> str:
    """``text`` if it can be a caption; see `decode`."""
    if len(text) > LONGEST:
        raise UnusableCaption(f"its caption {name} has {len(text)} characters; {LONGEST} at most")
    return text


def variants(text: str, options: FolderOptions) -> tuple[str, ...]:
    """What is cached for a caption: each as the text encoders get it, each once.

    They depend on the text and the options alone, so other seeds and other captions leave them cached.
    """
    count = options.cache_shuffle_num
    shuffle = options.shuffle_tags or count > 0
    wild = options.caption_wildcards and bool(_WILDCARD.search(text))
    if not (shuffle or wild or options.tag_dropout):
        return (_complete(text, options),)
    count = count or (1 if options.shuffle_tags and not (wild or options.tag_dropout) else USUAL_VARIANTS)
    chance = random.Random(derive_seed("caption", text, count, options.tag_dropout, options.keep_tokens))
    choices = _resolved(text, count, chance) if wild else itertools.repeat(text)
    made = (_tags(choice, options, shuffle, chance) for choice in itertools.islice(choices, count))
    return tuple(dict.fromkeys(_complete(entry, options) for entry in made))


def _resolved(text: str, count: int, chance: random.Random) -> Iterator[str]:
    """``text`` with each wildcard replaced by one of its words: all ways in turn where they are few."""
    parts = _WILDCARD.split(text)  # text, choices, text, choices, ... text
    words = [part.split("|") for part in parts[1::2]]
    ways: list[tuple[str, ...]]
    if math.prod(map(len, words)) <= count:
        ways = list(itertools.product(*words))
    else:
        ways = [tuple(chance.choice(options) for options in words) for _ in range(count)]
    for way in itertools.cycle(ways):
        chosen = itertools.chain.from_iterable(zip(parts[::2], (*way, ""), strict=True))
        yield "".join(chosen)


def _tags(text: str, options: FolderOptions, shuffle: bool, chance: random.Random) -> str:
    delimiter = options.cache_shuffle_delimiter
    tags = text.split(delimiter)
    kept, rest = tags[: options.keep_tokens], tags[options.keep_tokens :]
    if shuffle:
        chance.shuffle(rest)
    if options.tag_dropout:
        rest = [tag for tag in rest if chance.random() >= options.tag_dropout] or rest[: not kept]
    return delimiter.join(kept + rest)


def _complete(text: str, options: FolderOptions) -> str:
    word = options.trigger_word
    if word and not re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text):
        text = f"{word}{options.cache_shuffle_delimiter}{text}" if text else word
    return options.caption_prefix + text
