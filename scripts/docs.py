"""Writes what is told about options and nodes, from their declarations: help pages, labels, examples.

    python scripts/docs.py            writes the files
    python scripts/docs.py --check    says which are not up to date, exit 1

English comes from the declarations; Chinese from locales/zh/texts.json, keyed by the English text.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, get_args

import tomli_w

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
LANGUAGES = ("en", "zh")
UPPER = {"addr": "address", "ar": "AR", "cfg": "CFG", "ckpt": "checkpoint", "cpu": "CPU", "cuda": "CUDA",
         "dir": "folder", "dora": "DoRA", "dtype": "precision", "ema": "EMA", "fp8": "FP8", "gpu": "GPU",
         "gpus": "GPUs",
         "huber": "Huber", "i": "I", "ib": "InfiniBand", "l1": "L1", "llm": "LLM", "lora": "LoRA",
         "lr": "learning rate", "matmul": "multiplication", "nccl": "NCCL", "num": "number of", "p2p": "P2P",
         "params": "parameters", "pred": "prediction", "proc": "processes", "rslora": "rsLoRA", "snr": "SNR",
         "t5": "T5", "toml": "TOML", "uncond": "unconditional", "unet": "U-Net", "url": "URL", "vae": "VAE",
         "wandb": "W&B", "x": "X", "zero": "ZeRO"}  # fmt: skip
WORDS = {
    "en": {"inputs": "Inputs", "outputs": "Outputs", "input": "Input", "type": "Type", "default": "Default",
           "range": "Range", "meaning": "Meaning", "output": "Output", "link": "link", "advanced": "advanced",
           "nodes": "Nodes", "node": "Node"},
    "zh": {"inputs": "输入", "outputs": "输出", "input": "输入", "type": "类型", "default": "默认值", "range": "范围",
           "meaning": "说明", "output": "输出", "link": "连线", "advanced": "高级", "nodes": "节点",
           "node": "节点"},
}  # fmt: skip


def package(name: str) -> Any:
    """A module of this package."""
    importlib.import_module("headless").load_package()
    return importlib.import_module(f"diffusion_trainer.{name}")


@cache
def chinese() -> dict[str, dict[str, str]]:
    """The table of Chinese texts: ``texts`` by English text, ``labels`` by input, ``nodes`` by id."""
    return json.loads((ROOT / "locales/zh/texts.json").read_text("utf-8"))


SENTENCES = re.compile(r"(?<=\.) +(?=[A-Z0-9-]|auto:)")
MISSING: set[str] = set()
"""Texts without Chinese that were asked for; filled by `files`."""


def _in(language: str, table: str, key: str, english: str) -> str:
    if language == "en":
        return english
    if key not in chinese()[table]:
        MISSING.add(f"{table}: {key}")
    return chinese()[table].get(key, english)


def _text(language: str, english: str) -> str:
    """A text as a whole, or put together from its sentences: tooltips share many."""
    if not english or language == "en" or english in chinese()["texts"]:
        return _in(language, "texts", english, english) if english else ""
    return "".join(_in(language, "texts", sentence, sentence) for sentence in SENTENCES.split(english))


def _label(language: str, name: str) -> str:
    words = " ".join(UPPER.get(word, word) for word in name.split("_"))
    words = words.removesuffix(" of") if name.endswith("_num") else words
    words = re.sub("^clip", "CLIP", words)  # the text encoder, not a video's clip
    return _in(language, "labels", name, words[:1].upper() + words[1:])


def _inputs(cls: Any) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    declared = cls.INPUT_TYPES()
    for section in ("required", "optional"):
        for name, entry in declared.get(section, {}).items():
            yield name, entry[0], entry[1] if len(entry) > 1 else {}


def _outputs(cls: Any) -> Iterator[tuple[str, str, str]]:
    tips = getattr(cls, "OUTPUT_TOOLTIPS", ("",) * len(cls.RETURN_TYPES))
    yield from zip(getattr(cls, "RETURN_NAMES", cls.RETURN_TYPES), cls.RETURN_TYPES, tips, strict=True)


def node_definitions(language: str) -> dict[str, Any]:
    """``nodeDefs.json``: what ComfyUI shows instead of the names in the code."""
    nodes = package("nodes")
    return {
        name: {
            "display_name": _in(language, "nodes", name, nodes.NODE_DISPLAY_NAME_MAPPINGS[name]),
            "description": _text(language, _description(cls)),
            "inputs": {key: {"name": _label(language, key), "tooltip": _text(language, options.get("tooltip", ""))}
                       for key, _, options in _inputs(cls)},
            "outputs": {str(index): {"name": _label(language, key), "tooltip": _text(language, tip)}
                        for index, (key, _, tip) in enumerate(_outputs(cls))},
        }
        for name, cls in nodes.NODE_CLASS_MAPPINGS.items()
    }  # fmt: skip


def main_texts(language: str) -> dict[str, Any]:
    """``main.json``: places in the menu, and link types, by which outputs of the same name are labelled."""
    classes = package("nodes").NODE_CLASS_MAPPINGS.values()
    places = {part for cls in classes for part in cls.CATEGORY.split("/")}
    types = {kind for cls in classes for name, kind, _ in _outputs(cls) if name == kind}
    return {"dataTypes": {kind: _label(language, kind) for kind in sorted(types)},
            "nodeCategories": {place: text for place in sorted(places)
                               if (text := _in(language, "places", place, place)) != place}}  # fmt: skip


def _description(cls: Any) -> str:
    return getattr(cls, "DESCRIPTION", "")


def node_page(name: str, language: str) -> str:
    """The help page of a node, in Markdown."""
    nodes, words = package("nodes"), WORDS[language]
    cls = nodes.NODE_CLASS_MAPPINGS[name]
    lines = [f"# {_in(language, 'nodes', name, nodes.NODE_DISPLAY_NAME_MAPPINGS[name])}", "",
             _text(language, _description(cls)), ""]  # fmt: skip
    if rows := [_input_row(language, *row) for row in _inputs(cls)]:
        head = [words[key] for key in ("input", "type", "default", "range", "meaning")]
        lines += [f"## {words['inputs']}", "", *_table(head, rows), ""]
    if rows := [
        [f"{_label(language, key)} `{key}`", f"`{kind}`", _text(language, tip)] for key, kind, tip in _outputs(cls)
    ]:
        head = [words[key] for key in ("output", "type", "meaning")]
        lines += [f"## {words['outputs']}", "", *_table(head, rows), ""]
    return "\n".join(lines)


def nodes_page(language: str) -> str:
    """The table of all nodes, by their place in ComfyUI's menu."""
    nodes, words = package("nodes"), WORDS[language]
    by_place: dict[str, list[list[str]]] = {}
    for name, cls in nodes.NODE_CLASS_MAPPINGS.items():
        page = f"../web/docs/{name}.md" if language == "en" else f"../web/docs/{name}/zh.md"
        title = _in(language, "nodes", name, nodes.NODE_DISPLAY_NAME_MAPPINGS[name])
        row = [f"[{title}]({page})", f"`{name}`", _text(language, _description(cls))]
        by_place.setdefault(cls.CATEGORY, []).append(row)
    lines = [f"# {words['nodes']}", ""]
    for place, rows in by_place.items():
        lines += [f"## {place}", "", *_table([words["node"], "id", words["meaning"]], rows), ""]
    return "\n".join(lines)


def _input_row(language: str, name: str, kind: Any, options: Mapping[str, Any]) -> list[str]:
    choices = ", ".join(f"`{choice}`" for choice in kind) if isinstance(kind, (list, tuple)) else ""
    span = f"{options['min']} … {options['max']}" if "min" in options and "max" in options else choices
    default = f"`{json.dumps(options['default'], ensure_ascii=False)}`" if "default" in options else ""
    note = f" ({WORDS[language]['advanced']})" if options.get("advanced") else ""
    shown = "COMBO" if choices else kind
    label, meaning = _label(language, name), _text(language, options.get("tooltip", ""))
    return [f"{label} `{name}`{note}", f"`{shown}`", default or WORDS[language]["link"], span, meaning]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    cells = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in cells]


def options_page() -> str:
    """Tables of every option of both TOML files."""
    families, data = package("models").families(), package("utils.dataset_settings")
    adapter, observation = package("utils.adapter_settings"), package("utils.observation_settings")
    parts = [("train.toml", package("utils.settings").TrainSettings), ("[adapter]", adapter.Lora),
             ('[adapter] with type = "loha"', adapter.Loha), ('[adapter] with type = "lokr"', adapter.Lokr),
             ("[[adapter.fuse_adapters]]", adapter.FusedAdapter),
             ("[optimizer]", package("utils.step_settings").Optimizer),
             ("[sample]", observation.Sampling), ("[monitoring]", observation.Monitoring)]  # fmt: skip
    planned = {kind: config for kind, config in package("models").configs().items() if kind not in families}
    parts += [("[environment]", package("utils.environment").Environment)]
    parts += [("[[eval_datasets]]", observation.EvalDataset)]
    parts += [(f'[model] with type = "{kind}"', family.Config) for kind, family in families.items()]
    parts += [
        (f'[model] with type = "{kind}", which cannot be trained yet', config) for kind, config in planned.items()
    ]
    parts += [("dataset.toml", data.DatasetSettings), ("[[directory]] in dataset.toml", data.Directory)]
    lines = ["# Options", "", "Generated by `scripts/docs.py` from the declarations. What is not required may be"]
    lines.append("left out.")
    for title, table in parts:
        known = data.FolderOptions.model_fields if table is data.Directory else {}
        fields = {name: field for name, field in table.model_fields.items() if field.description and name not in known}
        rows = [_option_row(name, field) for name, field in fields.items()]
        doc = " ".join((table.__doc__ or "").split()).replace("``", "`")
        lines += ["", f"## `{title}`", "", doc, "", *_table(["Option", "Type", "Default", "Meaning"], rows)]
    return "\n".join(lines) + "\n"


def _option_row(name: str, field: Any) -> list[str]:
    default = "required" if field.is_required() else "" if field.default is None else f"`{json.dumps(field.default)}`"
    bounds = [f"{sign} {getattr(rule, key)}" for rule in field.metadata
              for key, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<")) if hasattr(rule, key)]  # fmt: skip
    others = package("utils.config").other_names(field)
    meaning = field.description + (f" Also read as {' and '.join(f'`{other}`' for other in others)}." if others else "")
    return [f"`{name}`", ", ".join([_type_name(field.annotation), *bounds]), default, meaning]


def _type_name(annotation: Any) -> str:
    if getattr(annotation, "__origin__", None) is dict:
        return "table of numbers by name"
    if isinstance(annotation, type) and not get_args(annotation):
        return {"str": "text", "int": "whole number", "float": "number", "bool": "true or false"}.get(
            annotation.__name__, "table")  # fmt: skip
    arguments = [argument for argument in get_args(annotation) if argument is not type(None)]
    if getattr(annotation, "__origin__", None) is list:
        return f"list of {_type_name(arguments[0])}"
    if all(isinstance(argument, str) for argument in arguments):
        return ", ".join(f"`{argument}`" for argument in arguments) or "anything"
    return " or ".join(_type_name(a) if not isinstance(a, str) else f"`{a}`" for a in arguments) or "anything"


def example(title: str, values: Mapping[str, Any], table: Any, tables: Mapping[str, Any]) -> str:
    """A commented TOML file: each value below the description of its option."""
    lines = [f"# {title}", "# Every option: docs/options.md"]
    nested = {key: value for key, value in values.items() if key in tables}
    sections: list[tuple[str, Mapping[str, Any], Any]] = [
        ("", {k: v for k, v in values.items() if k not in nested}, table)
    ]
    for key, value in nested.items():
        rows = value if isinstance(value, list) else [value]
        head = f"[[{key}]]" if isinstance(value, list) else f"[{key}]"
        sections += [(head, row, tables[key]) for row in rows]
    told: set[str] = set()
    for head, entries, owner in sections:
        lines += ["", *([head] if head else [])]
        for key, value in entries.items():
            if f"{head}{key}" not in told:  # once for all [[directory]] tables
                told.add(f"{head}{key}")
                text = owner.model_fields[key].description or ""
                lines += textwrap.wrap(text, 100, initial_indent="# ", subsequent_indent="# ")
            lines.append(
                tomli_w.dumps({key: value})
                .strip()
                .replace("[\n    ", "[")
                .replace(",\n    ", ", ")
                .replace(",\n]", "]")
            )
    return "\n".join(lines) + "\n"


def files() -> dict[Path, str]:
    """Every generated file and what belongs in it, whatever runs and models this machine has."""
    host = package("diffusion_nodes.comfy")
    base = host.base_directory()
    host.set_base_directory(ROOT / "web")
    try:
        return _files()
    finally:
        host.set_base_directory(base)


def _files() -> dict[Path, str]:
    settings, families = package("utils.settings").TrainSettings, package("models").families()
    data, observation = package("utils.dataset_settings"), package("utils.observation_settings")
    result: dict[Path, str] = {}
    for language in LANGUAGES:
        text = json.dumps(node_definitions(language), ensure_ascii=False, indent=2) + "\n"
        result[ROOT / "locales" / language / "nodeDefs.json"] = text
        text = json.dumps(main_texts(language), ensure_ascii=False, indent=2) + "\n"
        result[ROOT / "locales" / language / "main.json"] = text
    for name in package("nodes").NODE_CLASS_MAPPINGS:
        result[ROOT / "web/docs" / f"{name}.md"] = node_page(name, "en")
        result[ROOT / "web/docs" / name / "zh.md"] = node_page(name, "zh")
    result[ROOT / "docs/options.md"] = options_page()
    result[ROOT / "docs/nodes.md"], result[ROOT / "docs/nodes.zh.md"] = map(nodes_page, LANGUAGES)
    examples = importlib.import_module("examples")
    tables = {"optimizer": package("utils.step_settings").Optimizer, "sample": observation.Sampling,
              "eval_datasets": observation.EvalDataset,
              "environment": package("utils.environment").Environment}  # fmt: skip
    for name, (title, values) in examples.TRAIN.items():
        own = {"model": families[values["model"]["type"]].Config, "adapter": package("utils.adapter_settings").Lora}
        head = f"{title}: {examples.COMMAND.format(name=name)}"
        result[ROOT / "configs" / name] = example(head, values, settings, tables | own)
    for name, (title, values) in examples.DATASET.items():
        result[ROOT / "configs" / name] = example(title, values, data.DatasetSettings, {"directory": data.Directory})
    return result


def main() -> int:
    """The command line; 1 when a file is not up to date or a text has no Chinese."""
    parser = argparse.ArgumentParser(description="Write the generated documentation.")
    parser.add_argument("--check", action="store_true", help="write nothing; say which files are not up to date")
    check = parser.parse_args().check
    stale = [path for path, text in files().items() if not path.is_file() or path.read_text("utf-8") != text]
    for path in stale:
        if check:
            sys.stderr.write(f"{path.relative_to(ROOT)}: not up to date; run scripts/docs.py\n")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(files()[path], "utf-8")
    for text in sorted(MISSING):
        sys.stderr.write(f"locales/zh/texts.json has no Chinese for {text}\n")
    return int(bool(MISSING or (check and stale)))


if __name__ == "__main__":
    sys.exit(main())
