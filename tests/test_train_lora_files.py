"""Training inside ComfyUI on checkpoints in files, through ComfyUI's own loaders; the example workflow as shipped.

Needs a ComfyUI: COMFYUI_DIR and COMFYUI_PYTHON. Old and new versions are two runs.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from comfyui import ROOT, ComfyUI, Job
from diffusion_trainer.scripts import headless
from diffusion_trainer.scripts.workflow import to_prompt
from PIL import Image, ImageChops, ImageDraw, ImageStat

EXAMPLE = ROOT / "example_workflows" / "train_lora_in_comfyui.json"
pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.skipif(
        not {"COMFYUI_DIR", "COMFYUI_PYTHON"} <= os.environ.keys(), reason="set COMFYUI_DIR and COMFYUI_PYTHON"
    ),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyUI]:
    base = tmp_path_factory.mktemp("comfyui")
    server = ComfyUI(base)
    (base / "custom_nodes/miniatures").symlink_to(ROOT / "tests/comfy_pack")
    write_pictures(base / "input/my_pictures")
    subprocess.run(
        [os.environ["COMFYUI_PYTHON"], str(ROOT / "tests/comfy_checkpoints.py"), str(base)],
        cwd=os.environ["COMFYUI_DIR"], env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, timeout=600)  # fmt: skip
    server.start()
    yield server
    server.end()
    shutil.rmtree(base / "models")  # gigabytes, which pytest would keep


def write_pictures(folder: Path) -> None:
    """Three pictures of one sign, and what they show."""
    folder.mkdir(parents=True)
    for number, ground in enumerate(("#f0ede6", "#e0e8f0", "#eef0e0")):
        picture = Image.new("RGB", (128, 128), ground)
        pen = ImageDraw.Draw(picture)
        pen.ellipse((24, 24, 104, 104), fill="#d03020")
        pen.rectangle((56, 24, 72, 104), fill="#3050d0")
        picture.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a red disc with a blue bar", "utf-8")


def run(server: ComfyUI, prompt: dict[str, Any]) -> Job:
    """The prompt, which must succeed."""
    job = server.queue(prompt)
    assert job.wait(600) == "success", job.error()
    return job


LOADERS = {
    "sdxl": ("CheckpointLoaderSimple", {"ckpt_name": "miniature_sdxl.safetensors"}),
    "flux": ("UNETLoader", {"unet_name": "miniature_flux.safetensors", "weight_dtype": "default"}),
    "wan": ("UNETLoader", {"unet_name": "miniature_wan.safetensors", "weight_dtype": "fp8_e4m3fn"}),
    "qwen": ("UNETLoader", {"unet_name": "miniature_qwen.safetensors", "weight_dtype": "default"}),
}


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


@pytest.mark.parametrize("family", LOADERS)
def test_a_checkpoint_trains_and_comfyui_loads_what_it_saved(server: ComfyUI, family: str) -> None:
    kind, values = LOADERS[family]
    known = server.get("/object_info")
    (saver,) = [name for name in ("SaveLoRA", "SaveLoRANode") if name in known]
    output = {"family": family, "full": True}
    prompt = {
        "model": node(kind, **values),
        "latents": node("MiniatureLatents", family=family, count=2, seed=3),
        "captions": node("MiniatureConditioning", family=family, count=2, seed=9, full=True),
        "train": node("TrainLoRANode", model=["model", 0], latents=["latents", 0], positive=["captions", 0], steps=3,
                      batch_size=2, rank=2, learning_rate=0.002, seed=5),
        "trained": node("MiniatureOutput", name="trained", model=["train", 0], lora=["train", 1], loss=["train", 2],
                        steps=["train", 3], **output),
        "save": node(saver, lora=["train", 1], prefix=f"loras/{family}", steps=["train", 3]),
        "load": node("LoraModelLoader", model=["model", 0], lora=["train", 1], strength_model=1.0, bypass=False),
        "loaded": node("MiniatureOutput", name="loaded", model=["load", 0], **output),
        "base": node("MiniatureOutput", name="base", model=["model", 0], **output),
    }  # fmt: skip
    run(server, prompt)
    (file,) = (server.base / "output/loras").glob(f"{family}_3_steps*.safetensors")
    again = {
        "model": prompt["model"],
        "load": node("LoraLoaderModelOnly", model=["model", 0], strength_model=1.0, lora_name=file.name),
        "result": node("MiniatureOutput", name="file", model=["load", 0], **output),
    }
    run(server, again)
    made = {name: safetensors.torch.load_file(server.base / f"output/{name}.model.safetensors")["output"]
            for name in ("trained", "loaded", "file", "base")}  # fmt: skip
    assert torch.isfinite(made["trained"]).all()
    assert torch.equal(made["trained"], made["loaded"]) and torch.equal(made["trained"], made["file"])
    assert not torch.allclose(made["trained"], made["base"])
    losses = json.loads((server.base / "output/trained.json").read_text())["loss"]
    assert len(losses) == 3 and all(0 < loss < 50 for loss in losses), losses


def shipped(server: ComfyUI) -> dict[str, Any]:
    """The example as ComfyUI's page sends it, on the miniature and three small pictures."""
    prompt = to_prompt(json.loads(EXAMPLE.read_text("utf-8")), headless.node_classes() | foreign(server))
    given = {
        "CheckpointLoaderSimple": {"ckpt_name": "miniature_sd15.safetensors"},
        "LoadCaptionedImageSetNode": {"width": 128, "height": 128},
        "EmptyLatentImage": {"width": 128, "height": 128}, "KSampler": {"steps": 6},
        "TrainLoRANode": {"steps": 30, "learning_rate": 0.002, "training_dtype": "fp32", "save_every": 20,
                          "preview_every": 15},
    }  # fmt: skip
    for entry in prompt.values():
        for name, value in given.get(entry["class_type"], {}).items():
            assert name in entry["inputs"], name
            entry["inputs"][name] = value
    return prompt


def foreign(server: ComfyUI) -> dict[str, type]:
    """ComfyUI's own nodes, as far as reading a canvas needs them."""

    def standing_for(declared: dict[str, Any]) -> type:
        return type("Foreign", (), {"INPUT_TYPES": staticmethod(lambda: declared)})

    return {name: standing_for(node["input"]) for name, node in server.get("/object_info").items()}


def test_the_example_trains_plots_saves_reloads_and_shows_before_and_after(server: ComfyUI) -> None:
    prompt = shipped(server)
    job = run(server, prompt)
    names = {entry["class_type"]: node_id for node_id, entry in prompt.items()}
    loras = server.base / "output/loras"
    saved = loras / "my_lora_30_steps.safetensors"
    assert saved.is_file() and (loras / "trained_lora_20_steps.safetensors").is_file()
    with safetensors.safe_open(saved, "pt") as file:
        assert file.metadata()["training_steps"] == "30"
    shown = {event["node"]: event["output"]["images"] for event in job.events("executed") if event["output"]}
    (plot,) = shown[names["PlotTrainingLossNode"]]
    assert Image.open(server.base / "temp" / plot["filename"]).size == (840, 520)
    before, after = (Image.open(next((server.base / "output").glob(f"{name}_*.png"))).convert("RGB")
                     for name in ("before", "after"))  # fmt: skip
    assert before.size == after.size == (128, 128)
    assert sum(ImageStat.Stat(ImageChops.difference(before, after)).mean) > 5
    texts = job.texts(names["TrainLoRANode"])
    assert texts[-1].startswith("step 30 of 30, loss ") and "per step" in texts[-1]
    sizes = {Image.open(io.BytesIO(event["picture"])).size for event in job.events("preview")}
    assert (512, 512) in sizes, "a picture over the curve"
    steps = [event["value"] for event in job.events("progress") if event["node"] == names["TrainLoRANode"]]
    assert steps[-1] == 30 and steps == sorted(steps)


def test_queueing_the_example_again_trains_nothing_again(server: ComfyUI) -> None:
    prompt = shipped(server)
    job = run(server, prompt)
    (train,) = [node_id for node_id, entry in prompt.items() if entry["class_type"] == "TrainLoRANode"]
    assert train in [node for event in job.events("execution_cached") for node in event["nodes"]]
