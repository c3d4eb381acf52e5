"""CLIP's text encoders and tokenizer: OpenAI's (ViT-L) and OpenCLIP's (bigG), in transformers' and original files.

Reference: https://github.com/openai/CLIP and https://github.com/mlfoundations/open_clip.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.imports import lazy
from ..utils.weights import Weights
from .files import write_json

if TYPE_CHECKING:
    import huggingface_hub
    import tokenizers
    import torch
else:
    huggingface_hub, tokenizers, torch = map(lazy, ("huggingface_hub", "tokenizers", "torch"))

CLIP_LENGTH = 77
"""Tokens of a text, with those for its start and its end."""
TOKENIZER_FILES = ("vocab.json", "merges.txt")
HUB_TOKENIZERS = (("openai/clip-vit-large-patch14", ""), ("stabilityai/stable-diffusion-xl-base-1.0", "tokenizer/"))
"""Repositories and the folder there."""
SPECIAL_TOKENS = {
    # Makes CLIP pool at the highest token, its real end token; as in the configurations of Flux and SDXL
    "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
}  # fmt: skip


def clip_config(weights: Weights) -> dict[str, Any]:
    """Arguments of CLIPTextConfig for a file with transformers' names. Heads have 64 features in every CLIP."""
    vocabulary, width = weights.shape("text_model.embeddings.token_embedding.weight")
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": weights.shape("text_model.encoder.layers.0.mlp.fc1.weight")[0],
        "num_hidden_layers": weights.count("text_model.encoder.layers."),
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": weights.shape("text_model.embeddings.position_embedding.weight")[0],
        "hidden_act": "quick_gelu",
        **SPECIAL_TOKENS,
    }


def projected_config(weights: Weights, activation: str) -> dict[str, Any]:
    """Arguments of CLIPTextConfig, with a projection, for such a file; without one its pooled text stays as it is."""
    config = clip_config(weights)
    has_projection = "text_projection.weight" in weights
    width = weights.shape("text_projection.weight")[0] if has_projection else config["hidden_size"]
    return {**config, "hidden_act": activation, "projection_dim": width}


def clip_name(name: str, weights: Weights) -> str:
    """Files have ``text_model.`` before every name, CLIPTextModel only in some versions of transformers."""
    name = name.removeprefix("text_model.")
    return f"text_model.{name}" if f"text_model.{name}" in weights else name


# -- OpenCLIP's own layout ---------------------------------------------------------------------------------

ROWS = ("q_proj", "k_proj", "v_proj")
"""Order of the parts in OpenCLIP's fused projection."""
OPEN_MODULES = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}
OPEN_LAYER_MODULES = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def open_clip_config(weights: Weights) -> dict[str, Any]:
    """Arguments of CLIPTextConfig for a text encoder in OpenCLIP's layout, from names and shapes."""
    vocabulary, width = weights.shape("token_embedding.weight")
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": weights.shape("transformer.resblocks.0.mlp.c_fc.weight")[0],
        "num_hidden_layers": weights.count("transformer.resblocks."),
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": weights.shape("positional_embedding")[0],
        "hidden_act": "gelu",
        "projection_dim": weights.shape("text_projection")[1],
        **SPECIAL_TOKENS,
    }


def open_clip_source(name: str) -> tuple[str, str]:
    """Where a parameter of CLIPTextModelWithProjection lies in OpenCLIP's layout: the tensor and the part of it.

    The part is empty (all of it), one of `ROWS`, or "transposed": OpenCLIP multiplies by its projection from
    the other side.
    """
    name = name.removeprefix("text_model.")
    if name in OPEN_MODULES:
        return OPEN_MODULES[name], "transposed" if name.startswith("text_projection") else ""
    match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    assert match, name
    layer, module, leaf = match.groups()
    if module.startswith("self_attn.") and (part := module.removeprefix("self_attn.")) in ROWS:
        return f"transformer.resblocks.{layer}.attn.in_proj_{leaf}", part
    return f"transformer.resblocks.{layer}.{OPEN_LAYER_MODULES[module]}.{leaf}", ""


def read_open_clip(weights: Weights, name: str) -> torch.Tensor:
    """A parameter of CLIPTextModelWithProjection from OpenCLIP's layout."""
    source, part = open_clip_source(name)
    if part in ROWS:
        width, index = weights.shape(source)[0] // 3, ROWS.index(part)
        return weights.read(source, slice(index * width, (index + 1) * width))
    return weights.read(source).T if part else weights.read(source)


def to_open_clip(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parameters of CLIPTextModelWithProjection, by name, in OpenCLIP's layout; the inverse of `read_open_clip`."""
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        source, part = open_clip_source(name)
        parts.setdefault(source, {})[part] = tensor.T if part == "transposed" else tensor
    return {
        name: torch.cat([found[part] for part in ROWS]) if ROWS[0] in found else next(iter(found.values()))
        for name, found in parts.items()
    }


# -- tokens ------------------------------------------------------------------------------------------------


def chunks(tokenizer: Any, captions: Sequence[str], pad: int) -> list[torch.Tensor]:
    """Token ids of captions, each (chunks, `CLIP_LENGTH`): pieces of up to 75 tokens between start and end.

    A caption of one piece comes as the tokenizer itself would pad and cut it.

    Args:
        pad: What fills the last piece after its end.
    """
    room = CLIP_LENGTH - 2
    found = []
    for tokens in tokenizer(list(captions), add_special_tokens=False, verbose=False).input_ids:
        pieces = [tokens[at : at + room] for at in range(0, len(tokens), room)] or [[]]
        rows = [
            [tokenizer.bos_token_id, *piece, tokenizer.eos_token_id, *[pad] * (room - len(piece))] for piece in pieces
        ]
        found.append(torch.tensor(rows))
    return found


def cached_tokenizer() -> Path | None:
    """Folder of CLIP's tokenizer, if it was once fetched from Hugging Face, by itself or with SDXL."""
    for repository, folder in HUB_TOKENIZERS:
        files = [huggingface_hub.try_to_load_from_cache(repository, f"{folder}{name}") for name in TOKENIZER_FILES]
        if all(isinstance(file, str) for file in files):
            return Path(str(files[0])).parent
    return None


def write_clip_tokenizer(folder: Path, pad: str = "<|endoftext|>") -> int:
    """Writes a byte-level BPE that knows a few words, for miniatures; returns the size of its vocabulary.

    Args:
        pad: The token that fills up short texts.
    """
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary, merges = [*letters, *(f"{letter}</w>" for letter in letters)], []
    for word in ("a", "cat", "dog", "photo", "of", "red"):
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            merges.append(f"{pieces[0]} {pieces[1]}")
            pieces[:2] = ["".join(pieces[:2])]
            vocabulary.append(pieces[0])
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    special["pad_token"] = pad
    vocabulary = list(dict.fromkeys([*vocabulary, "<|startoftext|>", "<|endoftext|>"]))
    write_json(folder / "vocab.json", {piece: index for index, piece in enumerate(vocabulary)})
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *dict.fromkeys(merges), ""]), "utf-8")
    write_json(folder / "special_tokens_map.json", special)
    write_json(
        folder / "tokenizer_config.json",
        {**special, "tokenizer_class": "CLIPTokenizer", "model_max_length": CLIP_LENGTH},
    )
    return len(vocabulary)
