"""Seconds per step, peak memory, FLOPs utilisation and the share of time in which the GPU does not compute the model,
of a training at real size, without model files.

    python benchmarks/train_step.py [--width 1024 --height 1024 --batch 1 --rank 16 --steps 20] [setting ...]
    python benchmarks/train_step.py --family wan-14b --width 832 --height 480 --frames 81 [setting ...]
    python benchmarks/train_step.py --gpus 2 [setting ...]

Weights are random and made on the GPU; latents and embeddings are random and come through the trainer's
own loader. Everything else is what ``train.py`` does: loader, engine, optimizer, curves, status file.
Each setting runs in a process of its own. Settings are comma-separated ``key=value`` pairs of train.toml,
such as ``activation_checkpointing=false,compile=true``; "" is the default.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any, ClassVar

from arithmetic import StepProfile, step_flops, utilisation
from subjects import SUBJECTS, Size, Subject

ROOT = Path(__file__).resolve().parent.parent
NUMBERS = {"width": 1024, "height": 1024, "frames": 1, "batch": 1, "rank": 16, "steps": 20, "gpus": 1}
"""Options of the command, and their defaults."""
MIN_STEPS = 8


def load_package() -> None:
    """This folder as a package of one fixed name."""
    spec = importlib.util.spec_from_file_location("train_entry", ROOT / "train.py")
    assert spec and spec.loader
    entry = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(entry)
    entry.load_package()


def random_cache(subject: Subject, size: Size) -> Any:
    """Stands for `utils.cache.Cache`: 64 samples whose latents and embeddings are random."""
    import torch
    from diffusion_trainer.utils.buckets import Bucket
    from diffusion_trainer.utils.cache import Encoded
    from diffusion_trainer.utils.dataset import Sample
    from diffusion_trainer.utils.index import Media
    from diffusion_trainer.utils.media import Properties, Source

    class RandomCache:
        samples: ClassVar = [
            Sample(
                Media(Source(f"{n}"), str(n), Properties(size.width, size.height)),
                Bucket(size.width, size.height, size.frames),
            )
            for n in range(64)
        ]

        def load(self, sample: Sample, view: Any) -> Encoded:
            generator = torch.Generator().manual_seed(int(sample.media.digest))
            media, text = (
                {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
                for shapes in (subject.media, subject.text)
            )
            tokens = {n: torch.randint(49408, shape, generator=generator) for n, shape in subject.tokens.items()}
            return Encoded(media, text | tokens)

    return RandomCache()


def train_table(arguments: argparse.Namespace, subject: Subject, changes: dict[str, Any], folder: Path) -> Any:
    """What a ``train.toml`` would hold."""
    values = {
        "output_dir": str(folder),
        "epochs": 1000,
        "max_steps": arguments.steps,
        "micro_batch_size_per_gpu": arguments.batch,
        "steps_per_print": 10**6,
        "model": {"type": subject.type},
        "adapter": {"type": "lora", "rank": arguments.rank},
        "optimizer": {"type": "adamw", "lr": 1e-4},
    }
    for key, value in changes.items():
        table, _, name = key.rpartition(".")
        (values[table] if table else values)[name] = value
    return values


def make_trainer(arguments: argparse.Namespace, changes: dict[str, Any], world: Any, folder: Path) -> Any:
    """A trainer whose model and data are random; on a GPU it has a ``profile`` of its last steps.

    Args:
        folder: The same on all ranks, as the processes of ``world`` are called.
    """
    from diffusion_trainer.utils.dataset_settings import parse_dataset_settings
    from diffusion_trainer.utils.preparation import Data
    from diffusion_trainer.utils.run_folder import RunFolder
    from diffusion_trainer.utils.settings import parse_train_settings
    from diffusion_trainer.utils.trainer import Trainer, prepare_folder

    class Benchmark(Trainer):
        profile: StepProfile | None = None

        def _build(self, data: Data) -> Any:
            model = super()._build(data)
            if self.profile:
                model.engine.train_batch = self.profile.around(model.engine.train_batch)
            return model

    size = Size(arguments.width, arguments.height, arguments.frames, arguments.small)
    subject = SUBJECTS[arguments.family](size, world.device)
    settings = parse_train_settings(train_table(arguments, subject, changes, folder))
    dataset = parse_dataset_settings({"directory": [{"path": "/nowhere"}]})
    run = RunFolder(world.share(RunFolder.create(folder).path if world.rank == 0 else None))
    if world.rank == 0:
        prepare_folder(settings, dataset, run)
    trainer = Benchmark(settings, dataset, world, run)
    trainer.family = subject.family(settings.model)
    trainer.preparation.run = lambda: Data(random_cache(subject, size), {}, {}, [])
    if world.device.type == "cuda":
        trainer.profile = StepProfile(arguments.steps)
    return trainer


def read_steps(run: Path) -> list[float]:
    """Seconds of each step, from TensorBoard's log."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    return [point.value for point in events.Scalars("train/step_seconds")]


def measure(arguments: argparse.Namespace, setting: str) -> dict[str, Any]:
    """Runs one setting in this process, which may be one of several; memory is that of the fullest GPU."""
    import torch

    load_package()
    from diffusion_trainer.utils.world import join_world

    world = join_world()
    changes = dict(pair.split("=", 1) for pair in setting.split(",") if pair)
    changes = {key: tomllib.loads(f"v = {value}")["v"] for key, value in changes.items()}
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(arguments, changes, world, Path(world.share(folder)))
        trainer.run()
        seconds = read_steps(trainer.folder.path)[max(3, arguments.steps // 3) : -StepProfile.STEPS]
        world.barrier()
    cuda = torch.cuda.is_available()
    samples = trainer.preparation.run().train.samples
    row = {
        "setting": setting or "default",
        "seconds": sum(seconds) / len(seconds),
        "median": sorted(seconds)[len(seconds) // 2],
        "loss": trainer.control.status.loss,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "planned": max(world.gather(trainer._planned(samples))) / 2**30,
    }
    batch = trainer._global_batch(samples[0].bucket)
    flops = step_flops(
        trainer.family,
        (arguments.width, arguments.height, arguments.frames),
        batch,
        trainer.settings.adapter is not None,
    )
    used = utilisation(flops / world.size, row["median"], row["device"])
    row |= {"tflop": flops / 1e12, "used": used, "samples": batch / row["median"]}
    if cuda:
        row["peak"] = max(world.gather(torch.cuda.max_memory_allocated())) / 2**30
        row["reserved"] = max(world.gather(torch.cuda.max_memory_reserved())) / 2**30
        row["outside"] = trainer.profile.outside()
    if cuda and arguments.profile and world.rank == 0:
        for milliseconds, count, name in trainer.profile.rows()[:60]:
            print(f"{milliseconds:8.2f} ms {count:5} x  {name[:90]}", file=sys.stderr)
        gaps = trainer.profile.gaps()
        print(f"{sum(gap[0] for gap in gaps):8.2f} ms nothing ran, most of it between", file=sys.stderr)
        for milliseconds, before, after in gaps[:15]:
            print(f"{milliseconds:8.2f} ms  {before[:60]}  and  {after[:60]}", file=sys.stderr)
    world.leave()
    return row if world.rank == 0 else {}


COLUMNS = {
    "seconds": ("s/step", "8.3f"), "median": ("median", "8.3f"), "samples": ("sample/s", "8.3f"),
    "peak": ("peak GiB", "9.1f"), "planned": ("planned", "8.1f"), "reserved": ("reserved", "9.1f"),
    "tflop": ("TFLOP", "8.4g"), "used": ("of peak", "8.0%"), "outside": ("outside", "8.1%"),
    "loss": ("loss", "8.4f"), "setting": (" setting", ""),
}  # fmt: skip
"""Of the table: heading and format by value. What was not measured is left blank."""


def line(row: dict[str, Any]) -> str:
    """A line of the table; of an empty row, its headings."""
    cells = []
    for name, (heading, form) in COLUMNS.items():
        width = int(form.partition(".")[0] or 0)
        value = row.get(name) if row else heading
        cells.append(
            f"{'' if value is None else value:>{width}}" if isinstance(value, str | None) else f"{value:{form}}"
        )
    return " ".join(cells)


def main() -> None:
    """Runs all settings and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "settings", nargs="*", default=["activation_checkpointing=true", "activation_checkpointing=false"]
    )
    parser.add_argument("--family", choices=list(SUBJECTS), default="flux")
    for name, default in NUMBERS.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--profile", action="store_true", help="print the kernels of two steps, and where none ran")
    parser.add_argument("--small", action="store_true", help="two blocks of each kind, to try the command itself")
    parser.add_argument("--one", action="store_true", help="run the one setting here and print JSON")
    arguments = parser.parse_args()
    if arguments.steps < MIN_STEPS:
        parser.error(f"--steps must be at least {MIN_STEPS}: the first three and the last two are not timed")
    if arguments.one:
        row = measure(arguments, arguments.settings[0])
        if row:
            print(json.dumps(row))
        return
    print(line({}), flush=True)
    flags = [f"--{name}={getattr(arguments, name)}" for name in ("family", *NUMBERS)]
    for setting in arguments.settings:
        switches = [f"--{name}" for name in ("small", "profile") if getattr(arguments, name)]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={arguments.gpus}"]
        start = [sys.executable, *(launcher if arguments.gpus > 1 else [])]
        command = [*start, __file__, "--one", *flags, *switches, "--", setting]
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=None if arguments.profile else subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode:
            print(f"failed: {setting}\n{(done.stderr or '')[-1500:]}", flush=True)
            continue
        row = json.loads(done.stdout.strip().splitlines()[-1])
        print(line({**row, "setting": f" {row['setting']}"}), flush=True)


if __name__ == "__main__":
    main()
