"""What the checks share: the node as ComfyUI's executor calls it, and looking at models."""

# mypy: ignore-errors

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import comfy.model_management as management
import comfy_miniatures as mini
import folder_paths
import torch
from diffusion_trainer.diffusion_nodes.lora_layers import attached
from diffusion_trainer.diffusion_nodes.lora_nodes import TrainLoRANode
from diffusion_trainer.diffusion_nodes.lora_recompute import Copies
from diffusion_trainer.diffusion_nodes.lora_samples import joined, prepare, split_conditioning, split_latents
from torch.utils._pytree import tree_map_only


def loras() -> Path:
    """The folder of finished LoRAs."""
    return Path(folder_paths.get_output_directory()) / "loras"


def train(model: Any, family: str, latents: Any = None, positive: Any = None, **values: Any) -> Any:
    """TrainLoRANode on one random picture, as ComfyUI's executor calls it."""
    values = {"steps": 4, "training_dtype": "fp32", "lora_dtype": "fp32", "rank": 4, **values}
    latents = latents or [mini.latents(family, 1, 3)]
    positive = positive or [mini.conditioning(family, 4)]
    with torch.inference_mode():
        return TrainLoRANode().train(
            model=[model], latents=latents, positive=positive,
            **{name: value if isinstance(value, list) else [value] for name, value in values.items()})  # fmt: skip


def same(first: Any, second: Any) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def refusal(*args: Any, **values: Any) -> str:
    """What the node tells about inputs that it must refuse."""
    told = ""
    try:
        train(*args, **values)
    except ValueError as error:
        told = str(error)
    return told


def models() -> Any:
    for family in mini.FAMILIES:
        with torch.inference_mode():  # as the executor loads them
            model = mini.make_model(family, seed=1)
        yield family, model


def difference(model: Any, patched: Any, adapters: Any, family: str) -> tuple[float, float]:
    """Of the model with adapters put in at run time from that with patched weights, and the size of outputs."""
    with torch.inference_mode():
        management.load_models_gpu([patched])
        wanted = apply(patched, family)
        management.load_models_gpu([model])
    for adapter in adapters.values():
        adapter.to(management.get_torch_device())
    with (
        torch.inference_mode(False),
        attached(model.model, adapters, torch.float32, Copies(made=True), checkpointing=True),
    ):
        got = apply(model, family).detach()
    return (got - wanted).abs().max().item(), wanted.abs().max().item()


def patching_error() -> float:
    """How far ComfyUI's patched weights may be off: on GPUs it multiplies a LoRA's factors in float16."""
    return 2e-4 if management.get_torch_device().type == "cpu" else 2e-3


def apply(model: Any, family: str) -> Any:
    with torch.no_grad():
        pairs = split_latents([mini.latents(family, 1, 3)]), split_conditioning([mini.conditioning(family, 4)])
        sample = prepare(model.model, *pairs, None, [], management.get_torch_device())[0]
    device = management.get_torch_device()
    sigma = model.model.model_sampling.sigmas[[500]].float().clone().to(device)
    conds = joined([sample.conds], device)
    return model.model.apply_model(sample.latent.to(device), sigma, transformer_options={}, **conds)


def picture_of(model: Any) -> Any:
    """All of a MODEL that training could touch. Where ComfyUI moves weights to a GPU, they may lie elsewhere after."""
    on_gpu = management.get_torch_device().type == "cuda"
    modules = {name: {key: value for key, value in vars(module).items() if key not in ("_parameters", "_buffers")}
               for name, module in model.model.named_modules()}  # fmt: skip
    held = {name: ((id(p), p.data_ptr(), p._version if not p.is_inference() else 0) if not on_gpu else (),
                   int(p.detach().contiguous().view(torch.uint8).long().sum()))
            for name, p in model.model.named_parameters()}  # fmt: skip
    modules[""].pop("current_weight_patches_uuid", None)
    for key in ("model_loaded_weight_memory", "device", "model_lowvram", "lowvram_patch_counter"):
        modules[""].pop(key, None)
    for values in modules.values():  # loading does these, as for sampling
        for key in ("comfy_patched_weights", "comfy_force_cast_weights", "weight_function", "bias_function"):
            values.pop(key, None)
        for key in [
            key for key in values if key.startswith("_v_") or key == "_pins"
        ]:  # dynamic VRAM's, from the first use on
            del values[key]
    patcher = (str(model.patches), str(model.object_patches), str(model.model_options), model.patches_uuid)
    flags = (torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.backends.cudnn.benchmark,
             torch.backends.cudnn.enabled, torch.get_float32_matmul_precision(),
             getattr(management, "in_training", None), len(management.current_loaded_models))  # fmt: skip
    return {
        "modules": {k: sorted(v) for k, v in modules.items()},
        "held": held,
        "patcher": patcher,
        "flags": flags,
        "forward": [name for name, module in model.model.named_modules() if "forward" in vars(module)],
        "random": [state.sum().item() for state in (torch.get_rng_state(), *torch.cuda.get_rng_state_all())],
    }


@contextlib.contextmanager
def calls_of(model: Any) -> Any:
    """The arguments of every call of the model, in main memory; the first step's may be done again, on copies."""
    seen: list[tuple[Any, Any, Any]] = []
    usual, again = model.model.apply_model, []

    def spy(x: Any, t: Any, **kwargs: Any) -> Any:
        if len(seen) == 1 and not again and torch.equal(x.cpu(), seen[0][0]) and torch.equal(t.cpu(), seen[0][1]):
            again.append(x)
        else:
            seen.append(tree_map_only(torch.Tensor, lambda value: value.detach().cpu().clone(), (x, t, kwargs)))
        return usual(x, t, **kwargs)

    vars(model.model)["apply_model"] = spy
    try:
        yield seen
    finally:
        del vars(model.model)["apply_model"]
