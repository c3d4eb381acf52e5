"""Language models as text encoders: their files with or without what says the next word."""

from __future__ import annotations

from ..utils.weights import Weights


def file_name(name: str, weights: Weights) -> str:
    """What parameter ``name`` of the model alone is called in a file, which may hold it below ``model.``."""
    return name if name in weights else f"model.{name}"


def width(weights: Weights) -> int:
    """Features of a token."""
    return weights.shape(file_name("embed_tokens.weight", weights))[1]
