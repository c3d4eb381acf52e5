"""Qwen2.5-VL as a text encoder, which may look at pictures as well: its files, its tokens and its last hidden states.

transformers' model has ``language_model`` and ``visual`` in it. Files have names of before transformers 5, as its
folders still do and ComfyUI's single files, or those of the modules.

In transformers 5 the model gives the tokens of a picture their places by row and column only where it is told which
tokens are a picture's. The processor says that, but diffusers' pipelines (0.42) do not pass it on, and all tokens get
places in one line. Here the model is told, as Qwen's own code and ComfyUI do.

Reference: https://github.com/QwenLM/Qwen2.5-VL. Licence of the 7B weights: Apache-2.0.

Shape legend: N batch, L tokens, D features, C H W channels, height and width of a picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.imports import lazy
from ..utils.weights import Weights, build, fill
from .components import TextEncoder
from .files import read_json
from .wan_files import Layout, Part

if TYPE_CHECKING:
    import tokenizers
    import torch
    import transformers
    from PIL.Image import Image

    from ..utils.storage import Storage
else:
    tokenizers, torch, transformers = map(lazy, ("tokenizers", "torch", "transformers"))

FILES = Part(
    "Qwen2.5-VL 7B, such as qwen_2.5_vl_7b.safetensors", "text_encoder_path", "text_encoder", (),
    Layout(("model.language_model.layers.0.self_attn.q_proj.bias", "model.visual.blocks.0.attn.qkv.bias")),
    Layout(("model.layers.0.self_attn.q_proj.bias", "visual.blocks.0.attn.qkv.bias"),
           ("", "text_encoders.qwen25_7b.transformer.")))  # fmt: skip
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
"""What stands for a picture in a text."""
PICTURE_TOKEN = "<|image_pad|>"
HEAD_DIM, VISUAL_HEAD_DIM = 128, 80
"""Features of a head; one that is smaller has one head."""
WINDOWED = 7
"""Of eight layers of the visual part, so many look at windows of the picture, and the last at all of it."""
PIXELS = {"shortest_edge": 56 * 56, "longest_edge": 12845056}
"""Least and most pixels of a picture, as the published processor and ComfyUI have them."""


@dataclass
class Qwen25VL(TextEncoder):
    """The model, its tokenizer, and what makes patches of pictures."""

    processor: Any


# -- files --------------------------------------------------------------------------------------------------


def source_name(name: str, weights: Weights) -> str:
    """Where a parameter of Qwen2_5_VLModel lies in a file or folder."""
    part, _, rest = name.partition(".")
    names = [f"model.{name}", f"model.{rest}" if part == "language_model" else name, name]
    return next((found for found in names if found in weights), names[1])


def width_of(weights: Weights) -> int:
    """Features of the hidden states."""
    return weights.shape(source_name("language_model.embed_tokens.weight", weights))[1]


def config_of(weights: Weights) -> dict[str, Any]:
    """Arguments of Qwen2_5_VLConfig for a single file, from names and shapes."""

    def shape(name: str) -> tuple[int, ...]:
        return weights.shape(source_name(name, weights))

    def count(block: str) -> int:
        return weights.count(source_name(f"{block}.0.norm1.weight", weights).removesuffix("0.norm1.weight"))

    vocabulary, width = shape("language_model.embed_tokens.weight")
    head_dim, layer = min(HEAD_DIM, width), "language_model.layers.0"
    layers = source_name(f"{layer}.input_layernorm.weight", weights).removesuffix("0.input_layernorm.weight")
    visual, depth = shape("visual.patch_embed.proj.weight")[0], count("visual.blocks")
    text = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shape(f"{layer}.mlp.gate_proj.weight")[0],
        "num_hidden_layers": weights.count(layers),
        "num_attention_heads": width // head_dim,
        "num_key_value_heads": shape(f"{layer}.self_attn.k_proj.weight")[0] // head_dim,
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "rope_parameters": rope_parameters(head_dim),
    }
    return {
        "text_config": text,
        "vision_config": {
            "depth": depth,
            "hidden_size": visual,
            "intermediate_size": shape("visual.blocks.0.mlp.gate_proj.weight")[0],
            "num_heads": max(1, visual // VISUAL_HEAD_DIM),
            "out_hidden_size": width,
            "fullatt_block_indexes": list(range(WINDOWED, depth, WINDOWED + 1)),
        },
    }


def rope_parameters(head_dim: int) -> dict[str, Any]:
    """A quarter of the pairs of features turns with time, three eighths with rows and as many with columns."""
    side = head_dim * 3 // 16
    sections = [head_dim // 2 - 2 * side, side, side]
    return {"rope_type": "default", "mrope_section": sections, "rope_theta": 1e6}


def load(
    weights: Weights,
    tokenizer_folder: Path,
    processor_folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    storage: Storage | None,
) -> Qwen25VL:
    """The model in eval mode, without what says its next word.

    Args:
        processor_folder: Where a processor's settings are, if they are there; else the published ones.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    settings = read_json(weights.path / "config.json") if weights.path.is_dir() else config_of(weights)
    if not weights.path.is_dir():
        settings["image_token_id"] = tokenizer.convert_tokens_to_ids(PICTURE_TOKEN)
    config = transformers.Qwen2_5_VLConfig.from_dict(settings)
    model = build(lambda: transformers.Qwen2_5_VLModel(config))
    fill(model, lambda name: weights.read(source_name(name, weights)), dtype, device, storage=storage)
    make = transformers.Qwen2VLImageProcessorPil  # what pictures become does not hang on torchvision being there
    is_there = (processor_folder / "preprocessor_config.json").is_file()
    processor = make.from_pretrained(processor_folder) if is_there else make(size=PIXELS)
    return Qwen25VL(tokenizer, model.eval(), processor)


# -- encoding -----------------------------------------------------------------------------------------------


def encode(encoder: Qwen25VL, texts: Sequence[str], most: int) -> list[torch.Tensor]:
    """Last hidden states (LD) of texts, each in its own length, cut to ``most`` tokens."""
    rows = encoder.tokenizer(list(texts), truncation=True, max_length=most).input_ids
    lengths = [len(row) for row in rows]
    ids_NL = torch.zeros(len(rows), max(lengths), dtype=torch.int64)
    seen_NL = torch.zeros_like(ids_NL)
    for number, row in enumerate(rows):
        ids_NL[number, : len(row)] = torch.tensor(row)
        seen_NL[number, : len(row)] = 1
    device = encoder.model.device
    with torch.no_grad():
        output = encoder.model(input_ids=ids_NL.to(device), attention_mask=seen_NL.to(device))
    return [states_LD[:length] for states_LD, length in zip(output.last_hidden_state, lengths, strict=True)]


def encode_with_pictures(encoder: Qwen25VL, text: str, pictures: Sequence[Image]) -> torch.Tensor:
    """Last hidden states (LD) of one text with a `PICTURE` in it for each of the pictures."""
    patches = encoder.processor(images=list(pictures), return_tensors="pt")
    grids = patches.image_grid_thw
    counts = iter((grids.prod(-1) // encoder.processor.merge_size**2).tolist())
    token = encoder.tokenizer.convert_tokens_to_ids(PICTURE_TOKEN)
    ids: list[int] = []
    for each in encoder.tokenizer(text).input_ids:
        ids += [each] * (next(counts) if each == token else 1)
    device = encoder.model.device
    ids_NL = torch.tensor([ids], device=device)
    with torch.no_grad():
        output = encoder.model(
            input_ids=ids_NL,
            attention_mask=torch.ones_like(ids_NL),
            mm_token_type_ids=(ids_NL == token).int(),
            pixel_values=patches.pixel_values.to(device),
            image_grid_thw=grids.to(device),
        )
    states_LD: torch.Tensor = output.last_hidden_state[0]
    return states_LD


# -- miniature ----------------------------------------------------------------------------------------------


def miniature(vocabulary: Mapping[str, int], width: int = 32) -> Any:
    """A small one, with a layer of the visual part that sees all of a picture."""
    text = {
        "vocab_size": len(vocabulary), "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2,
        "num_attention_heads": 1, "num_key_value_heads": 1, "rms_norm_eps": 1e-6, "bos_token_id": None,
        "eos_token_id": None, "rope_parameters": rope_parameters(width),
    }  # fmt: skip
    visual = {"depth": 8, "hidden_size": 32, "intermediate_size": 48, "num_heads": 1, "out_hidden_size": width,
              "fullatt_block_indexes": [WINDOWED]}  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=visual, image_token_id=vocabulary[PICTURE_TOKEN],
        video_token_id=vocabulary["<|video_pad|>"], vision_start_token_id=vocabulary["<|vision_start|>"],
        vision_end_token_id=vocabulary["<|vision_end|>"])  # fmt: skip
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def write_processor(folder: Path) -> None:
    """What says how pictures become patches."""
    transformers.Qwen2VLImageProcessorPil(size=PIXELS).save_pretrained(folder)


SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", PICTURE_TOKEN,
           "<|video_pad|>")  # fmt: skip
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen's tokenizer cuts a text before it looks up its pieces."""


def write_tokenizer(folder: Path, words: Sequence[str]) -> dict[str, int]:
    """Qwen's pieces of the texts ``words`` as one token each, other pieces byte by byte; returns the vocabulary."""
    cut = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(PIECES), "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    pieces = [piece for text in words for piece, _ in cut.pre_tokenize_str(text)]
    vocabulary = dict.fromkeys([*sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), *pieces])
    model = tokenizers.models.BPE({piece: n for n, piece in enumerate(vocabulary)}, [], ignore_merges=True)
    whole = tokenizers.Tokenizer(model)
    whole.pre_tokenizer, whole.decoder = cut, tokenizers.decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=whole, pad_token=SPECIAL[0], eos_token=SPECIAL[2], additional_special_tokens=list(SPECIAL[1:])
    )
    tokenizer.save_pretrained(folder)
    return tokenizer.get_vocab()
