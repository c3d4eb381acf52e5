"""Nodes as the old package's versions saved them, made from what is known of those versions."""

import json
from pathlib import Path
from typing import Any

FIRST = json.loads((Path(__file__).parent / "node_contract.json").read_text("utf-8"))
_LATER = json.loads((Path(__file__).parent / "node_contract_later.json").read_text("utf-8"))
LATER, LAYOUTS = _LATER["nodes"], _LATER["widget_layouts"]

CASES = [(kind, number) for kind, layouts in LAYOUTS.items() for number in range(len(layouts))]
"""Every known layout, by node and number."""
TODAY = {"output_folder_name": "output_dir", "diffusion_transformer_dtype": "transformer_dtype"}
GONE = {"model_type", "use_transformer_file"}
"""Inputs that have no counterpart; in these nodes also the precision, which Model Config sets."""
GONE_IN = {"FluxModelNode": {"dtype", "transformer_dtype"}, "SDXLModelNode": {"dtype"}}


def stored_values(kind: str, number: int) -> list[Any]:
    """Values unlike the defaults, in the order of this layout."""
    return [_value(kind, name, place) for place, name in enumerate(LAYOUTS[kind][number])]


def expected(kind: str, number: int) -> dict[str, Any]:
    """What they are by today's names."""
    named = dict(zip(LAYOUTS[kind][number], stored_values(kind, number), strict=True))
    gone = GONE | GONE_IN.get(kind, set())
    return {TODAY.get(name, name): value for name, value in named.items() if name not in gone}


def canvas() -> dict[str, Any]:
    """A canvas with a node for every layout, none of them linked."""
    nodes = [
        {"id": place, "type": kind, "pos": [40 + 420 * (place % 7), 60 + 560 * (place // 7)], "size": [380, 500],
         "flags": {}, "order": place, "mode": 0, "properties": {"Node name for S&R": kind},
         "inputs": _sockets(kind), "outputs": _outputs(kind), "widgets_values": stored_values(kind, number)}
        for place, (kind, number) in enumerate(CASES, 1)
    ]  # fmt: skip
    return {"last_node_id": len(nodes), "last_link_id": 0, "nodes": nodes, "links": [], "groups": [], "config": {},
            "extra": {}, "version": 0.4}  # fmt: skip


ERAS = {"first": (0, 0, 0, 0, 1), "autumn": (1, 1, 0, 2, 1), "later": (2, 1, 1, 2, 2)}
"""Numbers of the layouts of GeneralConfig, GeneralDatasetConfig, ModelConfig, FluxModelNode and Train in a version."""
LINKS = [("path", 0, "dataset", "input_path"), ("flux", 0, "model", "model_path"),
         ("optimizer", 0, "general", "optimizer_config"), ("model", 0, "general", "model_config"),
         ("dataset", 0, "general", "dataset_config"), ("adapter", 0, "general", "adapter_config"),
         ("advanced", 0, "general", "advanced_config"), ("dataset", 0, "train", "dataset_config"),
         ("general", 0, "train", "train_config"), ("general", 2, "train", "config_path"),
         ("general", 0, "shown", "source")]  # fmt: skip


def workflow(era: str, dataset: str, model: str) -> dict[str, Any]:
    """A whole workflow as a version saved it, Train bypassed; the settings go to a node that shows them."""
    general, sizes, precision, flux, train = ERAS[era]
    defaults = {"output_dir": "mine", "output_folder_name": "mine", "config_save_path": "", "output_path": "",
                "diffusers_path": model, "dtype": "float16", "transformer_dtype": "auto", "use_transformer_file": False,
                "model_type": "diffusion", "partition_method": "memory", "epochs": 7}  # fmt: skip
    kinds = {"path": ("GeneralDatasetPathNode", None), "dataset": ("GeneralDatasetConfig", sizes),
             "flux": ("FluxModelNode", flux), "model": ("ModelConfig", precision),
             "adapter": ("AdapterConfigNode", None), "optimizer": ("OptimizerConfigNode", None),
             "advanced": ("AdvancedTrainConfig", None), "general": ("GeneralConfig", general),
             "train": ("Train", train), "shown": ("PreviewAny", None)}  # fmt: skip
    ids = {name: number for number, name in enumerate(kinds, 1)}
    nodes = []
    for name, (kind, layout) in kinds.items():
        values = [] if kind == "PreviewAny" else [dataset] if name == "path" else [
            defaults[key] if key in defaults else _default(kind, key) for key in _order(kind, layout)]  # fmt: skip
        sockets = [{"name": "source", "type": "*", "link": None}] if kind == "PreviewAny" else _sockets(kind)
        for socket in sockets:
            socket["link"] = next((n for n, (_, _, target, slot) in enumerate(LINKS, 1)
                                   if (target, slot) == (name, socket["name"])), None)  # fmt: skip
        nodes.append({
            "id": ids[name], "type": kind, "pos": [40 + 430 * (ids[name] % 5), 60 + 620 * (ids[name] // 5)],
            "size": [400, 560], "flags": {}, "order": ids[name], "mode": 4 if name == "train" else 0, "properties": {},
            "inputs": sockets, "outputs": [] if kind == "PreviewAny" else _outputs(kind), "widgets_values": values,
        })  # fmt: skip
    slots = {name: [socket["name"] for socket in node["inputs"]] for name, node in zip(kinds, nodes, strict=True)}
    types = {name: [output["type"] for output in node["outputs"]] for name, node in zip(kinds, nodes, strict=True)}
    links = [[number, ids[source], output, ids[target], slots[target].index(slot), types[source][output]]
             for number, (source, output, target, slot) in enumerate(LINKS, 1)]  # fmt: skip
    for link, (source, output, *_) in zip(links, LINKS, strict=True):
        place = nodes[ids[source] - 1]["outputs"][output]
        place["links"] = [*(place["links"] or []), link[0]]
    return {"last_node_id": len(nodes), "last_link_id": len(links), "nodes": nodes, "links": links, "groups": [],
            "config": {}, "extra": {}, "version": 0.4}  # fmt: skip


def _order(kind: str, layout: int | None) -> list[str]:
    if layout is not None:
        return LAYOUTS[kind][layout]
    rows = [row for section in ("required", "optional") for row in FIRST[kind][section]]
    return [name for name, type_, _ in rows if not _is_link_type(type_)]


def _default(kind: str, name: str) -> Any:
    rows = [row for contract in (FIRST, LATER) if kind in contract for section in ("required", "optional")
            for row in contract[kind][section] if row[0] == name]  # fmt: skip
    return rows[0][2]["default"]


def later_prompt(dataset: str, model: str) -> dict[str, Any]:
    """As "Export (API)" of a later version wrote it: other names, and inputs of today missing."""
    general = {name: options["default"] for section in ("required", "optional")
               for name, _, options in LATER["GeneralConfig"][section] if "default" in options}  # fmt: skip
    general |= {"output_folder_name": "mine", "partition_method": "memory", "optimizer_config": ["3", 0],
                "model_config": ["5", 0], "dataset_config": ["2", 0], "adapter_config": ["6", 0]}  # fmt: skip
    return {
        "1": {"class_type": "GeneralDatasetPathNode", "inputs": {"dataset_path": dataset}},
        "2": {"class_type": "GeneralDatasetConfig", "inputs": {
            "input_path": ["1", 0], "resolutions": "[512]", "enable_ar_bucket": True, "min_ar": 0.5, "max_ar": 2.0,
            "num_ar_buckets": 7, "num_repeats": 1}},
        "3": {"class_type": "OptimizerConfigNode", "inputs": {"optimizer_type": "AdamW8bitKahan", "lr": 2e-5}},
        "4": {"class_type": "FluxModelNode", "inputs": {"diffusers_path": model, "flux_shift": False}},
        "5": {"class_type": "ModelConfig", "inputs": {
            "model_path": ["4", 0], "model_type": "diffusion", "dtype": "bfloat16",
            "diffusion_transformer_dtype": "float8", "timestep_sample_method": "logit_normal"}},
        "6": {"class_type": "AdapterConfigNode", "inputs": {"adapter_type": "lora", "rank": 32, "dtype": "bfloat16"}},
        "7": {"class_type": "GeneralConfig", "inputs": general},
        "8": {"class_type": "PreviewAny", "inputs": {"source": ["7", 0]}},
    }  # fmt: skip


def _contract(kind: str) -> dict[str, Any]:
    return FIRST.get(kind) or LATER[kind]


def _sockets(kind: str) -> list[dict[str, Any]]:
    rows = [row for section in ("required", "optional") for row in _contract(kind)[section]]
    return [{"name": name, "type": type_, "link": None} for name, type_, options in rows
            if options.get("forceInput") or _is_link_type(type_)]  # fmt: skip


def _is_link_type(type_: Any) -> bool:
    return isinstance(type_, str) and (not type_.isupper() or "_CONFIG" in type_)


def _outputs(kind: str) -> list[dict[str, Any]]:
    contract = _contract(kind)
    return [{"name": name, "type": type_, "links": None}
            for name, type_ in zip(contract["return_names"], contract["return_types"], strict=True)]  # fmt: skip


def _value(kind: str, name: str, place: int) -> Any:
    if name in ("dtype", "transformer_dtype", "model_type"):
        return {"dtype": "float16", "transformer_dtype": "float8", "model_type": "diffusion"}[name]
    if name == "use_transformer_file":
        return True
    rows = [row for contract in (FIRST, LATER) if kind in contract for section in ("required", "optional")
            for row in contract[kind][section] if row[0] == name]  # fmt: skip
    _, type_, options = rows[0]
    if isinstance(type_, list):
        return next(word for word in reversed(type_) if word not in ("memory", options["default"]))
    if type_ == "BOOLEAN":
        return not options["default"]
    if type_ == "INT":
        return int(options.get("default", 0)) + options.get("step", 1) if name != "shift" else "3"
    if type_ == "FLOAT":
        return round(options["default"] + 10 * options["step"], 10) if options["default"] < 1 else options["default"]
    return "[768]" if name == "resolutions" else "" if name == "partition_split" else f"/values/{place}/{name}"
