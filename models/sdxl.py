"""Stable Diffusion XL and models trained from it (Pony, Illustrious, NoobAI ...), by Stability AI.

A U-Net over 4-channel latents that attends to the penultimate states of two CLIP text encoders and is told
the time, the size of the picture and the second encoder's pooled text. It predicts the noise, or v in models
with zero terminal SNR, on DDPM's discrete times. The text encoders may be trained with it; then they are the
first links of the chain, and captions are cached as tokens.

Reference: https://github.com/Stability-AI/generative-models, and diffusers' StableDiffusionXLPipeline, which
the layers here equal bit for bit. Licence of the weights: CreativeML Open RAIL++-M.

Shape legend: N batch, C latent channels (or pieces of a caption, where said), H W height and width of the
latents, L text tokens, D features.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import field_validator, model_validator

from ..utils.config import SettingsError, option
from ..utils.imports import lazy
from ..utils.weights import Weights, build, fill
from . import autoencoder, unet
from .base import Batch, Encodings, Example, Family, Layer, ModelConfig, SampleRequest, Shapes, StorageDtype
from .clip import (
    CLIP_LENGTH,
    HUB_TOKENIZERS,
    TOKENIZER_FILES,
    cached_tokenizer,
    chunks,
    clip_config,
    clip_name,
    open_clip_config,
    read_open_clip,
    to_open_clip,
    write_clip_tokenizer,
)
from .clip_layers import Tensors, proper, text_layers
from .files import fingerprint, in_comfyui, read_json, require_path, write_json

if TYPE_CHECKING:
    import diffusers
    import torch
    import transformers
    from PIL.Image import Image
    from torch import nn
else:
    diffusers, torch, transformers = map(lazy, ("diffusers", "torch", "transformers"))
    nn = lazy("torch.nn")

logger = logging.getLogger(__name__)

NUM_TIMES = 1000
NOISE_SCHEDULE: dict[str, Any] = {
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": NUM_TIMES,
}  # fmt: skip
SAMPLING_SCHEDULE: dict[str, Any] = {**NOISE_SCHEDULE, "steps_offset": 1, "timestep_spacing": "leading"}
VAE_SCALING = 0.13025
LARGEST_SNR = 1000.0
"""Signal-to-noise ratio above which all times are weighed alike by the debiased loss."""
PLACES = {"clip_l": 4, "clip_g": 5}
"""Where the tokens, then the states, of each encoder are in the tuple: x_t, t, sizes, seen, first, second, pooled."""
NO_EFFECT = "Accepted from older files: SDXL trains all its noise levels alike."


class SDXLConfig(ModelConfig):
    """Stable Diffusion XL, from a checkpoint file as ComfyUI has it or from a diffusers folder."""

    type: Literal["sdxl"] = "sdxl"
    checkpoint_path: str | None = option(
        None, "The whole model as a single file, such as sd_xl_base_1.0.safetensors.", picker="checkpoints"
    )
    v_pred: bool = option(
        False,
        "The model predicts v and has zero terminal SNR, as NoobAI's v-prediction versions do. Files that say so "
        "themselves need no switch.",
    )
    min_snr_gamma: float | None = option(
        None, "Weigh low noise less, with this gamma; 5 is usual. Left out: all alike.", ge=0, le=20, step=0.1
    )
    debiased_estimation_loss: bool = option(
        False, "Weigh high noise more, by the inverse root of the signal-to-noise ratio."
    )
    unet_lr: float | None = option(
        None, "Learning rate of the U-Net; 0 freezes it. Left out: the optimizer's.", ge=0, le=10, step=1e-8
    )
    text_encoder_1_lr: float | None = option(
        None, "Learning rate of CLIP-L; 0 freezes it. Left out: the optimizer's.", ge=0, le=10, step=1e-8
    )
    text_encoder_2_lr: float | None = option(
        None, "Learning rate of OpenCLIP bigG; 0 freezes it. Left out: the optimizer's.", ge=0, le=10, step=1e-8
    )
    diffusers_path: str | None = option(
        None,
        "Folder of the whole model in diffusers layout. What a path here names is taken from there instead.",
        picker="diffusers",
    )
    vae_path: str | None = option(None, "VAE as a single file or a folder, instead of the model's own.", picker="vae")
    tokenizer_path: str | None = option(
        None, "Folder of the CLIP tokenizer, if it is in neither the diffusers folder nor ComfyUI.", advanced=True
    )
    noise_offset: float = option(
        0.0,
        "Shifts the noise of each channel by a random amount of this size, so that the model learns brightness; 0.05 "
        "is usual. Not for v_pred, which learns it anyhow.",
        ge=0,
        le=1,
        step=0.01,
        advanced=True,
    )
    timestep_sample_method: Literal["logit_normal", "uniform"] = option("uniform", NO_EFFECT, advanced=True)
    sigmoid_scale: float = option(1.0, NO_EFFECT, gt=0, step=0.1, advanced=True)
    logit_mean: float = option(0.0, NO_EFFECT, ge=-10, le=10, step=0.1, advanced=True)
    loss_weighting: Literal["none"] = option(  # type: ignore[assignment]  # a field may be narrower
        "none", "Only none: SDXL weighs its loss by min_snr_gamma and debiased_estimation_loss.", advanced=True
    )
    text_encoder_dtype: StorageDtype | None = option(
        None, "Has no effect: SDXL's text encoders are small.", advanced=True
    )

    @field_validator("timestep_sample_method")
    @classmethod
    def _uniform(cls, _value: str) -> str:
        return "uniform"  # files have "logit_normal" because nodes wrote it for every model

    @model_validator(mode="after")
    def _something_is_trained(self) -> SDXLConfig:
        if self.unet_lr == self.text_encoder_1_lr == self.text_encoder_2_lr == 0:
            raise ValueError("model.unet_lr: nothing would be trained; give a learning rate to at least one part")
        return self


@dataclass(frozen=True)
class Component:
    """A part of the model: how it is called in each place and how to know its file."""

    title: str
    folder: str
    """In a diffusers folder, and in the denoiser."""
    class_name: str
    prefixes: tuple[str, ...]
    """Before its tensors' names in a checkpoint, and then in a file of its own."""
    marker: str
    """A tensor that it always has."""


COMPONENTS = {
    "unet": Component(
        "an SDXL U-Net", "unet", "UNet2DConditionModel", ("model.diffusion_model.",), "label_emb.0.0.weight"),
    "vae": Component(
        "the SDXL VAE, such as sdxl_vae.safetensors", "vae", "AutoencoderKL", ("first_stage_model.", "vae.", ""),
        "encoder.down.0.block.0.conv1.weight"),
    "clip_l": Component(
        "CLIP-L", "text_encoder", "CLIPTextModel", ("conditioner.embedders.0.transformer.",),
        "text_model.embeddings.token_embedding.weight"),
    "clip_g": Component(
        "OpenCLIP bigG", "text_encoder_2", "CLIPTextModelWithProjection", ("conditioner.embedders.1.model.",),
        "text_projection"),
}  # fmt: skip
CHECKPOINT = "an SDXL checkpoint, such as sd_xl_base_1.0.safetensors"
V_MARKERS = ("v_pred", "ztsnr")
"""Empty tensors by which a checkpoint says that it predicts v, with zero terminal SNR."""
EDM_MARKERS = ("edm_mean", "edm_std", "edm_vpred.sigma_max")


@dataclass
class TextEncoder:
    """A tokenizer and, unless it is trained and the denoiser holds it, its text encoder."""

    tokenizer: Any
    model: Any


class SDXL(Family):
    """SDXL in the hands of the trainer."""

    title = "SDXL"
    Config = SDXLConfig
    config: SDXLConfig
    size_multiple = 16
    model_folder = "checkpoints"
    text_encoders = ("clip_l", "clip_g")
    shared_inputs = (
        ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
        ("attn2.to_k", "attn2.to_v"),
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    )
    adapter_blocks = (
        "DownBlock2D", "CrossAttnDownBlock2D", "UNetMidBlock2DCrossAttn", "CrossAttnUpBlock2D", "UpBlock2D",
        "CLIPEncoderLayer",
    )  # fmt: skip
    high_precision = (r"^unet\.(time|add)_embedding", r"^unet\..*\.time_emb_proj", r"^text_encoder")
    lora_sides = ("lora_down", "lora_up")

    @property
    def trained(self) -> tuple[str, ...]:
        """The text encoders that are trained."""
        rates = (self.config.text_encoder_1_lr, self.config.text_encoder_2_lr)
        return tuple(name for name, rate in zip(self.text_encoders, rates, strict=True) if rate != 0)

    # -- files ------------------------------------------------------------------------------------

    def check_files(self) -> None:
        parts = {name: self._weights(name) for name in COMPONENTS}
        for name in self.text_encoders:
            self._tokenizer_folder(name)
        self._refuse_edm()
        config, network = self._unet_config, parts["unet"]
        if config["in_channels"] != 4 or config.get("addition_embed_type") != "text_time":
            raise SettingsError(
                f"{network.option}: '{network.path}' is not an SDXL model that draws from text alone; inpainting "
                "models, refiners and Stable Diffusion 1 or 2 cannot be trained"
            )
        widths = [self._text_config(name)["hidden_size"] for name in self.text_encoders]
        if sum(widths) != config["cross_attention_dim"]:
            raise SettingsError(
                f"{network.option}: the text encoders of '{parts['clip_l'].path}' give {sum(widths)} features, but the "
                f"U-Net works with {config['cross_attention_dim']}"
            )

    def identity(self, part: str) -> str:
        if part == "vae":
            return json.dumps({"weights": fingerprint(self._place("vae")[0]), "saved as": self.config.dtype})
        tokens = {"tokenizer": fingerprint(self._tokenizer_folder(part))}
        if part in self.trained:
            return json.dumps(tokens)
        return json.dumps({"weights": fingerprint(self._place(part)[0]), "dtype": self.config.dtype, **tokens})

    def _place(self, part: str) -> tuple[Path, str]:
        """The file or folder of a component, and the setting that names it."""
        config, component = self.config, COMPONENTS[part]
        if part == "vae" and config.vae_path:
            return require_path(config.vae_path, "model.vae_path", component.title), "model.vae_path"
        if config.checkpoint_path:
            path = require_path(config.checkpoint_path, "model.checkpoint_path", CHECKPOINT)
            if path.is_dir():
                raise SettingsError(
                    f"model.checkpoint_path: '{path}' is a folder; name it in model.diffusers_path, or give "
                    f"{CHECKPOINT}"
                )
            return path, "model.checkpoint_path"
        if not config.diffusers_path:
            raise SettingsError(f"model.checkpoint_path: give {CHECKPOINT}; or give model.diffusers_path")
        root = require_path(config.diffusers_path, "model.diffusers_path", "an SDXL folder in diffusers layout")
        if not (root / component.folder / "config.json").is_file():
            raise SettingsError(
                f"model.diffusers_path: '{root}' has no '{component.folder}/config.json'; give an SDXL folder in "
                "diffusers layout"
            )
        return root / component.folder, "model.diffusers_path"

    def _weights(self, part: str) -> Weights:
        """The tensors of a component, known to be of the right kind; reads headers only."""
        component, (path, setting) = COMPONENTS[part], self._place(part)
        if path.is_dir():
            config = read_json(path / "config.json")
            found = config.get("_class_name") or ", ".join(config.get("architectures") or ["of unknown class"])
            if component.class_name not in found:
                raise SettingsError(f"{setting}: '{path}' holds a model {found}, not {component.class_name}")
            return Weights(path, setting)
        weights = Weights(path, setting, component.prefixes, component.marker)
        if component.marker not in weights:
            title = component.title if setting == "model.vae_path" else CHECKPOINT
            missing = component.prefixes[0] + component.marker
            raise SettingsError(f"{setting}: '{path}' is not {title} (it has no '{missing}')")
        return weights

    def _tokenizer_folder(self, part: str) -> Path:
        folder = COMPONENTS[part].folder.replace("text_encoder", "tokenizer")
        places = [in_comfyui("comfy/sd1_tokenizer"), cached_tokenizer()]
        if self.config.diffusers_path:
            places.insert(0, Path(self.config.diffusers_path).expanduser() / folder)
        if value := self.config.tokenizer_path:
            places = [require_path(value, "model.tokenizer_path", "a folder like 'tokenizer' of SDXL")]
        for place in places:
            if place and any((place / file).is_file() for file in ("tokenizer.json", "vocab.json")):
                return place
        raise SettingsError(
            f"model.tokenizer_path: no tokenizer found{f' in {places[0]!s}' if places[0] else ''}; give the folder "
            "'tokenizer' of SDXL in diffusers layout, or ComfyUI's 'comfy/sd1_tokenizer'; or fetch it once with: "
            f"hf download {HUB_TOKENIZERS[0][0]} {' '.join(TOKENIZER_FILES)}"
        )

    def _markers(self) -> Container[str]:
        """Names of all tensors of the checkpoint."""
        path, setting = self._place("unet")
        return () if path.is_dir() else Weights(path, setting)

    @cached_property
    def _schedule(self) -> dict[str, Any]:
        """How the model itself is sampled: what its folder says, or what SDXL uses."""
        folder = self._place("unet")[0]
        file = folder.parent / "scheduler" / "scheduler_config.json"
        if folder.is_dir() and file.is_file():
            return read_json(file)
        return SAMPLING_SCHEDULE

    def _refuse_edm(self) -> None:
        path, setting = self._place("unet")
        markers = self._markers()
        if any(marker in markers for marker in EDM_MARKERS) or "EDM" in self._schedule.get("_class_name", ""):
            raise SettingsError(
                f"{setting}: '{path}' works with continuous noise levels (EDM), as Playground 2.5 and CosXL do; it "
                "cannot be trained"
            )

    @cached_property
    def predicts_v(self) -> bool:
        """Whether the network predicts v, with zero terminal SNR."""
        if self.config.v_pred:
            return True
        found = V_MARKERS[0] in self._markers() or self._schedule.get("prediction_type") == "v_prediction"
        if found:
            logger.info("the model says that it predicts v: trained as with v_pred = true")
        return found

    # -- encoding, once per sample, cached ----------------------------------------------------------

    def load_vae(self, device: torch.device) -> nn.Module:
        # In float32 whatever the rest has: SDXL's own VAE overflows in float16
        return self._load_vae(device, torch.float32)

    def _load_vae(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        return autoencoder.load_autoencoder(self._weights("vae"), dtype, device, VAE_SCALING)

    def encode_media(
        self, vae: Any, pixels_NCFHW: torch.Tensor, generators: Sequence[torch.Generator]
    ) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            latents_NCHW = vae.encode(pixels_NCFHW.squeeze(2).float()).latent_dist.sample(list(generators))
        return {"latents": (latents_NCHW * vae.config.scaling_factor).to(self.dtype)}

    def load_text_encoder(self, name: str, device: torch.device) -> TextEncoder:
        tokenizer = transformers.CLIPTokenizer.from_pretrained(self._tokenizer_folder(name))
        return TextEncoder(tokenizer, None if name in self.trained else self._load_text_model(name, device))

    def _load_text_model(self, name: str, device: torch.device) -> Any:
        model = self._build_text_model(name)
        fill(model, self._reader(name), self.dtype, device)
        return model.eval()

    def encode_text(self, name: str, encoder: TextEncoder, captions: Sequence[str]) -> Encodings:
        # SDXL fills up the first encoder's texts with the end token, the second's with token 0
        pad = encoder.tokenizer.eos_token_id if name == "clip_l" else 0
        tokens = chunks(encoder.tokenizer, captions, pad)
        if name in self.trained:
            return {f"{name}_tokens": tokens}
        return self._embed_texts(name, encoder.model, tokens, encoder.model.device)

    def _embed_texts(
        self, name: str, model: Any, tokens: Sequence[torch.Tensor], device: torch.device
    ) -> dict[str, list[torch.Tensor]]:
        """Embeddings of texts, each given as (pieces, tokens): the penultimate states of all pieces one after
        another, and for the second encoder the pooled text of the first piece."""
        pieces_P1L = torch.cat(list(tokens))[:, None].to(device)
        values: Tensors = (pieces_P1L,) * (PLACES[name] + 1)
        with torch.no_grad():
            for layer in self._text_layers(name, model):
                values = layer.forward(SimpleNamespace(**layer.submodules), *values)
        counts = [len(pieces) for pieces in tokens]
        embeds = [part.flatten(0, 1).to(self.dtype) for part in values[PLACES[name]].split(counts)]
        if name == "clip_l":
            return {"clip_l_embeds": embeds}
        return {"clip_g_embeds": embeds, "clip_g_pooled": [part[0].to(self.dtype) for part in values[-1].split(counts)]}

    # -- the networks -------------------------------------------------------------------------------

    @cached_property
    def _unet_config(self) -> dict[str, Any]:
        weights = self._weights("unet")
        if weights.path.is_dir():
            return read_json(weights.path / "config.json")
        return unet.config_of(weights, self._text_config("clip_g")["projection_dim"])

    def _text_config(self, name: str) -> dict[str, Any]:
        weights = self._weights(name)
        if weights.path.is_dir():
            return read_json(weights.path / "config.json")
        return clip_config(weights) if name == "clip_l" else open_clip_config(weights)

    def _build_text_model(self, name: str) -> Any:
        config: Any = transformers.CLIPTextConfig(**self._text_config(name))
        kind = getattr(transformers, COMPONENTS[name].class_name)
        return build(lambda: kind(config))

    def _reader(self, part: str) -> Callable[[str], torch.Tensor]:
        """Reads a parameter of a component by its name there."""
        weights = self._weights(part)
        if part == "clip_l":
            return lambda name: weights.read(clip_name(name, weights))
        if weights.path.is_dir():
            return weights.read
        if part == "clip_g":
            return partial(read_open_clip, weights)
        return lambda name: weights.read(unet.original_name(name, self._unet_config))

    def build_denoiser(self) -> nn.Module:
        network = build(lambda: diffusers.UNet2DConditionModel.from_config(self._unet_config))
        denoiser = nn.ModuleDict({"unet": network})
        for name in self.trained:
            model = self._build_text_model(name)
            if name == "clip_l":  # nobody looks at what its last layer gives
                body = proper(model)
                del body.encoder.layers[-1]
                body.final_layer_norm = nn.Identity()
            denoiser[COMPONENTS[name].folder] = model
        return denoiser.to(self.dtype)  # what other stages have is never read, but asked for its precision

    def denoiser_reader(self) -> Callable[[str], torch.Tensor]:
        readers = {COMPONENTS[part].folder: self._reader(part) for part in ("unet", *self.trained)}

        def read(name: str) -> torch.Tensor:
            folder, _, inner = name.partition(".")
            return readers[folder](inner)

        return read

    def layers(self, denoiser: Any) -> list[Layer]:
        layers = []
        for name in self.trained:
            layers += self._text_layers(name, denoiser[COMPONENTS[name].folder])
        return layers + unet.layers(denoiser["unet"])

    def _text_layers(self, name: str, model: Any) -> list[Layer]:
        return text_layers(model, COMPONENTS[name].folder, PLACES[name], pools=name == "clip_g")

    # -- training -----------------------------------------------------------------------------------

    def learning_rates(self) -> dict[str, float]:
        rates = {
            r"^unet\.": self.config.unet_lr,
            r"^text_encoder\.": self.config.text_encoder_1_lr,
            r"^text_encoder_2\.": self.config.text_encoder_2_lr,
        }
        return {pattern: rate for pattern, rate in rates.items() if rate is not None}

    @cached_property
    def noise_scheduler(self) -> diffusers.DDPMScheduler:
        """Adds noise; knows what the network should answer."""
        kind = "v_prediction" if self.predicts_v else "epsilon"
        return diffusers.DDPMScheduler(**NOISE_SCHEDULE, prediction_type=kind, rescale_betas_zero_snr=self.predicts_v)

    def collate(self, examples: Sequence[Example]) -> Batch:
        x0_NCHW = torch.stack([example.media["latents"] for example in examples]).float()
        noise_NCHW = torch.stack([self._noise(example) for example in examples]).to(x0_NCHW)
        size = (x0_NCHW.shape[-2], x0_NCHW.shape[-1])
        t_N = torch.tensor([self._discrete_time(example.quantile, size) for example in examples])
        scheduler: Any = self.noise_scheduler
        x_t_NCHW = scheduler.add_noise(x0_NCHW, noise_NCHW, t_N)
        target_NCHW = scheduler.get_velocity(x0_NCHW, noise_NCHW, t_N) if self.predicts_v else noise_NCHW
        height, width = (side * self.latent_multiple for side in size)
        size_ids_N6 = torch.tensor([[height, width, 0, 0, height, width]] * len(examples), dtype=torch.float32)
        return Batch(
            inputs=(x_t_NCHW.to(self.dtype), t_N, size_ids_N6, *self._texts(examples)),
            target=target_NCHW,
            weight=self.loss_weight(t_N)[:, None, None, None],
        )

    def blank_example(self, width: int, height: int, frames: int = 1) -> Example:
        example = super().blank_example(width, height, frames)
        tokens = {f"{name}_tokens" for name in self.trained}
        example.text |= {name: value.long() for name, value in example.text.items() if name in tokens}
        return example

    def cached_shapes(self, latent_size: tuple[int, int, int]) -> tuple[Shapes, Shapes]:
        text: dict[str, tuple[int, ...]] = {}
        for name in self.text_encoders:
            if name in self.trained:
                text[f"{name}_tokens"] = (1, CLIP_LENGTH)
                continue
            config = self._text_config(name)
            text[f"{name}_embeds"] = (CLIP_LENGTH, config["hidden_size"])
            if name == "clip_g":
                text["clip_g_pooled"] = (config["projection_dim"],)
        return {"latents": (4, *latent_size[1:])}, text

    def _noise(self, example: Example) -> torch.Tensor:
        if not self.config.noise_offset:
            return example.noise
        channels = example.noise.shape[0]
        offset_C = torch.randn(channels, generator=torch.Generator().manual_seed(example.seed))
        return example.noise + self.config.noise_offset * offset_C[:, None, None].to(example.noise)

    def _discrete_time(self, quantile: float, latent_size: tuple[int, int]) -> int:
        return min(int(self.timestep(quantile, latent_size) * NUM_TIMES), NUM_TIMES - 1)

    def loss_weight(self, t_N: torch.Tensor) -> torch.Tensor:
        """Weight of each sample's loss for its time, float32.

        Min-SNR: Hang et al. 2023, arXiv 2303.09556. Debiased estimation: Yu et al. 2023, arXiv 2310.08442. The
        signal-to-noise ratio is that of the schedule before it is made to end in pure noise.
        """
        alphas_T = diffusers.DDPMScheduler(**NOISE_SCHEDULE).alphas_cumprod
        snr_N = (alphas_T / (1 - alphas_T))[t_N]
        weight_N = torch.ones_like(snr_N)
        if gamma := self.config.min_snr_gamma:
            weight_N = snr_N.clamp(max=gamma) / (snr_N + 1 if self.predicts_v else snr_N)
        if self.config.debiased_estimation_loss:
            capped_N = snr_N.clamp(max=LARGEST_SNR)
            weight_N = weight_N * (1 / (capped_N + 1) if self.predicts_v else capped_N.rsqrt())
        return weight_N

    def _texts(self, examples: Sequence[Example]) -> tuple[torch.Tensor, ...]:
        """Both encoders' tokens or embeddings, stacked, which of them count, and the pooled text if it is cached.

        Shorter captions repeat themselves up to the length of the longest; the mask keeps that unseen.
        """
        lengths: list[int] = [0] * len(examples)
        columns = []
        for name in self.text_encoders:
            in_pieces = name in self.trained
            column = [example.text[f"{name}_{'tokens' if in_pieces else 'embeds'}"] for example in examples]
            unit = CLIP_LENGTH if in_pieces else 1
            lengths = [max(length, len(value) * unit) for length, value in zip(lengths, column, strict=True)]
            columns.append(column)
        longest = max(lengths)
        texts = []
        for name, column in zip(self.text_encoders, columns, strict=True):
            rows = torch.arange(longest // CLIP_LENGTH if name in self.trained else longest)
            texts.append(torch.stack([value[rows % len(value)] for value in column]))
        seen_NL = torch.ones(len(examples), 1, dtype=torch.bool)
        if min(lengths) < longest:
            seen_NL = torch.arange(longest) < torch.tensor(lengths)[:, None]
        pooled = [] if "clip_g" in self.trained else [torch.stack([e.text["clip_g_pooled"] for e in examples])]
        return seen_NL, *(text if text.dtype == torch.int64 else text.to(self.dtype) for text in (*texts, *pooled))

    # -- results ------------------------------------------------------------------------------------

    def lora_keys(self, module_name: str) -> str:
        folder, _, inner = module_name.partition(".")
        if folder == "unet":
            return f"lora_unet_{inner.replace('.', '_')}"
        number = 1 if folder == "text_encoder" else 2
        if not inner.startswith("text_projection"):
            inner = f"text_model.{inner.removeprefix('text_model.')}"
        return f"lora_te{number}_{inner.replace('.', '_')}"

    def comfyui_tensors(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        by_folder: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            folder, _, inner = name.partition(".")
            by_folder.setdefault(folder, {})[inner] = tensor
        parts = {part: by_folder[component.folder] for part, component in COMPONENTS.items()
                 if component.folder in by_folder}  # fmt: skip
        return self._original(parts)

    def other_tensors(self, names: Container[str]) -> dict[str, torch.Tensor]:
        """The VAE, what is not trained of the text encoders, and the marks of v-prediction."""
        vae, parts = autoencoder.read_original(self._weights("vae")), {}
        for part in self.text_encoders:
            folder, read = COMPONENTS[part].folder, self._reader(part)
            model = self._build_text_model(part)
            parts[part] = {name: read(name) for name, _ in model.named_parameters() if f"{folder}.{name}" not in names}
        found = {COMPONENTS["vae"].prefixes[0] + name: tensor for name, tensor in vae.items()} | self._original(parts)
        return found | ({name: torch.zeros(0) for name in V_MARKERS} if self.predicts_v else {})

    def _original(self, parts: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Parameters of components, by name there, under the names of a checkpoint file."""
        found: dict[str, torch.Tensor] = {}
        for part, tensors in parts.items():
            if not tensors:
                continue
            if part == "unet":
                named = {unet.original_name(name, self._unet_config): tensor for name, tensor in tensors.items()}
            elif part == "clip_g":
                named = to_open_clip(tensors)
            else:
                named = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in tensors.items()}
            found |= {COMPONENTS[part].prefixes[0] + name: tensor for name, tensor in named.items()}
        return found

    def pipeline(
        self, denoiser: Any, device: torch.device, text_encoders: bool = True
    ) -> diffusers.StableDiffusionXLPipeline:
        models: dict[str, Any] = {}
        tokenizers: dict[str, Any] = {}
        for name in self.text_encoders:
            folder = COMPONENTS[name].folder
            models[folder] = tokenizers[folder] = None
            if name in self.trained:
                live = getattr(denoiser, folder)
                models[folder] = self._whole(name, live, device) if text_encoders else live
            elif text_encoders:
                models[folder] = self._load_text_model(name, device)
            if text_encoders:
                tokenizers[folder] = transformers.CLIPTokenizer.from_pretrained(self._tokenizer_folder(name))
        schedule = dict(self._schedule)
        if self.predicts_v:
            schedule |= {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
            schedule["timestep_spacing"] = "trailing"
        return diffusers.StableDiffusionXLPipeline(
            vae=self._load_vae(device, self.dtype),
            text_encoder=models["text_encoder"],
            text_encoder_2=models["text_encoder_2"],
            tokenizer=tokenizers["text_encoder"],
            tokenizer_2=tokenizers["text_encoder_2"],
            unet=denoiser.unet,
            scheduler=diffusers.EulerDiscreteScheduler.from_config(schedule),
            add_watermarker=False,
        )

    def _whole(self, name: str, live: Any, device: torch.device) -> Any:
        """A text encoder that is trained, with the end that training leaves out."""
        if name != "clip_l":
            return live
        whole = self._load_text_model(name, device)
        body, trained = proper(whole), proper(live)
        body.embeddings = trained.embeddings
        for index, layer in enumerate(trained.encoder.layers):
            body.encoder.layers[index] = layer
        return whole

    def prompt_arguments(self, request: SampleRequest, device: torch.device) -> dict[str, Any]:
        texts = {"": request.text, "negative_": request.negative_text}
        embeds = {
            prefix: torch.cat([text[f"{name}_embeds"].to(device) for name in self.text_encoders], dim=-1)
            for prefix, text in texts.items()
        }
        # A text that is repeated draws what it draws alone; so both are as long as the pipeline wants them
        longest = math.lcm(*map(len, embeds.values()))
        arguments = {f"{prefix}prompt_embeds": e.repeat(longest // len(e), 1)[None] for prefix, e in embeds.items()}
        for prefix, text in texts.items():
            arguments[f"{prefix}pooled_prompt_embeds"] = text["clip_g_pooled"][None].to(device)
        return arguments

    def sample(self, pipeline: Any, request: SampleRequest) -> list[Image]:
        def embedded(text: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            found = dict(text)
            for name in self.trained:
                model = getattr(pipeline, COMPONENTS[name].folder)
                values = self._embed_texts(name, model, [text[f"{name}_tokens"]], pipeline._execution_device)
                found |= {key: value[0] for key, value in values.items()}
            return found

        text, negative = embedded(request.text), embedded(request.negative_text)
        return super().sample(pipeline, dataclasses.replace(request, text=text, negative_text=negative))

    @classmethod
    def write_miniature(cls, folder: Path, checkpoint: bool = False) -> dict[str, Any]:
        """As `Family.write_miniature`; with ``checkpoint`` the table names a single file, which is written too."""
        vocabulary = write_clip_tokenizer(folder / "tokenizer")
        write_clip_tokenizer(folder / "tokenizer_2", pad="!")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            parts = _miniature_parts(vocabulary)
        index: dict[str, Any] = {
            "_class_name": "StableDiffusionXLPipeline",
            "_diffusers_version": diffusers.__version__,
        }
        for name, part in parts.items():
            part.save_pretrained(folder / name)
            index[name] = [type(part).__module__.split(".")[0], type(part).__name__]
        index |= {name: ["transformers", "CLIPTokenizer"] for name in ("tokenizer", "tokenizer_2")}
        write_json(folder / "model_index.json", {**index, "force_zeros_for_empty_prompt": True})
        table = {"type": "sdxl", "dtype": "float32"}
        if not checkpoint:
            return {**table, "diffusers_path": str(folder)}
        return {**table, "checkpoint_path": str(_write_checkpoint(folder)), "tokenizer_path": str(folder / "tokenizer")}


# -- miniature --------------------------------------------------------------------------------------------


def _miniature_parts(vocabulary: int) -> dict[str, Any]:
    text = {"vocab_size": vocabulary, "num_hidden_layers": 2, "num_attention_heads": 1, "bos_token_id": 0,
            "eos_token_id": 2, "pad_token_id": 1}  # fmt: skip
    first = transformers.CLIPTextConfig(**text, hidden_size=8, intermediate_size=32, hidden_act="quick_gelu")
    second = transformers.CLIPTextConfig(
        **text, hidden_size=16, intermediate_size=64, hidden_act="gelu", projection_dim=16
    )
    models: dict[str, Any] = {
        "unet": diffusers.UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), block_out_channels=(8, 8, 16),
            layers_per_block=2, transformer_layers_per_block=(1, 1, 2), attention_head_dim=(1, 1, 1),
            cross_attention_dim=24, norm_num_groups=4, use_linear_projection=True, addition_embed_type="text_time",
            addition_time_embed_dim=8, projection_class_embeddings_input_dim=64),
        "vae": diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=8, scaling_factor=VAE_SCALING),
        "text_encoder": transformers.CLIPTextModel(first),
        "text_encoder_2": transformers.CLIPTextModelWithProjection(second),
    }  # fmt: skip
    return {
        **{name: model.to(torch.bfloat16) for name, model in models.items()},
        "scheduler": diffusers.EulerDiscreteScheduler(**SAMPLING_SCHEDULE),
    }


def _write_checkpoint(folder: Path) -> Path:
    """The diffusers folder as one file in the original layout."""
    from safetensors.torch import save_file

    family = SDXL(SDXLConfig(diffusers_path=str(folder), text_encoder_1_lr=0, text_encoder_2_lr=0))
    trained = family.load_denoiser(torch.device("cpu")).state_dict()
    tensors = {**family.comfyui_tensors(trained), **family.other_tensors(())}
    path = folder / "checkpoint.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path
