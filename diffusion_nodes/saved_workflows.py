"""Values as earlier versions of the package stored them, turned into today's.

What is known of those versions is in ``web/layouts.json``, which the browser reads too: there the values of a
canvas are turned before it opens (``web/js/saved_workflows.js``); here prompts before they are checked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

NAMES = "input names"
"""The property in which nodes of the canvas store the names of their values, in the same order."""
Prompt = dict[str, dict[str, Any]]
"""Node ids to ``{"class_type": ..., "inputs": {name: value or [node_id, output]}}``."""


@cache
def known() -> dict[str, dict[str, Any]]:
    """The tables of ``web/layouts.json``."""
    return json.loads((Path(__file__).parent.parent / "web" / "layouts.json").read_text("utf-8"))


def by_name(kind: str, stored: Sequence[Any]) -> dict[str, Any] | None:
    """Stored values of an earlier layout by today's input names; None when they have today's layout."""
    for layout in known()["layouts"].get(kind, []):
        if len(stored) == layout["count"] and all(_is(stored[int(n)], what) for n, what in layout["when"].items()):
            named = dict(zip(layout["names"], stored, strict=True))
            named.pop(None, None)
            return adopt_values(kind, named)
    return None


def adopt_values(kind: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Input values of one node by today's names, with today's words for them."""
    values = dict(values)
    for old, new in known()["inputs"].get(kind, {}).items():
        if old in values:
            values.setdefault(new, values.pop(old))
    for name, words in known()["values"].get(kind, {}).items():
        if isinstance(values.get(name), str):
            values[name] = words.get(values[name], values[name])
    for name, switch in known()["only_if"].get(kind, {}).items():
        if values.pop(switch, True) is False and isinstance(values.get(name), str):
            values[name] = ""
    return values


def adopt_prompt(prompt: Prompt, classes: Mapping[str, type]) -> None:
    """Turns a prompt of an earlier version into today's, in place.

    Required widgets that it does not have get their defaults; a Train node without ``config_path``, which
    came later, gets it from where it has its settings.
    """
    for node in prompt.values():
        if not isinstance(node, dict) or not isinstance(node.get("inputs"), dict):  # ComfyUI will say so
            continue
        kind = node.get("class_type")
        if not isinstance(kind, str) or kind not in classes:
            continue
        inputs = node["inputs"] = adopt_values(kind, node["inputs"])
        for name, entry in classes[kind].INPUT_TYPES().get("required", {}).items():  # type: ignore[attr-defined]
            if name not in inputs and len(entry) > 1 and "default" in entry[1]:
                inputs[name] = entry[1]["default"]
        settings = inputs.get("train_config")
        if kind == "Train" and "config_path" not in inputs and isinstance(settings, list):
            inputs["config_path"] = [settings[0], 2]


def _is(value: Any, what: str | list[Any]) -> bool:
    if what == "switch":
        return isinstance(value, bool)
    return isinstance(value, str) if what == "text" else value in what
