"""``[model]`` tables whose parts are named as ComfyUI's loaders take them."""

from __future__ import annotations

from pydantic import model_validator

from ..utils.config import Table, option
from .flow import FlowConfig


class TextEncoderFiles(Table):
    """One entry of ``text_encoders``, as ComfyUI's CLIP loaders take it."""

    path: str | None = option(None, "The file.", picker="text_encoders")
    paths: list[str] | None = option(None, "The files, for encoders that are used together.")
    type: str | None = option(None, "ComfyUI's name for this kind of encoder.")

    @model_validator(mode="after")
    def _one(self) -> TextEncoderFiles:
        if bool(self.path) == bool(self.paths):
            raise ValueError("text_encoders: each entry needs 'path' or 'paths', one of the two")
        return self


class FromComfyUI(FlowConfig):
    """What the ``[model]`` tables of these families have."""

    diffusion_model: str | None = option(None, "Transformer as a single file.", picker="diffusion_models")
    vae: str | None = option(None, "VAE as a single file.", picker="vae")
    text_encoders: list[TextEncoderFiles] = option([], "The text encoders, each with path or paths and type.")
