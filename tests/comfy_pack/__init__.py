"""A ComfyUI node pack for tests: miniatures as nodes, and a node that writes what a model makes."""

# mypy: ignore-errors

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

_FILE = Path(__file__).resolve().parent.parent / "comfy_miniatures.py"  # the pack is linked to
_spec = importlib.util.spec_from_file_location("comfy_miniatures", _FILE)
mini = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(mini)
FAMILY = (list(mini.FAMILIES),)
SEED = ("INT", {"default": 0})
FULL = ("BOOLEAN", {"default": False})
"""Whether the model is a checkpoint from a file, which wants wide text embeddings."""


class MiniatureModel:
    CATEGORY, FUNCTION, RETURN_TYPES = "tests", "make", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"family": FAMILY, "seed": SEED}}

    def make(self, family: str, seed: int) -> tuple[Any]:
        return (mini.make_model(family, seed=seed),)


class MiniatureLatents:
    """A list of single latents."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_IS_LIST = "tests", "make", ("LATENT",), (True,)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"family": FAMILY, "count": ("INT", {"default": 1}), "seed": SEED}}

    def make(self, family: str, count: int, seed: int) -> tuple[Any]:
        return ([mini.latents(family, 1, seed + n) for n in range(count)],)


class MiniatureConditioning:
    """A list of conditionings, as text encoders give for a list of texts."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_IS_LIST = "tests", "make", ("CONDITIONING",), (True,)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"family": FAMILY, "count": ("INT", {"default": 1}), "seed": SEED},
            "optional": {"full": FULL},
        }

    def make(self, family: str, count: int, seed: int, full: bool = False) -> tuple[Any]:
        return ([mini.conditioning(family, seed + n, full=full) for n in range(count)],)


class MiniatureOutput:
    """Writes what the model makes of a fixed input, and any LoRA, loss and steps, to the output folder."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "tests", "write", (), True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"family": FAMILY, "name": ("STRING", {"default": "a"})},
            "optional": {"model": ("MODEL",), "lora": ("LORA_MODEL",), "loss": ("LOSS_MAP",),
                         "steps": ("INT", {"forceInput": True}), "full": FULL},
        }  # fmt: skip

    def write(
        self, family: str, name: str, model: Any = None, lora: Any = None, loss: Any = None, steps: int | None = None,
        full: bool = False,
    ) -> dict[str, Any]:  # fmt: skip
        import folder_paths
        import safetensors.torch

        folder = Path(folder_paths.get_output_directory())
        if model is not None:
            output = {"output": mini.output(model, family, full=full)}
            safetensors.torch.save_file(output, folder / f"{name}.model.safetensors")
        if lora is not None:
            safetensors.torch.save_file(dict(lora), folder / f"{name}.lora.safetensors")
        (folder / f"{name}.json").write_text(json.dumps({"loss": (loss or {}).get("loss"), "steps": steps}))
        return {}


NODE_CLASS_MAPPINGS = {cls.__name__: cls for cls in (MiniatureModel, MiniatureLatents, MiniatureConditioning,
                                                     MiniatureOutput)}  # fmt: skip
