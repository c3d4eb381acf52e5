"""Training inside ComfyUI: checks in its own Python, and graphs through its API.

Needs a ComfyUI: COMFYUI_DIR and COMFYUI_PYTHON. Old and new versions are two runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import safetensors.torch
import torch

ROOT = Path(__file__).resolve().parent.parent
CHECKS = [name for file in sorted((ROOT / "tests/comfy_checks").glob("*.py"))
          for name in re.findall(r"^def check_(\w+)", file.read_text("utf-8"), re.M)]  # fmt: skip
FAMILIES = ("sdxl", "flux", "wan", "qwen")
pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.skipif(
        not {"COMFYUI_DIR", "COMFYUI_PYTHON"} <= os.environ.keys(), reason="set COMFYUI_DIR and COMFYUI_PYTHON"
    ),
]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What went wrong by check; all run in one process, because ComfyUI takes long to import."""
    file = tmp_path_factory.mktemp("checks") / "results.json"
    command = [os.environ["COMFYUI_PYTHON"], str(ROOT / "tests/comfy_checks"), str(file)]
    done = subprocess.run(command, cwd=os.environ["COMFYUI_DIR"], env=environment(), capture_output=True, text=True,
                          timeout=900)  # fmt: skip
    assert file.exists(), done.stderr[-3000:]
    return json.loads(file.read_text())


@pytest.mark.parametrize("check", CHECKS)
def test_inside(results, check):
    assert results.get(check, "was not reached") == ""


class Server:
    """A ComfyUI with this package and the test nodes."""

    def __init__(self, base: Path, port: int) -> None:
        self.base, self.address = base, f"http://127.0.0.1:{port}"

    def get(self, path: str, body: object = None) -> dict:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from None
        return json.loads(text) if text else {}

    def queue(self, prompt: dict) -> str:
        return self.get("/prompt", {"prompt": prompt})["prompt_id"]

    def wait(self, prompt_id: str, seconds: float = 180) -> dict:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if entry := self.get(f"/history/{prompt_id}").get(prompt_id):
                return entry
            time.sleep(0.2)
        raise TimeoutError(prompt_id)

    def run(self, prompt: dict) -> dict:
        entry = self.wait(self.queue(prompt))
        assert entry["status"]["status_str"] == "success", entry["status"]["messages"][-1]
        return entry

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        return safetensors.torch.load_file(self.base / "output" / name)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    base = tmp_path_factory.mktemp("comfyui")
    for name in ("custom_nodes", "models", "input", "output", "temp", "user"):
        (base / name).mkdir()
    (base / "custom_nodes/trainer").symlink_to(ROOT)
    (base / "custom_nodes/miniatures").symlink_to(ROOT / "tests/comfy_pack")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [os.environ["COMFYUI_PYTHON"], "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(port),
               "--disable-api-nodes", "--base-directory", str(base), "--database-url",
               f"sqlite:///{base}/user/comfyui.db"]  # fmt: skip
    with (base / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=os.environ["COMFYUI_DIR"], env=environment(), stdout=log, stderr=log)
        try:
            result = Server(base, port)
            for _ in range(240):
                with contextlib.suppress(OSError):
                    result.get("/queue")
                    break
                assert process.poll() is None, (base / "log").read_text()[-3000:]
                time.sleep(0.5)
            yield result
        finally:
            process.terminate()
            process.wait(30)


def graph(family: str, count: int = 1, **values: object) -> dict:
    """Miniature, latents and captions into TrainLoRANode, which is node "train"."""
    values = {"steps": 4, "rank": 4, "training_dtype": "fp32", **values}

    def node(kind: str, **inputs: object) -> dict:
        return {"class_type": kind, "inputs": inputs}

    return {
        "model": node("MiniatureModel", family=family, seed=1),
        "latents": node("MiniatureLatents", family=family, count=count, seed=3),
        "captions": node("MiniatureConditioning", family=family, count=count, seed=9),
        "train": node("TrainLoRANode", model=["model", 0], latents=["latents", 0], positive=["captions", 0], **values),
        "result": node("MiniatureOutput", family=family, name="trained", model=["train", 0], lora=["train", 1],
                       loss=["train", 2], steps=["train", 3]),
    }  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_by_comfyui_it_is_the_same(server, family):
    savers = [name for name in ("SaveLoRA", "SaveLoRANode") if name in server.get("/object_info")]
    prompt = graph(family, 4, batch_size=4, seed=11)
    prompt |= {
        "save": {"class_type": savers[0], "inputs": {"lora": ["train", 1], "prefix": f"loras/{family}",
                                                     "steps": ["train", 3]}},
        "plot": {"class_type": "LossGraphNode", "inputs": {"loss": ["train", 2], "filename_prefix": "loss"}},
        "own_plot": {"class_type": "PlotTrainingLossNode", "inputs": {"loss": ["train", 2], "logarithmic": True}},
        "own_save": {"class_type": "SaveTrainedLoRANode", "inputs": {"lora": ["train", 1], "name": f"own/{family}",
                                                                     "steps": ["train", 3]}},
        "own_load": {"class_type": "LoadTrainedLoRANode", "inputs": {"model": ["model", 0], "lora_name":
                                                                     ["own_save", 0], "strength": 1.0}},
        "own_result": {"class_type": "MiniatureOutput", "inputs": {"family": family, "name": "own",
                                                                   "model": ["own_load", 0]}},
        "load": {"class_type": "LoraModelLoader", "inputs": {"model": ["model", 0], "lora": ["train", 1],
                                                             "strength_model": 1.0, "bypass": False}},
        "loaded": {"class_type": "MiniatureOutput", "inputs": {"family": family, "name": "loaded",
                                                               "model": ["load", 0]}},
        "base": {"class_type": "MiniatureOutput", "inputs": {"family": family, "name": "base", "model": ["model", 0]}},
    }  # fmt: skip
    server.run(prompt)
    files = sorted((server.base / "output/loras").glob(f"{family}_4_steps*.safetensors"))
    assert len(files) == 1
    trained, base = (server.tensors(f"{name}.model.safetensors")["output"] for name in ("trained", "base"))
    assert not torch.allclose(trained, base)
    for name in ("loaded", "own"):
        assert torch.equal(trained, server.tensors(f"{name}.model.safetensors")["output"]), name
    from_file = {
        "model": prompt["model"],
        "load": {"class_type": "LoraLoaderModelOnly", "inputs": {"model": ["model", 0], "strength_model": 1.0,
                                                                 "lora_name": files[0].name}},
        "result": {"class_type": "MiniatureOutput", "inputs": {"family": family, "name": "file", "model": ["load", 0]}},
    }  # fmt: skip
    server.run(from_file)
    assert torch.equal(trained, server.tensors("file.model.safetensors")["output"])


def test_the_seed_decides_and_a_file_of_comfyui_goes_on(server):
    loras = []
    for name in ("a", "b"):
        prompt = graph("wan", 3, seed=21, batch_size=2, save_prefix=f"loras/{name}")
        prompt["result"]["inputs"]["name"] = name
        server.run(prompt)
        loras.append(server.tensors(f"{name}.lora.safetensors"))
    assert all(torch.equal(loras[0][key], loras[1][key]) for key in loras[0])
    target = server.base / "output/loras/without_a_number.safetensors"
    target.parent.mkdir(exist_ok=True)
    safetensors.torch.save_file(loras[0], target)
    prompt = graph("wan", 3, seed=22, existing_lora=target.name)
    prompt["result"]["inputs"]["name"] = "more"
    server.run(prompt)
    assert json.loads((server.base / "output/more.json").read_text())["steps"] == 4


def test_cancel(server):
    for choice in ("discard", "keep"):
        prompt = graph("flux", steps=100000, on_cancel=choice, seed=31)
        prompt["result"]["inputs"]["name"] = f"cancel_{choice}"
        prompt_id = server.queue(prompt)
        time.sleep(6)
        begun = time.monotonic()
        server.get("/interrupt", {})
        entry = server.wait(prompt_id)
        assert time.monotonic() - begun < 5
        kept = (server.base / f"output/cancel_{choice}.json").exists()
        assert kept == (choice == "keep")
        assert entry["status"]["status_str"] == ("success" if kept else "error")


def test_a_mismatch_is_told_with_both_counts(server):
    prompt = graph("wan", 3)
    prompt["captions"]["inputs"]["count"] = 2
    entry = server.wait(server.queue(prompt))
    told = str(entry["status"]["messages"])
    assert "2 conditionings for 3 latents" in told


def test_documented_values_alone_are_enough(server):
    prompt = graph("wan")
    prompt["train"]["inputs"] = {key: prompt["train"]["inputs"][key] for key in ("model", "latents", "positive")}
    prompt["result"]["inputs"]["name"] = "plain"
    server.run(prompt)
    told = json.loads((server.base / "output/plain.json").read_text())
    assert told["steps"] == 16 and len(told["loss"]) == 16
