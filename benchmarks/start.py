"""Seconds from the start of train.py to its first step, with warm caches, beside those that reading the weights takes.

    python benchmarks/start.py FOLDER [--small] [setting ...]

Writes a Flux whose transformer has FLUX.1-dev's size (24 GB; its text encoders and VAE are miniatures, which warm
caches do without) and eight pictures into FOLDER, trains two steps to fill the caches, and two again to measure.
Settings are ``key=value`` pairs of train.toml, such as ``compile=true``. ``launcher`` are the seconds before train.py
starts, which count in neither start; ``log`` tells after how many seconds of the second one the trainer said what.
``byte_code`` tells whether Python has its libraries in compiled form, as pip leaves them; imports take twice as long
without.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import re
import subprocess
import sys
import time
import tomllib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from train_step import load_package

LINE = re.compile(r"^(\d\d):(\d\d):(\d\d) \[rank 0\] \w+ (.*)$", re.M)

READ = """
import sys, time
import torch
from safetensors import safe_open
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.empty(1, device=device)
start = time.perf_counter()
for path in sys.argv[1:]:
    with safe_open(path, "pt", device=device) as file:
        for name in file.keys():
            file.get_tensor(name)
if device == "cuda":
    torch.cuda.synchronize()
print(time.perf_counter() - start)
"""


def write_model(folder: Path, small: bool) -> None:
    """A Flux of random weights in diffusers' layout."""
    import torch
    from diffusers import FluxTransformer2DModel
    from diffusion_trainer.models import families

    families()["flux"].write_miniature(folder)
    blocks = {"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 2} if small else {}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        transformer = FluxTransformer2DModel(
            guidance_embeds=True, joint_attention_dim=32, pooled_projection_dim=16, **blocks
        )
    torch.set_default_dtype(torch.float32)
    for path in (folder / "transformer").glob("*.safetensors*"):
        path.unlink()
    transformer.save_pretrained(folder / "transformer", max_shard_size="5GB")


def write_pictures(folder: Path) -> None:
    """Eight pictures of noise with captions."""
    from PIL import Image

    folder.mkdir(parents=True)
    for number in range(8):
        noise = Image.frombytes("RGB", (64, 64), random.Random(number).randbytes(64 * 64 * 3))
        noise.resize((1024, 1024)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a photo of a red cat", "utf-8")


@dataclass
class Start:
    """How a training began, in seconds."""

    launcher: float
    """From the start of the launcher to that of train.py."""
    first_step: float
    """From the start of train.py until the first step is done."""
    log: list[tuple[int, str]]
    """What the trainer said until then, and when; the log knows whole seconds."""


def train(folder: Path, changes: dict[str, Any], resolution: int) -> Start:
    """Trains two steps as the Train node does."""
    from diffusion_trainer.utils import launch
    from diffusion_trainer.utils.config import write_toml
    from diffusion_trainer.utils.run_folder import ENDED, RunFolder

    run_folder = RunFolder.create(folder / "runs")
    table: dict[str, Any] = {
        "output_dir": str(folder / "runs"), "max_steps": 2, "activation_checkpointing": True,
        "model": {"type": "flux", "diffusers_path": str(folder / "model"), "max_sequence_length": 32},
        "adapter": {"type": "lora", "rank": 16}, "optimizer": {"type": "adamw", "lr": 1e-4},
    }  # fmt: skip
    for key, value in changes.items():
        owner, _, name = key.rpartition(".")
        (table[owner] if owner else table)[name] = value
    write_toml(run_folder.train_toml, table)
    write_toml(
        run_folder.dataset_toml, {"resolutions": [resolution], "directory": [{"path": str(folder / "pictures")}]}
    )
    run = launch.start(run_folder, num_gpus=1, identity=str(run_folder.path))
    began, script = 0.0, str(launch.TRAIN_SCRIPT)
    while (status := run.status()).step < 1 and status.state not in ENDED and run.poll() is None:
        with suppress(psutil.Error):
            trainers = [] if began else psutil.Process(run.pid).children(recursive=True)
            began = next((child.create_time() for child in trainers if script in child.cmdline()), began)
        time.sleep(0.02)
    ended = time.time()
    if run.wait() != "finished":
        sys.exit(run.failure_text())
    return Start(began - run.started, ended - began, said(run_folder.log, began))


def said(log: Path, began: float) -> list[tuple[int, str]]:
    """The lines of the first rank until its first step."""
    found = []
    for hour, minute, second, text in LINE.findall(log.read_text("utf-8")):
        clock = time.localtime(began)
        passed = (int(hour) - clock.tm_hour) * 3600 + (int(minute) - clock.tm_min) * 60 + int(second) - clock.tm_sec
        found.append((passed % 86400, text[:80]))
        if text.startswith("step "):
            break
    return found


def main() -> None:
    """Writes what is missing, trains twice and prints the seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("settings", nargs="*")
    parser.add_argument(
        "--small",
        action="store_true",
        help="two narrow blocks of each kind and small pictures, to try the command itself",
    )
    arguments = parser.parse_args()
    load_package()
    changes = {
        key: tomllib.loads(f"v = {value}")["v"] for key, _, value in (s.partition("=") for s in arguments.settings)
    }
    model = arguments.folder.resolve() / "model"
    if not model.exists():
        write_model(model, arguments.small)
        write_pictures(model.parent / "pictures")
    cold, warm = (train(model.parent, changes, 64 if arguments.small else 1024) for _ in range(2))
    files = sorted(str(path) for path in (model / "transformer").glob("*.safetensors"))
    reading = float(subprocess.run([sys.executable, "-c", READ, *files], capture_output=True, check=True).stdout)
    size = sum(os.path.getsize(path) for path in files) / 1e9
    origins = [str(importlib.util.find_spec(name).origin) for name in ("torch", "diffusers")]  # type: ignore[union-attr]
    print(json.dumps({
        "gigabytes": round(size, 2), "launcher": round(warm.launcher, 1),
        "first_start": round(cold.first_step, 1), "second_start": round(warm.first_step, 1),
        "reading_weights": round(reading, 1), "beyond": round(warm.first_step - reading, 1), "log": warm.log,
        "byte_code": all(os.path.exists(importlib.util.cache_from_source(path)) for path in origins),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
