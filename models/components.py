"""Families whose parts come from a diffusers folder, from single files as ComfyUI has them, or from both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..utils.config import SettingsError
from ..utils.weights import Weights
from .files import in_comfyui, read_json, require_path


@dataclass(frozen=True)
class Component:
    """A part of the model: how it is called in each place and how to know its file."""

    title: str
    option: str
    folder: str
    """In a diffusers folder."""
    class_name: str
    markers: tuple[str, ...]
    """Tensors that each single file of it has."""
    prefixes: tuple[str, ...]
    """Before its tensors' names in files that hold more than it."""
    foreign: tuple[str, ...] = ()
    """Tensors that give away the similar part of another model."""
    tokenizer_option: str = ""
    tokenizer_folder: str = ""
    tokenizer_in_comfyui: str = ""


FLUX_VAE = Component(
    "the Flux VAE, such as ae.safetensors", "vae_path", "vae", "AutoencoderKL",
    ("encoder.down.0.block.0.conv1.weight", "decoder.conv_in.weight"), ("vae.", "first_stage_model."))  # fmt: skip
CLIP_L = Component(
    "CLIP-L, such as clip_l.safetensors", "clip_path", "text_encoder", "CLIPTextModel",
    ("text_model.embeddings.token_embedding.weight",), ("text_encoders.clip_l.transformer.",), (),
    "clip_tokenizer_path", "tokenizer", "comfy/sd1_tokenizer")  # fmt: skip
T5_XXL = Component(
    "T5-XXL, such as t5xxl_fp16.safetensors", "t5_path", "text_encoder_2", "T5EncoderModel",
    ("encoder.block.0.layer.0.SelfAttention.q.weight", "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"),
    ("text_encoders.t5xxl.transformer.",),
    # UMT5, which Wan has, repeats its position bias in every block
    ("encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight",),
    "t5_tokenizer_path", "tokenizer_2", "comfy/text_encoders/t5_tokenizer")  # fmt: skip
OLD_T5_XXL = Component(
    "T5-XXL of version 1.0, which is t5-11b, such as oldt5_xxl_fp16.safetensors", "t5_path", "text_encoder",
    "T5EncoderModel",
    ("encoder.block.0.layer.1.DenseReluDense.wi.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"),
    ("text_encoders.t5xxl.transformer.",), (), "t5_tokenizer_path", "tokenizer",
    "comfy/text_encoders/t5_tokenizer")  # fmt: skip


@dataclass
class TextEncoder:
    """A text encoder with its tokenizer."""

    tokenizer: Any
    model: Any


def width_of(weights: Weights) -> int:
    """Features of a text encoder."""
    endings = ("token_embedding.weight", "shared.weight", "embed_tokens.weight")
    return weights.shape(next((name for name in weights if name.endswith(endings)), endings[0]))[1]


class FromComponents:
    """Finds parts, and says what is wrong with what is given.

    The settings have ``diffusers_path``, an option for each component, and one for its tokenizer.
    """

    config: Any
    components: ClassVar[Mapping[str, Component]]
    whole: ClassVar[str]
    """What ``diffusers_path`` names, in words."""
    published: ClassVar[str] = "FLUX.1-dev"
    """A model whose folder has the tokenizers."""

    def _component(self, name: str) -> Component:
        """As the folder has it that the settings name."""
        return self.components[name]

    def _given(self, name: str) -> tuple[str | None, str]:
        """The file that the settings name for a component, and the setting that names it or would."""
        option = self.components[name].option
        return getattr(self.config, option), f"model.{option}"

    def _place(self, name: str) -> tuple[Path, str]:
        """The file or folder of a component, and the setting that names it."""
        part = self._component(name)
        value, setting = self._given(name)
        if value:
            return require_path(value, setting, part.title), setting
        if not self.config.diffusers_path:
            raise SettingsError(f"{setting}: give {part.title}; or give model.diffusers_path")
        root = require_path(self.config.diffusers_path, "model.diffusers_path", self.whole)
        if not (root / part.folder).is_dir():
            raise SettingsError(
                f"model.diffusers_path: '{root}' has no folder '{part.folder}'; give {self.whole}, "
                f"or in {setting} {part.title}"
            )
        return root / part.folder, "model.diffusers_path"

    def _weights(self, name: str) -> Weights:
        """The tensors of a component, known to be of the right kind; reads headers only."""
        part, (path, setting) = self._component(name), self._place(name)
        if path.is_dir():
            if not (path / "config.json").is_file():
                raise SettingsError(
                    f"{setting}: '{path}' has no config.json; give {part.title}, or the folder '{part.folder}' of "
                    f"{self.whole}"
                )
            config = read_json(path / "config.json")
            found = config.get("_class_name") or ", ".join(config.get("architectures") or ["of unknown class"])
            if part.class_name not in found:
                raise SettingsError(f"{setting}: '{path}' holds a model {found}, not {part.class_name}")
            return Weights(path, setting)
        weights = Weights(path, setting, part.prefixes, part.markers[0])
        if missing := [marker for marker in part.markers if marker not in weights]:
            raise SettingsError(f"{setting}: '{path}' is not {part.title} (it has no '{missing[0]}')")
        if foreign := [name for name in part.foreign if name in weights]:
            raise SettingsError(f"{setting}: '{path}' is not {part.title} (it has '{foreign[0]}')")
        return weights

    def _check_widths(self, parts: Mapping[str, Weights], widths: Mapping[str, tuple[int, int]]) -> None:
        """That each part has as many features as the transformer takes of it.

        Args:
            widths: Of what the part has, and of what is taken.
        """
        for name, (given, taken) in widths.items():
            if given != taken:
                raise SettingsError(
                    f"{parts[name].option}: '{parts[name].path}' has {given} features, but the transformer works with "
                    f"{taken}; give {self._component(name).title}"
                )

    def _schedule(self, usual: dict[str, Any]) -> dict[str, Any]:
        """The configuration of the folder's scheduler, where its transformer is trained; else the usual one."""
        if self.config.diffusers_path and not self._given("transformer")[0]:
            file = Path(self.config.diffusers_path).expanduser() / "scheduler" / "scheduler_config.json"
            return read_json(file) if file.is_file() else usual
        return usual

    def _tokenizer_folder(self, name: str) -> Path:
        part = self._component(name)
        setting = f"model.{part.tokenizer_option}"
        shipped = part.tokenizer_in_comfyui
        places = [in_comfyui(shipped) if shipped else None]
        if self.config.diffusers_path:
            places.insert(0, Path(self.config.diffusers_path).expanduser() / part.tokenizer_folder)
        if value := getattr(self.config, part.tokenizer_option):
            places = [require_path(value, setting, f"a folder like '{part.tokenizer_folder}' of {self.published}")]
        for folder in places:
            if folder and any((folder / file).is_file() for file in ("tokenizer.json", "vocab.json", "spiece.model")):
                return folder
        raise SettingsError(
            f"{setting}: no tokenizer found{f' in {places[0]!s}' if places[0] else ''}; give the folder "
            f"'{part.tokenizer_folder}' of {self.published}, or model.diffusers_path"
            + (f", or ComfyUI's '{shipped}'" if shipped else "")
        )


def language_model_name(name: str, weights: Weights) -> str:
    """What a file calls parameter ``name`` of a language model: files hold it with or without what says the next word,
    and in the former below ``model.``."""
    return name if name in weights else f"model.{name}"
