"""Families at their real size, with random weights in place of files: what `train_step.py` measures.

A further family is one function here and its names in `SUBJECTS`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch
    from diffusion_trainer.models.base import Family

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Size:
    """What is trained."""

    width: int
    height: int
    frames: int
    small: bool
    """Two blocks of each kind, to try the command itself."""


@dataclass(frozen=True)
class Subject:
    """A family that needs no files, and the shapes of its cached values."""

    type: str
    family: type[Family]
    media: Shapes
    text: Shapes
    tokens: Shapes = field(default_factory=dict)
    """Of captions for text encoders that are trained."""


def random_weights(denoiser: Any, device: torch.device) -> Callable[[str], torch.Tensor]:
    """Values for the parameters of a network without values, made on ``device`` when they are asked for."""
    import torch

    shapes = {name: parameter.shape for name, parameter in denoiser.named_parameters()}

    def read(name: str) -> torch.Tensor:
        if "norm" in name and len(shapes[name]) == 1 and name.endswith("weight"):
            return torch.ones(shapes[name], device=device, dtype=torch.bfloat16)
        generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))  # the same whatever is read first
        return torch.randn(shapes[name], device=device, dtype=torch.bfloat16, generator=generator) * 0.02

    return read


def flux(size: Size, device: torch.device) -> Subject:
    """FLUX.1-dev."""
    from diffusers import FluxTransformer2DModel
    from diffusion_trainer.models.flux import Flux
    from diffusion_trainer.utils.weights import build

    shape = {"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 2} if size.small else {}

    class RandomFlux(Flux):
        def check_files(self) -> None: ...

        def build_denoiser(self) -> Any:
            return build(lambda: FluxTransformer2DModel(guidance_embeds=True, **shape))

        def denoiser_reader(self) -> Any:
            return random_weights(self.build_denoiser(), device)

    media = {"latents": (16, size.height // 8, size.width // 8)}
    return Subject("flux", RandomFlux, media, {"clip_pooled": (768,), "t5_embeds": (512, 4096)})


def chroma(size: Size, device: torch.device) -> Subject:
    """Chroma1 with captions of 128 tokens."""
    from diffusers import ChromaTransformer2DModel
    from diffusion_trainer.models.chroma import Chroma
    from diffusion_trainer.utils.weights import build

    shape = {"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 2, "approximator_hidden_dim": 64}

    class RandomChroma(Chroma):
        def check_files(self) -> None: ...

        def build_denoiser(self) -> Any:
            return build(lambda: ChromaTransformer2DModel(**(shape if size.small else {})))

        def denoiser_reader(self) -> Any:
            return random_weights(self.build_denoiser(), device)

    media = {"latents": (16, size.height // 8, size.width // 8)}
    return Subject("chroma", RandomChroma, media, {"t5_embeds": (128, 4096)})


def z_image(size: Size, device: torch.device) -> Subject:
    """Z-Image with captions of 128 tokens."""
    from diffusers import ZImageTransformer2DModel
    from diffusion_trainer.models.z_image import ZImage
    from diffusion_trainer.utils.weights import build

    shape = {"dim": 256, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2} if size.small else {}

    class RandomZImage(ZImage):
        def check_files(self) -> None: ...

        def build_denoiser(self) -> Any:
            return build(lambda: ZImageTransformer2DModel(**shape))

        def denoiser_reader(self) -> Any:
            return random_weights(self.build_denoiser(), device)

    media = {"latents": (16, size.height // 8, size.width // 8)}
    return Subject("z_image", RandomZImage, media, {"qwen_embeds": (128, 2560)})


def sd3(size: Size, device: torch.device, shape: dict[str, Any]) -> Subject:
    """Stable Diffusion 3.5; the shape is that of SD3Transformer2DModel."""
    from diffusion_trainer.models.sd3 import SD3

    if size.small:
        shape = {**shape, "num_layers": 2, "num_attention_heads": 2}
    width = 64 * shape["num_attention_heads"]

    class RandomSD3(SD3):
        _network: ClassVar = {
            **shape, "in_channels": 16, "attention_head_dim": 64, "joint_attention_dim": 4096,
            "caption_projection_dim": width, "pooled_projection_dim": 2048, "qk_norm": "rms_norm",
        }  # fmt: skip

        def check_files(self) -> None: ...

        def denoiser_reader(self) -> Any:
            import torch

            read = random_weights(self.build_denoiser(), device)
            table = 1, self._network["pos_embed_max_size"] ** 2, width
            return lambda name: torch.zeros(table, device=device) if name == "pos_embed.pos_embed" else read(name)

        def cached_shapes(self, latent_size: tuple[int, int, int]) -> tuple[Shapes, Shapes]:
            return media, text

    media: Shapes = {"latents": (16, size.height // 8, size.width // 8)}
    text: Shapes = {"clip_l_embeds": (77, 768), "clip_l_pooled": (768,), "clip_g_embeds": (77, 1280),
                    "clip_g_pooled": (1280,), "t5_embeds": (256, 4096)}  # fmt: skip
    return Subject("sd3", RandomSD3, media, text)


SD35_MEDIUM = {"num_layers": 24, "num_attention_heads": 24, "pos_embed_max_size": 384,
               "dual_attention_layers": tuple(range(13))}  # fmt: skip
SD35_LARGE = {"num_layers": 38, "num_attention_heads": 38, "pos_embed_max_size": 192}


def sdxl(size: Size, device: torch.device) -> Subject:
    """SDXL; its text encoders are trained unless their learning rates are 0."""
    from diffusion_trainer.models.sdxl import SDXL

    channels = (32, 64, 64) if size.small else (320, 640, 1280)
    layers = 2 if size.small else 32
    texts: dict[str, dict[str, Any]] = {
        "clip_l": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": min(12, layers),
                   "num_attention_heads": 12, "hidden_act": "quick_gelu"},
        "clip_g": {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": layers,
                   "num_attention_heads": 20, "hidden_act": "gelu", "projection_dim": 1280},
    }  # fmt: skip

    class RandomSDXL(SDXL):
        predicts_v: ClassVar = False
        _unet_config: ClassVar = {
            "block_out_channels": channels, "layers_per_block": 2,
            "transformer_layers_per_block": (1, 1, 2) if size.small else (1, 2, 10),
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
            return random_weights(self.build_denoiser(), device)

    text: Shapes = {f"{name}_embeds": (77, config["hidden_size"]) for name, config in texts.items()}
    tokens: Shapes = {f"{name}_tokens": (1, 77) for name in texts}
    media = {"latents": (4, size.height // 8, size.width // 8)}
    return Subject("sdxl", RandomSDXL, media, {**text, "clip_g_pooled": (1280,)}, tokens)


def wan(size: Size, device: torch.device, shape: dict[str, Any], task: Any = "t2v") -> Subject:
    """Wan 2.1; the shape is that of WanTransformer3DModel."""
    from diffusers import WanTransformer3DModel
    from diffusion_trainer.models.wan import Variant, Wan
    from diffusion_trainer.utils.weights import build

    if size.small:
        shape = {**shape, "num_attention_heads": 2, "ffn_dim": 512, "num_layers": 2}
    if task == "i2v":
        width = shape["num_attention_heads"] * 128
        shape = {**shape, "in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": width}

    class RandomWan(Wan):
        variant = Variant(task, 16, task == "i2v")  # type: ignore[assignment]

        def check_files(self) -> None: ...

        def build_denoiser(self) -> Any:
            return build(lambda: WanTransformer3DModel(text_dim=4096, **shape))

        def denoiser_reader(self) -> Any:
            return random_weights(self.build_denoiser(), device)

        def cached_shapes(self, latent_size: tuple[int, int, int]) -> tuple[Shapes, Shapes]:
            return media, text

    latents = (16, (size.frames - 1) // 4 + 1, size.height // 8, size.width // 8)
    media: Shapes = {"latents": latents}
    if task == "i2v":
        media |= {"condition": latents, "image_embeds": (257, 1280)}
    text: Shapes = {"umt5_embeds": (120, 4096)}
    return Subject("wan", RandomWan, media, text)


def hunyuan_video(size: Size, device: torch.device) -> Subject:
    """HunyuanVideo with captions of 128 tokens."""
    from diffusers import HunyuanVideoTransformer3DModel
    from diffusion_trainer.models.hunyuan_video import HunyuanVideo
    from diffusion_trainer.models.hunyuan_video_attention import as_original
    from diffusion_trainer.utils.weights import build

    shape = {"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 2} if size.small else {}

    class RandomHunyuanVideo(HunyuanVideo):
        def check_files(self) -> None: ...

        def build_denoiser(self) -> Any:
            return build(lambda: as_original(HunyuanVideoTransformer3DModel(**shape)))

        def denoiser_reader(self) -> Any:
            return random_weights(self.build_denoiser(), device)

    media: Shapes = {"latents": (16, (size.frames - 1) // 4 + 1, size.height // 8, size.width // 8)}
    text: Shapes = dict.fromkeys(("llama_embeds", "llama_picture_embeds"), (128, 4096))
    return Subject("hunyuan-video", RandomHunyuanVideo, media, {**text, "clip_pooled": (768,)})


SUBJECTS: dict[str, Callable[[Size, torch.device], Subject]] = {
    "flux": flux,
    "chroma": chroma,
    "z-image": z_image,
    "sd3.5-medium": partial(sd3, shape=SD35_MEDIUM),
    "sd3.5-large": partial(sd3, shape=SD35_LARGE),
    "sdxl": sdxl,
    "hunyuan-video": hunyuan_video,
    "wan-1.3b": partial(wan, shape={"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}),
    "wan-14b": partial(wan, shape={"num_attention_heads": 40}),
    "wan-i2v-14b": partial(wan, shape={"num_attention_heads": 40}, task="i2v"),
}
"""By name, as ``--family`` takes it."""
