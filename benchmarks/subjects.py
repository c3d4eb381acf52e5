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
    """Of captions, for what is trained of their reading."""


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


def lumina2(size: Size, device: torch.device) -> Subject:
    """Lumina Image 2 with captions of 128 tokens."""
    from diffusers import Lumina2Transformer2DModel
    from diffusion_trainer.models.lumina2 import Lumina2
    from diffusion_trainer.models.lumina2_attention import fuse_attention
    from diffusion_trainer.utils.weights import build

    shape = {"hidden_size": 192, "num_layers": 2, "num_refiner_layers": 1, "num_attention_heads": 2, "num_kv_heads": 1}

    class RandomLumina2(Lumina2):
        def check_files(self) -> None: ...

        def build_denoiser(self) -> Any:
            options = shape if size.small else {}
            return fuse_attention(build(lambda: Lumina2Transformer2DModel(cap_feat_dim=2304, **options)))

        def denoiser_reader(self) -> Any:
            return random_weights(self.build_denoiser(), device)

    media = {"latents": (16, size.height // 8, size.width // 8)}
    return Subject("lumina_2", RandomLumina2, media, {"gemma_embeds": (128, 2304)})


def flux2(size: Size, device: torch.device, shape: dict[str, Any]) -> Subject:
    """FLUX.2; the shape is that of Flux2Transformer2DModel."""
    from diffusers import Flux2Transformer2DModel
    from diffusion_trainer.models.flux2 import Flux2
    from diffusion_trainer.utils.weights import build

    if size.small:
        shape = {**shape, "num_layers": 2, "num_single_layers": 2, "num_attention_heads": 2}

    class RandomFlux2(Flux2):
        def check_files(self) -> None: ...

        def build_denoiser(self) -> Any:
            return build(lambda: Flux2Transformer2DModel(**shape))

        def denoiser_reader(self) -> Any:
            return random_weights(self.build_denoiser(), device)

    media = {"latents": (128, size.height // 16, size.width // 16)}
    return Subject("flux2", RandomFlux2, media, {"text_embeds": (512, shape["joint_attention_dim"])})


def qwen_image(size: Size, device: torch.device) -> Subject:
    """Qwen-Image with captions of 128 tokens."""
    from diffusers import QwenImageTransformer2DModel
    from diffusion_trainer.models.qwen_image import QwenImage
    from diffusion_trainer.utils.weights import build

    shape = {"num_layers": 2, "num_attention_heads": 2} if size.small else {}

    class RandomQwenImage(QwenImage):
        def check_files(self) -> None: ...

        def build_denoiser(self) -> Any:
            return build(lambda: QwenImageTransformer2DModel(**shape))

        def denoiser_reader(self) -> Any:
            return random_weights(self.build_denoiser(), device)

    media = {"latents": (16, 1, size.height // 8, size.width // 8)}
    return Subject("qwen_image", RandomQwenImage, media, {"qwen_embeds": (128, 3584)})


def cosmos_predict2(size: Size, device: torch.device, shape: dict[str, Any]) -> Subject:
    """Cosmos-Predict2; the shape is that of CosmosTransformer3DModel."""
    from diffusion_trainer.models.cosmos_predict2 import CosmosPredict2

    if size.small:
        shape = {"num_attention_heads": 2, "num_layers": 2}

    class RandomCosmosPredict2(CosmosPredict2):
        _network: ClassVar = COSMOS | shape  # type: ignore[assignment]

        def check_files(self) -> None: ...

        def denoiser_reader(self) -> Any:
            return random_weights(self.build_denoiser(), device)

    media = {"latents": (16, size.height // 8, size.width // 8)}
    return Subject("cosmos_predict2", RandomCosmosPredict2, media, {"t5_embeds": (128, 1024)})


COSMOS: dict[str, Any] = {"in_channels": 16, "out_channels": 16, "attention_head_dim": 128, "text_embed_dim": 1024,
                          "rope_scale": (1.0, 4.0, 4.0), "extra_pos_embed_type": None}  # fmt: skip
COSMOS_2B, COSMOS_14B = ({"num_attention_heads": heads, "num_layers": layers} for heads, layers in ((16, 28), (40, 36)))


def anima(size: Size, device: torch.device) -> Subject:
    """Anima with captions of 128 tokens of either kind."""
    from diffusion_trainer.models.anima import Anima

    small = {"num_attention_heads": 2, "num_layers": 2}

    class RandomAnima(Anima):
        _network: ClassVar = COSMOS | (small if size.small else COSMOS_2B)  # type: ignore[assignment]
        # as many tokens as the benchmark draws them of, where T5 has 32128
        _adapter: ClassVar = {  # type: ignore[assignment]
            "source_dim": 1024,
            "num_layers": 1 if size.small else 6,
            "target_vocab_size": 49408,
        }

        def check_files(self) -> None: ...

        def denoiser_reader(self) -> Any:
            return random_weights(self.build_denoiser(), device)

    media = {"latents": (16, size.height // 8, size.width // 8)}
    return Subject("anima", RandomAnima, media, {"qwen_embeds": (128, 1024)}, {"t5_ids": (128,)})


def ltx_video(size: Size, device: torch.device, shape: dict[str, Any]) -> Subject:
    """LTX-Video 0.9.5 and later; the shape is that of LTXVideoTransformer3DModel."""
    from diffusion_trainer.models.ltx_video import LTXVideo

    if size.small:
        shape = {"num_attention_heads": 2, "attention_head_dim": 64, "num_layers": 2}
    width = shape["num_attention_heads"] * shape["attention_head_dim"]

    class RandomLTXVideo(LTXVideo):
        is_causal = True  # type: ignore[assignment]
        _network: ClassVar = {"in_channels": 128, "caption_channels": 4096, "cross_attention_dim": width, **shape}

        def check_files(self) -> None: ...

        def denoiser_reader(self) -> Any:
            return random_weights(self.build_denoiser(), device)

    media = {"latents": (128, (size.frames - 1) // 8 + 1, size.height // 32, size.width // 32)}
    return Subject("ltx-video", RandomLTXVideo, media, {"t5_embeds": (128, 4096)})


LTX_VIDEO_2B = {"num_attention_heads": 32, "attention_head_dim": 64, "num_layers": 28}
LTX_VIDEO_13B = {"num_attention_heads": 32, "attention_head_dim": 128, "num_layers": 48}


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
    "lumina2": lumina2,
    "flux2-klein-4b": partial(flux2, shape={
        "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680,
        "guidance_embeds": False}),
    "flux2-klein-9b": partial(flux2, shape={
        "num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288,
        "guidance_embeds": False}),
    "flux2-dev": partial(flux2, shape={
        "num_layers": 8, "num_single_layers": 48, "num_attention_heads": 48, "joint_attention_dim": 15360}),
    "qwen-image": qwen_image,
    "cosmos-predict2-2b": partial(cosmos_predict2, shape=COSMOS_2B),
    "cosmos-predict2-14b": partial(cosmos_predict2, shape=COSMOS_14B),
    "anima": anima,
    "ltx-video-2b": partial(ltx_video, shape=LTX_VIDEO_2B),
    "ltx-video-13b": partial(ltx_video, shape=LTX_VIDEO_13B),
    "sdxl": sdxl,
    "hunyuan-video": hunyuan_video,
    "wan-1.3b": partial(wan, shape={"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}),
    "wan-14b": partial(wan, shape={"num_attention_heads": 40}),
    "wan-i2v-14b": partial(wan, shape={"num_attention_heads": 40}, task="i2v"),
}  # fmt: skip
"""By name, as ``--family`` takes it."""
