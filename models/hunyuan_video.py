"""HunyuanVideo, by Tencent: text to video and to pictures, 13 billion weights.

A rectified-flow transformer over 1x2x2 patches of latents that a causal video VAE makes of 4n+1 frames. The caption is
put into a prompt for Llava-Llama3, one for videos or one for pictures as in the original release, of whose third-last
hidden states the prompt is cut off; a refiner of two blocks works on these. CLIP-L's pooled text joins the time. Video
and text pass the double blocks as two streams with joint attention, then the single blocks as one, the video first.
Guidance is distilled and told. The network predicts noise - x0.

ComfyUI and diffusers ask with the prompt for videos even for a picture, so what is trained on pictures is trained with
another prompt than a video that is made with it.

Captions have their own lengths here, which gives what diffusers' 256 tokens with a mask give within rounding, and
nothing is masked where they are equally long. Queries, keys and values are one layer, as in the original (see
`hunyuan_video_attention`); else all is as in diffusers' HunyuanVideoPipeline, but for the frames of the VAE's tiles.

Reference: https://github.com/Tencent-Hunyuan/HunyuanVideo. Licence of the weights: Tencent Hunyuan Community, which
does not hold in the European Union, the United Kingdom and South Korea.

Shape legend: N batch, C latent channels, F H W frames, height and width of the latents, T video tokens (F * H/2 * W/2),
in angles with the text's, L text tokens, D features.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..utils.config import SettingsError, option
from ..utils.imports import lazy
from ..utils.weights import Weights, build, fill
from .base import Batch, Encodings, Example, Layer, SampleRequest, Shapes
from .captions import side_by_side
from .clip import CLIP_LENGTH, clip_name, write_clip_tokenizer
from .components import Component, FromComponents, TextEncoder, width_of
from .files import fingerprint, read_json, require_path, write_json
from .flow import FlowConfig, FlowFamily
from .hunyuan_video_files import (
    COMPONENTS,
    END,
    LLAMA_HEAD_DIM,
    PROMPTS,
    RELEASE,
    TEXT_LENGTH,
    llama_tokenizer,
    lora_name,
    name_in_folder,
    original_name,
    read_library,
    read_original,
    read_vae,
    text_config,
    transformer_config,
    vae_config,
    write_llama_tokenizer,
)

if TYPE_CHECKING:
    import diffusers
    import torch
    import transformers
    from PIL.Image import Image
    from torch import nn
else:
    diffusers, torch, transformers = map(lazy, ("diffusers", "torch", "transformers"))

SCHEDULE: dict[str, Any] = {"shift": 7.0, "use_dynamic_shifting": False}
USUAL_LENGTH = 128
"""For estimates."""
HIDDEN_STATES = -3
"""Those of Llama that are taken."""


class HunyuanVideoConfig(FlowConfig):
    """HunyuanVideo, text to video, from the original folder, from ComfyUI's files or from a diffusers folder."""

    type: Literal["hunyuan-video"] = "hunyuan-video"
    ckpt_path: str | None = option(
        None,
        "Folder of the original release, with hunyuan-video-t2v-720p, text_encoder and text_encoder_2. What a path "
        "below names is taken from there instead.",
        picker="diffusers",
    )
    transformer_path: str | None = option(
        None,
        "Transformer as a single file, such as hunyuan_video_t2v_720p_bf16.safetensors.",
        picker="diffusion_models",
    )
    vae_path: str | None = option(
        None, "VAE as a single file, such as hunyuan_video_vae_bf16.safetensors.", picker="vae"
    )
    llm_path: str | None = option(
        None,
        "Llava-Llama3 text encoder: a single file, such as llava_llama3_fp8_scaled.safetensors, or a folder.",
        picker="text_encoders",
    )
    clip_path: str | None = option(
        None,
        "CLIP-L text encoder: a single file, such as clip_l.safetensors, or a folder.",
        picker="text_encoders",
    )
    guidance: float = option(
        1.0, "Guidance that the model is told while training. 1 leaves later guidance intact.", ge=0, step=0.1
    )
    diffusers_path: str | None = option(
        None,
        "Folder of the whole model in diffusers layout. What a path above names is taken from there instead.",
        picker="diffusers",
    )
    llm_tokenizer_path: str | None = option(
        None, "Folder of Llava-Llama3's tokenizer, if it is neither beside the text encoder nor in ComfyUI.",
        advanced=True,
    )  # fmt: skip
    clip_tokenizer_path: str | None = option(
        None, "Folder of the CLIP tokenizer, if it is neither beside the text encoder nor in ComfyUI.", advanced=True
    )


class HunyuanVideo(FromComponents, FlowFamily):
    """HunyuanVideo in the hands of the trainer."""

    title = "HunyuanVideo"
    Config = HunyuanVideoConfig
    config: HunyuanVideoConfig
    components: ClassVar[Mapping[str, Component]] = COMPONENTS
    whole = "a HunyuanVideo folder in diffusers layout"
    published = "hunyuanvideo-community/HunyuanVideo"
    fps: float | None = 24.0
    text_encoders: ClassVar[tuple[str, ...]] = ("llama", "clip")
    adapter_blocks = ("HunyuanVideoTransformerBlock", "HunyuanVideoSingleTransformerBlock")
    says_alpha = False  # diffusers refuses a file that does
    high_precision = ("^x_embedder", "^context_embedder", "^time_text_embed", "^norm_out", "^proj_out")

    # -- files ------------------------------------------------------------------------------------

    def check_files(self) -> None:
        parts = {name: self._weights(name) for name in self.components}
        for name in self.text_encoders:
            self._tokenizer_folder(name)
        config, transformer = self._transformer_config(), parts["transformer"]
        channels = vae_config(parts["vae"])["latent_channels"]
        if (kind := config.get("image_condition_type")) or config["in_channels"] > config["out_channels"]:
            said = f"is of kind '{kind}'" if kind else f"takes {config['in_channels']} channels"
            raise SettingsError(
                f"{transformer.option}: '{transformer.path}' {said}; image-to-video models cannot be trained, give "
                f"{self.components['transformer'].title}"
            )
        self._check_widths(
            parts,
            {
                "vae": (channels, config["in_channels"]),
                "llama": (width_of(parts["llama"]), config["text_embed_dim"]),
                "clip": (width_of(parts["clip"]), config["pooled_projection_dim"]),
            },
        )

    def identity(self, part: str) -> str:
        identity = {"weights": fingerprint(self._place(part)[0]), "dtype": self.config.dtype}
        if part in self.text_encoders:
            identity["tokenizer"] = fingerprint(self._tokenizer_folder(part))
        if part == "llama":
            identity |= {"length": str(TEXT_LENGTH), "storage": self.text_dtype or ""}
        return json.dumps(identity)

    def _place(self, name: str) -> tuple[Path, str]:
        """As `FromComponents._place`; what is named nowhere else is in the folder of the original release."""
        part = self.components[name]
        if getattr(self.config, part.option) or self.config.diffusers_path or not self.config.ckpt_path:
            return super()._place(name)
        expected = "the folder of the original release, with hunyuan-video-t2v-720p, text_encoder and text_encoder_2"
        root = require_path(self.config.ckpt_path, "model.ckpt_path", expected)
        if not (root / RELEASE[name]).exists():
            raise SettingsError(
                f"model.ckpt_path: '{root}' has no '{RELEASE[name]}'; give {expected}, or in model.{part.option} "
                f"{part.title}; a folder in diffusers layout goes into model.diffusers_path"
            )
        return root / RELEASE[name], "model.ckpt_path"

    def _weights(self, name: str) -> Weights:
        """As `FromComponents._weights`; a text encoder's folder may hold what it is a part of, such as Llava."""
        part, (path, setting) = self.components[name], self._place(name)
        if name not in self.text_encoders or not path.is_dir():
            return super()._weights(name)
        if not (path / "config.json").is_file():
            raise SettingsError(f"{setting}: '{path}' has no config.json; give {part.title}, or a folder of it")
        weights = Weights(path, setting, part.prefixes, part.markers[0])
        if missing := [marker for marker in part.markers if name_in_folder(marker, weights) not in weights]:
            raise SettingsError(f"{setting}: '{path}' is not {part.title} (it has no '{missing[0]}')")
        return weights

    def _tokenizer_folder(self, name: str) -> Path:
        """As `FromComponents._tokenizer_folder`; folders of the original release have them with the text encoders."""
        part, places = self.components[name], [self._place(name)[0]]
        if self.config.ckpt_path:
            places.append(Path(self.config.ckpt_path).expanduser() / RELEASE[name])
        for folder in [] if getattr(self.config, part.tokenizer_option) else places:
            if any((folder / file).is_file() for file in ("tokenizer.json", "vocab.json")):
                return folder
        return super()._tokenizer_folder(name)

    def _transformer_config(self) -> dict[str, Any]:
        """Arguments of HunyuanVideoTransformer3DModel."""
        weights = self._weights("transformer")
        return read_json(weights.path / "config.json") if weights.path.is_dir() else transformer_config(weights)

    # -- encoding, once per sample, cached ----------------------------------------------------------

    def load_vae(self, device: torch.device) -> nn.Module:
        """It works on tiles of 256 pixels and 64 frames, as the original does; diffusers cuts clips after 16."""
        weights = self._weights("vae")
        config = read_json(weights.path / "config.json") if weights.path.is_dir() else vae_config(weights)
        vae = build(lambda: diffusers.AutoencoderKLHunyuanVideo.from_config(config))
        fill(vae, lambda name: read_vae(weights, name), self.dtype, device)
        vae.enable_tiling(tile_sample_min_num_frames=64, tile_sample_stride_num_frames=48)
        vae.enable_slicing()
        return vae.eval()

    def encode_media(
        self, vae: Any, pixels_NCFHW: torch.Tensor, generators: Sequence[torch.Generator]
    ) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            latents_NCFHW = vae.encode(pixels_NCFHW.to(self.dtype)).latent_dist.sample(list(generators))
        return {"latents": latents_NCFHW * vae.config.scaling_factor}

    def load_text_encoder(self, name: str, device: torch.device) -> TextEncoder:
        weights, folder = self._weights(name), self._tokenizer_folder(name)
        settings = text_config(name, weights)
        if name == "clip":
            model = build(lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**settings)))
            fill(model, lambda tensor: weights.read(clip_name(tensor, weights)), self.dtype, device)
            return TextEncoder(transformers.CLIPTokenizer.from_pretrained(folder), model.eval())
        model = build(lambda: transformers.LlamaModel(transformers.LlamaConfig(**settings)))
        fill(model, weights.read, self.dtype, device, storage=self.text_storage())
        return TextEncoder(llama_tokenizer(folder, f"model.{self.components[name].tokenizer_option}"), model.eval())

    def encode_text(self, name: str, encoder: TextEncoder, captions: Sequence[str]) -> Encodings:
        """As `Family.encode_text`; Llama's for a video and for a picture, in the caption's length."""
        if name == "clip":
            tokens = encoder.tokenizer(
                list(captions), padding="max_length", max_length=CLIP_LENGTH, truncation=True, return_tensors="pt"
            )
            with torch.no_grad():
                pooled_ND = encoder.model(tokens.input_ids.to(encoder.model.device)).pooler_output
            return {"clip_pooled": pooled_ND.to(self.dtype)}
        return {
            value: self._asked(encoder, [f"{prompt}{caption}{END}" for caption in captions], start)
            for value, (prompt, start) in PROMPTS.items()
        }

    def _asked(self, encoder: TextEncoder, texts: Sequence[str], start: int) -> list[torch.Tensor]:
        """Llama's states (LD) of each text from token ``start`` on."""
        tokens = encoder.tokenizer(
            list(texts), padding="max_length", max_length=start + TEXT_LENGTH, truncation=True, return_tensors="pt"
        )
        ids_NL, seen_NL = (value.to(encoder.model.device) for value in (tokens.input_ids, tokens.attention_mask))
        with torch.no_grad():
            output = encoder.model(ids_NL, attention_mask=seen_NL, output_hidden_states=True)
        states_NLD = output.hidden_states[HIDDEN_STATES].to(self.dtype)
        lengths = seen_NL.sum(1).tolist()
        return [states_LD[start:length] for states_LD, length in zip(states_NLD, lengths, strict=True)]

    # -- training -----------------------------------------------------------------------------------

    def build_denoiser(self) -> nn.Module:
        from .hunyuan_video_attention import as_original

        config = self._transformer_config()
        return build(lambda: as_original(diffusers.HunyuanVideoTransformer3DModel.from_config(config)))

    def denoiser_reader(self) -> Callable[[str], torch.Tensor]:
        weights = self._weights("transformer")
        return partial(read_library if weights.path.is_dir() else read_original, weights)

    def layers(self, denoiser: Any) -> list[Layer]:
        modules = {name: getattr(denoiser, name) for name in ("x_embedder", "context_embedder", "time_text_embed")}
        layers = [Layer("embed", partial(_embed, angles_of=denoiser.rope), modules)]
        for stack in ("transformer_blocks", "single_transformer_blocks"):
            for index, block in enumerate(getattr(denoiser, stack)):
                layers.append(Layer(f"{stack}.{index}", _block, {"block": block}, is_block=True))
        layers.append(Layer("out", _out, {"norm_out": denoiser.norm_out, "proj_out": denoiser.proj_out}))
        return layers

    def collate(self, examples: Sequence[Example]) -> Batch:
        x_t_NCFHW, t_N, velocity_NCFHW = self.noised(examples)
        asked = _asked_for(x_t_NCFHW.shape[2])
        text_NLD, seen_NL = side_by_side([example.text[asked].to(self.dtype) for example in examples])
        pooled_ND = torch.stack([example.text["clip_pooled"] for example in examples]).to(self.dtype)
        # As the pipeline rounds it: in the network's precision, before it is multiplied and after
        guidance_N = torch.full_like(t_N, self.config.guidance).to(self.dtype) * 1000
        return Batch(
            inputs=(x_t_NCFHW.to(self.dtype), t_N * 1000, text_NLD, seen_NL, pooled_ND, guidance_N.float()),
            target=velocity_NCFHW,
            weight=self.time_weight(t_N, velocity_NCFHW),
        )

    def cached_shapes(self, latent_size: tuple[int, int, int]) -> tuple[Shapes, Shapes]:
        config: Any = self.build_denoiser().config
        text: dict[str, tuple[int, ...]] = dict.fromkeys(PROMPTS, (USUAL_LENGTH, config.text_embed_dim))
        return {"latents": (config.in_channels, *latent_size)}, {**text, "clip_pooled": (config.pooled_projection_dim,)}

    # -- results ------------------------------------------------------------------------------------

    def lora_keys(self, module_name: str) -> str:
        return f"transformer.{lora_name(module_name)}"

    def comfyui_tensors(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {original_name(name): tensor for name, tensor in tensors.items()}

    def pipeline(self, denoiser: Any, device: torch.device, text_encoders: bool = True) -> Any:
        llama, clip = (
            self.load_text_encoder(name, device) if text_encoders else TextEncoder(None, None)
            for name in self.text_encoders
        )
        return diffusers.HunyuanVideoPipeline(
            transformer=denoiser,
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler.from_config(self._schedule(SCHEDULE)),
            vae=self.load_vae(device),
            text_encoder=llama.model,
            tokenizer=llama.tokenizer,
            text_encoder_2=clip.model,
            tokenizer_2=clip.tokenizer,
        )

    def prompt_arguments(self, request: SampleRequest, device: torch.device) -> dict[str, Any]:
        arguments: dict[str, Any] = {"true_cfg_scale": request.true_cfg}
        for prefix, text in (("", request.text), ("negative_", request.negative_text)):
            text_LD = text[_asked_for(request.frames)].to(device)
            padded_NLD = text_LD.new_zeros(1, TEXT_LENGTH, text_LD.shape[1])  # the pipeline's length, for its rounding
            padded_NLD[0, : len(text_LD)] = text_LD
            arguments[f"{prefix}prompt_embeds"] = padded_NLD
            arguments[f"{prefix}prompt_attention_mask"] = (torch.arange(TEXT_LENGTH) < len(text_LD))[None].to(device)
            arguments[f"{prefix}pooled_prompt_embeds"] = text["clip_pooled"][None].to(device)
        return arguments

    def sample(self, pipeline: Any, request: SampleRequest) -> list[Image]:
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
        frames: list[Image] = output.frames[0]
        return frames

    @classmethod
    def write_miniature(cls, folder: Path) -> dict[str, Any]:
        vocabularies = write_llama_tokenizer(folder / "tokenizer"), write_clip_tokenizer(folder / "tokenizer_2")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            parts = _miniature_parts(*vocabularies)
        index: dict[str, Any] = {"_class_name": "HunyuanVideoPipeline", "_diffusers_version": diffusers.__version__}
        for name, part in parts.items():
            part.save_pretrained(folder / name)
            index[name] = [type(part).__module__.split(".")[0], type(part).__name__]
        index |= {
            "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
        }
        write_json(folder / "model_index.json", index)
        return {"type": "hunyuan-video", "diffusers_path": str(folder), "dtype": "float32"}


def _asked_for(frames: int) -> str:
    """The name of the value that Llama gave for a clip or a picture of so many frames."""
    return "llama_embeds" if frames > 1 else "llama_picture_embeds"


# -- links of the chain ---------------------------------------------------------------------------------

Tensors = tuple["torch.Tensor", ...]


def _embed(
    modules: Any,
    x_t_NCFHW: torch.Tensor,
    told_N: torch.Tensor,
    text_NLD: torch.Tensor,
    seen_NL: torch.Tensor,
    pooled_ND: torch.Tensor,
    guidance_N: torch.Tensor,
    *,
    angles_of: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
) -> Tensors:
    """Also what is seen of video and text, one column where that is all, and a tensor shaped as the patches are."""
    from .hunyuan_video_attention import of_all

    temb_ND = modules.time_text_embed(told_N, pooled_ND, guidance_N)[0]
    x_NTD = modules.x_embedder(x_t_NCFHW).contiguous()
    refined_NLD = _refine(modules.context_embedder, text_NLD, told_N, seen_NL)
    cos_TD, sin_TD = of_all(angles_of(x_t_NCFHW), x_NTD.shape[1] + text_NLD.shape[1])
    seen_NT = torch.cat([seen_NL.new_ones(x_NTD.shape[:2]), seen_NL], dim=1) if seen_NL.shape[1] > 1 else seen_NL
    frames, height, width = x_t_NCFHW.shape[2:]
    grid = torch.zeros(frames, height // 2, width // 2, dtype=torch.uint8, device=x_NTD.device)
    return x_NTD, refined_NLD.contiguous(), temb_ND, cos_TD.contiguous(), sin_TD.contiguous(), seen_NT, grid


def _refine(embedder: Any, text_NLD: torch.Tensor, told_N: torch.Tensor, seen_NL: torch.Tensor) -> torch.Tensor:
    """As ``embedder``'s forward. There what fills up a batch sees its first token, here all tokens of its caption:
    nobody sees what becomes of it."""
    seen_NL1 = seen_NL.float().expand(text_NLD.shape[:2]).unsqueeze(-1)
    pooled_ND = ((text_NLD * seen_NL1).sum(dim=1) / seen_NL1.sum(dim=1)).to(text_NLD.dtype)
    temb_ND = embedder.time_text_embed(told_N, pooled_ND)
    text_NLD, mask = embedder.proj_in(text_NLD), _mask(seen_NL)
    for block in embedder.token_refiner.refiner_blocks:
        text_NLD = block(text_NLD, temb_ND, mask)
    return text_NLD


def _mask(seen_NT: torch.Tensor) -> torch.Tensor | None:
    """As attention takes it, N11T; None where all is seen, which one column says."""
    return seen_NT.bool()[:, None, None] if seen_NT.shape[1] > 1 else None


def _block(
    modules: Any, x_NTD: torch.Tensor, text_NLD: torch.Tensor, temb_ND: torch.Tensor, cos_TD: torch.Tensor,
    sin_TD: torch.Tensor, seen_NT: torch.Tensor, grid: torch.Tensor,
) -> Tensors:  # fmt: skip
    """A double or a single block: they take and give the same."""
    x_NTD, text_NLD = modules.block(x_NTD, text_NLD, temb_ND, _mask(seen_NT), (cos_TD, sin_TD))
    return x_NTD.contiguous(), text_NLD.contiguous(), temb_ND, cos_TD, sin_TD, seen_NT, grid


def _out(
    modules: Any, x_NTD: torch.Tensor, _text: Any, temb_ND: torch.Tensor, _cos: Any, _sin: Any, _seen: Any,
    grid: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    made_NTD = modules.proj_out(modules.norm_out(x_NTD, temb_ND))
    frames, height, width = grid.shape
    patches = made_NTD.reshape(len(made_NTD), frames, height, width, -1, 2, 2).permute(0, 4, 1, 2, 5, 3, 6)
    return patches.flatten(5, 6).flatten(3, 4)


# -- miniature --------------------------------------------------------------------------------------------


def _miniature_parts(llama_vocabulary: int, clip_vocabulary: int) -> dict[str, Any]:
    llama = transformers.LlamaConfig(
        vocab_size=llama_vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=LLAMA_HEAD_DIM, rms_norm_eps=1e-5, rope_theta=500000.0, bos_token_id=0,
        eos_token_id=1, pad_token_id=2)  # fmt: skip
    clip = transformers.CLIPTextConfig(
        vocab_size=clip_vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1,
        bos_token_id=0, eos_token_id=2, pad_token_id=1)  # fmt: skip
    models: dict[str, Any] = {
        "transformer": diffusers.HunyuanVideoTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, num_layers=2, num_single_layers=2, num_refiner_layers=1,
            text_embed_dim=32, pooled_projection_dim=16, rope_axes_dim=(4, 6, 6)),
        "vae": diffusers.AutoencoderKLHunyuanVideo(
            block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=8),
        "text_encoder": transformers.LlamaModel(llama),
        "text_encoder_2": transformers.CLIPTextModel(clip),
    }  # fmt: skip
    return {
        **{name: model.to(torch.bfloat16) for name, model in models.items()},
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(**SCHEDULE),
    }
