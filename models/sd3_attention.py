"""Stable Diffusion 3's attention with its norms as one operator, where there are kernels for it.

Shape legend: N batch, T tokens (image before text), H heads, D features of a head or of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import Tensor
from torch.nn import functional as F

from ..utils.rotary import is_fused, norm_rotate


class FusedJointAttention(JointAttnProcessor2_0):
    """In place of diffusers' processor, which it leaves to its work where there are no norms or no kernels.

    There is nothing to rotate; an angle of 0 costs little beside the passes over queries and keys that it saves.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Any:
        """The image's tokens, and the text's where ``encoder_hidden_states`` is given."""
        streams = [(hidden_states, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))]
        if encoder_hidden_states is not None:
            layers = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
            streams.append((encoder_hidden_states, layers, (attn.norm_added_q, attn.norm_added_k)))
        norms = [norm for _, _, pair in streams for norm in pair]
        lengths = [x_NTD.shape[1] for x_NTD, _, _ in streams]
        head_dim = attn.inner_dim // attn.heads
        angles = _no_turn(sum(lengths), head_dim, hidden_states.device)
        if None in norms or not is_fused(hidden_states, head_dim, [norm.weight for norm in norms], *angles):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)
        parts = [[layer(x_NTD).unflatten(-1, (-1, head_dim)) for layer in layers] for x_NTD, layers, _ in streams]
        queries, keys, values = zip(*parts, strict=True)
        x_NHTD = F.scaled_dot_product_attention(
            _normed(queries, norms[::2], angles).transpose(1, 2),
            _normed(keys, norms[1::2], angles).transpose(1, 2),
            (values[0] if len(values) == 1 else torch.cat(values, dim=1)).transpose(1, 2),
        )
        image_NTD, *text = x_NHTD.transpose(1, 2).flatten(2).split(lengths, dim=1)
        image_NTD = attn.to_out[1](attn.to_out[0](image_NTD))
        if not text:
            return image_NTD
        return image_NTD, text[0] if attn.context_pre_only else attn.to_add_out(text[0])


def _no_turn(length: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.ones(length, head_dim, device=device), torch.zeros(length, head_dim, device=device)


def _normed(parts: Sequence[Tensor], norms: Sequence[Any], angles: tuple[Tensor, Tensor]) -> Tensor:
    return norm_rotate(list(parts), [norm.weight for norm in norms], *angles, norms[0].eps)
