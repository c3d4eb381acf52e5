"""The whole product once, on a miniature model: workflow, training, curve, LoRA, pictures.

    python3 scripts/demo.py [folder]

Makes its environment, writes a miniature Flux and a few pictures, runs the shipped example workflow
through the package's nodes, and shows what came out. About three minutes on two CPU cores, not counting
the installation; a GPU is used where there is one.
"""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from environment import ROOT, prepare

FOLDER = ROOT / "demo_run"
WORKFLOW = ROOT / "example_workflows" / "flux_lora.json"


def write_inputs(base: Path) -> None:
    """A miniature Flux and a picture set with captions, where ComfyUI would have them."""
    from headless import load_package

    load_package()
    from diffusion_trainer.models import families

    model = base / "models" / "diffusers" / "miniature-flux"
    if not model.exists():
        families()["flux"].write_miniature(model)
    pictures = base / "input" / "demo_pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    for number in range(12):
        draw_picture(pictures / f"{number:02}.png", number)


def draw_picture(path: Path, number: int) -> None:
    """One coloured shape on a plain ground, and what it is as a caption."""
    from PIL import Image, ImageDraw

    chance = random.Random(number)
    name, colour = chance.choice([("red", "#d03020"), ("green", "#30a040"), ("blue", "#3050d0"), ("yellow", "#e0c020")])
    shape = chance.choice(["circle", "square"])
    size = (96, 64) if number % 3 else (64, 96)
    picture = Image.new("RGB", size, "#f0ede6")
    box = (size[0] // 2 - 20, size[1] // 2 - 20, size[0] // 2 + 20, size[1] // 2 + 20)
    getattr(ImageDraw.Draw(picture), "ellipse" if shape == "circle" else "rectangle")(box, fill=colour)
    picture.save(path)
    path.with_suffix(".txt").write_text(f"a {name} {shape} on a plain ground", "utf-8")


def read_losses(run: Path) -> list[float]:
    """The loss of every step, from TensorBoard's log."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    return [point.value for point in events.Scalars("train/loss")]


def draw_curve(losses: list[float], path: Path) -> None:
    """The loss over steps, and its running mean, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    window = max(1, len(losses) // 8)
    means = [sum(losses[max(0, n - window + 1) : n + 1]) / min(n + 1, window) for n in range(len(losses))]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(range(1, len(losses) + 1), losses, alpha=0.4, label="each step")
    axes.plot(range(1, len(losses) + 1), means, label=f"mean of {window}")
    axes.set(xlabel="step", ylabel="loss", title="Training loss")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def compare_pictures(run: Path, lora: Path, target: Path) -> float:
    """Makes a picture without and with the LoRA in diffusers' own pipeline; returns their mean difference of 255."""
    import torch
    from diffusers import FluxPipeline
    from diffusion_trainer.utils.settings import load_train_settings
    from PIL import Image, ImageChops, ImageStat

    settings = load_train_settings(run / "train.toml")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = FluxPipeline.from_pretrained(settings.model.diffusers_path, dtype=torch.float32).to(device)
    pipe.set_progress_bar_config(disable=True)
    arguments: dict[str, Any] = {
        "prompt": "a red circle on a plain ground",
        "height": 64,
        "width": 96,
        "num_inference_steps": 8,
    }
    before = pipe(**arguments, generator=torch.Generator().manual_seed(1)).images[0]
    pipe.load_lora_weights(str(lora.parent), weight_name=lora.name)
    after = pipe(**arguments, generator=torch.Generator().manual_seed(1)).images[0]
    sheet = Image.new("RGB", (before.width * 2 + 8, before.height), "white")
    sheet.paste(before, (0, 0))
    sheet.paste(after, (before.width + 8, 0))
    sheet.resize((sheet.width * 4, sheet.height * 4), Image.Resampling.NEAREST).save(target)
    return float(sum(ImageStat.Stat(ImageChops.difference(before, after)).mean) / 3)


def main(base: Path) -> None:
    """Runs the demo in ``base``; ends with an error if the loss did not fall or the LoRA changed nothing."""
    from headless import run_file

    write_inputs(base)
    print(f"running {WORKFLOW.name}; its log is train.log in the run folder", flush=True)
    results = run_file(WORKFLOW, base, {"11.survive_restart": False})  # TensorBoard ends with the demo
    trained = next(result for result in results.values() if result.class_type == "Train")
    run, lora = Path(trained.outputs[2]), Path(trained.outputs[3])
    losses = read_losses(run)
    tenth = max(1, len(losses) // 10)
    first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    curve, pictures = run / "loss.png", run / "before_after.png"
    draw_curve(losses, curve)
    change = compare_pictures(run, lora, pictures)
    print(f"""
run folder         {run}
LoRA               {lora}
loss curve         {curve}
TensorBoard log    {run}   (tensorboard --logdir "{run}")
loss               first {losses[0]:.4f}, last {losses[-1]:.4f} (means of {tenth} steps: {first:.4f}, {last:.4f})
LoRA in diffusers  loaded; changed a picture by {change:.2f} of 255 on average: {pictures}""")
    if last >= first:
        raise SystemExit("the loss did not fall")
    if change <= 0:
        raise SystemExit("the LoRA changed nothing")


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if "--inside" in arguments:
        main(Path(arguments[-1]))
    else:
        base = Path(arguments[0]) if arguments else FOLDER
        python = str(prepare(dev=True))  # diffusers loads LoRAs through peft, which training does without
        sys.exit(subprocess.run([python, __file__, "--inside", str(base.resolve())], check=False).returncode)
