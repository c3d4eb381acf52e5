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
