"""What ComfyUI's own network makes of a model file and a LoRA, run by ComfyUI's Python.

    COMFYUI_DIR=... $COMFYUI_PYTHON tests/comfy_predict.py FOLDER

FOLDER has model.safetensors, lora.safetensors and inputs.safetensors (``x``, ``timestep`` and further arguments
of the network); answers.safetensors is written there: ``plain`` and ``lora``.
"""

# mypy: ignore-errors

from __future__ import annotations

import sys
from pathlib import Path

from comfy_checks import enter_comfyui


def predict(folder: Path) -> None:
    """Loads the files as ComfyUI's loaders do."""
    import comfy.model_management
    import comfy.sd
    import comfy.utils
    import torch
    from safetensors.torch import load_file, save_file

    inputs = load_file(folder / "inputs.safetensors")
    with torch.inference_mode():
        patcher = comfy.sd.load_diffusion_model(str(folder / "model.safetensors"))
        answers = {}
        for name in ("plain", "lora"):
            if name == "lora":
                weights = comfy.utils.load_torch_file(str(folder / "lora.safetensors"))
                patcher, _ = comfy.sd.load_lora_for_models(patcher, None, weights, 1.0, 0.0)
            comfy.model_management.load_models_gpu([patcher], force_full_load=True)
            answers[name] = patcher.model.diffusion_model(**inputs).float().contiguous()
    save_file(answers, folder / "answers.safetensors")


if __name__ == "__main__":
    target = Path(sys.argv[1])
    enter_comfyui(target)
    predict(target)
