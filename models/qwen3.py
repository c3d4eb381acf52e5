"""Qwen3 as a text encoder, from a folder or from a single file, and a small tokenizer of its kind.

Reference: transformers' Qwen3Model. Licence of the weights: Apache-2.0.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.imports import lazy
from ..utils.weights import Weights, build, fill
from .components import Component, TextEncoder
from .files import read_json

if TYPE_CHECKING:
    import tokenizers
    import torch
    import transformers
    from torch import nn

    from ..utils.storage import Storage
else:
    tokenizers, torch, transformers, nn = map(lazy, ("tokenizers", "torch", "transformers", "torch.nn"))

QWEN3_4B = Component(
    "Qwen3 4B, such as qwen_3_4b.safetensors", "text_encoders", "text_encoder", "Qwen3",
    ("model.layers.0.self_attn.q_norm.weight", "model.embed_tokens.weight"),
    ("text_encoders.qwen3_4b.transformer.",), (), "tokenizer_path", "tokenizer",
    "comfy/text_encoders/qwen25_tokenizer")  # fmt: skip


def load_qwen(
    weights: Weights,
    tokenizer: Path,
    dtype: torch.dtype,
    device: torch.device,
    storage: Storage | None = None,
    num_layers: int | None = None,
) -> TextEncoder:
    """Qwen3 without its output layer, in eval mode, and the tokenizer of a folder.

    Args:
        num_layers: Only the first of its layers; what they give is not normed. Left out: all.
    """
    settings = read_json(weights.path / "config.json") if weights.path.is_dir() else qwen_config(weights)
    model = build(lambda: transformers.Qwen3Model(transformers.Qwen3Config(**cut_to(settings, num_layers))))
    if num_layers is not None:
        model.norm = nn.Identity()
    fill(model, lambda tensor: weights.read(qwen_name(tensor, weights)), dtype, device, storage=storage)
    return TextEncoder(transformers.AutoTokenizer.from_pretrained(tokenizer), model.eval())


def cut_to(settings: dict[str, Any], num_layers: int | None) -> dict[str, Any]:
    """A language model's configuration with its first layers alone."""
    if num_layers is None:
        return settings
    kinds = {"layer_types": settings["layer_types"][:num_layers]} if settings.get("layer_types") else {}
    return {**settings, "num_hidden_layers": num_layers, **kinds}


def qwen_config(weights: Weights) -> dict[str, Any]:
    """Arguments of Qwen3Config for a single file, from names and shapes."""
    vocabulary, width = weights.shape("model.embed_tokens.weight")
    layer = "model.layers.0"
    head_dim = weights.shape(f"{layer}.self_attn.q_norm.weight")[0]
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": weights.shape(f"{layer}.mlp.gate_proj.weight")[0],
        "num_hidden_layers": weights.count("model.layers."),
        "num_attention_heads": weights.shape(f"{layer}.self_attn.q_proj.weight")[0] // head_dim,
        "num_key_value_heads": weights.shape(f"{layer}.self_attn.k_proj.weight")[0] // head_dim,
        "head_dim": head_dim,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
    }


def qwen_name(name: str, weights: Weights) -> str:
    """Files hold the language model with or without what says its next word."""
    return name if name in weights else f"model.{name}"


def qwen_width(weights: Weights) -> int:
    return weights.shape(qwen_name("embed_tokens.weight", weights))[1]


def write_qwen_tokenizer(folder: Path) -> int:
    """Bytes as tokens, and Qwen's special ones; returns the size of its vocabulary."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.Tokenizer(tokenizers.models.BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<|endoftext|>", eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )  # fmt: skip
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return len(tokenizer)
