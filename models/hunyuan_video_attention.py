"""HunyuanVideo's transformer as diffusers has it, with the layers of the original.

`as_original` puts one layer in place of each group of diffusers' that the original files hold as one tensor. So a LoRA
has the original's layers, which is what ComfyUI reads, and queries, keys and values are one product. Diffusers' own
forward of the whole network works with them.

Shape legend: N batch, T tokens (video before text), L text tokens, H heads, D features of a head or of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.normalization import AdaLayerNormContinuous
from diffusers.models.transformers import transformer_hunyuan_video
from torch import Tensor, nn
from torch.nn import functional as F

from ..utils.rotary import is_fused, norm_rotate

Angles = tuple[Tensor, Tensor]


def as_original(denoiser: Any) -> Any:
    """``denoiser``, a HunyuanVideoTransformer3DModel, changed in place; new layers have no values yet."""
    for block in denoiser.transformer_blocks:
        _join(block.attn, "to_qkv", ("to_q", "to_k", "to_v"))
        _join(block.attn, "to_added_qkv", ("add_q_proj", "add_k_proj", "add_v_proj"))
        block.attn.set_processor(JointAttention())
    for block in denoiser.single_transformer_blocks:
        block.linear1 = _joined([block.attn.to_q, block.attn.to_k, block.attn.to_v, block.proj_mlp])
        del block.attn.to_q, block.attn.to_k, block.attn.to_v, block.proj_mlp
        block.__class__ = HunyuanVideoSingleTransformerBlock
    for block in denoiser.context_embedder.token_refiner.refiner_blocks:
        _join(block.attn, "to_qkv", ("to_q", "to_k", "to_v"))
        block.attn.set_processor(TextAttention())
    denoiser.norm_out.__class__ = ShiftBeforeScale
    return denoiser


def _join(attn: Any, name: str, parts: Sequence[str]) -> None:
    setattr(attn, name, _joined([getattr(attn, part) for part in parts]))
    for part in parts:
        delattr(attn, part)


def _joined(layers: Sequence[Any]) -> nn.Linear:
    outputs = sum(layer.out_features for layer in layers)
    return nn.Linear(layers[0].in_features, outputs, bias=layers[0].bias is not None)


class ShiftBeforeScale(AdaLayerNormContinuous):
    """As diffusers', but its layer gives the shift first."""

    def forward(self, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
        """NTD, modulated by ND."""
        shift_ND, scale_ND = self.linear(self.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
        normed: Tensor = self.norm(x)
        return normed * (1 + scale_ND)[:, None, :] + shift_ND[:, None, :]


class TextAttention:
    """Self-attention of the refiner's text tokens."""

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """``attention_mask`` is what is seen, boolean: N1LL or N11L."""
        q, k, v = (x_NLHD.transpose(1, 2) for x_NLHD in _split(attn.to_qkv(hidden_states), attn.heads))
        x_NHLD = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)
        output: Tensor = attn.to_out[1](attn.to_out[0](x_NHLD.transpose(1, 2).flatten(2)))
        return output


class JointAttention:
    """Attention of the double blocks: video and text have layers of their own and see each other."""

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Angles | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Video and text. The angles (TD) are those of all tokens or, as diffusers gives them, of the video's."""
        assert image_rotary_emb is not None
        video = _split(attn.to_qkv(hidden_states), attn.heads)
        text = _split(attn.to_added_qkv(encoder_hidden_states), attn.heads)
        angles = of_all(image_rotary_emb, hidden_states.shape[1] + encoder_hidden_states.shape[1])
        x_NTHD = dispatch_attention_fn(
            _normed_rotated([video[0], text[0]], [attn.norm_q, attn.norm_added_q], angles),
            _normed_rotated([video[1], text[1]], [attn.norm_k, attn.norm_added_k], angles),
            torch.cat([video[2], text[2]], dim=1),
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        lengths = [hidden_states.shape[1], encoder_hidden_states.shape[1]]
        video_NTD, text_NLD = x_NTHD.flatten(2).split(lengths, dim=1)
        return attn.to_out[1](attn.to_out[0](video_NTD)), attn.to_add_out(text_NLD)


class HunyuanVideoSingleTransformerBlock(transformer_hunyuan_video.HunyuanVideoSingleTransformerBlock):
    """As diffusers', with the original's one layer for queries, keys, values and what the MLP begins with."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Angles | None = None,
        *_: Any,
    ) -> tuple[Tensor, Tensor]:
        """Video and text; arguments as those of the double blocks."""
        assert image_rotary_emb is not None
        joined_NTD = torch.cat([hidden_states, encoder_hidden_states], dim=1)
        normed_NTD, gate_ND = self.norm(joined_NTD, emb=temb)
        width = joined_NTD.shape[-1]
        made_NTD = self.linear1(normed_NTD)
        qkv_NTD, mlp_NTD = made_NTD.split([3 * width, made_NTD.shape[-1] - 3 * width], dim=-1)
        q, k, v = _split(qkv_NTD, self.attn.heads)
        angles = of_all(image_rotary_emb, joined_NTD.shape[1])
        processor = self.attn.processor
        x_NTHD = dispatch_attention_fn(
            _normed_rotated([q], [self.attn.norm_q], angles),
            _normed_rotated([k], [self.attn.norm_k], angles),
            v,
            attn_mask=attention_mask,
            backend=processor._attention_backend,
            parallel_config=processor._parallel_config,
        )
        attended_NTD = torch.cat([x_NTHD.flatten(2), self.act_mlp(mlp_NTD)], dim=2)
        joined_NTD = gate_ND.unsqueeze(1) * self.proj_out(attended_NTD) + joined_NTD
        video_NTD, text_NLD = joined_NTD.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1)
        return video_NTD, text_NLD


def _split(x_NTD: Tensor, heads: int) -> tuple[Tensor, ...]:
    """Queries, keys and values, each NTHD."""
    return x_NTD.unflatten(-1, (3, heads, -1)).unbind(2)


def of_all(angles: Angles, length: int) -> Angles:
    """The angles of ``length`` tokens: text, which comes last, is not turned."""
    cos_TD, sin_TD = angles
    missing = length - cos_TD.shape[0]
    if not missing:
        return angles
    return torch.cat([cos_TD, cos_TD.new_ones(missing, cos_TD.shape[1])]), F.pad(sin_TD, (0, 0, 0, missing))


def _normed_rotated(parts: Sequence[Tensor], norms: Sequence[Any], angles: Angles) -> Tensor:
    weights = [norm.weight for norm in norms]
    if is_fused(parts[0], parts[0].shape[-1], weights, *angles):
        return norm_rotate(list(parts), weights, *angles, norms[0].eps)
    cos_TD, sin_TD = angles
    x_NTHD = torch.cat([norm(part) for part, norm in zip(parts, norms, strict=True)], dim=1)
    turned_NTHD = torch.stack([-x_NTHD[..., 1::2], x_NTHD[..., ::2]], dim=-1).flatten(-2)
    return (x_NTHD.float() * cos_TD[:, None] + turned_NTHD.float() * sin_TD[:, None]).to(x_NTHD.dtype)
