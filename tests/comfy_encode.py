"""What ComfyUI's own VAE and text encoders of FLUX.2 make of a file, run by ComfyUI's Python.

    COMFYUI_DIR=... $COMFYUI_PYTHON tests/comfy_encode.py FOLDER

FOLDER has model.safetensors, task.json and, for the VAE, inputs.safetensors with ``pixels`` (NHWC, 0 to 1);
answers.safetensors is written there. task.json has ``part``: "vae", whose answers are ``latents`` and what it makes of
them (``pixels``), or the name of a text encoder, with ``captions`` and ``sizes``, what is not of published size; then
there is one answer for each caption, by its number.
"""

# mypy: ignore-errors

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

from comfy_checks import enter_comfyui


def encode(folder: Path) -> None:
    import comfy.utils
    import torch
    from safetensors.torch import load_file, save_file

    logging.basicConfig(level=logging.INFO)
    task = json.loads((folder / "task.json").read_text())
    weights = comfy.utils.load_torch_file(str(folder / "model.safetensors"))
    with torch.inference_mode():
        if task["part"] == "vae":
            answers = of_pixels(weights, load_file(folder / "inputs.safetensors")["pixels"])
        else:
            answers = of_captions(weights, **task)
    save_file({name: value.float().contiguous() for name, value in answers.items()}, folder / "answers.safetensors")


def of_pixels(weights: dict[str, Any], pixels: Any) -> dict[str, Any]:
    import comfy.sd
    import torch

    vae = comfy.sd.VAE(sd=weights, dtype=torch.float32)
    latents = vae.encode(pixels)
    return {"latents": latents, "pixels": vae.decode(latents)}


def of_captions(weights: dict[str, Any], part: str, captions: list[str], sizes: dict[str, int], **_: Any) -> Any:
    import torch
    from comfy.text_encoders import flux

    if part == "mistral3_24b":
        tokenizer = flux.Flux2Tokenizer(tokenizer_data={"tekken_model": weights.pop("tekken_model")})
        make = flux.flux2_te(torch.float32, pruned=True)
    else:
        tokenizer = flux.KleinTokenizer()
        make = flux.klein_te(torch.float32, model_type=part)
    encoder = make(device="cpu", dtype=torch.float32, model_options={f"{part}_model_config": sizes})
    logging.info("%s", getattr(encoder, part).load_sd(weights))
    texts = [encoder.encode_token_weights(tokenizer.tokenize_with_weights(caption))[0] for caption in captions]
    return {str(number): text for number, text in enumerate(texts)}


if __name__ == "__main__":
    target = Path(sys.argv[1])
    enter_comfyui(target)
    encode(target)
