"""Speed and memory of TrainLoRANode against ComfyUI's own TrainLoraNode, at the same settings.

    COMFYUI_DIR=... $COMFYUI_PYTHON benchmarks/train_lora_node.py [--family wan] [--width 512] [--layers 4]
        [--size 32] [--batch 1 4] [--dtype bf16 fp32] [--checkpointing on off] [--steps 4] [--rounds 5]
        [--gpu [--dynamic]]
    ... --all [--gpu] [--small]

The model is ComfyUI's own with random weights. Both nodes train rank 8 with AdamW, with as many captions as pictures,
and no gradient is clipped, which ComfyUI's node never does.
They take turns, so that what else the machine does hits both. A step lasts from one call of the model to the next; the
first one of each turn is not counted. On the CPU its seconds are those of the processor, on one thread. Prints one line
of JSON for each setting.

Memory is counted by torch's allocator in a turn of its own, in MiB: the peak of the whole node beyond the model that it
was given, and the peak of the steps beyond what was held when the first one began. ``restored`` tells whether, when
the node is done and its outputs are gone, the model's weights are as they were, bit for bit, and no memory is held.

``--all`` measures one model of each family and a larger one, each in a process of its own; on a GPU also with
ComfyUI's dynamic VRAM, where it has that. ``--small`` shows in short that all of it works.
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
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
FAMILIES = ("sdxl", "flux", "wan", "qwen")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", default="wan", choices=FAMILIES)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--size", type=int, default=32, help="side of the latents")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--dtype", nargs="+", default=["bf16"], choices=["bf16", "fp32"])
    parser.add_argument("--checkpointing", nargs="+", default=["on"], choices=["on", "off"])
    parser.add_argument("--steps", type=int, default=4, help="steps counted in each turn")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each node")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--dynamic", action="store_true", help="with ComfyUI's dynamic VRAM")
    parser.add_argument("--all", action="store_true", help="one model of each family and a larger one")
    parser.add_argument("--small", action="store_true", help="as little as shows that it works")
    return parser.parse_args()


def sizes(family: str, width: int, layers: int) -> dict[str, Any]:
    heads = width // 128
    return {
        "sdxl": {"model_channels": width // 2, "transformer_depth": [0, layers], "transformer_depth_middle": layers,
                 "transformer_depth_output": [0, 0, layers, layers], "num_head_channels": 64},
        "wan": {"dim": width, "num_heads": heads, "ffn_dim": 4 * width, "num_layers": layers},
        "flux": {"hidden_size": width, "num_heads": heads, "depth": layers, "depth_single_blocks": 2 * layers},
        "qwen": {"num_attention_heads": heads, "num_layers": layers},
    }[family]  # fmt: skip


def make(options: argparse.Namespace, dtype: str, **_: Any) -> Any:
    """The model; ComfyUI's node makes its own copy by calling this."""
    import comfy_miniatures as mini
    import torch

    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    device = "cuda" if options.gpu else "cpu"
    shape = sizes(options.family, options.width, options.layers)
    model = mini.make_model(options.family, kind, 1, random_on=device, **shape)
    model.cached_patcher_init = (make, (options, dtype))
    return model


def data(options: argparse.Namespace, batch: int) -> tuple[list[Any], list[Any]]:
    import comfy_miniatures as mini

    latents = [mini.latents(options.family, 1, n, options.size, options.size) for n in range(batch)]
    if options.family in ("wan", "qwen"):
        for latent in latents:
            latent["samples"] = latent["samples"].unsqueeze(2)
    return latents, [mini.conditioning(options.family, n, tokens=64) for n in range(batch)]


def run_ours(model: Any, options: argparse.Namespace, setting: dict[str, Any], steps: int) -> None:
    from diffusion_trainer.diffusion_nodes.lora_nodes import TrainLoRANode

    latents, positive = data(options, setting["batch"])
    values = {"batch_size": setting["batch"], "steps": steps, "rank": 8, "training_dtype": setting["dtype"],
              "lora_dtype": setting["dtype"], "gradient_checkpointing": setting["checkpointing"] == "on",
              "gradient_clipping": 0.0, "seed": 0}  # fmt: skip
    TrainLoRANode().train(model=[model], latents=latents, positive=positive, **{k: [v] for k, v in values.items()})


def run_comfyui(model: Any, options: argparse.Namespace, setting: dict[str, Any], steps: int) -> None:
    import torch
    from comfy_extras.nodes_train import TrainLoraNode

    latents, positive = data(options, setting["batch"])
    values = {"batch_size": setting["batch"], "grad_accumulation_steps": 1, "steps": steps, "learning_rate": 5e-4,
              "rank": 8, "optimizer": "AdamW", "loss_function": "MSE", "seed": 0,
              "training_dtype": setting["dtype"], "lora_dtype": setting["dtype"], "algorithm": "LoRA",
              "gradient_checkpointing": setting["checkpointing"] == "on", "existing_lora": "[None]",
              "quantized_backward": False, "checkpoint_depth": 1, "offloading": False, "bucket_mode": False,
              "bypass_mode": False}  # fmt: skip
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
    function(**inputs, **given)


NODES = {"comfyui": run_comfyui, "ours": run_ours}


class Calls:
    """When the model was called, and what else is to happen then."""

    def __init__(self, gpu: bool) -> None:
        self.gpu, self.at = gpu, list[float]()
        self.first: Callable[[], None] = lambda: None

    def install(self) -> None:
        """Has every model of ComfyUI tell when it is called."""
        import comfy.model_base

        usual = comfy.model_base.BaseModel.apply_model

        def timed(model: Any, *args: Any, **kwargs: Any) -> Any:
            if not self.at:
                self.first()
            self.at.append(self.now())
            return usual(model, *args, **kwargs)

        comfy.model_base.BaseModel.apply_model = timed

    def now(self) -> float:
        """Seconds: of the processor, or on the clock when the GPU has done what it was given."""
        import torch

        if not self.gpu:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()


# -- memory --------------------------------------------------------------------------------------------------------


class Memory:
    """Peaks of torch's allocator in bytes: of all, and from ``mark`` on beyond what was held then."""

    def __init__(self, gpu: bool) -> None:
        self.gpu, self.whole, self.steps = gpu, 0, 0

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        import torch

        gc.collect()
        if self.gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = self._at_mark = torch.cuda.memory_allocated()
            yield
            last = torch.cuda.max_memory_allocated()
            self.steps, self.whole = last - self._at_mark, max(last - before, self.whole)
            return
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
            yield
        self._read(seen.profiler.kineto_results.experimental_event_tree())

    def mark(self) -> None:
        """From here on the steps count."""
        import torch

        if self.gpu:
            self.whole = torch.cuda.max_memory_allocated() - self._at_mark
            torch.cuda.reset_peak_memory_stats()
            self._at_mark = torch.cuda.memory_allocated()
            return
        with torch.profiler.record_function("the first step"):
            pass

    def _read(self, tree: Any) -> None:
        events, waiting = [], list(tree)
        while waiting:
            event = waiting.pop()
            waiting += event.children
            sized = type(event.extra_fields).__name__ == "_ExtraFields_Allocation"
            if sized or event.name == "the first step":
                events.append((event.start_time_ns, event.extra_fields.alloc_size if sized else None))
        held, at_mark, high = 0, 0, 0
        for _, size in sorted(events, key=lambda event: event[0]):
            held += size or 0
            if size is None:
                at_mark = high = held
            self.whole, high = max(self.whole, held), max(high, held)
        self.steps = high - at_mark


def checksum(model: Any, gpu: bool) -> list[int]:
    """Differs when a bit of the weights does."""
    import torch

    device = "cuda" if gpu else "cpu"
    return [int(value.detach().to(device).contiguous().view(torch.uint8).long().sum()) + len(value.untyped_storage())
            for value in model.model.state_dict().values()]  # fmt: skip


def memory_of(name: str, options: argparse.Namespace, setting: dict[str, Any], calls: Calls) -> dict[str, Any]:
    """Peaks of a short training, and whether everything is as before it."""
    import comfy.model_management as management
    import torch

    memory = Memory(options.gpu)
    model = make(options, setting["dtype"])
    before, held = checksum(model, options.gpu), torch.cuda.memory_allocated() if options.gpu else 0
    calls.at.clear()
    calls.first = memory.mark
    with memory.counted(), quiet():
        NODES[name](model, options, setting, 3)
    calls.first = lambda: None
    gc.collect()
    same = checksum(model, options.gpu) == before
    del model
    management.unload_all_models()
    gc.collect()
    freed = not options.gpu or torch.cuda.memory_allocated() <= held
    return {"peak_mib": round(memory.whole / 2**20, 1), "steps_peak_mib": round(memory.steps / 2**20, 1),
            "restored": same and freed}  # fmt: skip


# -- speed ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """As ComfyUI's executor calls nodes; progress bars write nothing."""
    import torch

    with torch.inference_mode(), contextlib.redirect_stderr(io.StringIO()):
        yield


def turn(name: str, options: argparse.Namespace, setting: dict[str, Any], calls: Calls) -> list[float]:
    """Seconds of each step that counts."""
    import comfy.model_management as management

    gc.collect()
    calls.at.clear()
    with quiet():
        NODES[name](make(options, setting["dtype"]), options, setting, options.steps + 2)
        management.unload_all_models()
    each = len(calls.at) // (options.steps + 2)  # a step may call the model more than once
    return [after - before for before, after in itertools.pairwise(calls.at[::each])][1:]


def measure(options: argparse.Namespace, setting: dict[str, Any], calls: Calls) -> dict[str, Any]:
    """One line of what is printed."""
    import comfy.model_management as management

    told: dict[str, Any] = {"family": options.family, "width": options.width, "dynamic": options.dynamic, **setting}
    seconds: dict[str, list[float]] = {name: [] for name in NODES}
    try:
        seconds["comfyui"] += turn("comfyui", options, setting, calls)
    except RuntimeError as error:  # it cannot train everything
        del seconds["comfyui"]
        told["comfyui_failed"] = str(error)[:160]
        management.unload_all_models()
    for _ in range(options.rounds):
        for name, so_far in seconds.items():
            so_far += turn(name, options, setting, calls)
    for kind, of in (("median", statistics.median), ("least", min)):
        told |= {f"{name}_{kind}_s": round(of(values), 4) for name, values in seconds.items()}
        if len(seconds) == len(NODES):
            told[f"times_faster_{kind}"] = round(of(seconds["comfyui"]) / of(seconds["ours"]), 2)
    for name in seconds:
        told |= {f"{name}_{key}": value for key, value in memory_of(name, options, setting, calls).items()}
    return told


def everything(options: argparse.Namespace) -> int:
    """Measures all there is, each model in a process of its own; how many of them failed."""
    small = ["--size=8", "--batch=1", "--rounds=1", "--steps=1"] if options.small else []
    runs = [[f"--family={family}", "--width=256", "--layers=2"] for family in FAMILIES]
    runs.append(["--family=wan", *(["--width=256", "--layers=2"] if options.small or not options.gpu else
                                   ["--width=3072", "--layers=12", "--size=64", "--rounds=3"])])  # fmt: skip
    ways = [["--gpu"], ["--gpu", "--dynamic"]] if options.gpu else [[]]
    failed = 0
    for way, run in itertools.product(ways, runs):
        command = [sys.executable, str(Path(__file__).resolve()), "--checkpointing", "on", "off", *run, *small, *way]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        sys.stdout.write(done.stdout)
        if done.returncode:
            failed += 1
            sys.stdout.write(json.dumps({"failed": command[2:], "told": done.stderr[-2000:]}) + "\n")
        sys.stdout.flush()
    return failed


def main() -> int:
    options = arguments()
    if options.all:
        return everything(options)
    calls = Calls(options.gpu)
    with tempfile.TemporaryDirectory() as folder:
        from comfy_checks import enter_comfyui

        for name in ("custom_nodes", "models", "input", "output/loras", "temp", "user"):
            (Path(folder) / name).mkdir(parents=True)
        os.chdir(os.environ["COMFYUI_DIR"])
        enter_comfyui(Path(folder), cpu=not options.gpu, dynamic=options.dynamic)
        calls.install()
        for batch, dtype, checkpointing in itertools.product(options.batch, options.dtype, options.checkpointing):
            setting = {"batch": batch, "dtype": dtype, "checkpointing": checkpointing}
            sys.stdout.write(json.dumps(measure(options, setting, calls)) + "\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
