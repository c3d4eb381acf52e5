"""A model in GGUF files, loaded by city96's ComfyUI-GGUF: COMFYUI_GGUF_DIR names its folder."""

# mypy: ignore-errors

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import comfy_miniatures as mini
import folder_paths
import torch
from comfy_checkpoints import diffusion_model

from .harness import picture_of, train

FORMATS = ("Q8_0", "Q4_0", "BF16")


def check_gguf_files() -> None:
    pack = load_pack(Path(os.environ["COMFYUI_GGUF_DIR"]))
    for kind in FORMATS:
        write(Path(folder_paths.models_dir) / "unet" / f"wan_{kind}.gguf", kind)
        with torch.inference_mode():
            (model,) = pack.NODE_CLASS_MAPPINGS["UnetLoaderGGUF"]().load_unet(f"wan_{kind}.gguf")
        before = picture_of(model)
        positive = [mini.conditioning("wan", 4, full=True)]
        trained, _, curve, _ = train(model, "wan", positive=positive, steps=8, learning_rate=0.005)
        assert all(0 < value < 20 for value in curve["loss"]), f"{kind}: {curve}"
        assert picture_of(model)["held"] == before["held"], kind
        outputs = [mini.output(one, "wan", full=True) for one in (model, trained)]
        assert torch.isfinite(outputs[1]).all() and not torch.allclose(*outputs, atol=1e-3), kind


def load_pack(folder: Path) -> Any:
    """ComfyUI-GGUF, as ComfyUI imports custom nodes."""
    spec = importlib.util.spec_from_file_location(
        "comfyui_gguf", folder / "__init__.py", submodule_search_locations=[str(folder)])  # fmt: skip
    pack = importlib.util.module_from_spec(spec)
    sys.modules["comfyui_gguf"] = pack
    spec.loader.exec_module(pack)
    return pack


def write(path: Path, kind: str) -> None:
    """The miniature Wan with its matrices in one of GGML's formats."""
    import gguf

    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "wan")
    wanted = gguf.GGMLQuantizationType[kind]
    for key, value in diffusion_model("wan").items():
        is_matrix = value.ndim == 2 and value.shape[1] % 32 == 0 and "block" in key
        form = wanted if is_matrix else gguf.GGMLQuantizationType.F32
        array = value.float().numpy()
        if form == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(key, array)
            if value.ndim > 4:
                writer.add_array(f"comfy.gguf.orig_shape.{key}", tuple(value.shape))
        else:
            writer.add_tensor(key, gguf.quants.quantize(array, form), raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
