"""Measures the dataset side on many tiny pictures: first scan, second start with a warm cache, memory.

    python benchmarks/dataset.py --count 100000

Pictures and the cache are made in a temporary folder. The values of the cache are tiny, as if encoded,
since what is measured is all but the encoders. The second start is a process of its own.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
CAPTION = "a tiny picture of number {n}, on a plain ground"


def module(name: str) -> Any:
    """A module of this package."""
    sys.path.insert(0, str(ROOT))
    importlib.import_module("train").load_package()
    return importlib.import_module(f"diffusion_trainer.{name}")


def write_pictures(folder: Path, count: int) -> None:
    """``count`` pictures of 5 shapes, each with a caption."""
    from PIL import Image

    folder.mkdir(parents=True)
    buffers = []
    for width, height in ((64, 64), (96, 64), (64, 96), (80, 64), (64, 80)):
        buffer = io.BytesIO()
        Image.new("RGB", (width, height), "teal").save(buffer, "png")
        buffers.append(buffer.getvalue())
    for n in range(count):  # bytes behind the end of a PNG are ignored, and make each another file
        (folder / f"{n:07}.png").write_bytes(buffers[n % 5] + str(n).encode())
        (folder / f"{n:07}.txt").write_text(CAPTION.format(n=n), "utf-8")


def start(root: Path, fill: bool) -> dict[str, float]:
    """What a start does before training; seconds of each part."""
    import torch

    begin = time.perf_counter()
    dataset, settings = module("utils.dataset"), module("utils.dataset_settings")
    cache, sampler, index = module("utils.cache"), module("utils.sampler"), module("utils.index")
    flux, readers = module("models.flux").Flux, module("utils.readers")
    times = {"imports": time.perf_counter() - begin}

    class Tiny(flux):  # type: ignore[misc, valid-type]
        def identity(self, part: str) -> str:
            return part

        def load_vae(self, device: Any) -> Any:
            return None

        def load_text_encoder(self, name: str, device: Any) -> Any:
            return None

        def encode_media(self, vae: Any, pixels_NCFHW: Any, generators: Any) -> Any:
            return {"latents": pixels_NCFHW[:, :, 0, ::8, ::8].bfloat16()}

        def encode_text(self, name: str, encoder: Any, captions: Any) -> Any:
            return {name: torch.zeros(len(captions), 8)}

    def timed(name: str, work: Any) -> Any:
        begin = time.perf_counter()
        value = work()
        times[name] = time.perf_counter() - begin
        return value

    options = settings.parse_dataset_settings({"resolutions": [64], "directory": [{"path": str(root / "data")}]})
    family = Tiny(flux.Config(type="flux"))
    with readers.Readers(readers.usual_count()) as pool:
        files = index.Index(root / "cache" / "index.sqlite", pool)
        samples, report = timed("scan", lambda: dataset.scan(options, files, family))
        timed("remember", lambda: dataset.remember(root / "cache" / "scan", samples))
        timed("keep", lambda: dataset.keep_for_good(samples))
        store = timed("open cache", lambda: cache.Cache(root / "cache", family, samples))
        timed("fill" if fill else "look for missing", lambda: store.fill(torch.device("cpu"), 64, pool))
    timed("note use", lambda: store.note_use("benchmark"))
    order = sampler.Sampler(samples, 4, 0)
    timed("plan 1 epoch", lambda: order.epoch(0))
    timed("count 1000 epochs", lambda: order.total_steps(1000))
    assert report.pictures == len(samples)
    return times


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000, help="pictures")
    parser.add_argument("--folder", type=Path, help="where the pictures and the cache go; kept")
    parser.add_argument("--start", choices=("first", "second"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.start:
        begin = time.perf_counter()
        times = start(arguments.folder, arguments.start == "first")
        total = time.perf_counter() - begin
        peak = _peak_memory() / 2**20
        cpu = os.times()
        parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in times.items())
        print(
            f"{arguments.start} start: {total:.1f} s, {peak:.0f} MiB ({parts}); CPU {cpu.user + cpu.system:.1f} s, and "
            f"{cpu.children_user + cpu.children_system:.1f} s of readers",
            flush=True,
        )
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        if not (folder / "data").is_dir():
            write_pictures(folder / "data", arguments.count)
            time.sleep(2.1)  # files that have just been written are not trusted to stay
        print(f"{arguments.count} pictures, {os.cpu_count()} cores", flush=True)
        for which in ("first", "second"):
            command = [sys.executable, __file__, "--folder", str(folder), "--start", which]
            if subprocess.run(command, check=False).returncode:
                return 1
    return 0


def _peak_memory() -> int:
    try:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    except ImportError:  # Windows
        return int(psutil.Process().memory_info().peak_wset)


if __name__ == "__main__":
    sys.exit(main())
