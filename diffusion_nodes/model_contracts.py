"""What saved workflows rely on in the model nodes: ids, functions, and which inputs come first.

Data alone: ComfyUI reads it at every start. All further options of a family follow by themselves as
inputs, and a family that is not listed here gets a node of its own name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from ..models import types_in_files


@dataclass(frozen=True)
class Contract:
    """What is fixed of a node."""

    title: str
    family: str
    function: str
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    """In this order; what the family has besides comes after."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """Options that inputs of another name set."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    kinds: Mapping[str, str] = field(default_factory=dict)
    """ComfyUI's types of inputs whose option has another."""


CONTRACTS = {
    "SDXLModelNode": Contract(
        "SDXL Model", "sdxl", "get_sdxl_config", ("checkpoint_path",),
        ("v_pred", "min_snr_gamma", "debiased_estimation_loss", "unet_lr", "text_encoder_1_lr", "text_encoder_2_lr"),
        defaults={"unet_lr": 4e-5, "text_encoder_1_lr": 2e-5, "text_encoder_2_lr": 2e-5}),
    "Wan22ModelNode": Contract(
        "Wan2.2 Model", "wan", "get_wan22_config", ("ckpt_path", "min_t", "max_t"),
        ("transformer_path", "llm_path", "vae_path", "clip_path", "tokenizer_path", "text_encoder_fp8",
         "cache_text_embeddings")),
    "QwenImageEditModelNode": Contract(
        "Qwen Image Edit Model", "qwen_image", "get_qwen_image_edit_config", ("diffusers_path",),
        ("transformer_path",)),
    "FluxModelNode": Contract(
        "Flux Model", "flux", "get_flux_config", (),
        ("diffusers_path", "transformer_path", "bypass_guidance_embedding", "flux_shift")),
    "SD3ModelNode": Contract("SD3 Model", "sd3", "get_sd3_config", ("diffusers_path",), ("flux_shift",)),
    "CosmosPredict2ModelNode": Contract(
        "Cosmos Predict2 Model", "cosmos_predict2", "get_cosmos_predict2_config",
        ("transformer_path", "vae_path", "t5_path")),
    "OmniGen2ModelNode": Contract(
        "OmniGen2 Model", "omnigen2", "get_omnigen2_config", ("diffusers_path",), ("flux_shift",)),
    "QwenImageModelNode": Contract(
        "Qwen Image Model", "qwen_image", "get_qwen_image_config", (),
        ("diffusers_path", "transformer_path", "text_encoder_path", "tokenizer_path", "vae_path", "qwen_2511")),
    "FluxKontextModelNode": Contract(
        "Flux Kontext Model", "flux", "get_flux_kontext_config", ("diffusers_path",),
        ("transformer_path", "flux_shift"), defaults={"flux_shift": True}),
    "LTXVideoModelNode": Contract(
        "LTX-Video Model", "ltx-video", "get_ltx_video_config", ("diffusers_path",),
        ("use_single_file", "single_file_path", "first_frame_conditioning_p")),
    "HunyuanVideoModelNode": Contract(
        "HunyuanVideo Model", "hunyuan-video", "get_hunyuan_video_config", (),
        ("ckpt_path", "transformer_path", "vae_path", "llm_path", "clip_path")),
    "CosmosModelNode": Contract(
        "Cosmos Model", "cosmos", "get_cosmos_config", ("transformer_path", "vae_path", "text_encoder_path")),
    "Lumina2ModelNode": Contract(
        "Lumina 2 Model", "lumina_2", "get_lumina2_config", ("transformer_path", "llm_path", "vae_path"),
        ("lumina_shift",), defaults={"lumina_shift": True}),
    "Wan21ModelNode": Contract(
        "Wan2.1 Model", "wan", "get_wan21_config", ("ckpt_path",),
        ("transformer_path", "llm_path", "vae_path", "clip_path", "tokenizer_path", "text_encoder_fp8",
         "cache_text_embeddings")),
    "ChromaModelNode": Contract(
        "Chroma Model", "chroma", "get_chroma_config", ("diffusers_path", "transformer_path"), ("flux_shift",),
        defaults={"flux_shift": True}),
    "HiDreamModelNode": Contract(
        "HiDream Model", "hidream", "get_hidream_config", ("diffusers_path", "llama3_path"),
        ("llama3_4bit", "max_llama3_sequence_length", "flux_shift")),
    "HunyuanImage21ModelNode": Contract(
        "HunyuanImage 2.1 Model", "hunyuan_image", "get_hunyuan_image21_config",
        ("transformer_path", "vae_path", "text_encoder_path", "byt5_path")),
    "AuraFlowModelNode": Contract(
        "AuraFlow Model", "auraflow", "get_aura_flow_config",
        ("transformer_path", "text_encoder_path", "vae_path", "max_sequence_length")),
    "Flux2ConfigNode": Contract(
        "Flux.2 Model", "flux2", "get_flux2_config", ("diffusers_path",),
        ("diffusion_model", "vae", "text_encoder_path")),
    "ZImageModelNode": Contract(
        "Z-Image Model", "z_image", "get_z_image_config", (),
        ("merge_adapters", "checkpoint_path", "diffusion_path", "text_encoder_path", "vae_path"),
        keys={"diffusion_path": "diffusion_model", "vae_path": "vae"}),
    "hunyuanvideo15ModelNode": Contract(
        "HunyuanVideo 1.5 Model", "hunyuan_video_15", "get_hunyuan_video_15_config",
        ("diffusion_path", "vae_path", "Text_Encoder", "ByT5", "shift"),
        keys={"diffusion_path": "diffusion_model", "vae_path": "vae"}, defaults={"shift": 1}, kinds={"shift": "INT"}),
}  # fmt: skip

SWITCHED = ("qwen2511",)
"""Families without a node of their own: an input of another's says that it is this one."""


@cache
def contracts() -> dict[str, Contract]:
    """The model nodes by id: those above, and one for each other family that has a file."""
    listed = {contract.family for contract in CONTRACTS.values()} | set(SWITCHED)
    others = [kind for kind in types_in_files() if kind not in listed]
    return CONTRACTS | {f"{_camel(kind)}ModelNode": Contract(f"{_words(kind)} Model", kind, "get_config")
                        for kind in others}  # fmt: skip


def _words(kind: str) -> str:
    return " ".join(part[:1].upper() + part[1:] for part in kind.replace("-", "_").split("_"))


def _camel(kind: str) -> str:
    return _words(kind).replace(" ", "").replace(".", "")
