"""What ComfyUI's Qwen2.5-VL makes of a text with pictures, run by ComfyUI's Python.

    COMFYUI_DIR=... $COMFYUI_PYTHON tests/comfy_text_encoder.py FOLDER

FOLDER has model.safetensors, and inputs.safetensors with ``ids`` of a text in which one token stands for each picture,
that ``token``, the ``pixels`` of the pictures' patches and their ``grid``; answers.safetensors is written there.
task.json has ``text`` and ``visual``, the sizes that differ from the published model's.
"""

# mypy: ignore-errors

from __future__ import annotations

import json
import sys
from pathlib import Path

from comfy_checks import enter_comfyui


def encode(folder: Path) -> None:
    import comfy.ops
    import comfy.text_encoders.llama
    import comfy.text_encoders.qwen_vl
    import torch
    from safetensors.torch import load_file, save_file

    task, given = json.loads((folder / "task.json").read_text()), load_file(folder / "inputs.safetensors")
    visual = comfy.text_encoders.qwen_vl.Qwen2VLVisionTransformer
    comfy.text_encoders.qwen_vl.Qwen2VLVisionTransformer = lambda **sizes: visual(**{**sizes, **task["visual"]})
    model = comfy.text_encoders.llama.Qwen25_7BVLI(task["text"], torch.float32, "cpu", comfy.ops.disable_weight_init)
    found = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    assert (found.missing_keys, found.unexpected_keys) == ([], ["lm_head.weight"]), found
    pictures = zip(given["pixels"].split(given["grid"].prod(-1).tolist()), given["grid"].split(1), strict=True)
    embeds, seen = [], []
    with torch.no_grad():
        for token in given["ids"]:
            embeds.append(model.model.embed_tokens(token[None]))
            if token == given["token"]:
                pixels, grid = next(pictures)
                embeds[-1] = model.visual(pixels, grid)
                start = sum(map(len, embeds[:-1]))
                seen.append({"type": "image", "index": start, "size": len(embeds[-1]), "extra": grid})
        joined = torch.cat(embeds)[None]
        mask = torch.ones(joined.shape[:2])
        states = model(None, attention_mask=mask, embeds=joined, embeds_info=seen)[0]
    save_file({"states": states[0].contiguous()}, folder / "answers.safetensors")


if __name__ == "__main__":
    target = Path(sys.argv[1])
    enter_comfyui(target)
    encode(target)
