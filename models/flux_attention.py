"""Flux's attention with its norms and rotary embedding as one operator, where there are kernels for it; and its single
block, cut so that compiled code joins the gradients.

Shape legend: N batch, T tokens (text before image), H heads, D features of a head or of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers import transformer_flux
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor

from ..utils.rotary import is_fused, norm_rotate

Angles = tuple[Tensor, Tensor]


class FusedFluxAttention(FluxAttnProcessor):
    """In place of diffusers' processor, which it leaves to its work where `rotary` has no kernels."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Angles | None = None,
    ) -> Any:
        """The image's tokens and the text's; with ``encoder_hidden_states`` left out all tokens, as one sequence."""
        if image_rotary_emb is None or not _has_kernels(attn, hidden_states, image_rotary_emb):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        parts = [_projected((attn.to_q, attn.to_k, attn.to_v), hidden_states, attn.head_dim)]
        norms = [(attn.norm_q, attn.norm_k)]
        if encoder_hidden_states is not None:
            layers = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
            parts.insert(0, _projected(layers, encoder_hidden_states, attn.head_dim))
            norms.insert(0, (attn.norm_added_q, attn.norm_added_k))
        queries, keys, values = zip(*parts, strict=True)
        norms_q, norms_k = zip(*norms, strict=True)
        x_NTHD = dispatch_attention_fn(
            _normed_rotated(queries, norms_q, image_rotary_emb),
            _normed_rotated(keys, norms_k, image_rotary_emb),
            values[0] if len(values) == 1 else torch.cat(values, dim=1),
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        x_NTD = x_NTHD.flatten(2)
        if encoder_hidden_states is None:
            return x_NTD
        num_text = encoder_hidden_states.shape[1]
        text_NTD, image_NTD = x_NTD[:, :num_text].contiguous(), x_NTD[:, num_text:].contiguous()
        return attn.to_out[1](attn.to_out[0](image_NTD)), attn.to_add_out(text_NTD)


def _has_kernels(attn: Any, x_NTD: Tensor, angles: Angles) -> bool:
    norms = [attn.norm_q, attn.norm_k]
    if attn.added_kv_proj_dim is not None:
        norms += [attn.norm_added_q, attn.norm_added_k]
    weights = [norm.weight for norm in norms]
    return not attn.fused_projections and is_fused(x_NTD, attn.head_dim, weights, *angles)


def _projected(layers: Sequence[Any], x_NTD: Tensor, head_dim: int) -> list[Tensor]:
    """Query, key and value, each NTHD."""
    return [layer(x_NTD).unflatten(-1, (-1, head_dim)) for layer in layers]


def _normed_rotated(parts: Sequence[Tensor], norms: Sequence[Any], angles: Angles) -> Tensor:
    return norm_rotate(list(parts), [norm.weight for norm in norms], *angles, norms[0].eps)


class MaskedFluxAttention(FusedFluxAttention):
    """The same for Chroma, whose blocks hide what is masked from all tokens, and all tokens from what is masked. Here
    hidden tokens see the others: nobody sees what becomes of them, and of a token that sees nothing some kernels make
    NaN."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Angles | None = None,
    ) -> Any:
        """``attention_mask`` is what each token sees: NHTT, its last row that of an image token."""
        seen = None if attention_mask is None else attention_mask[:, :, -1:].bool()
        return super().__call__(attn, hidden_states, encoder_hidden_states, seen, image_rotary_emb)


class FluxSingleTransformerBlock(transformer_flux.FluxSingleTransformerBlock):
    """As diffusers', but text and image come out by one split. Of its two slices torch.compile gives the gradients
    to autograd, which fills two tensors of zeros, copies into each, and adds them up."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Angles | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Text and image."""
        joined_NTD = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        normed_NTD, gate_ND = self.norm(joined_NTD, emb=temb)
        mlp_NTD = self.act_mlp(self.proj_mlp(normed_NTD))
        attended_NTD = self.attn(normed_NTD, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
        added_NTD = gate_ND.unsqueeze(1) * self.proj_out(torch.cat([attended_NTD, mlp_NTD], dim=2))
        joined_NTD = joined_NTD + added_NTD
        if joined_NTD.dtype == torch.float16:
            joined_NTD = joined_NTD.clip(-65504, 65504)
        text_NTD, image_NTD = joined_NTD.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], dim=1)
        return text_NTD, image_NTD
