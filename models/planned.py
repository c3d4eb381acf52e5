"""``[model]`` tables of families that this version cannot train yet, so that their files can be checked.

A table here becomes a node and is validated like any other; training with it is refused by name. When a
family is implemented, its own file declares the table and the one here is deleted.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from ..utils.config import option
from .base import ModelConfig, StorageDtype
from .flow import FlowConfig
from .from_comfyui import FromComfyUI


def _file(description: str, picker: str, required: bool = False) -> Any:
    return option(... if required else None, description, picker=picker)


def _folder(required: bool = False) -> Any:
    return _file("Folder of the whole model in diffusers layout.", "diffusers", required)


def _transformer(required: bool = False) -> Any:
    return _file("Transformer as a single file.", "diffusion_models", required)


def _vae(required: bool = False) -> Any:
    return _file("VAE as a single file.", "vae", required)


def _text_encoder(required: bool = False) -> Any:
    return _file("Text encoder as a single file.", "text_encoders", required)


class CosmosConfig(ModelConfig):
    """Cosmos 1, text to video."""

    type: Literal["cosmos"] = "cosmos"
    transformer_path: str = _transformer(required=True)
    vae_path: str = _vae(required=True)
    text_encoder_path: str = _text_encoder(required=True)


class HiDreamConfig(FlowConfig):
    """HiDream-I1."""

    type: Literal["hidream"] = "hidream"
    transformer_dtype: StorageDtype | Literal["nf4"] | None = option(  # type: ignore[assignment]
        None, "Precision that the frozen transformer weights are stored in. Left out: the same as dtype."
    )
    diffusers_path: str = _folder(required=True)
    llama3_path: str = _file("Folder of Llama 3.1 8B Instruct.", "text_encoders", required=True)
    llama3_4bit: bool = option(True, "Hold Llama in 4 bits.")
    max_llama3_sequence_length: int = option(128, "Llama tokens per caption.", ge=32, le=2048, step=1)


class OmniGen2Config(FlowConfig):
    """OmniGen2."""

    type: Literal["omnigen2"] = "omnigen2"
    diffusers_path: str = _folder(required=True)


class HunyuanImageConfig(FlowConfig):
    """HunyuanImage 2.1."""

    type: Literal["hunyuan_image"] = "hunyuan_image"
    transformer_path: str = _transformer(required=True)
    vae_path: str = _vae(required=True)
    text_encoder_path: str = _text_encoder(required=True)
    byt5_path: str = _text_encoder(required=True)


class AuraFlowConfig(FlowConfig):
    """AuraFlow and Pony V7."""

    type: Literal["auraflow"] = "auraflow"
    transformer_path: str = _transformer(required=True)
    text_encoder_path: str = _text_encoder(required=True)
    vae_path: str = _vae(required=True)
    max_sequence_length: int = option(
        768, "Tokens per caption: 256 for AuraFlow, 768 for Pony V7.", ge=1, le=8192, step=1
    )


class HunyuanVideo15Config(FromComfyUI):
    """HunyuanVideo 1.5."""

    type: Literal["hunyuan_video_15"] = "hunyuan_video_15"


class ErnieImageConfig(FromComfyUI):
    """ERNIE-Image."""

    type: Literal["ernie_image"] = "ernie_image"


class Ideogram4Config(FromComfyUI):
    """Ideogram 4."""

    type: Literal["ideogram4"] = "ideogram4"


class Krea2Config(FromComfyUI):
    """Krea 2."""

    type: Literal["krea2"] = "krea2"


class LTX2Config(FlowConfig):
    """LTX-Video 2.3."""

    type: Literal["ltx2"] = "ltx2"
    diffusion_model: str = _file("Transformer and VAE as a single file.", "diffusion_models", required=True)
    text_encoder: str = _text_encoder(required=True)


class MiniMaxH3Config(FromComfyUI):
    """MiniMax H3, video with sound."""

    type: Literal["minimax_h3"] = "minimax_h3"
    audio_vae: str = _file("VAE of the sound as a single file.", "vae", required=True)
    image_shift: float | None = option(None, "'shift' for pictures. Left out: as for videos.", gt=0, step=0.1)
    cfg: float = option(1.0, "Guidance that the prediction is blended with while training.", ge=1, step=0.1)


CONFIGS: dict[str, type[ModelConfig]] = {
    get_args(config.model_fields["type"].annotation)[0]: config
    for config in list(globals().values())
    if isinstance(config, type) and issubclass(config, ModelConfig) and config.__name__.endswith("Config")
    if get_args(config.model_fields["type"].annotation)
}
"""The tables by ``type``."""
