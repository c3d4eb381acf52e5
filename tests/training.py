"""Real trainings of miniatures, for the tests of trainer, engine and families."""

import gc
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import av
import torch
from deepspeed.utils import groups as deepspeed_groups
from diffusion_trainer.models import families
from diffusion_trainer.utils.config import write_toml
from diffusion_trainer.utils.dataset_settings import DatasetSettings, parse_dataset_settings
from diffusion_trainer.utils.run_folder import Command, RunFolder
from diffusion_trainer.utils.settings import parse_train_settings
from diffusion_trainer.utils.trainer import Trainer, prepare_folder
from diffusion_trainer.utils.world import World, join_world
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed import ProcessGroup, distributed_c10d

ROOT = Path(__file__).resolve().parent.parent


@cache
def world() -> World:
    """The world of one that this test process is."""
    joined = join_world()
    del os.environ["MASTER_PORT"]  # processes that tests start must not take this one's
    return joined


@contextmanager
def closed_groups() -> Iterator[None]:
    """Ends the process groups that are made within. A run leaves them to the end of its process, but here hundreds
    of runs share one, and gloo has three threads for each group, of which one polls."""
    world()
    known = set(distributed_c10d._world.pg_map)
    try:
        yield
    finally:
        kept = {value for value in vars(deepspeed_groups).values() if isinstance(value, ProcessGroup)}
        for group in set(distributed_c10d._world.pg_map) - known - kept:
            torch.distributed.destroy_process_group(group)
        gc.collect()  # engines refer to themselves and to their groups


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write_pictures(folder: Path, count: int = 6) -> Path:
    """Pictures of two shapes with captions."""
    folder.mkdir(parents=True)
    chance = random.Random(count)
    for number in range(count):
        size = (96, 64) if number % 2 else (80, 80)
        picture = Image.new("RGB", size, (chance.randrange(256), 80, chance.randrange(256)))
        ImageDraw.Draw(picture).ellipse((8, 8, 40 + number, 50), fill=(chance.randrange(256), 200, 30))
        picture.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture of ball {number}", "utf-8")
    return folder


def write_clips(folder: Path, count: int = 4, frames: int = 9, fps: int = 16) -> Path:
    """Clips of a ball that moves, with captions; they may lie beside pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        with av.open(str(folder / f"clip{number}.mp4"), "w") as container:
            stream: Any = container.add_stream("mpeg4", rate=fps)
            stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 64, "yuv420p", 5_000_000
            for time in range(frames):
                picture = Image.new("RGB", (64, 64), (40 * number, 80, 160))
                left = 4 * time + 3 * number
                ImageDraw.Draw(picture).ellipse((left, 8, left + 24, 32), fill=(200, 200, 50 * number))
                container.mux(stream.encode(av.VideoFrame.from_image(picture)))
            container.mux(stream.encode())
        (folder / f"clip{number}.txt").write_text(f"video of ball {number}", "utf-8")
    return folder


class Bench:
    """A folder with a miniature model, pictures and a shared cache, and trainings in it."""

    def __init__(self, root: Path, family: str = "flux", **variant: Any) -> None:
        """``variant``: arguments of the family's `write_miniature`."""
        self.root = root
        self.model = families()[family].write_miniature(root / "model", **variant)
        self.pictures = write_pictures(root / "pictures")

    def settings(self, **changes: Any) -> dict[str, Any]:
        """Tables of a short training; ``changes`` override keys, tables are merged."""
        base: dict[str, Any] = {
            "output_dir": str(self.root / "out"),
            "cache_dir": str(self.root / "cache"),
            "epochs": 4,
            "micro_batch_size_per_gpu": 2,
            "seed": 7,
            "save_dtype": "float32",
            "steps_per_print": 1000,
            "model": self.model,
            "adapter": {"type": "lora", "rank": 4},
            "optimizer": {"type": "adamw", "lr": 2e-3},
        }
        for key, value in changes.items():
            base[key] = {**base.get(key, {}), **value} if isinstance(value, dict) else value
        return {key: value for key, value in base.items() if value is not None}

    def dataset(self, **changes: Any) -> dict[str, Any]:
        """Tables of the dataset."""
        return {"resolutions": [64], "directory": [{"path": str(self.pictures)}], **changes}

    def parsed_dataset(self, **changes: Any) -> DatasetSettings:
        """The dataset's settings."""
        return parse_dataset_settings(self.dataset(**changes))

    def train(
        self,
        folder: RunFolder | None = None,
        resume: bool = False,
        dataset: dict[str, Any] | None = None,
        **changes: Any,
    ) -> "Result":
        """Trains in this process."""
        settings = parse_train_settings(self.settings(**changes))
        tables = parse_dataset_settings(dataset or self.dataset())
        folder = folder or RunFolder.create(self.root / "out")
        prepare_folder(settings, tables, folder)
        with closed_groups():
            Trainer(settings, tables, world(), folder, resume).run()
        return Result(folder)

    def launch(
        self,
        num_processes: int,
        *,
        resume: bool = False,
        folder: RunFolder | None = None,
        timeout: float = 120,
        **changes: Any,
    ) -> "Result":
        """Trains through DeepSpeed's launcher."""
        folder = folder or RunFolder.create(self.root / "out")
        write_toml(folder.train_toml, self.settings(**changes))
        write_toml(folder.dataset_toml, self.dataset())
        command = [
            sys.executable,
            "-m",
            "deepspeed.launcher.runner",
            f"--num_gpus={num_processes}",
            f"--master_port={free_port()}",
            str(ROOT / "train.py"),
            "--deepspeed",
            "--config",
            str(folder.train_toml),
            "--run_dir",
            str(folder.path),
        ]
        done = subprocess.run(
            command + ["--resume_from_checkpoint"] * resume, capture_output=True, timeout=timeout, check=False
        )
        assert done.returncode == 0, done.stderr.decode("utf-8", "replace")[-3000:]
        return Result(folder)


class Result:
    """What a training left in its run folder."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.status = folder.read_status()

    def curve(self, name: str) -> list[float]:
        """Points of ``train/<name>`` in TensorBoard's log."""
        return self.points(f"train/{name}")

    def points(self, name: str) -> list[float]:
        """Points of a curve by its whole name."""
        return [point.value for point in self._scalars(name)]

    def places(self, name: str) -> list[int]:
        """Where they lie."""
        return [point.step for point in self._scalars(name)]

    def _scalars(self, name: str) -> list[Any]:
        return sorted(self.events().Scalars(name), key=lambda point: point.step)

    def events(self) -> EventAccumulator:
        """TensorBoard's log."""
        return EventAccumulator(str(self.folder.path), size_guidance={"scalars": 0, "images": 0}).Reload()

    def lora(self) -> dict[str, torch.Tensor]:
        """Tensors of the last export."""
        return load_file(Path(self.status.exports[-1]) / "adapter_model.safetensors")


class StopsAfter(RunFolder):
    """A run folder in which someone leaves ``commands`` when the ``step``-th step is done."""

    def __init__(
        self, path: Path, step: int, commands: Sequence[Command] = ("save_quit",), by_signal: bool = False
    ) -> None:
        super().__init__(path)
        self._left, self._commands, self._by_signal = step, commands, by_signal

    def take_requests(self) -> Iterator[Command]:
        self._left -= self.read_status().state == "training"
        if self._left == 0 and self._by_signal:
            signal.raise_signal(signal.SIGTERM)  # heard at the end of the next step
        elif self._left == 0:
            for command in self._commands:
                self.request(command)
        yield from super().take_requests()
