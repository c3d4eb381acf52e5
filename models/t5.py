"""T5's text encoder (version 1.1, and 1.0 with its plain feed-forward) and tokenizer, in transformers' files and
ComfyUI's.

Reference: https://github.com/google-research/text-to-text-transfer-transformer.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.imports import lazy
from ..utils.weights import Weights, build, fill
from .files import read_json

if TYPE_CHECKING:
    import torch
    import transformers

    from .base import Family
else:
    transformers = lazy("transformers")


def load_t5(family: Family, weights: Weights, device: torch.device) -> Any:
    """T5EncoderModel from a folder or a single file, in eval mode, stored as the family's settings say."""
    settings = read_json(weights.path / "config.json") if weights.path.is_dir() else t5_config(weights)
    model = build(lambda: transformers.T5EncoderModel(transformers.T5Config(**settings)))
    model.tie_weights()
    # transformers keeps these in float32 beside float16, where their output overflows
    float32 = ("DenseReluDense.wo",) if family.config.dtype == "float16" else ()
    storage = family.text_storage(float32)
    fill(model, lambda tensor: weights.read(_t5_name(tensor, weights)), family.dtype, device, float32, storage)
    return model.eval()


def t5_config(weights: Weights) -> dict[str, Any]:
    """Arguments of T5Config for a single file of an encoder, from names and shapes."""
    block = "encoder.block.0.layer"
    is_gated = f"{block}.1.DenseReluDense.wi_0.weight" in weights
    buckets, heads = weights.shape(f"{block}.0.SelfAttention.relative_attention_bias.weight")
    inner, width = weights.shape(f"{block}.0.SelfAttention.q.weight")
    return {
        "vocab_size": weights.shape(_t5_name("shared.weight", weights))[0],
        "d_model": width,
        "d_kv": inner // heads,
        "d_ff": weights.shape(f"{block}.1.DenseReluDense.{'wi_0' if is_gated else 'wi'}.weight")[0],
        "num_layers": weights.count("encoder.block."),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu" if is_gated else "relu",
    }


def _t5_name(name: str, weights: Weights) -> str:
    """The token embedding is one tensor with two names; a file has either or both."""
    if name in ("shared.weight", "encoder.embed_tokens.weight") and name not in weights:
        return "shared.weight" if "shared.weight" in weights else "encoder.embed_tokens.weight"
    return name


def write_t5_tokenizer(folder: Path) -> int:
    """A unigram model of printable ASCII and a few words, for miniatures; returns the size of its vocabulary."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -3.0) for word in ("a", "cat", "dog", "photo", "of", "red")]
    pieces += [(chr(code), -6.0) for code in range(33, 127)]
    tokenizer = transformers.T5TokenizerFast(  # type: ignore[attr-defined]
        vocab=pieces, extra_ids=0, model_max_length=512
    )
    tokenizer.save_pretrained(folder)
    return len(tokenizer)
