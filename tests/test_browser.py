"""The example workflow in ComfyUI's page, in headless Chromium; PLAYWRIGHT_DIR holds playwright-core."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import saved
from comfyui import EXAMPLE, ComfyUI, write_inputs
from diffusion_trainer.diffusion_nodes.saved_workflows import NAMES
from diffusion_trainer.scripts.headless import node_classes
from diffusion_trainer.scripts.workflow import to_prompt, widget_names

NEEDED = {"COMFYUI_DIR", "COMFYUI_PYTHON", "PLAYWRIGHT_DIR"}
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not os.environ.keys() >= NEEDED, reason=f"set {', '.join(sorted(NEEDED))}"),
    pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyUI]:
    base = tmp_path_factory.mktemp("ComfyUI")
    write_inputs(base)
    server = ComfyUI(base)
    server.start()
    yield server
    server.end()


def look(server: ComfyUI, workflow: Path, *flags: str) -> dict[str, Any]:
    """What browser.mjs sees of a workflow."""
    script = Path(__file__).with_name("browser.mjs")
    picture = workflow.with_suffix(".png")
    done = subprocess.run(["node", str(script), server.url, str(workflow), str(picture), *flags],
                          capture_output=True, text=True, timeout=400, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    print(picture)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("flags", [(), ("--vue",)], ids=["canvas", "Nodes 2.0"])
def test_example_opens_with_its_values(server: ComfyUI, tmp_path: Path, flags: tuple[str, ...]) -> None:
    document = json.loads(EXAMPLE.read_text("utf-8"))
    (optimizer,) = [node for node in document["nodes"] if node["type"] == "OptimizerConfigNode"]
    optimizer["widgets_values"][1] = 0.00001
    workflow = tmp_path / "workflow.json"
    workflow.write_text(json.dumps(document))
    seen = look(server, workflow, *flags)
    assert (seen["missing"], seen["errors"]) == ([], [])
    numbers = {float(text) for text in seen["drawn"] if re.fullmatch(r"-?[\d.]*\d(e-?\d+)?", text)}
    wanted = to_prompt(document, node_classes())
    for node_id, node in wanted.items():
        shown = seen["widgets"][node_id]
        for name, value in node["inputs"].items():
            if not isinstance(value, list):
                assert shown[name] == value, f"{node['class_type']}.{name}"
            if isinstance(value, float) and not flags:  # Nodes 2.0 folds advanced inputs away
                assert value in numbers, f"{node['class_type']}.{name} is not shown as {value}"
    assert 0.00001 in numbers


@pytest.mark.parametrize("flags", [(), ("--vue",)], ids=["canvas", "Nodes 2.0"])
def test_workflows_of_every_old_version_open_with_their_values(
    server: ComfyUI, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    workflow = tmp_path / "old.json"
    workflow.write_text(json.dumps(saved.canvas()))
    seen = look(server, workflow, *flags)
    assert (seen["missing"], seen["errors"]) == ([], [])
    for place, (kind, number) in enumerate(saved.CASES, 1):
        wanted = saved.expected(kind, number)
        if kind == "hunyuanvideo15ModelNode":  # stored as a text, shown as a number
            wanted["shift"] = int(wanted["shift"])
        shown = seen["widgets"][str(place)]
        assert {name: shown[name] for name in wanted} == wanted, f"{kind}, layout {number}"
        defaults = {
            name: default for name, default in widget_names(node_classes()[kind]) if name not in (None, *wanted)
        }
        assert {name: shown[name] for name in defaults} == defaults, f"{kind}, layout {number}"


NAMES_OF_THINGS = {"VAE", "Latent", "LoRA", "DoRA", "eps", "beta1", "beta2"}
"""Texts that are the same in every language."""


def test_everything_has_a_chinese_label_on_the_chinese_page(server: ComfyUI, tmp_path: Path) -> None:
    shutil.copy(EXAMPLE.parent.parent / "docs/loss.png", server.base / "input")  # for nodes that show a picture
    nodes = [{"id": number, "type": kind, "pos": [400 * number, 0], "size": [360, 300], "mode": 0, "properties": {}}
             for number, kind in enumerate(node_classes(), 1)]  # fmt: skip
    workflow = tmp_path / "all.json"
    workflow.write_text(json.dumps({"version": 0.4, "nodes": nodes, "links": [], "groups": []}))
    seen = look(server, workflow, "--zh")
    assert (seen["missing"], seen["errors"]) == ([], [])
    assert set(seen["labels"]) == set(node_classes())
    foreign = server.get("/object_info")  # a node of ComfyUI's own may have taken the name of one of ours
    english = [f"{kind}.{name}: {text}" for kind, labels in seen["labels"].items() for name, text in labels.items()
               if foreign[kind]["python_module"].startswith("custom_nodes")
               and text not in NAMES_OF_THINGS and not re.search("[\u4e00-\u9fff]", text or "")]  # fmt: skip
    assert english == []


def test_values_follow_the_names_that_the_page_stores(server: ComfyUI, tmp_path: Path) -> None:
    document = json.loads(EXAMPLE.read_text("utf-8"))
    (general,) = [node for node in document["nodes"] if node["type"] == "GeneralConfig"]
    wanted = dict(zip(general["properties"][NAMES], general["widgets_values"], strict=True))
    general["properties"][NAMES].reverse()
    general["widgets_values"].reverse()
    workflow = tmp_path / "reversed.json"
    workflow.write_text(json.dumps(document))
    seen = look(server, workflow)
    assert {name: seen["widgets"][str(general["id"])][name] for name in wanted} == wanted
    stored = seen["stored"][str(general["id"])]
    assert dict(zip(stored["properties"][NAMES], stored["widgets_values"], strict=True)) == wanted


@pytest.mark.parametrize("flags", [(), ("--vue",)], ids=["canvas", "Nodes 2.0"])
@pytest.mark.parametrize("era", saved.ERAS)
def test_old_workflows_run_from_the_page(server: ComfyUI, tmp_path: Path, era: str, flags: tuple[str, ...]) -> None:
    workflow = tmp_path / f"{era}.json"
    workflow.write_text(json.dumps(saved.workflow(era, "demo_pictures", "miniature-flux")))
    seen = look(server, workflow, *flags, "--run", "60")
    assert (seen["outcome"], seen["missing"], seen["errors"]) == ("success", [], [])


def test_example_runs_from_the_page(server: ComfyUI, tmp_path: Path) -> None:
    document = json.loads(EXAMPLE.read_text("utf-8"))
    (monitor,) = [node for node in document["nodes"] if node["type"] == "TensorBoardMonitor"]
    monitor["widgets_values"][4] = False  # it ends with ComfyUI
    workflow = tmp_path / "workflow.json"
    workflow.write_text(json.dumps(document))
    seen = look(server, workflow, "--run", "300")
    assert (seen["outcome"], seen["errors"]) == ("success", [])
    assert (server.run_folders()[-1] / "status.json").exists()
