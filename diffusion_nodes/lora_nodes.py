"""Nodes that train a LoRA inside ComfyUI, save it and load it again."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.config import SettingsError
from . import comfy
from .lora_settings import LoraTraining
from .loss_plot import draw
from .schema import SettingsNode, Socket, widget, widgets

if TYPE_CHECKING:
    from PIL.Image import Image

    from .lora_files import Existing, TrainedLora
    from .lora_training import Report

logger = logging.getLogger(__name__)

CATEGORY = "Diffusion-Pipe/LoRA"
NONE = "[None]"
TEXT_SECONDS, CURVE_SECONDS = 0.5, 2.0
"""How often the text and the curve on the node change, at most."""
PICTURE = (512, 512)
"""Largest size that ComfyUI sends of what a node shows while it works."""
PREVIEW_GUIDANCE = 4.0


class TrainLoRANode(SettingsNode):
    """Trains a LoRA on the connected model inside ComfyUI. Each latent goes with its own conditioning; one
    conditioning serves all. The model is not changed. Equal inputs are not trained again."""

    CATEGORY = CATEGORY
    FUNCTION = "train"
    INPUT_IS_LIST = True
    RETURN_TYPES = ("MODEL", "LORA_MODEL", "LOSS_MAP", "INT")
    RETURN_NAMES = ("model_with_lora", "lora", "loss", "steps")
    OUTPUT_TOOLTIPS = (
        "The model with the LoRA at strength 1, as Load LoRA would give it.",
        "The LoRA, for Save Trained LoRA, Save LoRA Weights or Load LoRA Model.",
        "The loss of every step, for a plot.",
        "Steps that the LoRA was trained for, those of the existing LoRA included.",
    )
    REQUIRED = {  # noqa: RUF012  # as the base declares it
        "model": Socket("MODEL", "The model to train on; it stays as it is."),
        "latents": Socket("LATENT", "Encoded pictures or videos: a batch, or a list of any sizes."),
        "positive": Socket("CONDITIONING", "Captions: one for all latents, or one for each in the same order."),
    }
    OPTIONAL = {  # noqa: RUF012
        **widgets(LoraTraining, "batch_size", "steps", "learning_rate", "rank", "optimizer", "loss_function", "seed",
                  "training_dtype", "lora_dtype"),
        "existing_lora": widget(LoraTraining, "existing_lora", choices=[NONE]),
        **widgets(LoraTraining, "gradient_accumulation", "alpha", "weight_decay", "schedule", "warmup_steps",
                  "gradient_clipping", "target", "algorithm", "gradient_checkpointing", "offloading",
                  "caption_dropout", "timestep_sampling", "save_every", "save_prefix", "preview_every", "on_cancel"),
        "negative": Socket("CONDITIONING", "What stands for a dropped caption, and the negative of previews; nothing "
                                           "connected: zeros."),
        "masks": Socket("MASK", "What of the pictures counts: white is trained, black is not. One for all, or one "
                                "for each latent."),
        "vae": Socket("VAE", "Makes pictures of previews."),
    }  # fmt: skip

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:
        """ComfyUI's declaration of the inputs, with the LoRAs there are now."""
        declared = super().INPUT_TYPES()
        kind, options = declared["optional"]["existing_lora"]
        declared["optional"]["existing_lora"] = ([*kind, *comfy.model_files("loras")], options)
        return declared | {"hidden": {"unique_id": "UNIQUE_ID"}}

    @classmethod
    def IS_CHANGED(cls, existing_lora: Any = None, **_: Any) -> str:
        """Differs when the file to go on with was written anew; ComfyUI compares the other inputs itself."""
        name = existing_lora[0] if isinstance(existing_lora, list) and existing_lora else existing_lora
        path = comfy.model_path("loras", name) if isinstance(name, str) and name != NONE else None
        return "" if path is None else f"{path.stat().st_mtime_ns} {path.stat().st_size}"

    def train(self, **inputs: list[Any]) -> tuple[Any, TrainedLora, dict[str, Any], int]:
        """The trained model, its LoRA, its losses and its steps.

        Raises:
            SettingsError: Inputs that cannot be used or do not go together.
            FloatingPointError: The loss is no number any more.
        """
        from . import lora_training as training

        single = {name: values[0] for name, values in inputs.items() if values}
        settings = LoraTraining(**self.read(single))
        model, node_id = single["model"], single.get("unique_id")
        masks = [mask[None] for batch in inputs.get("masks") or [] for mask in batch.reshape(-1, *batch.shape[-2:])]
        data = training.Inputs(inputs["latents"], inputs["positive"], single.get("negative"), masks)
        existing = read_existing(settings.existing_lora, model)
        first = existing.steps if existing else 0
        display = _Display(settings.steps, first, node_id)
        hooks = training.Hooks(
            watch=display,
            save=lambda lora, steps: _save_on_the_way(lora, settings.save_prefix, steps),
            preview=lambda lora, steps: display.show(_sample(model, single, settings, lora)),
        )
        result = training.train(model, data, settings, existing, hooks)
        if result.interrupted:
            comfy.progress_text(f"cancelled after {len(result.losses)} steps; the LoRA so far is used", node_id)
        curve = {"loss": result.losses, "first_step": result.steps - len(result.losses)}
        return with_lora(model, result.lora), result.lora, curve, result.steps


class SaveTrainedLoRANode:
    """Saves a trained LoRA where ComfyUI's loaders find it."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Saves a trained LoRA into ComfyUI's output/loras, where its loaders find it, with what it was trained by. "
        "The optimizer's memory goes beside it, so that a training goes on exactly where it ended."
    )
    FUNCTION = "save"
    OUTPUT_NODE = True
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("lora_name",)
    OUTPUT_TOOLTIPS = ("The file's name as LoRA loaders show it.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:
        return {
            "required": {
                "lora": ("LORA_MODEL", {"tooltip": "From Train LoRA."}),
                "name": ("STRING", {"default": "trained_lora", "multiline": False,
                                    "tooltip": "File name; a slash makes a folder. The steps are added to it."}),
            },
            "optional": {
                "steps": ("INT", {"forceInput": True, "min": 0, "max": 2**31 - 1, "step": 1,
                                  "tooltip": "From Train LoRA; goes into the file's name."}),
                "with_optimizer": ("BOOLEAN", {"default": True, "tooltip":
                                   "Keep what the optimizer remembers, three times the LoRA's size at least."}),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }  # fmt: skip

    def save(
        self, lora: TrainedLora, name: str, steps: int | None = None, with_optimizer: bool = True,
        unique_id: str | None = None,
    ) -> tuple[str]:  # fmt: skip
        """The name of the new file; none that exists is overwritten.

        Raises:
            SettingsError: A name that leads out of the folder.
        """
        from .lora_files import TrainedLora, save

        path = new_file("name", Path("loras") / name, steps)
        if isinstance(lora, TrainedLora) and not with_optimizer:
            lora = TrainedLora(lora, lora.metadata, {})
        save(lora, path)
        comfy.progress_text(f"saved {path.name}", unique_id)
        return (path.relative_to(comfy.output_directory() / "loras").as_posix(),)


class LoadTrainedLoRANode:
    """Loads a LoRA by a name that another node gives."""

    CATEGORY = CATEGORY
    DESCRIPTION = "Loads the LoRA that Save Trained LoRA wrote, in the same graph, and puts it into the model."
    FUNCTION = "load"
    RETURN_TYPES = ("MODEL", "LORA_MODEL")
    RETURN_NAMES = ("model", "lora")
    OUTPUT_TOOLTIPS = ("The model with the LoRA.", "The LoRA itself.")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model that the LoRA was trained on."}),
                "lora_name": ("STRING", {"forceInput": True, "tooltip": "From Save Trained LoRA."}),
                "strength": ("FLOAT", {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01,
                                       "tooltip": "How much of the LoRA is used; 1 is as trained."}),
            }
        }  # fmt: skip

    def load(self, model: Any, lora_name: str, strength: float = 1.0) -> tuple[Any, dict[str, Any]]:
        """The model with the LoRA, and the LoRA.

        Raises:
            SettingsError: There is no such file.
        """
        from comfy.utils import load_torch_file

        path = lora_path("lora_name", lora_name)
        tensors = load_torch_file(str(path), safe_load=True)
        return with_lora(model, tensors, strength), tensors


def with_lora(model: Any, tensors: Mapping[str, Any], strength: float = 1.0) -> Any:
    """A clone of ``model`` with the LoRA, put in by ComfyUI as its own loaders do."""
    from comfy.sd import load_lora_for_models

    return load_lora_for_models(model, None, dict(tensors), strength, 0.0)[0]


def read_existing(name: str, model: Any) -> Existing | None:
    """The LoRA to go on with, if one is chosen."""
    if name in ("", NONE):
        return None
    import torch

    from . import lora_files

    with torch.inference_mode(False):
        return lora_files.read_existing(lora_path("existing_lora", name), model.model)


def lora_path(option: str, name: str) -> Path:
    """The LoRA that loaders show as ``name``.

    Raises:
        SettingsError: There is none; names ``option``.
    """
    path = comfy.model_path("loras", name)
    if path is None:
        raise SettingsError(f"{option}: there is no LoRA '{name}'; press R in ComfyUI to see those there are")
    return path


def new_file(option: str, name: Path, steps: int | None) -> Path:
    """A file below ComfyUI's output folder that does not exist yet.

    Raises:
        SettingsError: ``name`` leads out of that folder.
    """
    root = comfy.output_directory()
    stem = re.sub(r"\.safetensors$", "", str(name).strip())
    stem = f"{stem}_{steps}_steps" if steps is not None else stem
    path = root / f"{stem}.safetensors"
    if not path.resolve().is_relative_to(root.resolve()) or not path.stem.strip("._ "):
        raise SettingsError(f"{option}: must be a name in ComfyUI's output folder, got '{name}'")
    number = 1
    while path.exists():
        number += 1
        path = root / f"{stem}_{number}.safetensors"
    return path


def _save_on_the_way(lora: TrainedLora, prefix: str, steps: int) -> None:
    from .lora_files import save

    path = new_file("save_prefix", Path(prefix), steps)
    save(lora, path)
    logger.info("saved %s", path)


class _Display:
    """The node's progress bar, its line of text, and below it the newest picture over the curve."""

    def __init__(self, steps: int, first: int, node_id: str | None) -> None:
        self.steps, self.first, self.node_id = steps, first, node_id
        self.begun = self.text_at = self.curve_at = time.monotonic()
        self.report: Report | None = None
        self.sample: Image | None = None

    def __call__(self, report: Report) -> None:
        now, last = time.monotonic(), report.step == self.steps
        self.report = report
        picture = None
        if now - self.curve_at > CURVE_SECONDS or last:
            self.curve_at = now
            picture = self._picture()
        if now - self.text_at > TEXT_SECONDS or last:
            self.text_at = now
            comfy.progress_text(self._text(report, now), self.node_id)
        comfy.progress(self.node_id, report.step, self.steps, picture)

    def show(self, sample: Image | None) -> None:
        """Shows a picture made with the LoRA so far, until there is a newer one."""
        if sample is not None and self.report is not None:
            self.sample = sample
            comfy.progress(self.node_id, self.report.step, self.steps, self._picture())

    def _picture(self) -> Image:
        losses = [("training", self.report.losses if self.report else [], self.first)]
        width, height = PICTURE
        if self.sample is None:
            return draw(losses, width=width, height=height * 5 // 8)
        from PIL import Image as pillow
        from PIL import ImageOps

        whole = pillow.new("RGB", PICTURE, "white")
        room = (width, height * 5 // 8)
        whole.paste(ImageOps.pad(self.sample, room, pillow.Resampling.LANCZOS, "white"), (0, 0))
        whole.paste(draw(losses, width=width, height=height - room[1]), (0, room[1]))
        return whole

    def _text(self, report: Report, now: float) -> str:
        seconds = (now - self.begun) / report.step
        recent = report.losses[-20:]
        left = int(seconds * (self.steps - report.step))
        loss = sum(recent) / len(recent)
        speed = f"{seconds:.2f} s per step, {left // 60}:{left % 60:02d} left"
        return f"step {report.step} of {self.steps}, loss {loss:.4f}, learning rate {report.rate:.2g}, {speed}"


def _sample(model: Any, inputs: Mapping[str, Any], settings: LoraTraining, lora: Mapping[str, Any]) -> Image | None:
    """A picture of the first caption at the first latent's size, made by ComfyUI's sampler; None without a VAE."""
    import comfy.sample as sampler
    import torch
    from PIL import Image as pillow

    from .lora_samples import split_conditioning

    vae = inputs.get("vae")
    if vae is None:
        return None
    with torch.inference_mode():
        latent = sampler.fix_empty_latent_channels(model, torch.zeros_like(inputs["latents"]["samples"][:1]))
        positive = split_conditioning([inputs["positive"]])[:1]
        negative = inputs.get("negative") or [[torch.zeros_like(text), extras] for text, extras in positive]
        sampled = sampler.sample(
            with_lora(model, lora), sampler.prepare_noise(latent, settings.seed), 20,
            PREVIEW_GUIDANCE if "negative" in inputs else 1.0, "euler", "simple", positive, negative, latent,
            disable_pbar=True, seed=settings.seed)  # fmt: skip
        pixels = vae.decode(sampled)
    first = pixels.reshape(-1, *pixels.shape[-3:])[0]
    return pillow.fromarray((first.clamp(0, 1) * 255).byte().cpu().numpy())
