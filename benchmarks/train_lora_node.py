"""Seconds per step and memory of TrainLoRANode against ComfyUI's own TrainLoraNode, at the same settings.

    COMFYUI_DIR=... $COMFYUI_PYTHON benchmarks/train_lora_node.py [--family wan] [--width 1024] [--layers 8]
        [--size 32] [--batch 1 4] [--steps 4] [--rounds 5] [--dtype bf16] [--gpu [--dynamic]]

The model is ComfyUI's own with random weights. Both nodes train rank 8 with AdamW and gradient checkpointing, with
as many captions as pictures. They take turns, so that what else the machine does hits both. A step is timed from
one call of the model to the next; the first one of each turn is not counted. Prints one line of JSON per batch size.
Memory is the peak above what was held before: of the GPU with --gpu, else of the process.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import inspect
import io
import itertools
import json
import os
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", default="wan", choices=["wan", "flux", "qwen"])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--size", type=int, default=32, help="side of the latents")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--steps", type=int, default=4, help="steps counted in each turn")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each node")
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--dynamic", action="store_true", help="with ComfyUI's dynamic VRAM")
    return parser.parse_args()


def sizes(family: str, width: int, layers: int) -> dict[str, Any]:
    heads = width // 128
    return {
        "wan": {"dim": width, "num_heads": heads, "ffn_dim": 4 * width, "num_layers": layers},
        "flux": {"hidden_size": width, "num_heads": heads, "depth": layers, "depth_single_blocks": 2 * layers},
        "qwen": {"num_attention_heads": heads, "num_layers": layers},
    }[family]


def make(options: argparse.Namespace, **_: Any) -> Any:
    """The model; ComfyUI's node makes its own copy by calling this."""
    import comfy_miniatures as mini
    import torch

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[options.dtype]
    model = mini.make_model(options.family, dtype, 1, **sizes(options.family, options.width, options.layers))
    model.cached_patcher_init = (make, (options,))
    return model


def data(options: argparse.Namespace, batch: int) -> tuple[list[Any], list[Any]]:
    import comfy_miniatures as mini

    latents = [mini.latents(options.family, 1, n, options.size, options.size) for n in range(batch)]
    if options.family in ("wan", "qwen"):
        for latent in latents:
            latent["samples"] = latent["samples"].unsqueeze(2)
    return latents, [mini.conditioning(options.family, n, tokens=64) for n in range(batch)]


def run_ours(options: argparse.Namespace, batch: int, steps: int) -> None:
    from diffusion_trainer.diffusion_nodes.lora_nodes import TrainLoRANode

    latents, positive = data(options, batch)
    values = {"batch_size": batch, "steps": steps, "rank": 8, "training_dtype": options.dtype,
              "lora_dtype": options.dtype, "gradient_checkpointing": True, "seed": 0}  # fmt: skip
    TrainLoRANode().train(
        model=[make(options)], latents=latents, positive=positive, **{k: [v] for k, v in values.items()})  # fmt: skip


def run_comfyui(options: argparse.Namespace, batch: int, steps: int) -> None:
    import torch
    from comfy_extras.nodes_train import TrainLoraNode

    latents, positive = data(options, batch)
    values = {"batch_size": batch, "grad_accumulation_steps": 1, "steps": steps, "learning_rate": 5e-4, "rank": 8,
              "optimizer": "AdamW", "loss_function": "MSE", "seed": 0, "training_dtype": options.dtype,
              "lora_dtype": options.dtype, "algorithm": "LoRA", "gradient_checkpointing": True,
              "existing_lora": "[None]", "quantized_backward": False, "checkpoint_depth": 1, "offloading": False,
              "bucket_mode": False, "bypass_mode": False}  # fmt: skip
    is_new = hasattr(TrainLoraNode, "execute")
    function = TrainLoraNode.execute if is_new else TrainLoraNode().train
    wanted = inspect.signature(function).parameters
    if is_new:
        given = {name: [value] for name, value in values.items() if name in wanted}
        inputs: dict[str, Any] = {"model": [make(options)], "latents": latents, "positive": positive}
    else:
        given = {name: value for name, value in values.items() if name in wanted}
        inputs = {"model": make(options), "positive": [entry for one in positive for entry in one],
                  "latents": {"samples": torch.cat([latent["samples"] for latent in latents])}}  # fmt: skip
    function(**inputs, **given)


class Clock:
    """When the model was called, in seconds; the GPU has done by then what came before."""

    def __init__(self, gpu: bool) -> None:
        self.gpu, self.at = gpu, list[float]()

    def install(self) -> None:
        """Has every model of ComfyUI tell when it is called."""
        import comfy.model_base

        usual = comfy.model_base.BaseModel.apply_model

        def timed(model: Any, *args: Any, **kwargs: Any) -> Any:
            self.tick()
            return usual(model, *args, **kwargs)

        comfy.model_base.BaseModel.apply_model = timed

    def tick(self) -> None:
        import torch

        if self.gpu:
            torch.cuda.synchronize()
        self.at.append(time.perf_counter())


class Memory:
    """The peak since the start of a turn, in MiB."""

    def __init__(self, gpu: bool) -> None:
        self.gpu, self.before = gpu, 0

    def start(self) -> None:
        import torch

        gc.collect()
        if self.gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            self.before = psutil.Process().memory_info().rss

    def peak(self) -> int:
        import torch

        if self.gpu:
            return (torch.cuda.max_memory_allocated() - self.before) // 2**20
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text("ascii"))
        assert found is not None
        return (int(found[1]) * 1024 - self.before) // 2**20


def turn(
    function: Any, options: argparse.Namespace, batch: int, clock: Clock, memory: Memory
) -> tuple[list[float], int]:
    """Seconds of each step that counts, and the peak of memory."""
    import comfy.model_management as management
    import torch

    memory.start()
    clock.at.clear()
    with torch.inference_mode(), contextlib.redirect_stderr(io.StringIO()):
        function(options, batch, options.steps + 2)
        peak = memory.peak()
        management.unload_all_models()
    calls = len(clock.at) // (options.steps + 2)  # a step may call the model more than once
    begins = clock.at[::calls]
    return [after - before for before, after in itertools.pairwise(begins)][1:], peak


def main() -> int:
    options = arguments()
    clock, memory = Clock(options.gpu), Memory(options.gpu)
    with tempfile.TemporaryDirectory() as folder:
        from comfy_checks import enter_comfyui

        for name in ("custom_nodes", "models", "input", "output/loras", "temp", "user"):
            (Path(folder) / name).mkdir(parents=True)
        os.chdir(os.environ["COMFYUI_DIR"])
        enter_comfyui(Path(folder), cpu=not options.gpu, dynamic=options.dynamic)
        clock.install()
        nodes = {"comfyui": run_comfyui, "ours": run_ours}
        for batch in options.batch:
            seconds: dict[str, list[float]] = {name: [] for name in nodes}
            peaks: dict[str, int] = dict.fromkeys(nodes, 0)
            for _ in range(options.rounds):
                for name, function in nodes.items():
                    took, peak = turn(function, options, batch, clock, memory)
                    seconds[name] += took
                    peaks[name] = max(peaks[name], peak)
            sys.stdout.write(json.dumps(summary(batch, seconds, peaks)) + "\n")
            sys.stdout.flush()
    return 0


def summary(batch: int, seconds: dict[str, list[float]], peaks: dict[str, int]) -> dict[str, Any]:
    """What one batch size came to."""
    told: dict[str, Any] = {"batch": batch}
    for kind, of in (("median", statistics.median), ("least", min)):
        told |= {f"{name}_{kind}_s": round(of(values), 4) for name, values in seconds.items()}
        told[f"times_faster_{kind}"] = round(of(seconds["comfyui"]) / of(seconds["ours"]), 2)
    return told | {f"{name}_peak_mib": peak for name, peak in peaks.items()}


if __name__ == "__main__":
    sys.exit(main())
