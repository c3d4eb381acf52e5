"""What ComfyUI's own networks make of a model file and of adapters, run by ComfyUI's Python.

    COMFYUI_DIR=... $COMFYUI_PYTHON tests/comfy_predict.py FOLDER

FOLDER has model.safetensors, a file for each adapter, inputs.safetensors and task.json; answers.safetensors is written
there: what is predicted, under ``plain`` and the names of the adapters. task.json has ``adapters``, names of files, and

- for a file with the denoiser alone ``widths``, which versions are told that take the published model's for granted;
  inputs are the network's arguments;
- for a VAE ``vae``; inputs are ``pixels`` and ``latents``, answers ``.encoded`` and ``.decoded``;
- for a checkpoint ``caption``, and ``text_encoders`` with what is not published size in them; inputs are ``x_t`` (of a
  variance-preserving process), ``t`` (of 1000) and ``latents``, or ``sigma`` for ``t`` and x_t of rectified flow.
  Answers are what the model takes x_t for without its noise, the text (``.text``, ``.pooled``) and what the VAE makes
  of the latents (``vae``).
"""

# mypy: ignore-errors

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

from comfy_checks import enter_comfyui


def predict(folder: Path) -> None:
    """Loads the files as ComfyUI's loaders do."""
    import comfy.sd
    import comfy.utils
    import torch
    from safetensors.torch import load_file, save_file

    logging.basicConfig()
    logging.getLogger().setLevel(logging.INFO)  # tensors left over are no more than information
    task, inputs = json.loads((folder / "task.json").read_text()), load_file(folder / "inputs.safetensors")
    load, answer = (load_checkpoint, of_caption) if "caption" in task else (load_denoiser, of_tensors)
    if "vae" in task:
        load, answer = load_vae, of_latents
    with torch.inference_mode():
        model, clip, answers = load(folder / "model.safetensors", task, inputs)
        answers |= named("plain", answer(model, clip, task, inputs))
        for name in task["adapters"]:
            weights = comfy.utils.load_torch_file(str(folder / f"{name}.safetensors"))
            patched = comfy.sd.load_lora_for_models(model, clip, weights, 1.0, 1.0)
            answers |= named(name, answer(*patched, task, inputs))
    save_file({name: value.float().contiguous() for name, value in answers.items()}, folder / "answers.safetensors")


def named(name: str, values: dict[str, Any]) -> dict[str, Any]:
    return {name + part: value for part, value in values.items()}


# -- the denoiser alone -----------------------------------------------------------------------------------


def load_denoiser(file: Path, task: dict[str, Any], _inputs: Any) -> tuple[Any, None, dict[str, Any]]:
    import comfy.model_detection
    import comfy.sd

    detect = comfy.model_detection.detect_unet_config

    def told(*args: Any, **kwargs: Any) -> Any:
        found = detect(*args, **kwargs)
        if wrong := {key: value for key, value in task["widths"].items() if found.get(key) != value}:
            logging.info("told instead of detected: %s", wrong)
        return {**found, **wrong}

    comfy.model_detection.detect_unet_config = told
    return comfy.sd.load_diffusion_model(str(file)), None, {}


def of_tensors(model: Any, _clip: Any, _task: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    import comfy.model_management

    comfy.model_management.load_models_gpu([model], force_full_load=True)
    arguments = {name: [value] if name == "ref_latents" else value for name, value in inputs.items()}
    return {"": model.model.diffusion_model(**arguments)}


# -- a checkpoint -----------------------------------------------------------------------------------------


def load_checkpoint(file: Path, task: dict[str, Any], inputs: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    import comfy.sd
    import torch

    precision = {"dtype": torch.float32}
    model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(
        str(file), model_options=dict(precision), te_model_options={**precision, **task["text_encoders"]})  # fmt: skip
    return model, clip, {"vae": vae.first_stage_model.float().decode(inputs["latents"])}


def of_caption(model: Any, clip: Any, task: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
    import comfy.model_management

    text, pooled = clip.encode_from_tokens(clip.tokenize(task["caption"]), return_pooled=True)
    comfy.model_management.load_models_gpu([model], force_full_load=True)
    height, width = (8 * side for side in inputs["x_t"].shape[-2:])
    conditions = model.model.encode_adm(pooled_output=pooled, height=height, width=width)
    if "sigma" in inputs:
        sigma, x = inputs["sigma"], inputs["x_t"]
    else:
        sigma = model.model.model_sampling.sigmas[inputs["t"]]
        x = inputs["x_t"] * (sigma**2 + 1) ** 0.5
    clean = model.model.apply_model(x, sigma, c_crossattn=text, y=conditions)
    return {"": clean, ".text": text, ".pooled": pooled}


# -- a VAE ------------------------------------------------------------------------------------------------


def load_vae(file: Path, _task: Any, _inputs: Any) -> tuple[Any, None, dict[str, Any]]:
    import comfy.sd
    import comfy.utils

    weights, metadata = comfy.utils.load_torch_file(str(file), return_metadata=True)
    return comfy.sd.VAE(sd=weights, metadata=metadata).first_stage_model.float(), None, {}


def of_latents(vae: Any, _clip: Any, _task: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    vae.decode_noise_scale = 0.0  # LTX-Video's draws
    return {".encoded": vae.encode(inputs["pixels"]), ".decoded": vae.decode(inputs["latents"])}


if __name__ == "__main__":
    target = Path(sys.argv[1])
    enter_comfyui(target)
    predict(target)
