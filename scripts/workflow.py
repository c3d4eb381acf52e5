"""Turns what ComfyUI's canvas saves into a prompt, by the rules of its frontend.

Widget values are stored by position: required inputs, then optional ones, sockets left out; an integer
called seed or noise_seed is followed by what becomes of it after a run. Links override values by name.
Muted nodes are gone, bypassed ones pass links through, reroutes and primitives dissolve.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..diffusion_nodes import saved_workflows

NEVER, BYPASS = 2, 4
"""Node modes of the canvas."""
NOTES = ("Note", "MarkdownNote")
WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


class Canvas:
    """A saved canvas: nodes and links by id."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self.nodes = {node["id"]: node for node in document["nodes"]}
        self.links: dict[int, tuple[int, int]] = {}
        """Source node and output slot."""
        for link in document.get("links") or []:
            row = link if isinstance(link, list) else [link["id"], link["origin_id"], link["origin_slot"]]
            self.links[row[0]] = (row[1], row[2])

    def source(self, link: int | None) -> tuple[dict[str, Any], int] | None:
        """The node and output that really feed a link; None when nothing does."""
        seen: set[int] = set()
        while link in self.links and link not in seen:
            seen.add(link)
            node_id, slot = self.links[link]
            node = self.nodes.get(node_id)
            if node is None or node.get("mode") == NEVER:
                return None
            if node["type"] == "Reroute":
                link = node["inputs"][0].get("link")
            elif node.get("mode") == BYPASS:
                link = _passed_through(node, slot)
            else:
                return node, slot
        return None


def _passed_through(node: Mapping[str, Any], slot: int) -> int | None:
    """The link that a bypassed node hands on: of the input in the same place, else the first of the type."""
    kind, inputs = node["outputs"][slot]["type"], node.get("inputs") or []
    candidates = [*inputs[slot : slot + 1], *inputs]
    return next(
        (entry.get("link") for entry in candidates if entry["type"] == kind and entry.get("link") is not None), None
    )


def to_prompt(document: Mapping[str, Any], classes: Mapping[str, type]) -> dict[str, dict[str, Any]]:
    """The prompt that ComfyUI's frontend would send; nodes whose class is unknown keep their id for a message."""
    canvas = Canvas(document)
    prompt = {}
    for node in canvas.nodes.values():
        kind = node["type"]
        if node.get("mode") in (NEVER, BYPASS) or kind in (*NOTES, "Reroute", "PrimitiveNode"):
            continue
        inputs = _widget_values(node, classes[kind]) if kind in classes else {}
        for entry in node.get("inputs") or []:
            found = canvas.source(entry.get("link"))
            if found is None:
                continue
            source, slot = found
            if source["type"] == "PrimitiveNode":
                inputs[entry["name"]] = source["widgets_values"][0]
            else:
                inputs[entry["name"]] = [str(source["id"]), slot]
        prompt[str(node["id"])] = {"class_type": kind, "inputs": inputs, "_meta": {"title": node.get("title", kind)}}
    return prompt


def _widget_values(node: Mapping[str, Any], cls: type) -> dict[str, Any]:
    """Values by input name; inputs beyond the saved values are left at their defaults, as the canvas does."""
    stored = node.get("widgets_values") or []
    names = list(widget_names(cls))
    defaults = {name: default for name, default in names if name is not None}
    if isinstance(stored, Mapping):
        return {name: stored.get(name, default) for name, default in defaults.items()}
    known = (node.get("properties") or {}).get(saved_workflows.NAMES)
    given = None if known else saved_workflows.by_name(node["type"], stored)
    if given is None:
        order = known or [name for name, _ in names]
        given = {name: value for name, value in zip(order, stored, strict=False) if name in defaults}
    return {**defaults, **given}


def widget_names(cls: type) -> Iterator[tuple[str | None, Any]]:
    """Name and default of each stored value in order; the name is None for what follows a seed."""
    declared = cls.INPUT_TYPES()  # type: ignore[attr-defined]
    for section in ("required", "optional"):
        for name, entry in declared.get(section, {}).items():
            kind, options = entry[0], entry[1] if len(entry) > 1 else {}
            is_combo = isinstance(kind, (list, tuple))
            if options.get("forceInput") or not (is_combo or kind in WIDGET_TYPES):
                continue
            first = (
                (kind[0] if kind else None) if is_combo else {"INT": 0, "FLOAT": 0.0, "BOOLEAN": False}.get(kind, "")
            )
            yield name, options.get("default", first)
            if options.get("control_after_generate") or (kind == "INT" and name in ("seed", "noise_seed")):
                yield None, None
