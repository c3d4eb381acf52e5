"""The headless runner against ComfyUI's rules, with small nodes of its own and the shipped example."""

import asyncio
import json
from pathlib import Path

import pytest
from diffusion_trainer.nodes import NODE_CLASS_MAPPINGS
from diffusion_trainer.scripts import headless
from diffusion_trainer.scripts.headless import WorkflowError, execute, fits, validate
from diffusion_trainer.scripts.workflow import to_prompt, widget_names

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "example_workflows/flux_lora.json"


class Number:
    FUNCTION, RETURN_TYPES = "run", ("INT",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seed": ("INT", {"default": 3, "min": 0, "max": 9}), "name": ("STRING", {"default": "a"})},
                "optional": {"mode": (["x", "y"],), "on": ("BOOLEAN", {"default": False})}}  # fmt: skip

    def run(self, seed, name, mode="x", on=False):
        return (seed,)


class Add:
    FUNCTION, RETURN_TYPES = "run", ("INT",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"a": ("INT", {"default": 0}), "b": ("INT,FLOAT", {}), "text": ("STRING", {"default": ""})},
                "hidden": {"me": "UNIQUE_ID"}}  # fmt: skip

    @classmethod
    def VALIDATE_INPUTS(cls, text):
        return True if text is None or text != "bad" else "text: is bad"

    async def run(self, a, b, text, me):
        await asyncio.sleep(0)
        return (a + b,)


class Show:
    FUNCTION, RETURN_TYPES, OUTPUT_NODE = "run", (), True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": ("*", {})}}

    def run(self, value):
        return {"ui": {"text": [str(value)]}}


CLASSES = {"Number": Number, "Add": Add, "Show": Show}


def node(id, kind, values=(), inputs=(), mode=0):
    return {"id": id, "type": kind, "mode": mode, "widgets_values": list(values),
            "inputs": [{"name": name, "type": type, "link": link} for name, type, link in inputs],
            "outputs": [{"type": "INT"}]}  # fmt: skip


def graph(*nodes, links):
    return {"nodes": list(nodes), "links": [[i, a, slot, b, 0, "INT"] for i, a, slot, b in links], "version": 0.4}


def run(document, classes=CLASSES):
    prompt = to_prompt(document, classes)
    return asyncio.run(execute(prompt, validate(prompt, classes), classes, document))


def sum_graph(*first, mode=0, text=""):
    return graph(
        node(1, "Number", first or (4, "randomize", "n", "y", True)),
        node(2, "Add", [10, text], [("b", "INT", 1)], mode),
        node(3, "Show", inputs=[("value", "*", 2)]),
        links=[(1, 1, 0, 2), (2, 2, 0, 3)])  # fmt: skip


def test_values_are_positional_with_one_more_after_a_seed():
    assert [name for name, _ in widget_names(Number)] == ["seed", None, "name", "mode", "on"]
    assert to_prompt(sum_graph(), CLASSES)["1"]["inputs"] == {"seed": 4, "name": "n", "mode": "y", "on": True}
    assert to_prompt(sum_graph(4, "fixed"), CLASSES)["1"]["inputs"] == {
        "seed": 4,
        "name": "a",
        "mode": "x",
        "on": False,
    }


def test_runs_and_shows():
    assert run(sum_graph())["3"].ui == {"text": ["14"]}


def test_a_linked_widget_keeps_its_place_but_not_its_value():
    document = graph(node(1, "Number", [4, "fixed", "n"]), node(2, "Add", [10, "kept"], [("b", "INT", 1), ("a", "INT", 2)]),  # noqa: E501
                     node(3, "Show", inputs=[("value", "*", 3)]), links=[(1, 1, 0, 2), (2, 1, 0, 2), (3, 2, 0, 3)])  # fmt: skip  # noqa: E501
    assert to_prompt(document, CLASSES)["2"]["inputs"] == {"a": ["1", 0], "text": "kept", "b": ["1", 0]}
    assert run(document)["3"].ui == {"text": ["8"]}


def test_bypassed_reroute_and_primitive():
    assert run(sum_graph(mode=4))["3"].ui == {"text": ["4"]}
    document = graph(node(1, "PrimitiveNode", [7, "fixed"]), node(4, "Reroute", inputs=[("", "*", 1)]),
                     node(2, "Add", [1, ""], [("b", "INT", 2)]), node(3, "Show", inputs=[("value", "*", 3)]),
                     links=[(1, 1, 0, 4), (2, 4, 0, 2), (3, 2, 0, 3)])  # fmt: skip
    assert run(document)["3"].ui == {"text": ["8"]}


def test_a_muted_node_is_missing():
    with pytest.raises(WorkflowError, match=r"node 3 \(Show\): value: required input is missing"):
        run(sum_graph(mode=2))


@pytest.mark.parametrize(
    ("values", "message"),
    [((10, "fixed", "n"), "seed: must be at most 9, got 10"), ((-1, "fixed", "n"), "seed: must be at least 0"),
     (("x", "fixed", "n"), "seed: must be INT, got 'x'"), ((1, "fixed", "n", "z"), "mode: must be one of x, y, got 'z'")],  # noqa: E501
)  # fmt: skip
def test_bounds_types_and_choices(values, message):
    with pytest.raises(WorkflowError, match=message):
        run(sum_graph(*values))


def test_values_are_coerced_as_comfyui_does():
    prompt = to_prompt(sum_graph("5", "fixed", 7, "x", "false"), CLASSES)
    validate(prompt, CLASSES)
    assert prompt["1"]["inputs"] == {"seed": 5, "name": "7", "mode": "x", "on": True}


def test_custom_validation_unknown_classes_and_circles():
    with pytest.raises(WorkflowError, match="text: is bad"):
        run(sum_graph(text="bad"))
    with pytest.raises(WorkflowError, match="node 1: there is no node class 'Gone'"):
        run(graph(node(1, "Gone"), links=[]))
    with pytest.raises(WorkflowError, match="circle"):
        validate({"1": {"class_type": "Show", "inputs": {"value": ["1", 0]}}}, CLASSES)
    with pytest.raises(WorkflowError, match="no output node"):
        run(graph(node(1, "Number", [1]), links=[]))


def test_link_types():
    assert fits("INT", "INT,FLOAT")
    assert fits("*", "MODEL")
    assert not fits("INT", "FLOAT")
    assert fits(["a", "b"], "COMBO")
    prompt = {"1": {"class_type": "Number", "inputs": {"seed": 1, "name": ["1", 0]}}}
    prompt["2"] = {"class_type": "Show", "inputs": {"value": ["1", 0]}}
    with pytest.raises(WorkflowError):
        validate(prompt, CLASSES)


def test_a_waiting_node_lets_others_run_and_a_failure_cancels_it():
    events = []

    class Wait(Show):
        async def run(self, value):
            try:
                await asyncio.sleep(60)
            finally:
                events.append("cleaned up")

    class Fail(Show):
        def run(self, value):
            events.append("failing")
            raise ValueError("no")

    prompt = {"1": {"class_type": "Number", "inputs": {"seed": 1, "name": ""}},
              "2": {"class_type": "Wait", "inputs": {"value": ["1", 0]}},
              "3": {"class_type": "Fail", "inputs": {"value": ["1", 0]}}}  # fmt: skip
    classes = {**CLASSES, "Wait": Wait, "Fail": Fail}
    with pytest.raises(ValueError, match="no"):
        asyncio.run(asyncio.wait_for(execute(prompt, validate(prompt, classes), classes, {}), 10))
    assert events == ["failing", "cleaned up"]


def test_the_example_is_sound(tmp_path):
    from diffusion_trainer.diffusion_nodes import comfy

    (tmp_path / "input/demo_pictures").mkdir(parents=True)
    comfy.set_base_directory(tmp_path)
    document = json.loads(EXAMPLE.read_text("utf-8"))
    classes = headless.node_classes()
    for entry in document["nodes"]:
        if entry["type"] in NODE_CLASS_MAPPINGS:
            cls = NODE_CLASS_MAPPINGS[entry["type"]]
            assert len(entry["widgets_values"]) == len(list(widget_names(cls))), entry["type"]
            assert [output["type"] for output in entry["outputs"]] == list(cls.RETURN_TYPES), entry["type"]
    prompt = to_prompt(document, classes)
    order = validate(prompt, classes)
    assert set(order) == set(prompt)
    assert set(classes) >= {entry["class_type"] for entry in prompt.values()}
    before = [
        node_id
        for node_id in order
        if prompt[node_id]["class_type"] not in ("Train", "TensorBoardMonitor", "PreviewAny")
    ]
    results = asyncio.run(execute(prompt, before, classes, document))
    (general,) = [results[i] for i in before if prompt[i]["class_type"] == "GeneralConfig"]
    train_config, output_dir, config_path = general.outputs
    assert train_config["max_steps"] == 60
    assert train_config["model"]["type"] == "flux"
    assert train_config["adapter"] == {"type": "lora", "rank": 4, "dropout": 0.0}
    assert output_dir == str(tmp_path / "output/training")
    assert config_path == ""


def test_links_of_the_example_name_both_ends():
    document = json.loads(EXAMPLE.read_text("utf-8"))
    nodes = {entry["id"]: entry for entry in document["nodes"]}
    for link, source, output, target, slot, kind in document["links"]:
        assert link in nodes[source]["outputs"][output]["links"]
        assert nodes[target]["inputs"][slot]["link"] == link
        assert nodes[source]["outputs"][output]["type"] == kind
    assert document["version"] == 0.4
