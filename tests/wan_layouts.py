"""A miniature Wan rewritten in the layouts of Wan-AI and ComfyUI, for the tests."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from diffusion_trainer.models.wan_files import (
    original_clip_name,
    original_name,
    original_umt5_name,
    original_vae_name,
)
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]


def folder_tensors(folder: Path, part: str) -> Tensors:
    """The tensors of a part of a folder in diffusers layout."""
    (file,) = (folder / part).glob("*.safetensors")
    return load_file(file)


def original_tensors(folder: Path, part: str) -> Tensors:
    """The tensors of a part under the names that Wan-AI gives them."""
    tensors = folder_tensors(folder, part)
    if part == "transformer":
        return {original_name(name): value for name, value in tensors.items()}
    if part == "vae":
        residual = json.loads((folder / "vae/config.json").read_text())["is_residual"]
        return {original_vae_name(name, 2, residual): value for name, value in tensors.items()}
    if part == "text_encoder":
        return {original_umt5_name(name): value for name, value in tensors.items()}
    out: Tensors = {}
    for name, value in tensors.items():
        name = name.removeprefix("vision_model.")
        if ".q_proj." in name:
            others = (tensors[key.replace("q_proj", other)] for other in ("k_proj", "v_proj") for key in tensors
                      if key.endswith(name))  # fmt: skip
            value = torch.cat([value, *others])
        elif "k_proj" in name or "v_proj" in name:
            continue
        if "class_embedding" in name:
            value = value[None, None]
        out[f"visual.{original_clip_name(name)}"] = value[None] if "position_embedding" in name else value
    return {**out, "log_scale": torch.ones(())}


def write_original(folder: Path, to: Path, task: str = "t2v", shards: int = 1) -> Path:
    """A folder as Wan-AI publishes them."""
    to.mkdir(parents=True)
    write_original_transformer(folder / "transformer", to, task, shards)
    for part, name in (("vae", "Wan2.1_VAE.pth"), ("text_encoder", "models_t5_umt5-xxl-enc-bf16.pth"),
                       ("image_encoder", "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth")):  # fmt: skip
        if (folder / part).is_dir():
            torch.save(original_tensors(folder, part), to / name)
    shutil.copytree(folder / "tokenizer", to / "google/umt5-xxl")
    return to


def write_original_transformer(transformer: Path, to: Path, task: str = "t2v", shards: int = 1) -> None:
    """Config and safetensors, in shards perhaps."""
    to.mkdir(parents=True, exist_ok=True)
    config = json.loads((transformer / "config.json").read_text())
    heads = config["num_attention_heads"]
    (to / "config.json").write_text(json.dumps({
        "_class_name": "WanModel", "model_type": task, "num_heads": heads, "dim": heads * config["attention_head_dim"],
    }))  # fmt: skip
    tensors = original_tensors(transformer.parent, transformer.name)
    if shards == 1:
        save_file(tensors, to / "diffusion_pytorch_model.safetensors")
        return
    names, places = sorted(tensors), {}
    for shard in range(shards):
        file = f"diffusion_pytorch_model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = names[shard::shards]
        places |= dict.fromkeys(part, file)
        save_file({name: tensors[name] for name in part}, to / file)
    (to / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def write_single(
    folder: Path, to: Path, change: Callable[[Tensors], Tensors] = dict, prefix: str = "", embed_tokenizer: bool = True
) -> dict[str, str]:
    """The files that ComfyUI has; returns the options that name them."""
    umt5 = change(folder_tensors(folder, "text_encoder"))
    if embed_tokenizer:
        model = bytearray((folder / "tokenizer/spiece.model").read_bytes())
        umt5["spiece_model"] = torch.frombuffer(model, dtype=torch.uint8)
    files = {
        "transformer_path": {
            prefix + name: value for name, value in change(original_tensors(folder, "transformer")).items()
        },
        "vae_path": original_tensors(folder, "vae"),
        "llm_path": umt5,
    }
    if (folder / "image_encoder").is_dir():
        files["clip_path"] = {
            f"vision_model.{name.removeprefix('vision_model.')}": value
            for name, value in folder_tensors(folder, "image_encoder").items()
        } | {"visual_projection.weight": torch.zeros(4, 32)}
    for option, tensors in files.items():
        save_file({name: value.contiguous() for name, value in tensors.items()}, to / f"{option}.safetensors")
    return {option: str(to / f"{option}.safetensors") for option in files}
