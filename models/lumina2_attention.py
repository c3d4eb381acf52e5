"""Lumina Image 2's attention with queries, keys and values from one layer, as in the original, and rotary embedding in
real numbers, which torch.compile knows.

Shape legend: N batch, T tokens, H heads, D features of a head or of a token, P pairs of features of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from .z_image_attention import normed_turned


def fuse_attention(denoiser: nn.Module) -> nn.Module:
    """Gives all attention of diffusers' ``denoiser`` one layer ``to_qkv`` in place of three, and the processor below.

    The weights are then those of the original model, one by one: an adapter of any kind can be written as ComfyUI,
    which has the one layer alone, reads it.
    """
    for module in denoiser.modules():
        if isinstance(module, Attention):
            rows = torch.cat([layer.weight.detach() for layer in (module.to_q, module.to_k, module.to_v)])
            module.to_qkv = nn.Linear(rows.shape[1], rows.shape[0], bias=False, device="meta")
            module.to_qkv.weight = nn.Parameter(rows)
            del module.to_q, module.to_k, module.to_v
            module.set_processor(FusedGroupedAttention())
    return denoiser


class FusedGroupedAttention:
    """In place of diffusers' processor, whose rotary embedding multiplies complex numbers of double precision."""

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor:
        """``image_rotary_emb`` is complex, NTP, as in diffusers, or its real and imaginary part, NTP2 or the same for
        all samples TP2. ``encoder_hidden_states``, the same as ``hidden_states``, is not looked at."""
        head_dim = attn.inner_dim // attn.heads
        groups = attn.inner_kv_dim // head_dim
        x_NTHD = attn.to_qkv(hidden_states).unflatten(-1, (-1, head_dim))
        q, k, v = x_NTHD.split([attn.heads, groups, groups], dim=2)
        turns = torch.view_as_real(image_rotary_emb) if image_rotary_emb.is_complex() else image_rotary_emb
        turns = turns.float()
        x_NTHD = dispatch_attention_fn(
            normed_turned(q, attn.norm_q, turns),
            _repeated(normed_turned(k, attn.norm_k, turns), attn.heads),
            _repeated(v, attn.heads),
            attn_mask=attention_mask[:, None, None, :].bool() if attention_mask is not None else None,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        output: Tensor = attn.to_out[0](x_NTHD.flatten(2, 3))
        return output


def _repeated(x_NTHD: Tensor, heads: int) -> Tensor:
    """Each group's head as often as queries share it. Attention's kernels could do that themselves, but not the fast
    ones, nor any beside a mask."""
    shared = heads // x_NTHD.shape[2]
    return x_NTHD.unsqueeze(3).expand(-1, -1, -1, shared, -1).flatten(2, 3)
