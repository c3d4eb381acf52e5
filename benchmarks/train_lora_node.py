"""Seconds per step and memory of TrainLoRANode against ComfyUI's own TrainLoraNode, at the same settings.

    COMFYUI_DIR=... $COMFYUI_PYTHON benchmarks/train_lora_node.py [--family wan] [--width 1024] [--layers 8]
        [--size 32] [--batch 1 4] [--steps 6] [--dtype bf16] [--gpu]

The model is ComfyUI's own with random weights. Both nodes train rank 8 with AdamW and gradient checkpointing, with
as many captions as pictures. Prints one line of JSON per node and batch size; the first steps warm up and are not
counted.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", default="wan", choices=["wan", "flux", "qwen"])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--size", type=int, default=32, help="side of the latents")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--gpu", action="store_true")
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


def run_ours(options: argparse.Namespace, batch: int, steps: int) -> float:
    from diffusion_trainer.diffusion_nodes.lora_nodes import TrainLoRANode

    latents, positive = data(options, batch)
    values = {"batch_size": batch, "steps": steps, "rank": 8, "training_dtype": options.dtype,
              "lora_dtype": options.dtype, "gradient_checkpointing": True, "seed": 0}  # fmt: skip
    model = make(options)
    begun = time.perf_counter()
    TrainLoRANode().train(model=[model], latents=latents, positive=positive, **{k: [v] for k, v in values.items()})
    return time.perf_counter() - begun


def run_comfyui(options: argparse.Namespace, batch: int, steps: int) -> float:
    import torch
    from comfy_extras.nodes_train import TrainLoraNode

    latents, positive = data(options, batch)
    values = {"batch_size": batch, "grad_accumulation_steps": 1, "steps": steps, "learning_rate": 5e-4, "rank": 8,
              "optimizer": "AdamW", "loss_function": "MSE", "seed": 0, "training_dtype": options.dtype,
              "lora_dtype": options.dtype, "algorithm": "LoRA", "gradient_checkpointing": True,
              "existing_lora": "[None]", "quantized_backward": False, "checkpoint_depth": 1, "offloading": False,
              "bucket_mode": False, "bypass_mode": False}  # fmt: skip
    model = make(options)
    is_new = hasattr(TrainLoraNode, "execute")
    function = TrainLoraNode.execute if is_new else TrainLoraNode().train
    wanted = inspect.signature(function).parameters
    if is_new:
        given = {name: [value] for name, value in values.items() if name in wanted}
        inputs: dict[str, Any] = {"model": [model], "latents": latents, "positive": positive}
    else:
        given = {name: value for name, value in values.items() if name in wanted}
        inputs = {"model": model, "positive": [entry for one in positive for entry in one],
                  "latents": {"samples": torch.cat([latent["samples"] for latent in latents])}}  # fmt: skip
    begun = time.perf_counter()
    function(**inputs, **given)
    return time.perf_counter() - begun


def measure(function: Any, options: argparse.Namespace, batch: int) -> dict[str, Any]:
    """Seconds per step, from the difference of a short and a long run, and peak GPU memory in MiB."""
    import comfy.model_management as management
    import torch

    def run(steps: int) -> float:
        with torch.inference_mode(), contextlib.redirect_stderr(io.StringIO()):
            seconds = function(options, batch, steps)
            management.unload_all_models()
        return seconds

    run(1)
    if options.gpu:
        torch.cuda.reset_peak_memory_stats()
    short, long = run(2), run(2 + options.steps)
    peak = torch.cuda.max_memory_allocated() // 2**20 if options.gpu else None
    return {"seconds_per_step": round((long - short) / options.steps, 4), "peak_mib": peak}


def main() -> int:
    options = arguments()
    with tempfile.TemporaryDirectory() as folder:
        from comfy_checks import enter_comfyui

        for name in ("custom_nodes", "models", "input", "output/loras", "temp", "user"):
            (Path(folder) / name).mkdir(parents=True)
        os.chdir(os.environ["COMFYUI_DIR"])
        enter_comfyui(Path(folder), cpu=not options.gpu)
        for batch in options.batch:
            found = {}
            for name, function in (("comfyui", run_comfyui), ("ours", run_ours)):
                found[name] = measure(function, options, batch)
                sys.stdout.write(json.dumps({"node": name, "batch": batch, **found[name]}) + "\n")
                sys.stdout.flush()
            ratio = found["comfyui"]["seconds_per_step"] / found["ours"]["seconds_per_step"]
            sys.stdout.write(json.dumps({"batch": batch, "times_faster": round(ratio, 2)}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
