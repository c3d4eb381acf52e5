"""Families at their published size whose weights and encoded data are random: nothing is read from files.

Each entry of `RANDOM` makes, from the benchmark's arguments, the family's class and a function that encodes
one sample: media and text as the cache would give them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, ClassVar

Sample = tuple[dict[str, Any], dict[str, Any]]
"""Media and text."""


def read_random(denoiser: Any, device: Any) -> Callable[[str], Any]:
    """Values for the parameters of a network without values, made on ``device`` when they are asked for."""
    import torch

    shapes = {name: parameter.shape for name, parameter in denoiser.named_parameters()}

    def read(name: str) -> torch.Tensor:
        if "norm" in name and len(shapes[name]) == 1 and name.endswith("weight"):
            return torch.ones(shapes[name], device=device, dtype=torch.bfloat16)
        return torch.randn(shapes[name], device=device, dtype=torch.bfloat16) * 0.02

    return read


def random_flux(arguments: argparse.Namespace, device: Any) -> tuple[type, Callable[[], Sample]]:
    """Flux.1 dev."""
    import torch
    from diffusers import FluxTransformer2DModel
    from diffusion_trainer.models.flux import Flux
    from diffusion_trainer.utils.weights import build

    class RandomFlux(Flux):
        def check_files(self) -> None: ...

        def build_denoiser(self) -> Any:
            shape = {"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 2} if arguments.small else {}
            return build(lambda: FluxTransformer2DModel(guidance_embeds=True, **shape))

        def denoiser_reader(self) -> Any:
            return read_random(self.build_denoiser(), device)

    def sample() -> Sample:
        latents = torch.randn(16, arguments.height // 8, arguments.width // 8).bfloat16()
        text = {"clip_pooled": torch.randn(768).bfloat16(), "t5_embeds": torch.randn(512, 4096).bfloat16()}
        return {"latents": latents}, text

    return RandomFlux, sample


def random_sdxl(arguments: argparse.Namespace, device: Any) -> tuple[type, Callable[[], Sample]]:
    """SDXL; its text encoders are trained unless their learning rates are 0."""
    import torch
    from diffusion_trainer.models.sdxl import SDXL

    depths = (1, 1, 2) if arguments.small else (1, 2, 10)
    channels = (32, 64, 64) if arguments.small else (320, 640, 1280)
    layers = 2 if arguments.small else 32
    texts = {
        "clip_l": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": min(12, layers),
                   "num_attention_heads": 12, "hidden_act": "quick_gelu"},
        "clip_g": {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": layers,
                   "num_attention_heads": 20, "hidden_act": "gelu", "projection_dim": 1280},
    }  # fmt: skip

    class RandomSDXL(SDXL):
        predicts_v: ClassVar = False
        _unet_config: ClassVar = {
            "block_out_channels": channels, "layers_per_block": 2, "transformer_layers_per_block": depths,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": tuple(max(1, width // 64) for width in channels), "cross_attention_dim": 2048,
            "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        }  # fmt: skip

        def check_files(self) -> None: ...

        def _text_config(self, name: str) -> dict[str, Any]:
            return {**texts[name], "eos_token_id": 2}

        def denoiser_reader(self) -> Any:
            return read_random(self.build_denoiser(), device)

    def sample() -> Sample:
        # Tokens for encoders that are trained, embeddings for those that are not
        text = {f"{name}_tokens": torch.randint(49000, (1, 77)) for name in texts}
        text |= {f"{name}_embeds": torch.randn(77, config["hidden_size"]).bfloat16() for name, config in texts.items()}
        text["clip_g_pooled"] = torch.randn(1280).bfloat16()
        return {"latents": torch.randn(4, arguments.height // 8, arguments.width // 8).bfloat16()}, text

    return RandomSDXL, sample


RANDOM: dict[str, Callable[[argparse.Namespace, Any], tuple[type, Callable[[], Sample]]]] = {
    "flux": random_flux,
    "sdxl": random_sdxl,
}
