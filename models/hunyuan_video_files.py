"""HunyuanVideo's files: which there are, and names and shapes in the layouts that people have.

"Original" is Tencent's own layout, which ComfyUI's single files have, too; "library" is diffusers'. Here is where a
parameter of our transformer (see `hunyuan_video_attention`) lies in each, and what arguments the library's classes need
for a file. And the prompts with which Llava-Llama3 is asked, since they tell its tokenizer.

Reference: https://github.com/Tencent-Hunyuan/HunyuanVideo.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.config import SettingsError
from ..utils.imports import lazy
from ..utils.weights import Weights
from . import autoencoder
from .clip import clip_config
from .components import CLIP_L, Component
from .files import read_json
from .fused import swap_halves

if TYPE_CHECKING:
    import tokenizers
    import torch
    import transformers
else:
    tokenizers, torch, transformers = map(lazy, ("tokenizers", "torch", "transformers"))

SCALING = 0.476986
"""Of the latents; from the original's configuration, as a file does not hold it."""
_HEAD = "<|start_header_id|>system<|end_header_id|>\n\n"
_TAIL = "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
END = "<|eot_id|>"
PROMPTS = {
    "llama_embeds": (
        f"{_HEAD}Describe the video by detailing the following aspects: "
        "1. The main content and theme of the video."
        "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
        "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
        "4. background environment, light, style and atmosphere."
        f"5. camera angles, movements, and transitions used in the video:{_TAIL}",
        95,
    ),
    "llama_picture_embeds": (
        f"{_HEAD}Describe the image by detailing the color, shape, size, texture, quantity, text, spatial "
        f"relationships of the objects and background:{_TAIL}",
        36,
    ),
}
"""What comes before a caption, for videos and for pictures, and how many tokens that is; by names of cached values."""
TEXT_LENGTH = 256
"""Most tokens of a caption with what ends it."""
LLAMA_HEAD_DIM = 128
"""Features of a head of Llama 3."""
_VARIANTS = ("byt5_in.fc1.weight", "vision_in.proj.0.weight", "cond_type_embedding.weight",
             "time_r_in.in_layer.weight", "time_r_in.mlp.0.weight", "clean_x_embedder.proj.weight")  # fmt: skip
"""Tensors of HunyuanImage 2.1, HunyuanVideo 1.5 and FramePack."""
COMPONENTS = {
    "transformer": Component(
        "a HunyuanVideo transformer, such as hunyuan_video_t2v_720p_bf16.safetensors", "transformer_path",
        "transformer", "HunyuanVideoTransformer3DModel",
        ("txt_in.individual_token_refiner.blocks.0.norm1.weight", "img_in.proj.weight",
         "single_blocks.0.linear1.weight"),
        ("model.diffusion_model.", "model.model.", "diffusion_model."), _VARIANTS),
    "vae": Component(
        "the HunyuanVideo VAE, such as hunyuan_video_vae_bf16.safetensors", "vae_path", "vae",
        "AutoencoderKLHunyuanVideo",
        ("encoder.conv_in.conv.weight", "decoder.conv_in.conv.weight", "quant_conv.weight", "post_quant_conv.weight"),
        ("vae.", "first_stage_model."), ("decoder.mid_block.resnets.0.norm1.norm_layer.weight",)),  # CogVideoX
    "llama": Component(
        "Llava-Llama3, such as llava_llama3_fp8_scaled.safetensors", "llm_path", "text_encoder", "Llama",
        ("layers.0.self_attn.q_proj.weight", "embed_tokens.weight"),
        ("model.", "language_model.model.", "model.language_model.", "text_encoders.llama.transformer.model."),
        ("layers.0.self_attn.q_norm.weight", "layers.0.self_attn.q_proj.bias"),  # Qwen
        "llm_tokenizer_path", "tokenizer", "comfy/text_encoders/llama_tokenizer"),
    "clip": replace(
        CLIP_L, title="CLIP-L, such as clip_l.safetensors, or a folder of it", folder="text_encoder_2",
        tokenizer_folder="tokenizer_2"),
}  # fmt: skip
RELEASE = {
    "transformer": "hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states.pt",
    "vae": "hunyuan-video-t2v-720p/vae/pytorch_model.pt",
    "llama": "text_encoder",
    "clip": "text_encoder_2",
}
"""Where the parts are in a folder of the original release."""


# -- the transformer in the original layout -----------------------------------------------------------------

TOP_MODULES = {
    "x_embedder.proj": "img_in.proj",
    "time_text_embed.timestep_embedder.linear_1": "time_in.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "time_in.mlp.2",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.mlp.0",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.mlp.2",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "context_embedder.proj_in": "txt_in.input_embedder",
    "context_embedder.time_text_embed.timestep_embedder.linear_1": "txt_in.t_embedder.mlp.0",
    "context_embedder.time_text_embed.timestep_embedder.linear_2": "txt_in.t_embedder.mlp.2",
    "context_embedder.time_text_embed.text_embedder.linear_1": "txt_in.c_embedder.linear_1",
    "context_embedder.time_text_embed.text_embedder.linear_2": "txt_in.c_embedder.linear_2",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
STACKS = {
    "transformer_blocks": ("double_blocks", {
        "norm1.linear": "img_mod.linear", "norm1_context.linear": "txt_mod.linear",
        "attn.to_qkv": "img_attn_qkv", "attn.to_added_qkv": "txt_attn_qkv",
        "attn.norm_q": "img_attn_q_norm", "attn.norm_k": "img_attn_k_norm",
        "attn.norm_added_q": "txt_attn_q_norm", "attn.norm_added_k": "txt_attn_k_norm",
        "attn.to_out.0": "img_attn_proj", "attn.to_add_out": "txt_attn_proj",
        "ff.net.0.proj": "img_mlp.fc1", "ff.net.2": "img_mlp.fc2",
        "ff_context.net.0.proj": "txt_mlp.fc1", "ff_context.net.2": "txt_mlp.fc2"}),
    "single_transformer_blocks": ("single_blocks", {
        "norm.linear": "modulation.linear", "linear1": "linear1", "proj_out": "linear2",
        "attn.norm_q": "q_norm", "attn.norm_k": "k_norm"}),
    "context_embedder.token_refiner.refiner_blocks": ("txt_in.individual_token_refiner.blocks", {
        "norm1": "norm1", "norm2": "norm2", "attn.to_qkv": "self_attn_qkv", "attn.to_out.0": "self_attn_proj",
        "ff.net.0.proj": "mlp.fc1", "ff.net.2": "mlp.fc2", "norm_out.linear": "adaLN_modulation.1"}),
}  # fmt: skip
JOINED = {
    "attn.to_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.to_added_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
}
"""Layers of blocks that are several of diffusers'."""
COMFYUI_EMBEDDERS = (
    (r"^txt_in\.c_embedder\.linear_1\.", "txt_in.c_embedder.in_layer."),
    (r"^txt_in\.c_embedder\.linear_2\.", "txt_in.c_embedder.out_layer."),
    (r"^(txt_in\.t_embedder|\w+_in)\.mlp\.0\.", r"\1.in_layer."),
    (r"^(txt_in\.t_embedder|\w+_in)\.mlp\.2\.", r"\1.out_layer."),
)
"""Parts of original names, and what ComfyUI's network calls them; it knows no LoRA of these layers by the former."""
COMFYUI_BLOCKS = (
    (r"_mod\.linear\.", "_mod.lin."), (r"\.modulation\.linear\.", ".modulation.lin."),
    (r"_attn_(qkv|proj)\.", r"_attn.\1."), (r"mlp\.fc1\.", "mlp.0."), (r"mlp\.fc2\.", "mlp.2."),
    (r"_attn_q_norm\.", "_attn.norm.query_norm."), (r"_attn_k_norm\.", "_attn.norm.key_norm."),
    (r"\.q_norm\.", ".norm.query_norm."), (r"\.k_norm\.", ".norm.key_norm."),
)  # fmt: skip
"""The same, of layers whose LoRAs it knows by either; files that it saves have its names."""


def lora_name(name: str) -> str:
    """What a LoRA calls a layer of our transformer: as the original does, where ComfyUI knows that."""
    name = f"{original_name(name)}."
    for theirs, comfyuis in COMFYUI_EMBEDDERS:
        name = re.sub(theirs, comfyuis, name)
    return name.removesuffix(".")


def original_name(name: str) -> str:
    """What the original calls a parameter or a layer of our transformer; each is one of its."""
    name, leaf = re.fullmatch(r"(.+?)((?:\.(?:weight|bias))?)", name).groups()  # type: ignore[union-attr]
    if match := re.fullmatch(r"(\w+|context_embedder\.token_refiner\.refiner_blocks)\.(\d+)\.(.+)", name):
        stack, modules = STACKS[match[1]]
        return f"{stack}.{match[2]}.{modules[match[3]]}{leaf}"
    return f"{TOP_MODULES[name]}{leaf}"


def _in_file(weights: Weights, name: str) -> str:
    """The name in a file, which may be as ComfyUI saves it, of the tensor that the original calls ``name``."""
    if name in weights:
        return name
    other = name
    for theirs, comfyuis in COMFYUI_EMBEDDERS + COMFYUI_BLOCKS:
        other = re.sub(theirs, comfyuis, other)
    scale = other.removesuffix(".weight") + ".scale"  # as norms are called by some
    return next((found for found in (other, scale) if found in weights), name)


def read_original(weights: Weights, name: str) -> torch.Tensor:
    """A parameter of our transformer from a file in the original layout, or in ComfyUI's."""
    return weights.read(_in_file(weights, original_name(name)))


def read_library(weights: Weights, name: str) -> torch.Tensor:
    """A parameter of our transformer from a diffusers folder."""
    module, _, leaf = name.rpartition(".")
    for layer, parts in JOINED.items():
        if module.endswith(f".{layer}"):
            block = module.removesuffix(layer)
            return torch.cat([weights.read(f"{block}{part}.{leaf}") for part in parts])
    value = weights.read(name)
    return swap_halves(value) if module == "norm_out.linear" else value


def transformer_config(weights: Weights) -> dict[str, Any]:
    """Arguments of HunyuanVideoTransformer3DModel for a file, from names and shapes."""

    def shape(name: str) -> tuple[int, ...]:
        return weights.shape(_in_file(weights, name))

    width, in_channels, *patch = shape("img_in.proj.weight")
    if len(patch) != 3:
        raise SettingsError(
            f"{weights.option}: '{weights.path}' makes pictures alone; give {COMPONENTS['transformer'].title}"
        )
    head_dim = shape("double_blocks.0.img_attn_q_norm.weight")[0]
    side = head_dim * 7 // 32 * 2  # 56 of 128, for rows and for columns; the first axis has what is left
    return {
        "in_channels": in_channels,
        "out_channels": shape("final_layer.linear.weight")[0] // math.prod(patch),
        "num_attention_heads": width // head_dim,
        "attention_head_dim": head_dim,
        "num_layers": weights.count("double_blocks."),
        "num_single_layers": weights.count("single_blocks."),
        "num_refiner_layers": weights.count("txt_in.individual_token_refiner.blocks."),
        "mlp_ratio": shape("double_blocks.0.img_mlp.fc1.weight")[0] / width,
        "guidance_embeds": _in_file(weights, "guidance_in.mlp.0.weight") in weights,
        "text_embed_dim": shape("txt_in.input_embedder.weight")[1],
        "pooled_projection_dim": shape("vector_in.in_layer.weight")[1],
        "rope_axes_dim": (head_dim - 2 * side, side, side),
    }


# -- the other files ----------------------------------------------------------------------------------------


def vae_config(weights: Weights) -> dict[str, Any]:
    """Arguments of AutoencoderKLHunyuanVideo for a file, from names and shapes."""
    is_library = "encoder.down_blocks.0.resnets.0.norm1.weight" in weights
    level, block = ("down_blocks", "resnets") if is_library else ("down", "block")
    levels = weights.count(f"encoder.{level}.")
    channels = [weights.shape(f"encoder.{level}.{n}.{block}.0.conv1.conv.weight")[0] for n in range(levels)]
    return {
        "latent_channels": weights.shape("decoder.conv_in.conv.weight")[1],
        "down_block_types": ("HunyuanVideoDownBlock3D",) * levels,
        "up_block_types": ("HunyuanVideoUpBlock3D",) * levels,
        "block_out_channels": tuple(channels),
        "layers_per_block": weights.count(f"encoder.{level}.0.{block}."),
        "norm_num_groups": math.gcd(32, *channels),
        "scaling_factor": SCALING,
    }


def read_vae(weights: Weights, name: str) -> torch.Tensor:
    """A parameter of AutoencoderKLHunyuanVideo: the original release has diffusers' names, what ComfyUI saves those of
    `autoencoder`."""
    if name in weights:
        return weights.read(name)
    return autoencoder.as_matrix(name, weights.read(autoencoder.original_name(name, weights.count("encoder.down."))))


def name_in_folder(name: str, weights: Weights) -> str:
    """CLIP's names begin with ``text_model.``, but not in all folders."""
    return name if name in weights else name.removeprefix("text_model.")


def text_config(name: str, weights: Weights) -> dict[str, Any]:
    """Arguments of LlamaConfig or CLIPTextConfig; a folder of Llava or of a whole CLIP says them of its text part."""
    from_shapes = clip_config if name == "clip" else llama_config
    if not weights.path.is_dir():
        return from_shapes(weights)
    config = read_json(weights.path / "config.json")
    config = config.get("text_config", config)
    if name == "clip" or "rope_parameters" in config:
        return config
    return {**llama_config(weights), **config}  # Llava says what differs from the usual


def llama_config(weights: Weights) -> dict[str, Any]:
    """Arguments of LlamaConfig for Llama 3, from names and shapes."""
    vocabulary, width = weights.shape("embed_tokens.weight")
    layer = "layers.0"
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": weights.shape(f"{layer}.mlp.gate_proj.weight")[0],
        "num_hidden_layers": weights.count("layers."),
        "num_attention_heads": weights.shape(f"{layer}.self_attn.q_proj.weight")[0] // LLAMA_HEAD_DIM,
        "num_key_value_heads": weights.shape(f"{layer}.self_attn.k_proj.weight")[0] // LLAMA_HEAD_DIM,
        "head_dim": LLAMA_HEAD_DIM,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
    }


def llama_tokenizer(folder: Path, setting: str) -> Any:
    """Llava-Llama3's; as its file says, whatever class its configuration names: that would split texts otherwise.

    Raises:
        SettingsError: It is of another model: the prompts have other lengths.
    """
    tokenizer: Any = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.padding_side = "right"
    tokenizer.pad_token = tokenizer.pad_token or END
    for prompt, start in PROMPTS.values():
        if (found := len(tokenizer(prompt).input_ids)) != start:
            raise SettingsError(
                f"{setting}: '{folder}' makes {found} tokens of a prompt that has {start}; give the tokenizer of "
                "Llava-Llama3"
            )
    return tokenizer


_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Where Llama 3 splits texts into words."""


def write_llama_tokenizer(folder: Path) -> int:
    """Bytes and the words of the prompts, each a token, so that the prompts have their lengths; returns the size of its
    vocabulary."""
    start, special = "<|begin_of_text|>", ["<|start_header_id|>", "<|end_header_id|>", END]
    split = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(_SPLIT), "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])  # fmt: skip
    words = {word for prompt, _ in PROMPTS.values() for part in re.split(r"<\|\w+\|>", prompt)
             for word, _ in split.pre_tokenize_str(part)}  # fmt: skip
    vocabulary = [start, "<|end_of_text|>", "<pad>", *special, *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())]
    numbers = {word: n for n, word in enumerate(dict.fromkeys([*vocabulary, *sorted(words)]))}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(numbers, [], ignore_merges=True))
    model.pre_tokenizer, model.decoder = split, tokenizers.decoders.ByteLevel()
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, numbers[start])])  # fmt: skip
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token=start, eos_token="<|end_of_text|>", pad_token="<pad>",
        additional_special_tokens=special, padding_side="right")  # fmt: skip
    tokenizer.save_pretrained(folder)
    return len(tokenizer)
