"""CLIP's text encoders as links of a chain, for families that train them.

Shape legend: N samples, C pieces of a caption, L tokens of a piece, D features.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from ..utils.imports import lazy
from .base import Layer

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")

Tensors = tuple["torch.Tensor", ...]


def proper(model: Any) -> Any:
    """The encoder proper: with projection, and in some versions of transformers always, it is one level deeper."""
    return getattr(model, "text_model", model)


def text_layers(model: Any, folder: str, at: int, pools: bool) -> list[Layer]:
    """The links that compute the penultimate states and, if it ``pools``, the pooled text, which comes last.

    Args:
        folder: In which a pipeline has the encoder; its links are named by it.
        at: Where its tokens, then its states, are in the tuple.
    """
    encoder = proper(model)
    blocks = list(encoder.encoder.layers)
    penultimate = model.config.num_hidden_layers - 1
    embed = partial(_embed_tokens, at=at, end_token=encoder.eos_token_id if pools else None)
    layers = [Layer(f"{folder}.embeddings", embed, {"embeddings": encoder.embeddings})]
    for index, block in enumerate(blocks[:penultimate]):
        forward = partial(_text_block, at=at)
        layers.append(Layer(f"{folder}.encoder.layers.{index}", forward, {"block": block}, is_block=True))
    if pools:
        modules = {"block": blocks[penultimate], "norm": encoder.final_layer_norm, "projection": model.text_projection}
        layers.append(Layer(f"{folder}.pool", partial(_pool, at=at), modules, is_block=True))
    return layers


def _embed_tokens(modules: Any, *values: torch.Tensor, at: int, end_token: int | None) -> Tensors:
    """Tokens (N, pieces, L) become states (N * pieces, L, D); at the end come the places to pool at, if it pools."""
    tokens_NCL = values[at]
    values = (*values[:at], modules.embeddings(input_ids=tokens_NCL.flatten(0, 1)), *values[at + 1 :])
    if end_token is None:
        return values
    first_NL = tokens_NCL[:, 0].int()
    # As transformers has it: 2 stands in old configurations, where the end is the highest token
    return *values, (first_NL if end_token == 2 else (first_NL == end_token).int()).argmax(-1)


def _text_block(modules: Any, *values: torch.Tensor, at: int) -> Tensors:
    states = modules.block(values[at], attention_mask=None, is_causal=True)
    return *values[:at], states.contiguous(), *values[at + 1 :]


def _pool(modules: Any, *values: torch.Tensor, at: int) -> Tensors:
    """The last block is for the pooled text alone, and that is of the first piece."""
    *values_before, ends_N = values
    count = len(ends_N)
    first_NLD = values[at].unflatten(0, (count, -1))[:, 0]
    first_NLD = modules.norm(modules.block(first_NLD, attention_mask=None, is_causal=True))
    rows = torch.arange(count, device=first_NLD.device)
    return *values_before, modules.projection(first_NLD[rows, ends_N])
