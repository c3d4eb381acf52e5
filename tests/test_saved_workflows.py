"""Workflows that versions of the old package saved: values arrive under today's names, prompts are complete."""

import json
from pathlib import Path

import pytest
import saved
from diffusion_trainer.diffusion_nodes import saved_workflows
from diffusion_trainer.nodes import NODE_CLASS_MAPPINGS
from diffusion_trainer.scripts import headless
from diffusion_trainer.scripts.workflow import to_prompt, widget_names

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(("kind", "number"), saved.CASES)
def test_stored_values_arrive_under_their_names(kind, number):
    document = {"nodes": [{"id": 1, "type": kind, "widgets_values": saved.stored_values(kind, number)}], "links": []}
    inputs = to_prompt(document, NODE_CLASS_MAPPINGS)["1"]["inputs"]
    wanted = saved.expected(kind, number)
    assert {name: inputs[name] for name in wanted} == wanted
    defaults = {name: default for name, default in widget_names(NODE_CLASS_MAPPINGS[kind]) if name}
    assert {name: value for name, value in inputs.items() if name not in wanted} == {
        name: value for name, value in defaults.items() if name not in wanted
    }


def test_todays_values_are_left_alone():
    for kind, cls in NODE_CLASS_MAPPINGS.items():
        assert saved_workflows.by_name(kind, [default for _, default in widget_names(cls)]) is None


def test_values_follow_their_names_when_a_node_has_got_inputs():
    """Canvases of today store the names of their values, so that an input may be added anywhere."""
    for kind, cls in NODE_CLASS_MAPPINGS.items():
        today = [name or "control_after_generate" for name, _ in widget_names(cls)]
        stored = [name for name in reversed(today) if name != today[-1]]  # another order, one input not there yet
        node = {"id": 1, "type": kind, "widgets_values": [f"value of {name}" for name in stored],
                "properties": {saved_workflows.NAMES: stored}}  # fmt: skip
        inputs = to_prompt({"nodes": [node], "links": []}, NODE_CLASS_MAPPINGS)["1"]["inputs"]
        defaults = {name: default for name, default in widget_names(cls) if name}
        assert inputs == {name: f"value of {name}" if name in stored else default for name, default in defaults.items()}


@pytest.mark.parametrize("path", sorted((ROOT / "example_workflows").glob("*.json")), ids=lambda path: path.stem)
def test_shipped_workflows_store_names(path):
    for node in json.loads(path.read_text("utf-8"))["nodes"]:
        if node["type"] in NODE_CLASS_MAPPINGS:
            names = node["properties"][saved_workflows.NAMES]
            assert len(names) == len(node["widgets_values"])
            known = {name for name, _ in widget_names(NODE_CLASS_MAPPINGS[node["type"]])} | {"control_after_generate"}
            assert set(names) <= known


def test_a_transformer_that_was_switched_off_stays_off():
    values = ["/flux", "bfloat16", "float8", True, False, "/transformer", False]
    assert saved_workflows.by_name("FluxModelNode", values)["transformer_path"] == ""


@pytest.mark.parametrize("kind", sorted(saved.LATER))
def test_prompts_of_later_versions_are_complete(kind):
    rows = [row for section in ("required", "optional") for row in saved.LATER[kind][section]]
    prompt = {"1": {"class_type": kind, "inputs": {name: options["default"] for name, _, options in rows
                                                   if "default" in options}}}  # fmt: skip
    saved_workflows.adopt_prompt(prompt, NODE_CLASS_MAPPINGS)
    declared = NODE_CLASS_MAPPINGS[kind].INPUT_TYPES()
    missing = [name for name, entry in declared["required"].items()
               if name not in prompt["1"]["inputs"] and "default" in entry[1]]  # fmt: skip
    assert missing == []
    assert not set(saved.TODAY) & set(prompt["1"]["inputs"])


def test_an_early_train_node_finds_its_config_path():
    prompt = {"9": {"class_type": "Train", "inputs": {"train_config": ["8", 0], "dataset_config": ["2", 0]}}}
    saved_workflows.adopt_prompt(prompt, NODE_CLASS_MAPPINGS)
    assert prompt["9"]["inputs"]["config_path"] == ["8", 2]


def test_other_packages_and_broken_prompts_are_left_alone():
    prompt = {"1": {"class_type": "KSampler", "inputs": {"output_folder_name": 1}}, "2": None, "3": {"inputs": []}}
    before = json.loads(json.dumps(prompt))
    saved_workflows.adopt_prompt(prompt, NODE_CLASS_MAPPINGS)
    assert prompt == before


def test_an_old_prompt_runs(tmp_path):
    """As "Save (API)" of a later version wrote it: other names, inputs of today missing."""
    (tmp_path / "input/pictures").mkdir(parents=True)
    prompt = saved.later_prompt(dataset="pictures", model="/flux")
    (tmp_path / "prompt.json").write_text(json.dumps(prompt))
    results = headless.run_file(tmp_path / "prompt.json", tmp_path)
    settings = results["7"].outputs[0]
    assert settings["output_dir"] == str(tmp_path / "output/mine")
    assert (settings["model"]["transformer_dtype"], settings["partition_method"]) == ("float8", "parameters")


@pytest.mark.parametrize("era", saved.ERAS)
def test_whole_workflows_run(era, tmp_path):
    (tmp_path / "input/pictures").mkdir(parents=True)
    (tmp_path / "old.json").write_text(json.dumps(saved.workflow(era, "pictures", "/flux")))
    results = headless.run_file(tmp_path / "old.json", tmp_path)
    settings = results["8"].outputs[0]
    assert settings["output_dir"] == str(tmp_path / "output/mine")
    assert (settings["epochs"], settings["partition_method"], settings["model"]["dtype"]) == (
        7,
        "parameters",
        "float16",
    )
    assert settings["model"]["diffusers_path"] == "/flux"
