"""Z-Image's attention with rotary embedding in real numbers, which torch.compile knows, and where there are kernels as
one operator.

Shape legend: N batch, T tokens, H heads, D features of a head or of a token, P pairs of features of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from ..utils.rotary import is_fused, norm_rotate


def use_real_attention(denoiser: nn.Module) -> None:
    """Gives all attention of ``denoiser`` the processor below."""
    for module in denoiser.modules():
        if isinstance(module, Attention):
            module.set_processor(RealAttention())


class RealAttention:
    """In place of diffusers' processor, whose rotary embedding multiplies complex numbers."""

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Any = None,
    ) -> Tensor:
        """``freqs_cis`` is complex, NTP, as in diffusers, or its real and imaginary part, NTP2 or the same for all
        samples TP2."""
        q, k, v = (layer(hidden_states).unflatten(-1, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v))
        turns = torch.view_as_real(freqs_cis) if freqs_cis.is_complex() else freqs_cis
        mask = attention_mask[:, None, None, :].bool() if attention_mask is not None else None
        x_NTHD = dispatch_attention_fn(
            normed_turned(q, attn.norm_q, turns),
            normed_turned(k, attn.norm_k, turns),
            v,
            attn_mask=mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        output: Tensor = attn.to_out[0](x_NTHD.flatten(2, 3))
        return output


def normed_turned(x_NTHD: Tensor, norm: Any, turns: Tensor) -> Tensor:
    """``x_NTHD`` normalised, and pairs of its features turned: ``turns`` is NTP2 or, the same for all samples, TP2."""
    if turns.ndim == 3:
        cos_TD, sin_TD = (turns[..., part].repeat_interleave(2, dim=-1) for part in (0, 1))
        if is_fused(x_NTHD, x_NTHD.shape[-1], [norm.weight], cos_TD, sin_TD):
            return norm_rotate([x_NTHD], [norm.weight], cos_TD, sin_TD, norm.eps)
        turns = turns[None]
    cos, sin = turns[:, :, None].unbind(-1)
    a, b = norm(x_NTHD).float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(3).to(x_NTHD.dtype)
