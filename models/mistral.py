"""Mistral Small 3 as a text encoder, from a folder or from a single file with its tokenizer inside.

Reference: transformers' MistralModel, and Mistral's tekken tokenizer (https://github.com/mistralai/mistral-common).
Licence of the weights: Apache-2.0.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.imports import lazy
from ..utils.weights import Weights, build, fill
from .components import Component, TextEncoder
from .files import read_json
from .qwen3 import cut_to

if TYPE_CHECKING:
    import tokenizers
    import torch
    import transformers
    from torch import nn

    from ..utils.storage import Storage
else:
    tokenizers, torch, transformers, nn = map(lazy, ("tokenizers", "torch", "transformers", "torch.nn"))

MISTRAL = Component(
    "Mistral Small 3, such as mistral_3_small_flux2_bf16.safetensors", "text_encoders", "text_encoder", "Mistral",
    ("model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"),
    ("text_encoders.mistral3_24b.transformer.",), ("model.layers.0.self_attn.q_norm.weight",), "tokenizer_path",
    "tokenizer")  # fmt: skip
EMBEDDED_TOKENIZER = "tekken_model"
"""What single files call the tokenizer that they hold, in Mistral's own format."""
HEAD_DIM = 128
"""Which no shape tells."""


def load_mistral(
    weights: Weights,
    tokenizer: Path | None,
    dtype: torch.dtype,
    device: torch.device,
    storage: Storage | None = None,
    num_layers: int | None = None,
) -> TextEncoder:
    """The language model without its output layer, in eval mode, and its tokenizer.

    Args:
        tokenizer: Its folder; None: that in the file.
        num_layers: Only the first of its layers; what they give is not normed. Left out: all.
    """
    settings = _folder_config(weights.path) if weights.path.is_dir() else mistral_config(weights)
    model = build(lambda: transformers.MistralModel(transformers.MistralConfig(**cut_to(settings, num_layers))))
    if num_layers is not None:
        model.norm = nn.Identity()
    fill(model, lambda tensor: weights.read(mistral_name(tensor, weights)), dtype, device, storage=storage)
    if tokenizer:
        return TextEncoder(transformers.AutoTokenizer.from_pretrained(tokenizer), model.eval())
    return TextEncoder(tekken_tokenizer(weights.raw(EMBEDDED_TOKENIZER)), model.eval())


def _folder_config(folder: Path) -> dict[str, Any]:
    """Of the language model, which in folders is a part of one that sees pictures."""
    config = read_json(folder / "config.json")
    return config.get("text_config", config)


def mistral_config(weights: Weights) -> dict[str, Any]:
    """Arguments of MistralConfig for a single file, from names and shapes."""
    vocabulary, width = weights.shape("model.embed_tokens.weight")
    layer = "model.layers.0"
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": weights.shape(f"{layer}.mlp.gate_proj.weight")[0],
        "num_hidden_layers": weights.count("model.layers."),
        "num_attention_heads": weights.shape(f"{layer}.self_attn.q_proj.weight")[0] // HEAD_DIM,
        "num_key_value_heads": weights.shape(f"{layer}.self_attn.k_proj.weight")[0] // HEAD_DIM,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e9,
        "sliding_window": None,
    }


def mistral_name(name: str, weights: Weights) -> str:
    """Where a parameter of the language model lies: alone, or in a model that sees pictures, of which there are two
    spellings."""
    for prefix in ("model.language_model.", "language_model.model.", "model."):
        if prefix + name in weights:
            return prefix + name
    return f"model.{name}"


# -- tokenizer --------------------------------------------------------------------------------------------


def tekken_tokenizer(data: bytes) -> Any:
    """The tokenizer that a tekken.json describes; it fills up on the left.

    The file lists tokens as bytes, most important first: of two neighbours that make up a token those are joined first
    whose token comes first.
    """
    found = json.loads(data)
    num_special = found["config"]["default_num_special_tokens"]
    special = {entry["rank"]: entry["token_str"] for entry in found["special_tokens"]}
    names = [special.get(rank, f"<SPECIAL_{rank}>") for rank in range(num_special)]
    entries = sorted(found["vocab"], key=lambda entry: entry["rank"])
    tokens = [base64.b64decode(entry["token_bytes"]) for entry in entries]
    tokens = tokens[: found["config"]["default_vocab_size"] - num_special]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    spelled = {token: _spelled(token) for token in tokens}
    merges = [(spelled[left], spelled[right]) for token in tokens for left, right in _cuts(token, ranks)]
    vocabulary = {name: rank for rank, name in enumerate(names)}
    vocabulary |= {spelled[token]: num_special + rank for token, rank in ranks.items()}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges, ignore_merges=True))
    words = tokenizers.pre_tokenizers.Split(tokenizers.Regex(found["config"]["pattern"]), behavior="isolated")
    letters = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([words, letters])
    model.decoder = tokenizers.decoders.ByteLevel()
    model.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in names])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )
    tokenizer.chat_template = CHAT
    return tokenizer


CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content[0].text }}"
    "[/SYSTEM_PROMPT]{% else %}[INST]{{ m.content[0].text }}[/INST]{% endif %}{% endfor %}"
)
"""Of a system message and a user's, both of one text."""


def _cuts(token: bytes, ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pairs of tokens that make up ``token``, the most important first."""
    cuts = [(token[:at], token[at:]) for at in range(1, len(token))]
    pairs = [pair for pair in cuts if pair[0] in ranks and pair[1] in ranks]
    return sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


PRINTED = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
OTHERS = [byte for byte in range(256) if byte not in PRINTED]
LETTERS = [chr(byte if byte in PRINTED else 256 + OTHERS.index(byte)) for byte in range(256)]
"""How tokenizers of bytes spell each: as it is, or if it cannot be printed by a letter of its own (GPT-2)."""


def _spelled(token: bytes) -> str:
    return "".join(LETTERS[byte] for byte in token)


def miniature_tekken() -> bytes:
    """A tekken.json of bytes, a few words, and Mistral's special tokens that are needed here."""
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]", "[SYSTEM_PROMPT]",
               "[/SYSTEM_PROMPT]", "[TOOL_CALLS]", "<pad>"]  # fmt: skip
    words = [b"ca", b"re", b"cat", b" c", b" cat", b" re", b"ed", b" red"]
    tokens = [bytes([byte]) for byte in range(256)] + words
    config = {
        "pattern": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        "num_vocab_tokens": len(tokens),
        "default_vocab_size": len(tokens) + 20,
        "default_num_special_tokens": 20,
    }
    vocab = [{"rank": n, "token_bytes": base64.b64encode(t).decode(), "token_str": None} for n, t in enumerate(tokens)]
    listed = [{"rank": rank, "token_str": name, "is_control": True} for rank, name in enumerate(special)]
    return json.dumps({"config": config, "vocab": vocab, "special_tokens": listed}).encode()


def write_mistral_tokenizer(folder: Path) -> int:
    """A small one of its kind, as folders have it; returns the size of its vocabulary."""
    tokenizer = tekken_tokenizer(miniature_tekken())
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def miniature_mistral(text: dict[str, Any]) -> Any:
    """A small model that sees pictures, as folders have it.

    Args:
        text: Of the configuration of its language model, what `mistral_config` does not take for granted.
    """
    granted = {"head_dim": HEAD_DIM, "rms_norm_eps": 1e-5, "rope_theta": 1e9, "sliding_window": None}
    vision = transformers.PixtralVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1, image_size=28, patch_size=14
    )
    config = transformers.Mistral3Config(
        text_config=transformers.MistralConfig(**granted, **text), vision_config=vision, image_token_index=5
    )
    return transformers.Mistral3ForConditionalGeneration(config)
