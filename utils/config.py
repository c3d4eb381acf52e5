"""What every table of settings has in common: strict fields, TOML in and out, messages for people.

A setting is one pydantic field. It is at once the TOML key, the node input, its tooltip, bounds and
default, and its row in the documentation; `option` declares it.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Dtype = Literal["bfloat16", "float16", "float32"]
T = TypeVar("T", bound="Table")

logger = logging.getLogger(__name__)


class SettingsError(ValueError):
    """A setting that cannot be used. The text is for the user: dotted path, then the remedy."""


class Table(BaseModel):
    """A TOML table: unknown keys are refused, defaults are checked like values."""

    unused: ClassVar[Mapping[str, str]] = {}
    """Options that older files have and that decide nothing here, with what the user is told of each."""

    model_config = ConfigDict(
        extra="forbid", validate_default=True, protected_namespaces=(), use_attribute_docstrings=False,
        defer_build=True,  # ComfyUI loads the package at every start, but rarely validates anything
    )  # fmt: skip

    @model_validator(mode="before")
    @classmethod
    def _other_names(cls, values: Any) -> Any:
        """Takes options by the names that files of other versions have for them; says so once for each."""
        if not isinstance(values, Mapping):
            return values
        values = dict(values)
        for name in cls.unused.keys() & values.keys():
            logger.warning("%s: not used; %s", name, cls.unused[name])
            del values[name]
        for name, field in cls.model_fields.items():
            for other in other_names(field):
                if other not in values:
                    continue
                if name in values:
                    raise ValueError(f"{other}: is another name of {name}; leave one of them out")
                logger.warning("%s: taken as %s, which is its name here", other, name)
                values[name] = values.pop(other)
        return values


def option(
    default: Any,
    description: str,
    *,
    step: float | None = None,
    advanced: bool = False,
    multiline: bool = False,
    lines: bool = False,
    spaces: bool = False,
    picker: str | None = None,
    ui_min: float | None = None,
    ui_max: float | None = None,
    ui_off: float | None = None,
    also: tuple[str, ...] = (),
    **constraints: Any,
) -> Any:
    """One setting. ``...`` as default makes it required.

    Args:
        description: Shown as tooltip and in the documentation.
        step: Increment of the number widget; decides how many decimals ComfyUI shows.
        advanced: Most people never touch it.
        multiline: A text box instead of a line.
        lines: The same for a list of texts, one on each line.
        spaces: Spaces at its ends mean something.
        picker: The ComfyUI model folder whose files are offered for this path.
        ui_min: Smallest value that the widget offers when the setting itself has no lower bound.
        ui_max: Largest value that the widget offers when the setting itself has no upper bound.
        ui_off: The widget's value that leaves the setting out, where 0 means something else.
        also: Names that files of other versions have for it.
        constraints: pydantic's own (``ge``, ``gt``, ``le``, ``alias`` ...).
    """
    widget = {"step": step, "advanced": advanced, "multiline": multiline or lines, "lines": lines, "spaces": spaces,
              "picker": picker,
              "ui_min": ui_min, "ui_max": ui_max, "ui_off": ui_off}  # fmt: skip
    extra: Any = {"widget": {key: value for key, value in widget.items() if value not in (None, False)}, "also": also}
    return Field(default, description=description, json_schema_extra=extra, **constraints)


def other_names(field: Any) -> tuple[str, ...]:
    """What `option` was told as ``also``."""
    extra = field.json_schema_extra
    return extra.get("also", ()) if isinstance(extra, dict) else ()


def validate(model: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    """``values`` as a ``model``.

    Raises:
        SettingsError: One line per problem, each with its dotted path (below ``prefix``) and remedy.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise SettingsError("\n".join(explain(error, model, prefix))) from None


def explain(error: ValidationError, model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """One line for each problem in ``error``: ``dotted.path: what is wrong and what to do``."""
    for problem in error.errors():
        keys, owner = _locate(problem["loc"], model)
        if not keys and problem["type"] == "value_error":  # a table's own check, which names its options
            yield _message(dict(problem), keys, owner)
            continue
        path = ".".join([prefix, *keys] if prefix else keys) or "settings"
        yield f"{path}: {_message(dict(problem), keys, owner)}"


def _locate(loc: tuple[int | str, ...], model: type[BaseModel]) -> tuple[list[str], type[BaseModel] | None]:
    """The keys a user would write for ``loc`` (union tags left out) and the table that owns the last."""
    keys: list[str] = []
    owner: Any = model
    parent: type[BaseModel] | None = model
    for part in loc:
        if isinstance(part, int):
            keys[-1:] = [f"{keys[-1]}[{part}]"] if keys else [f"[{part}]"]
            continue
        members = {_tag(member): member for member in _tables(owner)}
        if part in members and len(members) > 1:
            owner = members[part]
            continue
        table = next(iter(members.values()), None)
        if table is None:  # a branch of a plain union, "list[int]" say: not something the user wrote
            continue
        parent, name = table, _field_name(table, part)
        keys.append(part)
        owner = table.model_fields[name].annotation if name else None
    return keys, parent


def _field_name(table: type[BaseModel], key: str) -> str | None:
    return next((name for name, field in table.model_fields.items() if key in (name, field.alias)), None)


def _tables(annotation: Any) -> list[type[BaseModel]]:
    """The tables inside an annotation such as ``Lora | None`` or ``list[Directory]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [table for argument in get_args(annotation) for table in _tables(argument)]


def _tag(table: type[BaseModel]) -> str:
    field = table.model_fields.get("type")
    return str(get_args(field.annotation)[0]) if field and get_origin(field.annotation) is Literal else table.__name__


def _message(problem: dict[str, Any], keys: list[str], owner: type[BaseModel] | None) -> str:
    kind, context, value = problem["type"], problem.get("ctx", {}), problem.get("input")
    if kind == "extra_forbidden":
        names = list(owner.model_fields) if owner else []
        near = difflib.get_close_matches(keys[-1], names, 1, 0.6)
        return (
            f"unknown option; did you mean '{near[0]}'?"
            if near
            else f"unknown option; known are {', '.join(sorted(names))}"
        )
    if kind == "missing":
        return "required, but not given"
    bounds = {
        "greater_than_equal": ("ge", "at least"),
        "greater_than": ("gt", "more than"),
        "less_than_equal": ("le", "at most"),
        "less_than": ("lt", "less than"),
    }
    if kind in bounds:
        key, words = bounds[kind]
        return f"must be {words} {context[key]}, got {value}"
    if kind == "literal_error":
        near = difflib.get_close_matches(
            str(value), context["expected"].replace("'", "").replace(" or ", ", ").split(", "), 1
        )
        return f"must be {context['expected']}, got {value!r}" + (f"; did you mean '{near[0]}'?" if near else "")
    if kind == "union_tag_invalid":
        known = context["expected_tags"]
        near = difflib.get_close_matches(str(context["tag"]), known.replace("'", "").split(", "), 1)
        return f"type '{context['tag']}' is unknown; known are {known}" + (
            f"; did you mean '{near[0]}'?" if near else ""
        )
    if kind == "union_tag_not_found":
        return "needs a 'type'"
    if kind == "value_error":
        return str(context["error"])
    return f"{problem['msg'][:1].lower()}{problem['msg'][1:]}, got {value!r}"


def bad_pattern(pattern: str) -> str:
    """What is wrong with a regular expression; empty when nothing is."""
    try:
        re.compile(pattern)
    except re.error as error:
        return f"'{pattern}' is not a regular expression ({error})"
    return ""


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        SettingsError: The file is missing, unreadable, not UTF-8 or not TOML; names the line.
    """
    try:
        return tomllib.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: not valid TOML: {error}") from None


def write_toml(path: Path, values: Mapping[str, Any]) -> None:
    """Writes ``values`` to ``path`` in one step, after reading the text back and comparing.

    Keys whose value is None are left out: TOML has no null.

    Raises:
        SettingsError: The text that TOML writing produced does not read back equal.
        OSError: The file cannot be written.
    """
    plain = without_none(values)
    text = tomli_w.dumps(plain)
    if tomllib.loads(text) != plain:
        raise SettingsError(f"{path}: these settings cannot be expressed in TOML: {plain!r}")
    write_whole(path, text)


def without_none(value: Any) -> Any:
    """``value`` with the None entries of every table in it left out."""
    if isinstance(value, Mapping):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [without_none(item) for item in value]
    return value


def write_whole(path: Path, text: str) -> None:
    """Puts ``text`` into ``path`` so that a reader sees the old content or the new, never a part."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
