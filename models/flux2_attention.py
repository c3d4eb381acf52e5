"""What makes Flux.2's blocks faster: norms and rotary embedding as one operator, where there are kernels for it, and
SwiGLU by one split.

Shape legend: N batch, T tokens (text before image), H heads, D features of a head or of a token.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_flux2 import (
    Flux2Attention,
    Flux2ParallelSelfAttention,
    Flux2ParallelSelfAttnProcessor,
    Flux2SwiGLU,
)
from torch import Tensor, nn

from ..utils.rotary import is_fused, norm_rotate
from .flux_attention import Angles, FusedFluxAttention


def use_fast_forms(denoiser: nn.Module) -> None:
    """Gives the blocks of ``denoiser`` what is below; double blocks have Flux's attention."""
    for module in denoiser.modules():
        if isinstance(module, Flux2Attention):
            module.set_processor(FusedFluxAttention())
        elif isinstance(module, Flux2ParallelSelfAttention):
            module.set_processor(FusedParallelAttention())
        elif isinstance(module, Flux2SwiGLU):
            module.__class__ = SwiGLU


class SwiGLU(Flux2SwiGLU):
    """As diffusers', whose two slices each get a gradient as wide as both, full of zeros."""

    def forward(self, x: Tensor) -> Tensor:
        gate, value = x.chunk(2, dim=-1)
        gated: Tensor = self.gate_fn(gate) * value
        return gated


class FusedParallelAttention(Flux2ParallelSelfAttnProcessor):
    """In place of diffusers' processor for single blocks, which it leaves to its work where `rotary` has no kernels."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Angles | None = None,
    ) -> Tensor:
        """Of attention and MLP together."""
        norms = attn.norm_q, attn.norm_k
        weights = [norm.weight for norm in norms]
        if image_rotary_emb is None or not is_fused(hidden_states, attn.head_dim, weights, *image_rotary_emb):
            return super().__call__(attn, hidden_states, attention_mask, image_rotary_emb)
        mlp_width = attn.mlp_hidden_dim * attn.mlp_mult_factor
        parts = attn.to_qkv_mlp_proj(hidden_states).split([*[attn.inner_dim] * 3, mlp_width], dim=-1)
        q, k, v = (part.unflatten(-1, (-1, attn.head_dim)) for part in parts[:3])
        q, k = (
            norm_rotate([part], [norm.weight], *image_rotary_emb, norm.eps)
            for part, norm in zip((q, k), norms, strict=True)
        )
        x_NTHD = dispatch_attention_fn(
            q, k, v, attn_mask=attention_mask, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        output: Tensor = attn.to_out(torch.cat([x_NTHD.flatten(2), attn.mlp_act_fn(parts[3])], dim=-1))
        return output
