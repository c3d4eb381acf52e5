"""Chroma, by Lodestone Rock: Flux schnell without guidance, its modulations by one small network.

The double and single blocks are Flux's without modulations of their own: the approximator makes those of all blocks
from the time, and is not trained. There is no pooled text. Of the T5 caption's padding the network sees the first
token alone; T5 sees none. The network predicts noise - x0.

Captions have their own lengths here, as in ComfyUI, so that nothing is masked where they are equally long; diffusers
0.42 pads them to 512 tokens and adds its mask of ones and zeros to the attention scores, which hides nothing. The
layers equal diffusers' transformer, given a boolean mask, bit for bit, and captions with padding within rounding.

Reference: https://huggingface.co/lodestones/Chroma1-HD, and diffusers' ChromaPipeline. Licence of the weights:
Apache-2.0.

Shape legend: as in `flux`; M modulations of all blocks.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..utils.config import option
from ..utils.imports import lazy
from ..utils.weights import Weights, build
from . import flux
from .base import Batch, Encodings, Example, Layer, SampleRequest, Shapes
from .captions import side_by_side
from .components import Component, TextEncoder, width_of
from .files import read_json, write_json
from .flow import FlowConfig, pack
from .flux import COMPONENTS as FLUX
from .flux import Flux, bfl_source, position_ids, read_bfl, to_bfl
from .t5 import write_t5_tokenizer

if TYPE_CHECKING:
    import diffusers
    import torch
    from torch import nn
else:
    diffusers, torch = map(lazy, ("diffusers", "torch"))

SCHEDULE: dict[str, Any] = {"shift": math.exp(1.15), "use_dynamic_shifting": False}
"""As ComfyUI samples it, where no folder says otherwise."""
USUAL_LENGTH = 128
"""Tokens of a caption, for estimates."""


class ChromaConfig(FlowConfig):
    """Chroma, from a diffusers folder, or from a single file with VAE and T5 of Flux."""

    type: Literal["chroma"] = "chroma"
    diffusers_path: str | None = option(
        None,
        "Folder of Chroma in diffusers layout, or of Flux for VAE and T5. What a path below names is taken from there "
        "instead.",
        picker="diffusers",
    )
    transformer_path: str | None = option(
        None, "Transformer as a single file, such as Chroma1-HD.safetensors.", picker="diffusion_models"
    )
    vae_path: str | None = option(None, "VAE as a single file, such as ae.safetensors.", picker="vae")
    t5_path: str | None = option(
        None, "T5-XXL text encoder as a single file, such as t5xxl_fp16.safetensors.", picker="text_encoders"
    )
    t5_tokenizer_path: str | None = option(
        None, "Folder of the T5 tokenizer, if it is in neither the diffusers folder nor ComfyUI.", advanced=True
    )
    max_sequence_length: int = option(512, "T5 tokens per caption; longer captions are cut.", ge=1, le=512,
                                      advanced=True)  # fmt: skip


class Chroma(Flux):
    """Chroma in the hands of the trainer."""

    title = "Chroma"
    Config = ChromaConfig  # type: ignore[assignment]
    config: ChromaConfig  # type: ignore[assignment]
    whole = "a Chroma folder in diffusers layout"
    max_controls = 0
    text_encoders = ("t5",)
    adapter_blocks = ("ChromaTransformerBlock", "ChromaSingleTransformerBlock")
    high_precision = ("^distilled_guidance_layer", "^context_embedder", "^x_embedder", "^proj_out")
    components: ClassVar[Mapping[str, Component]] = {
        "transformer": replace(
            FLUX["transformer"],
            title="a Chroma transformer, such as Chroma1-HD.safetensors",
            class_name="ChromaTransformer2DModel",
            markers=("double_blocks.0.img_attn.qkv.weight", "distilled_guidance_layer.in_proj.weight"),
        ),
        "vae": FLUX["vae"],
        "t5": replace(FLUX["t5"], folder="text_encoder", tokenizer_folder="tokenizer"),
    }

    # -- files ------------------------------------------------------------------------------------

    def check_files(self) -> None:
        parts = {name: self._weights(name) for name in self.components}
        self._tokenizer_folder("t5")
        transformer, is_single = parts["transformer"], not parts["transformer"].path.is_dir()

        def shape(name: str) -> tuple[int, ...]:
            return transformer.shape(source_of(name)[0] if is_single else name)

        channels = parts["vae"].shape("decoder.conv_in.weight")[1]
        self._check_widths(
            parts,
            {
                "vae": (channels, shape("proj_out.weight")[0] // 4),
                "t5": (width_of(parts["t5"]), shape("context_embedder.weight")[1]),
            },
        )

    def _component(self, name: str) -> Component:
        """In a folder of Flux T5 is the second text encoder."""
        part = self.components[name]
        if name == "t5" and self.config.diffusers_path:
            root = Path(self.config.diffusers_path).expanduser()
            if (root / FLUX["t5"].folder).is_dir():
                return FLUX["t5"]
        return part

    def identity(self, part: str) -> str:
        """Captions with the padding that is kept."""
        identity = json.loads(super().identity(part))
        return json.dumps(identity | {"padding": "1"} if part in self.text_encoders else identity)

    # -- encoding, once per sample, cached ----------------------------------------------------------

    def encode_text(self, name: str, encoder: TextEncoder, captions: Sequence[str]) -> Encodings:
        """With the first token of the padding, where a caption leaves room for one."""
        tokens = encoder.tokenizer(
            list(captions), padding="max_length", max_length=self.config.max_sequence_length, truncation=True,
            return_tensors="pt",
        )  # fmt: skip
        ids_NL, mask_NL = (value.to(encoder.model.device) for value in (tokens.input_ids, tokens.attention_mask))
        with torch.no_grad():
            states_NLD = encoder.model(ids_NL, attention_mask=mask_NL).last_hidden_state.to(self.dtype)
        lengths = mask_NL.sum(1).tolist()
        return {"t5_embeds": [states_LD[: length + 1] for states_LD, length in zip(states_NLD, lengths, strict=True)]}

    # -- training -----------------------------------------------------------------------------------

    def learning_rates(self) -> dict[str, float]:
        """The approximator stands for modulations that were distilled into it; it is never trained."""
        return {"^distilled_guidance_layer": 0.0}

    def build_denoiser(self) -> nn.Module:
        weights = self._weights("transformer")
        is_folder = weights.path.is_dir()
        config = read_json(weights.path / "config.json") if is_folder else transformer_config(weights)
        return build(lambda: diffusers.ChromaTransformer2DModel.from_config(config))

    def denoiser_reader(self) -> Callable[[str], torch.Tensor]:
        weights = self._weights("transformer")
        return weights.read if weights.path.is_dir() else partial(read_bfl, weights, source_of=source_of)

    def layers(self, denoiser: Any) -> list[Layer]:
        """As `Family.layers`; the denoiser's attention is given its masked form, which pipelines run as well."""
        from .flux_attention import MaskedFluxAttention

        denoiser.set_attn_processor(MaskedFluxAttention())
        embedders = ("x_embedder", "time_text_embed", "distilled_guidance_layer", "context_embedder", "pos_embed")
        layers = [Layer("embed", _embed, {name: getattr(denoiser, name) for name in embedders})]
        doubles, singles = denoiser.transformer_blocks, denoiser.single_transformer_blocks
        image = 3 * len(singles)  # their modulations come first, then those of image and text of the double blocks
        text = image + 6 * len(doubles)
        for index, block in enumerate(doubles):
            run = partial(_double, image=image + 6 * index, text=text + 6 * index)
            layers.append(Layer(f"transformer_blocks.{index}", run, {"block": block}, is_block=True))
        for index, block in enumerate(singles):
            run = partial(_single, first=3 * index)
            layers.append(Layer(f"single_transformer_blocks.{index}", run, {"block": block}, is_block=True))
        layers.append(Layer("out", _out, {"norm_out": denoiser.norm_out, "proj_out": denoiser.proj_out}))
        return layers

    def collate(self, examples: Sequence[Example]) -> Batch:
        x_t_NCHW, t_N, velocity_NCHW = self.noised(examples)
        # The network is told the time as the pipeline rounds it: t * 1000 in the latents' precision.
        told_N = ((t_N * 1000).to(self.dtype) / 1000).float()
        text_NLD, seen_NL = side_by_side([example.text["t5_embeds"].to(self.dtype) for example in examples])
        target_NTD = pack(velocity_NCHW)
        return Batch(
            inputs=(x_t_NCHW.to(self.dtype), told_N, text_NLD, seen_NL),
            target=target_NTD,
            weight=self.time_weight(t_N, target_NTD),
        )

    def cached_shapes(self, latent_size: tuple[int, int, int]) -> tuple[Shapes, Shapes]:
        config: Any = self.build_denoiser().config
        text = {"t5_embeds": (min(USUAL_LENGTH, self.config.max_sequence_length), config.joint_attention_dim)}
        return {"latents": (config.in_channels // 4, *latent_size[1:])}, text

    # -- results ------------------------------------------------------------------------------------

    def comfyui_rows(self, module_name: str, scale: torch.Tensor) -> torch.Tensor:
        return scale

    def comfyui_tensors(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return to_bfl(tensors, source_of)

    def pipeline(self, denoiser: Any, device: torch.device, text_encoders: bool = True) -> Any:
        t5 = self.load_text_encoder("t5", device) if text_encoders else TextEncoder(None, None)
        schedule = self._schedule(SCHEDULE)
        self.layers(denoiser)  # for its attention
        return diffusers.ChromaPipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler.from_config(schedule),
            vae=self.load_vae(device),
            text_encoder=t5.model,
            tokenizer=t5.tokenizer,
            transformer=denoiser,
        )

    def prompt_arguments(self, request: SampleRequest, device: torch.device) -> dict[str, Any]:
        arguments: dict[str, Any] = {}
        for prefix, text in (("", request.text), ("negative_", request.negative_text)):
            embeds_NLD = arguments[f"{prefix}prompt_embeds"] = text["t5_embeds"][None].to(device)
            mask_NL = torch.ones(embeds_NLD.shape[:2], dtype=torch.bool, device=device)
            arguments[f"{prefix}prompt_attention_mask"] = mask_NL
        return arguments

    @classmethod
    def write_miniature(cls, folder: Path) -> dict[str, Any]:  # type: ignore[override]
        vocabulary = write_t5_tokenizer(folder / "tokenizer")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            parts = flux.miniature_parts(True, 3, vocabulary)
            parts["transformer"] = diffusers.ChromaTransformer2DModel(
                in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
                joint_attention_dim=32, axes_dims_rope=(4, 6, 6), approximator_hidden_dim=32,
                approximator_layers=2).to(torch.bfloat16)  # fmt: skip
        parts["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler(**SCHEDULE)
        parts["text_encoder"] = parts.pop("text_encoder_2")
        index: dict[str, Any] = {"_class_name": "ChromaPipeline", "_diffusers_version": diffusers.__version__}
        for name, part in parts.items():
            part.save_pretrained(folder / name)
            index[name] = [type(part).__module__.split(".")[0], type(part).__name__]
        index["tokenizer"] = ["transformers", "T5TokenizerFast"]
        write_json(folder / "model_index.json", index)
        return {"type": "chroma", "diffusers_path": str(folder), "dtype": "float32", "max_sequence_length": 32}


# -- links of the chain ---------------------------------------------------------------------------------

Tensors = tuple["torch.Tensor", ...]


def _embed(
    modules: Any, x_t_NCHW: torch.Tensor, t_N: torch.Tensor, text_NLD: torch.Tensor, seen_NL: torch.Tensor
) -> Tensors:
    x_NTD = modules.x_embedder(pack(x_t_NCHW))
    modulations_NMD = modules.distilled_guidance_layer(_times(modules.time_text_embed, t_N.to(x_NTD.dtype) * 1000))
    height, width = x_t_NCHW.shape[2] // 2, x_t_NCHW.shape[3] // 2
    cos, sin = modules.pos_embed(position_ids(text_NLD.shape[1], height, width, x_NTD.device))
    seen_NT = torch.cat([seen_NL, seen_NL.new_ones(x_NTD.shape[:2])], dim=1) if seen_NL.shape[1] > 1 else seen_NL
    return x_NTD, modules.context_embedder(text_NLD), modulations_NMD, cos.contiguous(), sin.contiguous(), seen_NT


def _times(embedder: Any, time_N: torch.Tensor) -> torch.Tensor:
    """As ``embedder(time_N)``, which would copy guidance, always 0, from the CPU."""
    zero_N = torch.zeros_like(time_N, dtype=torch.int64)
    parts = [projection.to(time_N.dtype) for projection in
             (embedder.time_proj(time_N), embedder.guidance_proj(zero_N))]  # fmt: skip
    places_NMD = embedder.mod_proj.to(time_N).repeat(len(time_N), 1, 1)
    told_NMD = torch.cat(parts, dim=1).unsqueeze(1).repeat(1, places_NMD.shape[1], 1)
    return torch.cat([told_NMD, places_NMD], dim=-1)


def _mask(seen_NT: torch.Tensor) -> torch.Tensor | None:
    """None where all is seen, which one column says."""
    return seen_NT.bool() if seen_NT.shape[1] > 1 else None


def _double(
    modules: Any, x_NTD: torch.Tensor, text_NLD: torch.Tensor, modulations_NMD: torch.Tensor, cos: torch.Tensor,
    sin: torch.Tensor, seen_NT: torch.Tensor, *, image: int, text: int,
) -> Tensors:  # fmt: skip
    mine_NMD = torch.cat([modulations_NMD[:, image : image + 6], modulations_NMD[:, text : text + 6]], dim=1)
    text_NLD, x_NTD = modules.block(x_NTD, text_NLD, mine_NMD, (cos, sin), _mask(seen_NT))
    return x_NTD.contiguous(), text_NLD.contiguous(), modulations_NMD, cos, sin, seen_NT


def _single(
    modules: Any, x_NTD: torch.Tensor, text_NLD: torch.Tensor, modulations_NMD: torch.Tensor, cos: torch.Tensor,
    sin: torch.Tensor, seen_NT: torch.Tensor, *, first: int,
) -> Tensors:  # fmt: skip
    joined_NTD = torch.cat([text_NLD, x_NTD], dim=1)
    joined_NTD = modules.block(joined_NTD, modulations_NMD[:, first : first + 3], (cos, sin), _mask(seen_NT))
    text_NLD, x_NTD = joined_NTD.split([text_NLD.shape[1], x_NTD.shape[1]], dim=1)
    return x_NTD.contiguous(), text_NLD.contiguous(), modulations_NMD, cos, sin, seen_NT


def _out(
    modules: Any, x_NTD: torch.Tensor, _text: Any, modulations_NMD: torch.Tensor, _cos: Any, _sin: Any, _seen: Any
) -> torch.Tensor:
    prediction: torch.Tensor = modules.proj_out(modules.norm_out(x_NTD, modulations_NMD[:, -2:]))
    return prediction


# -- the transformer in its original layout ---------------------------------------------------------------


def source_of(name: str) -> tuple[str, str]:
    """As `flux.bfl_source`, for diffusers' transformer of Chroma."""
    if not name.startswith("distilled_guidance_layer."):
        return bfl_source(name)
    name = name.replace(".linear_1.", ".in_layer.").replace(".linear_2.", ".out_layer.")
    return re.sub(r"(\.norms\.\d+)\.weight$", r"\1.scale", name), ""


def transformer_config(weights: Weights) -> dict[str, Any]:
    """Arguments of ChromaTransformer2DModel for a file in the original layout, from names and shapes."""
    hidden, channels = weights.shape("distilled_guidance_layer.in_proj.weight")
    return {
        **flux.block_config(weights),
        "approximator_num_channels": channels,
        "approximator_hidden_dim": hidden,
        "approximator_layers": weights.count("distilled_guidance_layer.layers."),
    }
