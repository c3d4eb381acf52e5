"""Wan 2.1 and 2.2, by Alibaba: text-to-video, image-to-video, first-and-last-frame-to-video, and pictures.

A rectified-flow transformer over 1x2x2 patches of latents that a causal video VAE makes of 4n+1 frames. Text
(UMT5) comes in through cross-attention. Image-to-video models see 20 further channels: which frames are given,
and the latents of a clip that has those frames and is grey elsewhere; Wan 2.1's also attend to CLIP's view of
the given frames. The network predicts noise - x0. Wan 2.2's A14B models are two networks of this kind, one for
high and one for low noise, trained one at a time with min_t and max_t; its 5B model has a VAE of its own.

Reference: https://github.com/Wan-Video, and diffusers' WanPipeline and WanImageToVideoPipeline, whose
transformer the layers here equal bit for bit. Licence of the weights: Apache-2.0.

Shape legend: N batch, C latent channels, F H W frames, height and width of the latents, T tokens (F * H/2 * W/2),
L text tokens, D features. Times, and what they become, are of each sample (N) or of each token (NT).
"""

from __future__ import annotations

import io
import json
import logging
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..utils.config import SettingsError, option
from ..utils.imports import lazy
from ..utils.weights import build, fill
from .base import Batch, Example, Layer, SampleRequest, Shapes
from .captions import filled_up
from .files import fingerprint, read_json, require_path, write_json
from .flow import FlowConfig, FlowFamily
from .wan_files import (
    HEAD_DIM,
    PARTS,
    Source,
    clip_config,
    clip_reader,
    foreign_parts,
    open_part,
    original_name,
    original_vae_name,
    transformer_config,
    umt5_config,
    umt5_reader,
)
from .wan_vae import encode_normalised, load_wan_vae

if TYPE_CHECKING:
    import diffusers
    import sentencepiece
    import torch
    import transformers
    from diffusers.pipelines.wan import pipeline_wan
    from PIL import Image, ImageOps
    from torch import nn
else:
    diffusers, sentencepiece, torch, transformers = map(lazy, ("diffusers", "sentencepiece", "torch", "transformers"))
    nn, Image, ImageOps = map(lazy, ("torch.nn", "PIL.Image", "PIL.ImageOps"))
    pipeline_wan = lazy("diffusers.pipelines.wan.pipeline_wan")

logger = logging.getLogger(__name__)

TEXT_LENGTH = 512
"""Text tokens that the transformer sees; shorter captions are filled up with zeros."""
SCHEDULE: dict[str, Any] = {
    "_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "use_flow_sigmas": True,
    "num_train_timesteps": 1000, "flow_shift": 3.0,
}  # fmt: skip
"""How Wan samples 480p."""
EMBEDDED_TOKENIZER = "spiece_model"
"""ComfyUI's files of UMT5 hold the tokenizer under this name."""
Task = Literal["t2v", "i2v", "flf2v"]


class WanConfig(FlowConfig):
    """Wan 2.1 or 2.2, from a folder as Wan-AI publishes it or in diffusers layout, from single files as ComfyUI has
    them, or from both."""

    type: Literal["wan"] = "wan"
    ckpt_path: str | None = option(
        None,
        "Folder of the whole model, as Wan-AI publishes it or in diffusers layout. What a path below names is taken "
        "from there instead.",
        picker="diffusers",
        also=("diffusers_path",),
    )
    transformer_path: str | None = option(
        None,
        "Transformer: a single file, or a folder such as low_noise_model of Wan 2.2. Train its high-noise model with "
        "min_t 0.875 (image-to-video 0.9), its low-noise model with that as max_t.",
        picker="diffusion_models",
    )
    llm_path: str | None = option(
        None, "UMT5-XXL text encoder as a single file, such as umt5_xxl_fp16.safetensors.", picker="text_encoders"
    )
    vae_path: str | None = option(None, "VAE as a single file, such as wan_2.1_vae.safetensors.", picker="vae")
    clip_path: str | None = option(
        None,
        "CLIP-ViT-H as a single file, such as clip_vision_h.safetensors. Wan 2.1's image-to-video models need it.",
        picker="clip_vision",
    )
    tokenizer_path: str | None = option(
        None, "Folder of UMT5's tokenizer, if it is neither in ckpt_path nor in the file of llm_path.", advanced=True
    )
    text_encoder_fp8: bool = option(
        False, "Store the text encoder's weights in float8 while captions are encoded: 6 GB in place of 11 GB."
    )
    cache_text_embeddings: bool = option(
        True,
        "Kept for older files. Captions are always encoded once, before training, so that the text encoder takes no "
        "memory while training.",
        advanced=True,
    )
    image_to_video: float = option(
        0.0,
        "Wan 2.2's 5B model: share of the times that a clip is trained with its first frame given, as for "
        "image-to-video. The rest is text-to-video.",
        ge=0,
        le=1,
        step=0.05,
        advanced=True,
    )


@dataclass
class TextEncoder:
    """UMT5 with its tokenizer."""

    tokenizer: Any
    model: Any


@dataclass(frozen=True)
class Variant:
    """Which of the Wan models this is, as its weights tell."""

    task: Task
    channels: int
    """Of the latents."""
    has_clip: bool
    """Attends to CLIP's view of the given frames."""


class Wan(FlowFamily):
    """Wan in the hands of the trainer."""

    title = "Wan"
    Config = WanConfig
    config: WanConfig
    fps: float | None = 16.0
    text_encoders = ("umt5",)
    shared_inputs = (
        ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
        ("attn2.to_k", "attn2.to_v"),
        ("attn2.add_k_proj", "attn2.add_v_proj"),
    )
    adapter_blocks = ("WanTransformerBlock",)
    float32 = ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")
    high_precision = ("^condition_embedder", "^proj_out")

    @property
    def text_dtype(self) -> str | None:
        return self.config.text_encoder_dtype or ("float8" if self.config.text_encoder_fp8 else None)

    # -- files ------------------------------------------------------------------------------------

    def check_files(self) -> None:
        variant, shapes = self.variant, self._transformer_config()
        vae = self._source("vae")
        expected = [
            ("vae", vae.shape("post_quant_conv.weight", _vae_name)[0], variant.channels),
            ("umt5", umt5_config(self._source("umt5"))["d_model"], shapes["text_dim"]),
        ]
        if variant.has_clip:
            expected.append(("clip", clip_config(self._source("clip"))["hidden_size"], shapes["image_dim"]))
        for name, given, taken in expected:
            if given != taken:
                weights = self._source(name).weights
                raise SettingsError(
                    f"{weights.option}: '{weights.path}' has {given} features, but the transformer works with {taken}; "
                    "give the one of the same Wan model"
                )
        self._tokenizer_folder()
        self.takes_pictures = variant.task == "t2v"
        if self.config.image_to_video and not self._does_both:
            raise SettingsError(
                "model.image_to_video: this model does one or the other; leave it out, or give Wan 2.2's 5B model"
            )
        if self._does_both:
            self.fps, self.size_multiple, self.latent_multiple = 24.0, 32, 16
        elif "skyreels" in str(self._source("transformer").weights.path).lower():
            self.fps = 24.0

    @property
    def starts_from_pictures(self) -> bool:
        return self._does_both or super().starts_from_pictures

    def identity(self, part: str) -> str:
        identity = {"weights": fingerprint(self._place(part)[0]), "dtype": self.config.dtype}
        if part == "umt5":
            folder = self._tokenizer_folder()
            identity["tokenizer"] = fingerprint(folder) if folder else ""
            identity["storage"] = self.text_dtype or ""
        elif self.variant.task != "t2v":
            identity["task"] = self.variant.task
            identity["clip"] = fingerprint(self._place("clip")[0]) if self.variant.has_clip else ""
        return json.dumps(identity)

    @property
    def _does_both(self) -> bool:
        """Text to video and image to video, as Wan 2.2's 5B model: a given frame takes its own place, at time 0."""
        return self.variant.channels == 48

    @cached_property
    def variant(self) -> Variant:
        """Which model this is.

        Raises:
            SettingsError: None that can be trained.
        """
        source, config = self._source("transformer"), self._transformer_config()
        weights = source.weights
        channels, given = config["out_channels"], config["in_channels"] - config["out_channels"]
        if foreign := foreign_parts(source):
            raise SettingsError(
                f"{weights.option}: '{weights.path}' is a variant of Wan that cannot be trained (it has "
                f"'{foreign[0]}'); give a text-to-video or image-to-video model"
            )
        if given not in (0, channels + 4):
            raise SettingsError(
                f"{weights.option}: '{weights.path}' takes {config['in_channels']} channels; models with further "
                f"inputs (Fun Control) cannot be trained; give one with {channels} (text-to-video) or "
                f"{2 * channels + 4} (image-to-video)"
            )
        task: Task = "t2v" if not given else "flf2v" if config["pos_embed_seq_len"] else "i2v"
        return Variant(task, channels, config["image_dim"] is not None)

    def _place(self, name: str) -> tuple[Path, str]:
        """The file or folder of a part, and the setting that names it."""
        part = PARTS[name]
        if value := getattr(self.config, part.option):
            return require_path(value, f"model.{part.option}", part.title), f"model.{part.option}"
        if not self.config.ckpt_path:
            raise SettingsError(f"model.{part.option}: give {part.title}; or give model.ckpt_path")
        root = require_path(self.config.ckpt_path, "model.ckpt_path", "a folder of a Wan model")
        if name == "transformer":
            _refuse_two_experts(root)
        for place in (root / part.folder, *(root / file for file in part.files)):
            if place.is_dir() if place in (root, root / part.folder) else place.is_file():
                return place, "model.ckpt_path"
        raise SettingsError(
            f"model.ckpt_path: '{root}' has neither a folder '{part.folder}' nor {' or '.join(part.files)}; give a "
            f"folder of a Wan model, or in model.{part.option} {part.title}"
        )

    def _source(self, name: str) -> Source:
        """The tensors of a part, known to be of the right kind; reads headers only."""
        if name not in self._sources:
            self._sources[name] = open_part(PARTS[name], *self._place(name))
        return self._sources[name]

    @cached_property
    def _sources(self) -> dict[str, Source]:
        return {}

    def _tokenizer_folder(self) -> Path | None:
        """Where UMT5's tokenizer lies; None: in the text encoder's file."""
        setting, expected = "model.tokenizer_path", "a folder like google/umt5-xxl of Wan2.1-T2V-1.3B"
        places = []
        if self.config.ckpt_path:
            root = Path(self.config.ckpt_path).expanduser()
            places = [root / "tokenizer", root / "google" / "umt5-xxl"]
        if self.config.tokenizer_path:
            places = [require_path(self.config.tokenizer_path, setting, expected)]
        for folder in places:
            if any((folder / file).is_file() for file in ("tokenizer.json", "spiece.model")):
                return folder
        if EMBEDDED_TOKENIZER in self._source("umt5").weights and not self.config.tokenizer_path:
            return None
        raise SettingsError(
            f"{setting}: no tokenizer found{f' in {places[0]!s}' if places else ''}; give {expected}, or in "
            "model.llm_path a file of ComfyUI, which holds it"
        )

    # -- encoding, once per sample, cached ----------------------------------------------------------

    def load_vae(self, device: torch.device) -> nn.Module:
        """The VAE as ``vae`` and, where the model attends to it, CLIP as ``clip``."""
        encoders = {"vae": load_wan_vae(self._source("vae"), self.dtype, device)}
        if self.variant.has_clip:
            source = self._source("clip")
            config = transformers.CLIPVisionConfig(**(_folder_config(source) or clip_config(source)))
            encoders["clip"] = build(lambda: transformers.CLIPVisionModel(config))
            fill(encoders["clip"], clip_reader(source), torch.float32, device)
        return nn.ModuleDict(encoders).eval()

    def encode_media(
        self, vae: Any, pixels_NCFHW: torch.Tensor, generators: Sequence[torch.Generator]
    ) -> dict[str, torch.Tensor]:
        pixels_NCFHW = pixels_NCFHW.to(self.dtype)
        media = {"latents": encode_normalised(vae["vae"], pixels_NCFHW, self.dtype)}
        if self.variant.task == "t2v":
            return media
        given = [0] if self.variant.task == "i2v" else [0, pixels_NCFHW.shape[2] - 1]
        shown_NCFHW = torch.zeros_like(pixels_NCFHW)
        shown_NCFHW[:, :, given] = pixels_NCFHW[:, :, given]
        media["condition"] = encode_normalised(vae["vae"], shown_NCFHW, self.dtype)
        if self.variant.has_clip:
            frames_NFCHW = pixels_NCFHW[:, :, given].transpose(1, 2)
            media["image_embeds"] = self._see(vae["clip"], frames_NFCHW).to(self.dtype)
        return media

    def _see(self, clip: Any, frames_NFCHW: torch.Tensor) -> torch.Tensor:
        """CLIP's last but one hidden states of frames, those of one sample behind each other: NLD."""
        folder = self._beside("image_processor")
        make = transformers.CLIPImageProcessorPil
        processor = make.from_pretrained(folder) if folder else make()
        pixels = ((frames_NFCHW.float() + 1) * 127.5).round().byte().flatten(0, 1).permute(0, 2, 3, 1).cpu().numpy()
        pictures = [Image.fromarray(picture) for picture in pixels]
        seen = processor(images=pictures, return_tensors="pt").pixel_values.to(clip.device, torch.float32)
        with torch.no_grad():
            hidden = clip(pixel_values=seen, output_hidden_states=True).hidden_states[-2]
        return hidden.reshape(len(frames_NFCHW), -1, hidden.shape[-1])

    def _beside(self, folder: str) -> Path | None:
        """A folder of a model in diffusers layout."""
        path = Path(self.config.ckpt_path).expanduser() / folder if self.config.ckpt_path else None
        return path if path and path.is_dir() else None

    def load_text_encoder(self, name: str, device: torch.device) -> TextEncoder:
        source = self._source(name)
        config = transformers.UMT5Config(**(_folder_config(source) or umt5_config(source)))
        model = build(lambda: transformers.UMT5EncoderModel(config))
        model.tie_weights()
        # transformers keeps these in float32 beside float16, where their output overflows
        float32 = ("DenseReluDense.wo",) if self.config.dtype == "float16" else ()
        fill(model, umt5_reader(source), self.dtype, device, float32, self.text_storage(float32))
        return TextEncoder(self._load_tokenizer(), model.eval())

    def _load_tokenizer(self) -> Any:
        make: Any = transformers.T5TokenizerFast  # type: ignore[attr-defined]
        if folder := self._tokenizer_folder():
            return make.from_pretrained(folder)
        with tempfile.TemporaryDirectory() as temporary:
            file = Path(temporary) / "spiece.model"
            file.write_bytes(self._source("umt5").weights.raw(EMBEDDED_TOKENIZER))
            return make.from_pretrained(temporary, extra_ids=0)

    def encode_text(self, name: str, encoder: TextEncoder, captions: Sequence[str]) -> dict[str, list[torch.Tensor]]:
        """As `Family.encode_text`; embeddings are as long as their caption."""
        tokens = encoder.tokenizer(
            [pipeline_wan.prompt_clean(caption) for caption in captions],
            padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt",
        ).to(encoder.model.device)  # fmt: skip
        with torch.no_grad():
            embeds_NLD = encoder.model(tokens.input_ids, tokens.attention_mask).last_hidden_state.to(self.dtype)
        lengths = tokens.attention_mask.sum(1).tolist()
        return {"umt5_embeds": [embeds_LD[:length] for embeds_LD, length in zip(embeds_NLD, lengths, strict=True)]}

    # -- training -----------------------------------------------------------------------------------

    def build_denoiser(self) -> nn.Module:
        config = self._transformer_config()
        return build(lambda: diffusers.WanTransformer3DModel.from_config(config))

    def denoiser_reader(self) -> Callable[[str], torch.Tensor]:
        source = self._source("transformer")
        return lambda name: source.weights.read(original_name(name) if source.original else name)

    def _transformer_config(self) -> dict[str, Any]:
        """Arguments of WanTransformer3DModel."""
        source = self._source("transformer")
        config = _folder_config(source)
        if config and not source.original:
            return {"pos_embed_seq_len": None, "image_dim": None, **config}
        return transformer_config(source, config["dim"] // config["num_heads"] if config else HEAD_DIM)

    def layers(self, denoiser: Any) -> list[Layer]:
        modules = {name: getattr(denoiser, name) for name in ("rope", "patch_embedding", "condition_embedder")}
        layers = [Layer("embed", partial(_embed, patch=denoiser.config.patch_size), modules)]
        for index, block in enumerate(denoiser.blocks):
            layers.append(Layer(f"blocks.{index}", _block, {"block": block}, is_block=True))
        modules = {
            "norm_out": denoiser.norm_out,
            "proj_out": denoiser.proj_out,
            "tables": nn.ParameterList([denoiser.scale_shift_table]),  # a layer holds modules alone
        }
        layers.append(Layer("out", partial(_out, patch=denoiser.config.patch_size), modules))
        return layers

    def collate(self, examples: Sequence[Example]) -> Batch:
        x_NCFHW, t_N, velocity_NCFHW = self.noised(examples)
        if self.variant.task != "t2v":
            condition_NCFHW = torch.stack([example.media["condition"] for example in examples])
            given_N4FHW = given_frames(condition_NCFHW, last=self.variant.task == "flf2v")
            x_NCFHW = torch.cat([x_NCFHW, given_N4FHW, condition_NCFHW], 1)
        time, weight = t_N * 1000, self.time_weight(t_N, velocity_NCFHW)
        if self.config.image_to_video and x_NCFHW.shape[2] > 1:
            made_N1FHW = self._made(examples)
            x_NCFHW = torch.where(made_N1FHW > 0, x_NCFHW, torch.stack([e.media["latents"] for e in examples]).float())
            time = (made_N1FHW[..., ::2, ::2] * time.view(-1, 1, 1, 1, 1)).flatten(1)  # NT
            weight = weight * made_N1FHW / made_N1FHW.mean((1, 2, 3, 4), keepdim=True)
        inputs = [
            x_NCFHW.to(self.dtype),
            time,
            filled_up([example.text["umt5_embeds"] for example in examples], TEXT_LENGTH),
        ]
        if self.variant.has_clip:
            inputs.append(torch.stack([example.media["image_embeds"] for example in examples]).to(self.dtype))
        inputs[2] = inputs[2].to(self.dtype)
        return Batch(tuple(inputs), velocity_NCFHW, weight)

    def _made(self, examples: Sequence[Example]) -> torch.Tensor:
        """1 for latents that the model is to make, 0 for those of a given first frame."""
        given = [random.Random(example.seed).random() < self.config.image_to_video for example in examples]
        made_N1FHW = torch.ones(len(examples), 1, *examples[0].media["latents"].shape[1:])
        made_N1FHW[given, :, 0] = 0
        return made_N1FHW

    def cached_shapes(self, latent_size: tuple[int, int, int]) -> tuple[Shapes, Shapes]:
        config: Any = self.build_denoiser().config
        media: dict[str, tuple[int, ...]] = {"latents": (self.variant.channels, *latent_size)}
        if self.variant.task != "t2v":
            media["condition"] = media["latents"]
        if self.variant.has_clip:
            clip = clip_config(self._source("clip"))
            tokens = (clip["image_size"] // clip["patch_size"]) ** 2 + 1
            media["image_embeds"] = (tokens * (1 if self.variant.task == "i2v" else 2), config.image_dim)
        return media, {"umt5_embeds": (TEXT_LENGTH, config.text_dim)}

    # -- results ------------------------------------------------------------------------------------

    def lora_keys(self, module_name: str) -> str:
        return f"diffusion_model.{original_name(module_name)}"

    def comfyui_tensors(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {original_name(name): tensor for name, tensor in tensors.items()}

    def pipeline(self, denoiser: Any, device: torch.device, text_encoders: bool = True) -> Any:
        text = self.load_text_encoder("umt5", device) if text_encoders else TextEncoder(None, None)
        folder, encoders = self._beside("scheduler"), self.load_vae(device)
        schedule = read_json(folder / "scheduler_config.json") if folder else SCHEDULE
        parts: dict[str, Any] = {
            "scheduler": getattr(diffusers, schedule["_class_name"]).from_config(schedule),
            "vae": encoders["vae"],  # type: ignore[index]
            "text_encoder": text.model,
            "tokenizer": text.tokenizer,
            "transformer": denoiser,
        }
        if self.variant.task == "t2v":
            return diffusers.WanPipeline(**parts)
        if self.variant.has_clip:
            processor = self._beside("image_processor")
            make = transformers.CLIPImageProcessorPil
            parts["image_encoder"] = encoders["clip"]  # type: ignore[index]
            parts["image_processor"] = make.from_pretrained(processor) if processor else make()
        return diffusers.WanImageToVideoPipeline(**parts)

    def prompt_arguments(self, request: SampleRequest, device: torch.device) -> dict[str, Any]:
        """As `Family.prompt_arguments`; first-and-last-frame models end on the last picture, which may be the first."""
        arguments: dict[str, Any] = {
            f"{prefix}prompt_embeds": filled_up([text["umt5_embeds"]], TEXT_LENGTH).to(device)
            for prefix, text in (("", request.text), ("negative_", request.negative_text))
        }
        if self.variant.task == "t2v" and not (self._does_both and request.images):
            return arguments
        if not request.images:
            raise SettingsError(f"sample: this {self.title} model draws from a first frame; give a picture")
        size = request.width, request.height
        first, *_, last = [ImageOps.fit(image.convert("RGB"), size) for image in (request.images * 2)]
        return arguments | {"image": first} | ({"last_image": last} if self.variant.task == "flf2v" else {})

    def sample(self, pipeline: Any, request: SampleRequest) -> list[Image.Image]:
        if self._does_both and request.images:
            pipeline = diffusers.WanImageToVideoPipeline(**pipeline.components, expand_timesteps=True)
            pipeline.set_progress_bar_config(disable=True)
        output = pipeline(
            width=request.width,
            height=request.height,
            num_frames=request.frames,
            num_inference_steps=request.steps,
            **({} if request.guidance is None else {"guidance_scale": request.guidance}),
            **self.prompt_arguments(request, pipeline._execution_device),
            generator=torch.Generator().manual_seed(request.seed),
            output_type="pil",
        )
        return output.frames[0]

    @classmethod
    def write_miniature(cls, folder: Path, variant: str = "t2v") -> dict[str, Any]:
        """As `Family.write_miniature`, in diffusers layout; ``variant`` is one of `MINIATURES`."""
        vocabulary = _write_tokenizer(folder / "tokenizer")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            parts = _miniature_parts(variant, vocabulary)
        pipeline = "WanPipeline" if MINIATURES[variant]["in_channels"] in (16, 48) else "WanImageToVideoPipeline"
        index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": diffusers.__version__}
        for name, part in parts.items():
            part.save_pretrained(folder / name)
            index[name] = [type(part).__module__.split(".")[0], type(part).__name__]
        index["tokenizer"] = ["transformers", "T5TokenizerFast"]
        write_json(folder / "model_index.json", index)
        return {"type": "wan", "ckpt_path": str(folder), "dtype": "float32"}


# -- parts of loading -------------------------------------------------------------------------------------


def _folder_config(source: Source) -> dict[str, Any]:
    """A folder's ``config.json``; empty for a file."""
    file = source.weights.path / "config.json"
    return read_json(file) if file.is_file() else {}


def _vae_name(name: str) -> str:
    """`original_vae_name` for names that are the same in every VAE."""
    return original_vae_name(name, 0, False)


def _refuse_two_experts(root: Path) -> None:
    """A folder of Wan 2.2 A14B holds two transformers, and one is trained at a time."""
    for high, low in (("high_noise_model", "low_noise_model"), ("transformer", "transformer_2")):
        if (root / low).is_dir():
            raise SettingsError(
                f"model.transformer_path: '{root}' holds two transformers; give '{root / high}' and min_t = 0.875 "
                f"(image-to-video 0.9) for high noise, or '{root / low}' and that as max_t for low noise"
            )


# -- links of the chain -----------------------------------------------------------------------------------


def given_frames(latents_NCFHW: torch.Tensor, last: bool) -> torch.Tensor:
    """Which of the four frames that each latent frame stands for are given: the first, and the ``last`` one.

    The first latent frame stands for the first frame alone, which then counts four times.
    """
    given_N4FHW = torch.zeros_like(latents_NCFHW[:, :4], dtype=torch.float32)
    given_N4FHW[:, :, 0] = 1
    if last:
        given_N4FHW[:, 3, -1] = 1
    return given_N4FHW


Tensors = tuple["torch.Tensor", ...]


def _embed(
    modules: Any,
    x_NCFHW: torch.Tensor,
    t: torch.Tensor,
    text_NLD: torch.Tensor,
    image_NLD: torch.Tensor | None = None,
    *,
    patch: tuple[int, int, int],
) -> Tensors:
    """``t`` is the time in thousandths. The tables of positions, FHWD, tell the last link the shape."""
    cos, sin = (
        table.view(*(size // step for size, step in zip(x_NCFHW.shape[2:], patch, strict=True)), -1)
        for table in modules.rope(x_NCFHW)
    )
    x_NTD = modules.patch_embedding(x_NCFHW).flatten(2).transpose(1, 2).contiguous()
    if image_NLD is not None and (embedder := modules.condition_embedder.image_embedder).pos_embed is not None:
        # the embedder takes the frames of a sample as further samples, and joins them again
        image_NLD = image_NLD.reshape(-1, embedder.pos_embed.shape[1] // 2, image_NLD.shape[-1])
    num_times = t.shape[1] if t.ndim == 2 else None
    temb, modulation, text_NLD, image_NLD = modules.condition_embedder(
        t.flatten(), text_NLD, image_NLD, timestep_seq_len=num_times
    )
    if image_NLD is not None:
        text_NLD = torch.cat([image_NLD, text_NLD], dim=1)
    return x_NTD, text_NLD, temb, modulation.unflatten(-1, (6, -1)), cos, sin


def _block(
    modules: Any,
    x_NTD: torch.Tensor,
    text_NLD: torch.Tensor,
    temb: torch.Tensor,
    modulation: torch.Tensor,
    cos_FHWD: torch.Tensor,
    sin_FHWD: torch.Tensor,
) -> Tensors:
    rotation = tuple(table.view(1, x_NTD.shape[1], 1, -1) for table in (cos_FHWD, sin_FHWD))
    x_NTD = modules.block(x_NTD, text_NLD, modulation, rotation)
    return x_NTD.contiguous(), text_NLD, temb, modulation, cos_FHWD, sin_FHWD


def _out(
    modules: Any,
    x_NTD: torch.Tensor,
    _text: Any,
    temb: torch.Tensor,
    _modulation: Any,
    cos_FHWD: torch.Tensor,
    _sin: Any,
    *,
    patch: tuple[int, int, int],
) -> torch.Tensor:
    table = modules.tables[0] if temb.ndim == 2 else modules.tables[0].unsqueeze(0)
    shift, scale = (part.squeeze(-2) if temb.ndim == 3 else part for part in (table + temb.unsqueeze(-2)).chunk(2, -2))
    x_NTD = (modules.norm_out(x_NTD.float()) * (1 + scale) + shift).type_as(x_NTD)
    x = modules.proj_out(x_NTD).reshape(len(x_NTD), *cos_FHWD.shape[:3], *patch, -1)
    return x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)


# -- miniature --------------------------------------------------------------------------------------------

MINIATURES: dict[str, dict[str, Any]] = {
    "t2v": {"in_channels": 16, "out_channels": 16},
    "i2v": {"in_channels": 36, "out_channels": 16, "image_dim": 32, "added_kv_proj_dim": 32},
    "flf2v": {
        "in_channels": 36, "out_channels": 16, "image_dim": 32, "added_kv_proj_dim": 32, "pos_embed_seq_len": 34},
    "i2v_a14b": {"in_channels": 36, "out_channels": 16},
    "ti2v_5b": {"in_channels": 48, "out_channels": 48},
}  # fmt: skip
"""What tells the variants of the transformer apart."""


def _miniature_parts(variant: str, vocabulary: int) -> dict[str, Any]:
    umt5 = transformers.UMT5Config(
        vocab_size=vocabulary, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    large_vae = {
        "is_residual": True,
        "patch_size": 2,
        "in_channels": 12,
        "out_channels": 12,
        "z_dim": 48,
        "decoder_base_dim": 8,
        "scale_factor_spatial": 16,
        **{name: [value] * 48 for name, value in (("latents_mean", 0.1), ("latents_std", 0.7))},
    }
    models: dict[str, Any] = {
        "transformer": diffusers.WanTransformer3DModel(
            num_attention_heads=1, attention_head_dim=32, text_dim=32, freq_dim=32, ffn_dim=48, num_layers=2,
            **MINIATURES[variant]),
        "vae": diffusers.AutoencoderKLWan(base_dim=4, **(large_vae if variant == "ti2v_5b" else {})),
        "text_encoder": transformers.UMT5EncoderModel(umt5),
    }  # fmt: skip
    if "image_dim" in MINIATURES[variant]:
        models["image_encoder"] = transformers.CLIPVisionModel(
            transformers.CLIPVisionConfig(
                hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=1, image_size=224,
                patch_size=56, hidden_act="gelu"))  # fmt: skip
    for model in models.values():
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
    if "image_encoder" in models:
        models["image_processor"] = transformers.CLIPImageProcessorPil()
    return {**models, "scheduler": diffusers.UniPCMultistepScheduler.from_config(SCHEDULE)}


def _write_tokenizer(folder: Path) -> int:
    """A SentencePiece model learnt from a few words; returns the size of its vocabulary."""
    words = (
        "a cat",
        "a dog",
        "photo of a red cat",
        "picture of ball",
        "video",
        "abcdefghijklmnopqrstuvwxyz",
        "0123456789",
    )
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words * 3), model_writer=model, vocab_size=64, model_type="unigram", pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, hard_vocab_limit=False, character_coverage=1.0, num_threads=1, minloglevel=2)  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(model.getvalue())
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "model_max_length": TEXT_LENGTH}
    write_json(folder / "tokenizer_config.json", settings)
    return len(sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()))
