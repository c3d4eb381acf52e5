"""The nodes against what saved workflows rely on: names, order, link types, outputs."""

import json
from pathlib import Path

import pytest
from diffusion_trainer.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from diffusion_trainer.scripts.workflow import widget_names

FIRST = json.loads((Path(__file__).parent / "node_contract.json").read_text("utf-8"))
LATER = json.loads((Path(__file__).parent / "node_contract_later.json").read_text("utf-8"))["nodes"]
CONTRACT = LATER | FIRST | {"Train": LATER["Train"]}
"""Each node as the first version that has it, but Train, whose later inputs follow the first."""
KNOWN = sorted(CONTRACT)
WIDER = {("GeneralConfig", "gradient_clipping"): "FLOAT"}
"""The old INT could not take 0.5."""
NARROWER = {"beta1": 1.0, "beta2": 1.0, "min_t": 1.0, "max_t": 0.0}
"""Ends of the old range that mean nothing: no decay, no noise level at all."""
DROPPED = {"memory"}
"""DeepSpeed has no such partition method: it never worked."""


def declared(name: str) -> dict[str, list[tuple]]:
    types = NODE_CLASS_MAPPINGS[name].INPUT_TYPES()
    return {section: [(key, entry[0], (*entry, {})[1]) for key, entry in types.get(section, {}).items()]
            for section in ("required", "optional")}  # fmt: skip


def test_every_node_that_saved_workflows_name_is_there():
    assert len(KNOWN) == 38
    assert set(KNOWN) <= set(NODE_CLASS_MAPPINGS)
    assert set(NODE_DISPLAY_NAME_MAPPINGS) == set(NODE_CLASS_MAPPINGS)


@pytest.mark.parametrize("name", KNOWN)
def test_old_inputs_come_first_in_order(name):
    for section, old in ((section, CONTRACT[name][section]) for section in ("required", "optional")):
        now = declared(name)[section]
        assert [key for key, *_ in now[: len(old)]] == [key for key, *_ in old]
    if len(declared(name)["required"]) > len(CONTRACT[name]["required"]):  # it would shift all optional ones
        assert not CONTRACT[name]["optional"]


@pytest.mark.parametrize("name", KNOWN)
def test_old_widget_values_keep_their_positions(name):
    sockets = {"input_path", "frame_buckets", "ar_buckets"} | {t for c in CONTRACT.values() for t in c["return_types"]}
    old = [key for section in ("required", "optional") for key, kind, options in CONTRACT[name][section]
           if not (isinstance(kind, str) and kind in sockets - {"STRING"}) and not options.get("forceInput")]  # fmt: skip  # noqa: E501
    assert [key for key, _ in widget_names(NODE_CLASS_MAPPINGS[name])][: len(old)] == old


@pytest.mark.parametrize("name", KNOWN)
def test_old_types_and_values_are_accepted(name):
    for section in ("required", "optional"):
        for (key, kind, options), (_, now, limits) in zip(
            CONTRACT[name][section], declared(name)[section], strict=False
        ):
            if isinstance(kind, list):
                assert set(kind) - DROPPED <= set(now), key
                continue
            assert now == WIDER.get((name, key), kind), key
            if "min" in options:
                assert limits["min"] <= options["min"] or NARROWER.get(key) == options["min"], key
                assert limits["max"] >= options["max"] or NARROWER.get(key) == options["max"], key


@pytest.mark.parametrize("name", KNOWN)
def test_outputs(name):
    cls, old = NODE_CLASS_MAPPINGS[name], CONTRACT[name]
    assert list(cls.RETURN_TYPES[: len(old["return_types"])]) == old["return_types"]
    assert list(cls.RETURN_NAMES[: len(old["return_names"])]) == old["return_names"]
    assert old["category"] == cls.CATEGORY
    assert callable(getattr(cls, cls.FUNCTION))


@pytest.mark.parametrize("name", sorted(NODE_CLASS_MAPPINGS))
def test_every_number_says_how_the_frontend_shows_it(name):
    for section in declared(name).values():
        for key, kind, options in section:
            if kind not in ("INT", "FLOAT") or options.get("forceInput"):
                continue
            assert {"min", "max", "step", "default"} <= set(options), key
            assert options["min"] <= options["default"] <= options["max"] <= 2**53 - 1, key
            steps = options["default"] / options["step"]
            assert steps == pytest.approx(round(steps), abs=1e-6), f"{key}: {options['default']} would be rounded"
            assert "control_after_generate" not in options
            # The frontend would randomise it; Train LoRA has it by contract, and its example sets it to "fixed".
            assert key not in ("seed", "noise_seed") or name == "TrainLoRANode"


@pytest.mark.parametrize("name", sorted(NODE_CLASS_MAPPINGS))
def test_every_choice_starts_with_one_that_is_offered(name):
    for section in declared(name).values():
        for key, kind, options in section:
            if isinstance(kind, list) and "default" in options:
                assert options["default"] in kind, key


@pytest.mark.parametrize("name", sorted(NODE_CLASS_MAPPINGS))
def test_everything_has_a_tooltip(name):
    cls = NODE_CLASS_MAPPINGS[name]
    assert cls.DESCRIPTION
    assert len(cls.OUTPUT_TOOLTIPS) == len(cls.RETURN_TYPES) == len(cls.RETURN_NAMES)
    assert [
        key for section in declared(name).values() for key, _, options in section if not options.get("tooltip")
    ] == []
