"""README and guide in both languages: settings, commands and names in them are those of the program."""

import argparse
import importlib
import inspect
import json
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed.run
from deepspeed.launcher import runner
from diffusion_trainer import train
from diffusion_trainer.models import configs
from diffusion_trainer.nodes import NODE_CLASS_MAPPINGS as NODES
from diffusion_trainer.scripts import examples
from diffusion_trainer.utils.config import Table, _tables
from diffusion_trainer.utils.dataset_settings import DatasetSettings, parse_dataset_settings
from diffusion_trainer.utils.run_folder import Command, Status
from diffusion_trainer.utils.settings import TrainSettings, parse_train_settings
from diffusion_trainer.utils.user_settings import UserSettings

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = {name: (ROOT / name).read_text("utf-8")
             for name in ("README.md", "README.zh.md", "docs/guide.md", "docs/guide.zh.md")}  # fmt: skip
PAIRS = [("README.md", "README.zh.md"), ("docs/guide.md", "docs/guide.zh.md")]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(name: str, *languages: str) -> list[str]:
    return [text for language, text in BLOCK.findall(DOCUMENTS[name]) if language in languages]


def in_line(name: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", BLOCK.sub("", DOCUMENTS[name]))


def commands(name: str) -> list[str]:
    """Command lines without comments; what stands for something else made a word of its own."""
    lines = [line for text in blocks(name, "bash") for line in text.splitlines()]
    lines += [
        text
        for text in in_line(name)
        if " -" in text and ".py" in text and re.match(r"(python3?|deepspeed|torchrun) ", text)
    ]
    return [re.sub(r"<[^>]*>|\s+\.\.\.", " WORD", line.partition("#")[0]).strip() for line in lines]


# -- settings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DOCUMENTS)
def test_settings_are_right(name: str) -> None:
    for text in blocks(name, "toml", "json"):
        values = json.loads(text) if text.startswith("{") else tomllib.loads(text)
        if "model" in values:
            assert parse_train_settings(values)
        elif "directory" in values:
            assert parse_dataset_settings(values)
        else:
            assert UserSettings.model_validate(values)


@pytest.mark.parametrize(("english", "chinese"), PAIRS)
def test_both_languages_have_the_same_blocks(english: str, chinese: str) -> None:
    for language in ("toml", "json", "python"):
        plain = [[re.sub(r"\s*# .*", "", text) for text in blocks(name, language)] for name in (english, chinese)]
        assert plain[0] == plain[1], language
    assert commands(english) == commands(chinese)


# -- commands ------------------------------------------------------------------------------------------


OTHER_NAMES = {"write_miniature", "diffusion_models", "wandb_api_key"}
"""A method of families, a folder of ComfyUI's, and a key of older files that is not used."""


class Parsed(Exception):
    """A command's own parser has taken its arguments."""


def parse(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Hands a command's words to the parsers that it really has."""
    first, *rest = words
    if first in ("deepspeed", "torchrun"):
        place = next((n for n, word in enumerate(rest) if word.endswith(".py")), len(rest))
        own = [*rest[:place], *(rest[place:] or ["train.py", "--config", "train.toml"])]
        launcher = runner if first == "deepspeed" else torch.distributed.run
        launcher.parse_args(own)
        return parse(["python", *own[place:]], monkeypatch)
    if rest[0] == "-m":
        assert importlib.util.find_spec(rest[1]), rest[1]
        return None
    script, *arguments = rest
    assert (ROOT / script).is_file(), script
    if script == "train.py":
        train.parse_arguments(arguments)
    elif "argparse" in (ROOT / script).read_text("utf-8"):
        module = importlib.import_module(f"diffusion_trainer.{script.removesuffix('.py').replace('/', '.')}")
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(Parsed):
            module.main()
    return None


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_are_taken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = argparse.ArgumentParser.parse_args

    def stops(parser: argparse.ArgumentParser, args: list[str] | None = None, namespace: None = None) -> object:
        parsed = real(parser, args, namespace)
        if args is None:  # a script's main; its work is not to begin
            raise Parsed
        return parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stops)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    taken = 0
    for command in [*commands(name), examples.COMMAND.format(name="flux_lora.toml")]:
        words = shlex.split(command)
        if words and Path(words[0]).name in ("python", "python3", "deepspeed", "torchrun"):
            parse(words, monkeypatch)
            taken += 1
    assert taken > 1, "no command was found in the document itself"


@pytest.mark.parametrize("command", ["python train.py --config a.toml --chek_config", "python scripts/demos.py",
                                     "deepspeed --num_gpuss=1 train.py --config a.toml"])  # fmt: skip
def test_a_wrong_command_is_noticed(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((SystemExit, AssertionError)):
        parse(shlex.split(command), monkeypatch)


# -- names ---------------------------------------------------------------------------------------------


def known_names() -> Iterator[str]:
    """Options, inputs and outputs of nodes, flags, and what stands in a run folder or status."""
    waiting: list[type[Table]] = [TrainSettings, DatasetSettings, *configs().values()]
    seen = set(waiting)
    while waiting:
        table = waiting.pop()
        yield from table.model_fields
        further = {inner for field in table.model_fields.values() for inner in _tables(field.annotation)} - seen
        seen |= further
        waiting += further
    for cls in NODES.values():
        for section in cls.INPUT_TYPES().values():
            yield from section
        yield from cls.RETURN_NAMES
        yield cls.FUNCTION
    yield from re.findall(r"--(\w+)", inspect.getsource(train))
    yield from UserSettings.model_fields
    yield from Status.__annotations__
    yield from Command.__args__


@pytest.mark.parametrize("name", DOCUMENTS)
def test_names_are_those_of_the_program(name: str) -> None:
    used = {text.partition(" ")[0] for text in in_line(name)}
    own = {text for text in used if re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)+", text)}
    known = set(known_names())
    assert own - known - OTHER_NAMES == set(), "no option, input, output or flag is called so"


@pytest.mark.parametrize("name", ["docs/guide.md", "docs/guide.zh.md"])
def test_messages_are_those_of_the_program(name: str) -> None:
    rows = re.findall(r"^\| `([^`]+)` \|", DOCUMENTS[name], re.MULTILINE)
    assert len(rows) == 5
    code = "".join(path.read_text("utf-8") for folder in ("models", "utils", "diffusion_nodes")
                   for path in (ROOT / folder).glob("*.py"))  # fmt: skip
    told = [max(re.split(r"'?\.\.\.'?|\d", row), key=len).strip() for row in rows]
    assert [text for text in told if text not in code] == []
