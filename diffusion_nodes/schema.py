"""Inputs of nodes, derived from settings, and the way back: what was typed becomes TOML values.

A `Widget` is one input that sets one option; its type, bounds, step, default and tooltip come from the
option's field. An option that may be left out becomes a widget with one value that means so: 0, an empty
text or "auto". A `Socket` is an input that takes a link. `SettingsNode` turns both into ComfyUI's V1
declarations.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import create_model
from pydantic.fields import FieldInfo

from ..utils.config import SettingsError, Table, validate
from . import comfy

MOST = {"INT": 2**31 - 1, "FLOAT": 1e6}
"""Upper ends of widgets whose setting has none; without one the frontend stops at 2048."""
SAFE_INTEGER = 2**53 - 1
"""The largest integer that a browser keeps exactly."""
AUTO = "auto"


@dataclass(frozen=True)
class Socket:
    """An input that only a link can fill."""

    type: str
    tooltip: str
    force: bool = False
    """The type would otherwise get a widget."""

    def declaration(self) -> tuple[str, dict[str, Any]]:
        """The entry of ComfyUI's INPUT_TYPES."""
        return self.type, {"tooltip": self.tooltip} | ({"forceInput": True} if self.force else {})


@dataclass(frozen=True)
class Widget:
    """An input that sets one option; see `widget`."""

    table: type[Table]
    key: str
    prefix: str
    kind: str | list[str]
    default: Any
    off: Any
    """The value that leaves the option out; None where there is no such value."""
    low: float | None = None
    high: float | None = None
    note: str = ""
    written: bool = False
    """The text is a place to write to, which has rules of its own, not something to be found."""
    only: Any = None
    """Which of the option's types the input is for; see `widget`."""

    @property
    def field(self) -> FieldInfo:
        """Where the option is declared."""
        return _field(self.table, self.key, self.only)

    @property
    def path(self) -> str:
        """What the option is called in messages: ``optimizer.lr``."""
        return f"{self.prefix}.{self.key}" if self.prefix else self.key

    @property
    def tooltip(self) -> str:
        """The option's description, with the value that leaves it out named."""
        text = self.field.description or ""
        if self.off is not None:
            word = "Empty" if self.off == "" else str(self.off)
            if "Left out:" in text:
                text = text.replace("Left out:", f"{word}:")
            elif not self.note:
                text += f" {word}: not used."
        if _hint(self.field, "picker"):
            kind = _hint(self.field, "picker")
            text += f" A name below ComfyUI's models/{kind} is enough. The node's right-click menu offers them."
        return " ".join(filter(None, [text.strip(), self.note]))

    def declaration(self) -> tuple[str | list[str], dict[str, Any]]:
        """The entry of ComfyUI's INPUT_TYPES."""
        options: dict[str, Any] = {"default": self.default, "tooltip": self.tooltip}
        if self.kind in ("INT", "FLOAT"):
            options |= {"min": self.low, "max": self.high, "step": _step(self.field, self.kind)}
        if self.kind == "STRING":
            options["multiline"] = bool(_hint(self.field, "multiline")) or _is_mapping(self.field)
            if names := comfy.model_names(_hint(self.field, "picker")):
                options["suggestions"] = names
        if _hint(self.field, "advanced"):
            options["advanced"] = True
        return self.kind, options

    def read(self, value: Any) -> Any:
        """What was typed as a TOML value; None when it means that the option is left out.

        Raises:
            SettingsError: A list that cannot be read as one.
        """
        if isinstance(value, str) and not isinstance(self.kind, list) and not _hint(self.field, "spaces"):
            value = value.strip()
        if value is None or self._is_off(value):
            return None
        if value == "" and self.field.is_required() and is_path(self.key, self.field):
            raise SettingsError(f"{self.path}: required, but empty")
        if _is_list(self.field):
            return read_list(value, self.path, self._separators())
        if _is_mapping(self.field):
            return read_pairs(value, self.path)
        if isinstance(self.kind, list) and isinstance(value, str):
            return next((known for known in self.kind if known.lower() == value.strip().lower()), value)
        if isinstance(value, str) and not self.written and is_path(self.key, self.field):
            return comfy.resolve(value, _hint(self.field, "picker"))
        return value

    def _separators(self) -> str:
        """What stands between texts of a list; commas belong to paths. Numbers have none: they are JSON."""
        if _hint(self.field, "lines"):
            return "\n"
        return ",\n" if get_args(_members(self.field)[0]) == (str,) else ""

    def _is_off(self, value: Any) -> bool:
        if self.off is None:
            return False
        if isinstance(value, str):  # ComfyUI turns a null in a text input into the text "None"
            return value.lower() in ("", "none", "null", str(self.off)) or _as_number(value) == self.off
        return value == self.off and self.kind in ("INT", "FLOAT")


class SettingsNode:
    """A node whose inputs are declared as `Widget` and `Socket`, by input name in the order shown."""

    REQUIRED: ClassVar[Mapping[str, Widget | Socket]] = {}
    OPTIONAL: ClassVar[Mapping[str, Widget | Socket]] = {}
    DESCRIPTION: ClassVar[str] = ""

    def __init_subclass__(cls) -> None:
        cls.DESCRIPTION = " ".join((inspect.getdoc(cls) or "").split())

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:
        """ComfyUI's declaration of the inputs."""
        return {section: {name: entry.declaration() for name, entry in entries.items()}
                for section, entries in (("required", cls.REQUIRED), ("optional", cls.OPTIONAL))}  # fmt: skip

    @classmethod
    def read(cls, values: Mapping[str, Any], only: Iterable[str] | None = None) -> dict[str, Any]:
        """Checked TOML values by option, from input values; absent inputs have their defaults.

        Args:
            only: Input names to look at; all by default.

        Raises:
            SettingsError: All that cannot be used, each by its dotted path.
        """
        widgets = {name: entry for name, entry in {**cls.REQUIRED, **cls.OPTIONAL}.items()
                   if isinstance(entry, Widget) and (only is None or name in only)}  # fmt: skip
        problems: list[str] = []
        found: dict[tuple[type[Table], str], dict[str, Any]] = {}
        given_by: dict[str, str] = {}
        for name, entry in widgets.items():
            try:
                value = entry.read(values.get(name, entry.default))
            except SettingsError as error:
                problems.append(str(error))
                continue
            if value is None:
                continue
            if (other := given_by.setdefault(entry.path, name)) != name:
                problems.append(f"{name}: sets {entry.path}, as {other} does; use one of them")
            found.setdefault((entry.table, entry.prefix), {})[entry.key] = value
        result: dict[str, Any] = {}
        for (table, prefix), part in found.items():
            try:
                model: type[Table] = _part(table, tuple(part))  # type: ignore[arg-type]  # mypy doubts that a class hashes
                checked = validate(model, part, prefix)
                result |= checked.model_dump(mode="json")
            except SettingsError as error:
                problems.append(str(error))
        if problems:
            raise SettingsError("\n".join(problems))
        return {entry.key: result[entry.key] for entry in widgets.values() if entry.key in result}

    @classmethod
    def check(cls, **values: Any) -> bool | str:
        """What VALIDATE_INPUTS answers for these text inputs; linked ones are None and not looked at.

        Only texts may be named there: ComfyUI then leaves its own checks of bounds and choices away.
        """
        given = {name: value for name, value in values.items() if value is not None}
        try:
            cls.read(given, given)
        except SettingsError as error:
            return str(error)
        return True


def widget(
    table: type[Table], key: str, *, prefix: str = "", kind: str | None = None, default: Any = ..., off: Any = ...,
    high: float | None = None, choices: Iterable[str] | None = None, note: str = "", written: bool = False,
    only: Any = None,
) -> Widget:  # fmt: skip
    """The input that sets option ``key`` of ``table``.

    Args:
        only: For an option of several types, that which this input is for: ``int``, ``list`` or ``Literal``. It may
            be left out, so that the input for another of them counts.
        prefix: Name of the TOML table, for messages.
        kind: ComfyUI's type where it is not that of the option.
        default: Where a node starts elsewhere than the option itself.
        off: Value that leaves the option out, if the option's own type does not say.
        high: Largest value that the widget offers.
        choices: What a combo offers, for an option that is any text.
        note: Added to the tooltip.
        written: The text is a place to write to.
    """
    field = _field(table, key, only)
    shape: str | list[str] = list(choices) if choices else kind or _kind(field)
    if off is ...:
        off = _off(field, shape)
    if isinstance(shape, list) and off == AUTO and AUTO not in shape:
        shape = [AUTO, *shape]
    if default is ...:
        default = _shown(field.default, off)
    low, top = _bounds(field, shape, off) if shape in ("INT", "FLOAT") else (None, None)
    if shape == "FLOAT":
        default = float(default)
    return Widget(table, key, prefix, shape, default, off, low, high if high is not None else top, note, written,
                  only)  # fmt: skip


def widgets(table: type[Table], *keys: str, prefix: str = "") -> dict[str, Widget | Socket]:
    """Inputs named like the options they set, as these are."""
    return {key: widget(table, key, prefix=prefix) for key in keys}


def read_list(value: Any, path: str, separators: str = "") -> list[Any]:
    """A list from what was typed: ``[512, [1280, 720]]``, ``512, 768`` or, with ``separators``, texts.

    Raises:
        SettingsError: It is not a list of numbers.
    """
    if isinstance(value, (list, tuple)):
        return list(value)
    text = str(value).strip()
    if separators != "\n":
        text = text.replace("，", ",")
    try:
        found = json.loads(text if text.startswith("[") else "" if separators else f"[{text}]")
    except json.JSONDecodeError:
        found = None
    if isinstance(found, list) and all(_fits(item, bool(separators)) for item in found):
        return found
    if separators and (separators == "\n" or not text.startswith("[")):
        return [part.strip() for part in re.split(f"[{separators}]", text) if part.strip()]
    example = '["to_q", "to_k"]' if separators else "[512] or [512, 768]"
    raise SettingsError(f"{path}: must be a list such as {example}, got '{value}'")


def read_pairs(value: Any, path: str) -> dict[str, str]:
    """Numbers by name from what was typed: a line ``name = number`` for each.

    Raises:
        SettingsError: A line has no ``=``.
    """
    if isinstance(value, Mapping):
        return dict(value)
    pairs = [line.rpartition("=") for line in str(value).splitlines() if line.strip()]
    for name, equals, number in pairs:
        if not equals or not name.strip():
            raise SettingsError(f"{path}: each line must be such as 'attn = 0.5', got '{number.strip()}'")
    return {name.strip(): number.strip() for name, _, number in pairs}


def can_be_typed(field: FieldInfo) -> bool:
    """Whether a widget can hold the option; tables have nodes of their own."""
    return bool(field.description) and (not has_tables(field) or bool(_hint(field, "lines")))


def further(table: type[Table], *tables: Mapping[str, Widget | Socket], without: Iterable[str] = ()) -> list[str]:
    """The options of ``table`` that no input of ``tables`` sets, so that a new option is an input by itself."""
    done = {entry.key for inputs in tables for entry in inputs.values() if isinstance(entry, Widget)} | set(without)
    return [key for key, field in table.model_fields.items() if key not in done and can_be_typed(field)]


def has_tables(field: FieldInfo) -> bool:
    """Whether the option is a table, or a list of tables."""
    return any(isinstance(part, type) and issubclass(part, Table) for member in _members(field)
               for part in (member, *get_args(member)))  # fmt: skip


def is_path(key: str, field: FieldInfo) -> bool:
    """Whether the option names a file or folder."""
    return bool(_hint(field, "picker")) or key == "path" or key.endswith("_path")


def _fits(item: Any, texts: bool) -> bool:
    if isinstance(item, list):
        return not texts and all(_fits(inner, False) for inner in item)
    return isinstance(item, str) if texts else isinstance(item, (int, float)) and not isinstance(item, bool)


def _as_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


@cache
def _part(table: type[Table], keys: tuple[str, ...]) -> type[Table]:
    """``table`` with these options alone, so that a node can check its share."""
    fields: dict[str, Any] = {key: (table.model_fields[key].annotation, table.model_fields[key]) for key in keys}
    return create_model(table.__name__, __base__=Table, **fields)


def _field(table: type[Table], key: str, only: Any = None) -> FieldInfo:
    """An option; with ``only`` as if it had that one of its types, or were left out."""
    field = table.model_fields[key]
    if only is None:
        return field
    (member,) = [member for member in _members(field) if only in (member, get_origin(member))]
    narrow = copy.copy(field)
    narrow.annotation, narrow.default = member | None, None
    return narrow


def _members(field: FieldInfo) -> list[Any]:
    """The types that the option may have, None left out."""
    annotation = field.annotation
    union = get_origin(annotation) in (Union, UnionType)
    return [member for member in (get_args(annotation) if union else (annotation,)) if member is not NoneType]


def _kind(field: FieldInfo) -> str | list[str]:
    members = _members(field)
    if bool in members:
        return "BOOLEAN"
    if get_origin(members[0]) is Literal:
        return [str(choice) for choice in get_args(members[0])]
    return {int: "INT", float: "FLOAT"}.get(members[0], "STRING")


def _is_list(field: FieldInfo) -> bool:
    return get_origin(_members(field)[0]) is list


def _is_mapping(field: FieldInfo) -> bool:
    return get_origin(_members(field)[0]) is dict


def _off(field: FieldInfo, kind: str | list[str]) -> Any:
    if NoneType not in get_args(field.annotation):
        return "" if field.default in ([], {}) else None
    if isinstance(kind, list):
        return AUTO
    if _hint(field, "ui_off") is not None:
        return _hint(field, "ui_off")
    return 0 if kind in ("INT", "FLOAT") else "" if kind == "STRING" else None


def _shown(value: Any, off: Any) -> Any:
    if value is None:
        return off
    if isinstance(value, list):
        return json.dumps(value) if value else ""
    if isinstance(value, dict):
        return "\n".join(f"{name} = {number}" for name, number in value.items())
    return value


def _bounds(field: FieldInfo, kind: Any, off: Any) -> tuple[float, float]:
    """Smallest and largest value of the widget; an excluded bound is moved by one step."""
    rules: dict[str, float] = {}
    for rule in field.metadata:
        if isinstance(rule, (annotated_types.Ge, annotated_types.Gt, annotated_types.Le, annotated_types.Lt)):
            rules |= dataclasses.asdict(rule)
    step = _step(field, kind)
    low = rules.get("ge", rules["gt"] + step if "gt" in rules else _hint(field, "ui_min") or -math.inf)
    high = rules.get("le", rules["lt"] - step if "lt" in rules else math.inf)
    if isinstance(off, (int, float)):
        low = min(low, off)
    high = min(high, _hint(field, "ui_max") or MOST[kind]) if math.isinf(high) else high
    low = max(low, -MOST[kind])
    return (int(low), min(int(high), SAFE_INTEGER)) if kind == "INT" else (float(low), round(float(high), 12))


def _step(field: FieldInfo, kind: Any) -> float:
    step = _hint(field, "step") or (1 if kind == "INT" else 0.01)
    return max(1, int(step)) if kind == "INT" else float(step)


def _hint(field: FieldInfo, name: str) -> Any:
    extra: Any = field.json_schema_extra
    return extra["widget"].get(name) if isinstance(extra, dict) and "widget" in extra else None
