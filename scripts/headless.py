"""Runs a workflow file through this package's nodes without ComfyUI, by ComfyUI's rules.

    python scripts/headless.py workflow.json --base-directory DIR [--package FOLDER]... [--set NODE_ID.input=value]...

Takes what the canvas saves and what "Export (API)" saves. Values, links, types, bounds and choices are
checked as ComfyUI checks them, but any error refuses the whole workflow. Core nodes that show text are
there under their ids; nodes of other packages where --package names their folder.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import importlib.util
import inspect
import json
import logging
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "diffusion_trainer"

Prompt = dict[str, dict[str, Any]]
"""Node ids to ``{"class_type": ..., "inputs": {name: value or [node_id, output]}}``."""


class WorkflowError(ValueError):
    """A workflow that cannot run; one line per problem."""


class PreviewAny:
    """Core's node that shows any value as text."""

    FUNCTION = "show"
    RETURN_TYPES = ()
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"source": ("*", {})}}

    def show(self, source: Any) -> dict[str, Any]:
        return {"ui": {"text": [source if isinstance(source, str) else json.dumps(source, default=str)]}}


@dataclass
class Result:
    """What a node gave."""

    class_type: str = ""
    outputs: tuple[Any, ...] = ()
    ui: dict[str, Any] = field(default_factory=dict)


def load_package() -> Any:
    """This package under its fixed name, whatever the clone is called."""
    if PACKAGE not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            PACKAGE, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        assert spec is not None
        assert spec.loader is not None
        package = importlib.util.module_from_spec(spec)
        sys.modules[PACKAGE] = package
        spec.loader.exec_module(package)
    return sys.modules[PACKAGE]


def node_classes(packages: Iterable[Path] = ()) -> dict[str, type]:
    """The nodes that a workflow may use, by id: ours, and those of other packages' folders."""
    known = {**load_package().NODE_CLASS_MAPPINGS, "PreviewAny": PreviewAny}
    for folder in packages:
        spec = importlib.util.spec_from_file_location(str(folder), folder / "__init__.py")
        if spec is None or spec.loader is None or not (folder / "__init__.py").is_file():
            raise WorkflowError(f"{folder}: is not the folder of a package of nodes")
        module = sys.modules[str(folder)] = importlib.util.module_from_spec(spec)  # named by its path, as in ComfyUI
        spec.loader.exec_module(module)
        known |= module.NODE_CLASS_MAPPINGS
    return known


def run_file(
    workflow: Path, base_directory: Path, overrides: Mapping[str, Any] | None = None, packages: Iterable[Path] = ()
) -> dict[str, Result]:
    """Runs ``workflow`` with ``base_directory`` as ComfyUI's and returns what each node gave, by node id.

    Args:
        overrides: Input values by ``node_id.input``.
        packages: Folders of other packages of nodes.

    Raises:
        WorkflowError: The file or a value in it cannot be used; nothing has run.
    """
    ours, classes = load_package().NODE_CLASS_MAPPINGS, node_classes(packages)
    importlib.import_module(f"{PACKAGE}.diffusion_nodes.comfy").set_base_directory(base_directory)
    convert = importlib.import_module(f"{PACKAGE}.scripts.workflow").to_prompt
    try:
        document = json.loads(workflow.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise WorkflowError(f"{workflow}: cannot be read: {error}") from None
    prompt = convert(document, classes) if "nodes" in document else document
    importlib.import_module(f"{PACKAGE}.diffusion_nodes.saved_workflows").adopt_prompt(prompt, ours)
    for place, value in (overrides or {}).items():
        node_id, _, name = place.rpartition(".")
        if node_id not in prompt:
            raise WorkflowError(f"{place}: there is no node {node_id} in the workflow")
        prompt[node_id]["inputs"][name] = value
    wanted = validate(prompt, classes)
    return asyncio.run(execute(prompt, wanted, classes, document if "nodes" in document else {}))


def validate(prompt: Prompt, classes: Mapping[str, type]) -> list[str]:
    """Coerces the values of ``prompt`` in place; returns the ids that the output nodes need, inputs first.

    Raises:
        WorkflowError: Says all that is wrong.
    """
    missing = [f"node {node_id}: there is no node class '{node.get('class_type')}'"
               for node_id, node in prompt.items() if node.get("class_type") not in classes]  # fmt: skip
    if missing:
        raise WorkflowError("\n".join(missing))
    order: list[str] = []
    for node_id, node in prompt.items():
        if getattr(classes[node["class_type"]], "OUTPUT_NODE", False):
            _visit(node_id, prompt, order, ())
    if not order:
        raise WorkflowError("the workflow has no output node, so nothing would run")
    problems = [f"node {node_id} ({prompt[node_id]['class_type']}): {problem}"
                for node_id in order for problem in _problems(node_id, prompt, classes)]  # fmt: skip
    if problems:
        raise WorkflowError("\n".join(problems))
    return order


def _visit(node_id: str, prompt: Prompt, order: list[str], path: tuple[str, ...]) -> None:
    if node_id in path:
        raise WorkflowError(f"the links form a circle: {' -> '.join((*path, node_id))}")
    if node_id in order or node_id not in prompt:
        return
    for value in prompt[node_id]["inputs"].values():
        if is_link(value):
            _visit(value[0], prompt, order, (*path, node_id))
    order.append(node_id)


def is_link(value: Any) -> bool:
    """Whether an input's value stands for another node's output."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)


def _problems(node_id: str, prompt: Prompt, classes: Mapping[str, type]) -> list[str]:
    node = prompt[node_id]
    cls: Any = classes[node["class_type"]]
    declared, inputs, found = cls.INPUT_TYPES(), node["inputs"], []
    own = list(inspect.signature(cls.VALIDATE_INPUTS).parameters) if hasattr(cls, "VALIDATE_INPUTS") else []
    for section in ("required", "optional"):
        for name, entry in declared.get(section, {}).items():
            kind, options = entry[0], entry[1] if len(entry) > 1 else {}
            if name not in inputs:
                found += [f"{name}: required input is missing"] if section == "required" else []
            elif is_link(inputs[name]):
                found += _link_problems(name, kind, inputs[name], prompt, classes)
            else:
                found += _coerce(name, kind, options, inputs, checked=name not in own)
    if own and not found:
        values = {name: None if is_link(inputs.get(name)) else inputs.get(name) for name in own}
        answer = cls.VALIDATE_INPUTS(**values)
        if answer is not True:
            found.append(f"{', '.join(own)}: custom validation failed" if answer is False else str(answer))
    return found


def _link_problems(name: str, kind: Any, link: list[Any], prompt: Prompt, classes: Mapping[str, type]) -> list[str]:
    source = prompt.get(link[0])
    if source is None:
        return [f"{name}: is linked to node {link[0]}, which is not there"]
    outputs = classes[source["class_type"]].RETURN_TYPES  # type: ignore[attr-defined]
    if not 0 <= link[1] < len(outputs):
        return [f"{name}: is linked to output {link[1]} of node {link[0]}, which has {len(outputs)}"]
    if not fits(outputs[link[1]], kind):
        return [f"{name}: takes {kind}, but node {link[0]} gives {outputs[link[1]]}"]
    return []


def fits(given: Any, taken: Any) -> bool:
    """Whether a link may join an output to an input: equal types, any (``*``), or one of ``A,B`` in the other."""
    given, taken = ("COMBO" if isinstance(kind, (list, tuple)) else str(kind) for kind in (given, taken))
    if "*" in (given, taken):
        return True
    return set(given.split(",")) <= set(taken.split(","))


def _coerce(name: str, kind: Any, options: Mapping[str, Any], inputs: dict[str, Any], checked: bool) -> list[str]:
    """Turns a value into the type of its widget, as ComfyUI does (bool("false") is true), and checks it."""
    value = inputs[name]
    if isinstance(value, dict) and "__value__" in value:
        value = inputs[name] = value["__value__"]
    types = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}
    if kind in types if isinstance(kind, str) else False:
        try:
            value = inputs[name] = types[kind](value)
        except (TypeError, ValueError):
            return [f"{name}: must be {kind}, got {value!r}"]
    if not checked:
        return []
    if "min" in options and value < options["min"]:
        return [f"{name}: must be at least {options['min']}, got {value}"]
    if "max" in options and value > options["max"]:
        return [f"{name}: must be at most {options['max']}, got {value}"]
    choices = options.get("options", []) if kind == "COMBO" else kind
    if isinstance(choices, (list, tuple)) and value not in choices:
        return [f"{name}: must be one of {', '.join(map(str, choices))}, got {value!r}"]
    return []


async def execute(
    prompt: Prompt, order: list[str], classes: Mapping[str, type], workflow: Mapping[str, Any]
) -> dict[str, Result]:
    """Runs the nodes of ``order``; while an async one waits, others that do not need it go on.

    When one fails, the others are cancelled and waited for, then its error is raised.
    """
    tasks: dict[str, asyncio.Task[Result]] = {}
    for node_id in order:
        tasks[node_id] = asyncio.create_task(_run(node_id, prompt, classes, tasks, workflow))
    try:
        await asyncio.gather(*tasks.values())
    except BaseException:
        for task in tasks.values():
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)
        raise
    return {node_id: task.result() for node_id, task in tasks.items()}


async def _run(node_id: str, prompt: Prompt, classes: Mapping[str, type], tasks: Mapping[str, asyncio.Task[Result]],
               workflow: Mapping[str, Any]) -> Result:  # fmt: skip
    node = prompt[node_id]
    cls: Any = classes[node["class_type"]]
    declared = cls.INPUT_TYPES()
    values = {}
    for name in (*declared.get("required", {}), *declared.get("optional", {})):
        if name in node["inputs"]:
            value = node["inputs"][name]
            values[name] = (await tasks[value[0]]).outputs[value[1]] if is_link(value) else value
    hidden = {"UNIQUE_ID": node_id, "PROMPT": prompt, "EXTRA_PNGINFO": {"workflow": workflow}, "DYNPROMPT": None}
    for name, kind in declared.get("hidden", {}).items():
        values[name] = hidden.get(kind if isinstance(kind, str) else kind[0])
    answer = getattr(cls(), cls.FUNCTION)(**values)
    if inspect.isawaitable(answer):
        answer = await answer
    if isinstance(answer, dict):
        return Result(node["class_type"], tuple(answer.get("result", ())), answer.get("ui", {}))
    return Result(node["class_type"], tuple(answer or ()))


def _assignment(text: str) -> tuple[str, Any]:
    place, equals, value = text.partition("=")
    if not equals or "." not in place:
        raise argparse.ArgumentTypeError(f"'{text}' is not NODE_ID.input=value")
    try:
        return place, json.loads(value)
    except ValueError:
        return place, value


def main() -> int:
    """The command line; 2 when the workflow is refused."""
    parser = argparse.ArgumentParser(description="Run a ComfyUI workflow of this package without ComfyUI.")
    parser.add_argument("workflow", type=Path)
    parser.add_argument("--base-directory", type=Path, required=True, help="holds input, output and models")
    parser.add_argument(
        "--set", type=_assignment, action="append", default=[], metavar="NODE_ID.input=value", dest="values"
    )
    parser.add_argument("--package", type=Path, action="append", default=[], help="folder of another package of nodes")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        results = run_file(arguments.workflow, arguments.base_directory, dict(arguments.values), arguments.package)
    except ValueError as error:  # a workflow or setting that was refused: the text is for the user
        sys.stderr.write(f"{error}\n")
        return 2
    for node_id, result in results.items():
        for text in result.ui.get("text", []):
            sys.stdout.write(f"node {node_id}: {text}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
