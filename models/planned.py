"""``[model]`` tables of families that this version cannot train yet, so that their files can be checked.

A table here becomes a node and is validated like any other; training with it is refused by name. When a
family is implemented, its own file declares the table and the one here is deleted.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import model_validator

from ..utils.config import option
from .base import ModelConfig, StorageDtype
from .flow import SHIFT_BY_SIZE, FlowConfig
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


def _rate(what: str) -> Any:
    return option(
        None,
        f"Learning rate of {what}; 0 freezes it. Left out: that of the optimizer.",
        ge=0,
        le=1,
        step=1e-8,
        ui_off=-1,
        advanced=True,
    )


class LTXVideoConfig(ModelConfig):
    """LTX-Video 0.9, a video model."""

    type: Literal["ltx-video"] = "ltx-video"
    diffusers_path: str = _folder(required=True)
    single_file_path: str | None = _file("Transformer and VAE as a single file.", "checkpoints")
    first_frame_conditioning_p: float = option(
        0.0, "Share of the times that the first frame is given and not trained, as in image to video.",
        ge=0, le=1, step=0.01)  # fmt: skip


class CosmosConfig(ModelConfig):
    """Cosmos 1, text to video."""

    type: Literal["cosmos"] = "cosmos"
    transformer_path: str = _transformer(required=True)
    vae_path: str = _vae(required=True)
    text_encoder_path: str = _text_encoder(required=True)


class Lumina2Config(ModelConfig):
    """Lumina Image 2."""

    type: Literal["lumina_2"] = "lumina_2"
    transformer_path: str = _transformer(required=True)
    llm_path: str = _text_encoder(required=True)
    vae_path: str = _vae(required=True)
    lumina_shift: bool = option(False, SHIFT_BY_SIZE)


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


class CosmosPredict2Config(FlowConfig):
    """Cosmos-Predict2, text to image."""

    type: Literal["cosmos_predict2"] = "cosmos_predict2"
    transformer_path: str = _transformer(required=True)
    vae_path: str = _vae(required=True)
    t5_path: str | None = _text_encoder()
    llm_path: str | None = _text_encoder()
    llm_adapter_path: str | None = _file("Adapter between language model and transformer.", "diffusion_models")
    cache_text_embeddings: bool = option(True, "Encode captions once and keep that.", advanced=True)
    text_encoder_nf4: bool = option(False, "Hold the text encoder in 4 bits.", advanced=True)
    text_encoder_fp8: bool = option(False, "Hold the text encoder in float8.", advanced=True)
    multiscale_loss_weight: float = option(
        0.0, "Weight of an added loss at half the size.", ge=0, step=0.01, advanced=True
    )
    self_attn_lr: float | None = _rate("self-attention")
    cross_attn_lr: float | None = _rate("cross-attention")
    mlp_lr: float | None = _rate("the MLPs")
    mod_lr: float | None = _rate("the modulation")
    llm_adapter_lr: float | None = _rate("the language model's adapter")

    @model_validator(mode="after")
    def _encoder(self) -> CosmosPredict2Config:
        if bool(self.t5_path) == bool(self.llm_path):
            raise ValueError("model.t5_path: give this or llm_path, one of the two")
        return self


class AnimaConfig(CosmosPredict2Config):
    """Anima, made from Cosmos-Predict2."""

    type: Literal["anima"] = "anima"  # type: ignore[assignment]


class OmniGen2Config(FlowConfig):
    """OmniGen2."""

    type: Literal["omnigen2"] = "omnigen2"
    diffusers_path: str = _folder(required=True)


class QwenImageConfig(FlowConfig):
    """Qwen-Image and, with control pictures in the dataset, Qwen-Image-Edit."""

    type: Literal["qwen_image"] = "qwen_image"
    diffusers_path: str | None = _folder()
    transformer_path: str | None = _transformer()
    text_encoder_path: str | None = _text_encoder()
    tokenizer_path: str | None = option(None, "Folder of the tokenizer, if it is not in the diffusers folder.")
    vae_path: str | None = _vae()

    @model_validator(mode="after")
    def _whole(self) -> QwenImageConfig:
        parts = [key for key in ("transformer_path", "text_encoder_path", "vae_path") if not getattr(self, key)]
        if parts and not self.diffusers_path:
            raise ValueError(f"model.{parts[0]}: required where diffusers_path is left out")
        return self


class QwenImage2511Config(QwenImageConfig):
    """Qwen-Image-Edit-2511."""

    type: Literal["qwen2511"] = "qwen2511"  # type: ignore[assignment]


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


class Flux2Config(FromComfyUI):
    """Flux.2 dev and klein."""

    type: Literal["flux2"] = "flux2"
    diffusers_path: str | None = _folder()


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
