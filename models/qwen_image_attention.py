"""Qwen-Image's attention with rotary embedding in real numbers, which torch.compile knows, and where there are kernels
as one operator with the norms; its block for pictures of two noise levels, without a mask over all features; and its
pipeline without a limit for captions that saw pictures.

Shape legend: N batch, T tokens (text before image), H heads, D features of a head or of a token, P pairs of features
of a head, M features of one modulation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import diffusers
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers import transformer_qwenimage
from torch import Tensor

from ..utils.rotary import is_fused, norm_rotate

Angles = tuple[Tensor, Tensor]


def use_real_attention(denoiser: Any) -> None:
    """Gives the blocks of ``denoiser`` the forms below."""
    for block in denoiser.transformer_blocks:
        block.attn.set_processor(RealAttention())
        if block.zero_cond_t:
            block.__class__ = QwenImageTransformerBlock


def real_angles(image_TP: Tensor, text_TP: Tensor) -> Angles:
    """Cosines and sines (TD) of the turns that diffusers' ``QwenEmbedRope`` gives, the text's before the image's."""
    turns_TP2 = torch.view_as_real(torch.cat([text_TP, image_TP]))
    cos_TD, sin_TD = (turns_TP2[..., part].repeat_interleave(2, dim=-1) for part in (0, 1))
    return cos_TD, sin_TD


class RealAttention:
    """In place of diffusers' processor, whose rotary embedding multiplies complex numbers."""

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """The image's tokens and the text's.

        Args:
            encoder_hidden_states_mask: NT of the text, False for what is not to be seen; None: all is seen.
            image_rotary_emb: As `real_angles` gives them, or as diffusers' transformer does: complex, the image's and
                the text's.
        """
        cos_TD, sin_TD = real_angles(*image_rotary_emb) if image_rotary_emb[0].is_complex() else image_rotary_emb
        streams = (
            (encoder_hidden_states, (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)),
            (hidden_states, (attn.to_q, attn.to_k, attn.to_v)),
        )
        queries, keys, values = zip(*(_projected(attn, layers, x_NTD) for x_NTD, layers in streams), strict=True)
        mask = None
        if encoder_hidden_states_mask is not None:
            seen_NT = encoder_hidden_states_mask.bool()
            mask = torch.cat([seen_NT, seen_NT.new_ones(hidden_states.shape[:2])], dim=1)[:, None, None, :]
        x_NTHD = dispatch_attention_fn(
            _normed_turned(queries, (attn.norm_added_q, attn.norm_q), cos_TD, sin_TD),
            _normed_turned(keys, (attn.norm_added_k, attn.norm_k), cos_TD, sin_TD),
            torch.cat(values, dim=1),
            attn_mask=mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        sizes = [encoder_hidden_states.shape[1], hidden_states.shape[1]]
        text_NTD, image_NTD = x_NTHD.flatten(2).split(sizes, dim=1)
        image: Tensor = attn.to_out[1](attn.to_out[0](image_NTD.contiguous()))
        text: Tensor = attn.to_add_out(text_NTD.contiguous())
        return image, text


def _projected(attn: Any, layers: Sequence[Any], x_NTD: Tensor) -> list[Tensor]:
    """Query, key and value, each NTHD."""
    return [layer(x_NTD).unflatten(-1, (attn.heads, -1)) for layer in layers]


def _normed_turned(parts: Sequence[Tensor], norms: Sequence[Any], cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    weights = [norm.weight for norm in norms]
    if is_fused(parts[0], parts[0].shape[-1], weights, cos_TD, sin_TD):
        return norm_rotate(list(parts), weights, cos_TD, sin_TD, norms[0].eps)
    x_NTHD = torch.cat([norm(part) for part, norm in zip(parts, norms, strict=True)], dim=1)
    cos, sin = cos_TD[:, None, ::2], sin_TD[:, None, ::2]
    a, b = x_NTHD.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(3).to(x_NTHD.dtype)


class QwenImageTransformerBlock(transformer_qwenimage.QwenImageTransformerBlock):
    """As diffusers' with ``zero_cond_t``, where control pictures are modulated as at time 0. diffusers picks a
    modulation for each token and feature; here each part of the sequence has its own."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None,
        temb: Tensor,
        image_rotary_emb: Any = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        modulate_index: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """Text and image.

        Args:
            temb: Of time and of time 0, one after the other; of time alone where there is no control picture.
            modulate_index: As long as there are tokens that are made; None: all are. diffusers' transformer gives a
                number for each token of each sample.
        """
        if modulate_index is not None and modulate_index.ndim == 2:
            return super().forward(
                hidden_states, encoder_hidden_states, encoder_hidden_states_mask, temb, image_rotary_emb,
                joint_attention_kwargs, modulate_index,
            )  # fmt: skip
        num_tokens = hidden_states.shape[1]
        made = num_tokens if modulate_index is None else modulate_index.shape[0]
        sizes = [num_tokens] if modulate_index is None else [made, num_tokens - made]
        image = _Modulated(self.img_mod(temb).chunk(len(sizes)), sizes)
        text = _Modulated([self.txt_mod(temb[: len(hidden_states)])], [encoder_hidden_states.shape[1]])
        attended, attended_text = self.attn(
            hidden_states=image.scaled(self.img_norm1(hidden_states), 0),
            encoder_hidden_states=text.scaled(self.txt_norm1(encoder_hidden_states), 0),
            encoder_hidden_states_mask=encoder_hidden_states_mask,
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )
        x_NTD = image.added(hidden_states, attended, 0)
        text_NTD = text.added(encoder_hidden_states, attended_text, 0)
        x_NTD = image.added(x_NTD, self.img_mlp(image.scaled(self.img_norm2(x_NTD), 1)), 1)
        text_NTD = text.added(text_NTD, self.txt_mlp(text.scaled(self.txt_norm2(text_NTD), 1)), 1)
        if x_NTD.dtype == torch.float16:
            x_NTD, text_NTD = x_NTD.clip(-65504, 65504), text_NTD.clip(-65504, 65504)
        return text_NTD, x_NTD


class _Modulated:
    """Shift, scale and gate of the two halves of a block, for each part of a sequence."""

    def __init__(self, modulations: Sequence[Tensor], sizes: Sequence[int]) -> None:
        """``modulations``: N x 6M of each part."""
        self._parts = [each[:, None].chunk(6, dim=-1) for each in modulations]
        self._sizes = list(sizes)

    def scaled(self, x_NTD: Tensor, half: int) -> Tensor:
        """Shifted and scaled."""
        pieces = zip(x_NTD.split(self._sizes, dim=1), self._parts, strict=True)
        return _joined([x * (1 + part[3 * half + 1]) + part[3 * half] for x, part in pieces])

    def added(self, x_NTD: Tensor, update_NTD: Tensor, half: int) -> Tensor:
        """With the update times the gate."""
        pieces = zip(update_NTD.split(self._sizes, dim=1), self._parts, strict=True)
        return x_NTD + _joined([part[3 * half + 2] * update for update, part in pieces])


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


class QwenImagePipeline(diffusers.QwenImagePipeline):
    """As diffusers', but embeddings are never cut: those of a caption that saw pictures have a token for each bit of
    them, and diffusers' limit of 1024 is one of captions alone."""

    def encode_prompt(self, *args: Any, prompt_embeds: Tensor | None = None, **given: Any) -> Any:
        if prompt_embeds is not None:
            return prompt_embeds, None
        return super().encode_prompt(*args, **given)
