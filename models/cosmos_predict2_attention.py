"""Cosmos-Predict2's network without torchvision, which diffusers' needs, and its attention without copies.

Shape legend: N batch, T tokens, L text tokens, H heads, D features of a head or of a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import diffusers
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

Angles = tuple[Tensor, Tensor]
LONGEST = 1024
"""Tokens along a side whose angles are known: more than diffusers', as ComfyUI has no limit."""


class CosmosAttention:
    """In place of diffusers' processor, with equal results: that one copies keys and values and changes the layout
    twice, and asks on the way what torch.compile cannot follow."""

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Angles | None = None,
    ) -> Tensor:
        """Of the picture's tokens (NTD) to themselves, or to the text's; the angles, each TD, turn the former."""
        seen = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            layer(states).unflatten(-1, (attn.heads, -1))
            for layer, states in ((attn.to_q, hidden_states), (attn.to_k, seen), (attn.to_v, seen))
        )
        q, k = attn.norm_q(q), attn.norm_k(k)
        if image_rotary_emb is not None:
            q, k = (apply_rotary_emb(x, image_rotary_emb, use_real_unbind_dim=-2, sequence_dim=1) for x in (q, k))
        x_NTHD = dispatch_attention_fn(
            q, k, v, attn_mask=attention_mask, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        output: Tensor = attn.to_out[0](x_NTHD.flatten(2).type_as(q))
        return output


class CosmosNetwork(diffusers.CosmosTransformer3DModel):
    """As diffusers', but for pictures without padding alone, and without torchvision."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        padding_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Latents (NCFHW, of one frame) to the prediction of the same shape, in a tuple.

        Args:
            padding_mask: All zeros, as diffusers' pipelines give it; not looked at.
        """
        from .cosmos_predict2 import chain

        assert not return_dict
        values: Any = hidden_states.squeeze(2), timestep, encoder_hidden_states
        for layer in chain(self):
            values = layer.forward(SimpleNamespace(**layer.submodules), *values)
        return (values.unsqueeze(2),)


def make_network(config: Mapping[str, Any]) -> CosmosNetwork:
    """A network with attention as above."""
    network: CosmosNetwork = CosmosNetwork.from_config(config)
    network.rope.max_size = [LONGEST] * 3
    for module in network.modules():
        if isinstance(module, Attention):
            module.set_processor(CosmosAttention())
    return network
