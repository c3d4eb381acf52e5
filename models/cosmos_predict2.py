"""Cosmos-Predict2 text to image, by NVIDIA, with 2 or 14 billion weights.

A transformer over 2x2 patches of the latents of Wan 2.1's VAE, with one channel beside them that says where a picture
is padded: nowhere. T5 1.0 (t5-11b) comes in through cross-attention, 512 tokens that are zeros after the caption's
end and are seen as such; nothing is masked. Blocks are modulated by the time through narrow layers of their own and
one that all share. The pipeline calls noise by sigma; with t = sigma / (sigma + 1) what the network is given is
t * noise + (1 - t) * x0, it is told t, and what it predicts is noise - x0: rectified flow, and trained as such.

Reference: https://github.com/nvidia-cosmos/cosmos-predict2, and diffusers' Cosmos2TextToImagePipeline, whose
transformer the layers here equal bit for bit. Licence of the weights: NVIDIA Open Model License, for the sake of which
that pipeline draws with NVIDIA's guardrail alone; previews need its package, training does not.

Shape legend: N batch, C latent channels, H W height and width of the latents, T picture tokens (H/2 * W/2), L text
tokens, D features. Angles are YXD: rows and columns of tokens, features of a head.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import model_validator

from ..utils.config import SettingsError, option
from ..utils.imports import lazy
from ..utils.weights import Weights, build
from .base import Batch, Encodings, Example, Layer, SampleRequest, Shapes
from .captions import filled_up
from .components import OLD_T5_XXL, Component, FromComponents, TextEncoder, width_of
from .files import fingerprint, read_json, write_json
from .flow import FlowConfig, FlowFamily
from .t5 import load_t5, write_t5_tokenizer
from .wan_files import PARTS, Source, open_part
from .wan_vae import encode_normalised, load_wan_vae

if TYPE_CHECKING:
    import diffusers
    import torch
    import transformers
    from diffusers.utils import import_utils
    from torch import nn
else:
    diffusers, torch, transformers = map(lazy, ("diffusers", "torch", "transformers"))
    import_utils = lazy("diffusers.utils.import_utils")

TEXT_LENGTH = 512
"""Text tokens that the transformer sees; shorter captions are filled up with zeros."""
SCHEDULE: dict[str, Any] = {"use_karras_sigmas": True}
"""From sigma 80 down to 0.002, as the pipeline says."""
LARGE = (0.9 * 1024 / 8) ** 2
"""Latents (height times width) of pictures from which on the loss at half the size counts."""


FOLDER = "Folder of the whole model in diffusers layout. What a path above names is taken from there instead."
T5_TOKENIZER = "Folder of the T5 tokenizer, if it is in neither the diffusers folder nor ComfyUI."


def rate_option(what: str) -> Any:
    """Declares the learning rate of a group of parameters."""
    return option(
        None,
        f"Learning rate of {what}; 0 freezes it. Left out: that of the optimizer.",
        ge=0,
        le=1,
        step=1e-8,
        ui_off=-1,
        advanced=True,
    )


class Predict2Config(FlowConfig):
    """What the ``[model]`` tables of Cosmos-Predict2 and of Anima have."""

    transformer_path: str | None = option(
        None,
        "Transformer as a single file, such as cosmos_predict2_2B_t2i.safetensors or anima-base-v1.0.safetensors.",
        picker="diffusion_models",
    )
    vae_path: str | None = option(
        None, "VAE as a single file: wan_2.1_vae.safetensors, or qwen_image_vae.safetensors for Anima.", picker="vae"
    )
    cache_text_embeddings: bool = option(
        True,
        "Kept for older files. Captions are always encoded once, before training, so that the text encoder takes no "
        "memory while training.",
        advanced=True,
    )
    text_encoder_nf4: bool = option(False, "Hold the text encoder in 4 bits.", advanced=True)
    text_encoder_fp8: bool = option(False, "Hold the text encoder in float8.", advanced=True)
    multiscale_loss_weight: float = option(
        0.0,
        "Weight of an added loss at half the size, for pictures of about 922x922 pixels and more.",
        ge=0,
        step=0.01,
        advanced=True,
    )
    self_attn_lr: float | None = rate_option("self-attention")
    cross_attn_lr: float | None = rate_option("cross-attention")
    mlp_lr: float | None = rate_option("the MLPs")
    mod_lr: float | None = rate_option("the modulation")

    @model_validator(mode="after")
    def _one_storage(self) -> Predict2Config:
        if self.text_encoder_nf4 and self.text_encoder_fp8:
            raise ValueError("model.text_encoder_nf4: give this or text_encoder_fp8, one of the two")
        return self


class CosmosPredict2Config(Predict2Config):
    """Cosmos-Predict2, text to image, from single files as ComfyUI has them, from a diffusers folder, or from both."""

    unused: ClassVar = {
        **Predict2Config.unused,
        "llm_path": "Cosmos-Predict2 reads text with T5; for Anima write type = 'anima'",
        "llm_adapter_path": "Anima alone has such an adapter; for it write type = 'anima'",
        "llm_adapter_lr": "Anima alone has such an adapter; for it write type = 'anima'",
    }

    type: Literal["cosmos_predict2"] = "cosmos_predict2"
    t5_path: str | None = option(
        None, "T5-XXL of version 1.0 as a single file, such as oldt5_xxl_fp16.safetensors.", picker="text_encoders"
    )
    diffusers_path: str | None = option(None, FOLDER, picker="diffusers")
    t5_tokenizer_path: str | None = option(None, T5_TOKENIZER, advanced=True)


TRANSFORMER = Component(
    "a Cosmos-Predict2 text-to-image transformer, such as cosmos_predict2_2B_t2i.safetensors", "transformer_path",
    "transformer", "CosmosTransformer3DModel",
    ("blocks.0.mlp.layer1.weight", "blocks.0.adaln_modulation_cross_attn.1.weight", "x_embedder.proj.1.weight"),
    ("net.", "model.diffusion_model.", "diffusion_model."), ("llm_adapter.out_proj.weight",))  # fmt: skip
COMPONENTS = {
    "transformer": TRANSFORMER,
    "vae": Component(PARTS["vae"].title, "vae_path", "vae", "AutoencoderKL", (), ()),
    "t5": OLD_T5_XXL,
}


class CosmosPredict2(FromComponents, FlowFamily):
    """Cosmos-Predict2 in the hands of the trainer."""

    title = "Cosmos-Predict2"
    Config = CosmosPredict2Config
    config: Predict2Config
    components: ClassVar[Mapping[str, Component]] = COMPONENTS
    whole = "a Cosmos-Predict2 Text2Image folder in diffusers layout"
    published = "Cosmos-Predict2-2B-Text2Image"
    size_multiple = 16
    text_encoders = ("t5",)
    shared_inputs: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
        ("attn2.to_k", "attn2.to_v"),
    )
    adapter_blocks: ClassVar[tuple[str, ...]] = ("CosmosTransformerBlock",)
    says_alpha = False
    high_precision: ClassVar[tuple[str, ...]] = ("^patch_embed", "^time_embed", "^norm_out", "^proj_out")

    @property
    def text_dtype(self) -> str | None:
        config = self.config
        given = "nf4" if config.text_encoder_nf4 else "float8" if config.text_encoder_fp8 else None
        return config.text_encoder_dtype or given

    # -- files ------------------------------------------------------------------------------------

    def check_files(self) -> None:
        parts = {name: self._weights(name) for name in self.components}
        self._check_network()
        self._tokenizer_folder("t5")
        widths = {"vae": (self._vae_channels, self._network["in_channels"])}
        self._check_widths(parts, widths | {"t5": (width_of(parts["t5"]), self._network["text_embed_dim"])})

    def _check_network(self) -> None:
        """That it is one of the text-to-image models, and has a precision that it computes in."""
        network, weights = self._network, self._weights("transformer")
        if network["in_channels"] != network["out_channels"] or any(network.get(name) for name in FOREIGN):
            raise SettingsError(
                f"{weights.option}: '{weights.path}' is another Cosmos model, which cannot be trained; give "
                f"{self.components['transformer'].title}"
            )
        if self.config.dtype == "float16":
            raise SettingsError(
                "model.dtype: float16 cannot hold the large values between this model's blocks; give bfloat16"
            )

    def _weights(self, name: str) -> Weights:
        return self._vae_source.weights if name == "vae" else super()._weights(name)

    @cached_property
    def _vae_source(self) -> Source:
        return open_part(PARTS["vae"], *self._place("vae"))

    @property
    def _vae_channels(self) -> int:
        source = self._vae_source
        return source.weights.shape("conv2.weight" if source.original else "post_quant_conv.weight")[0]

    @cached_property
    def _network(self) -> dict[str, Any]:
        """Arguments of CosmosTransformer3DModel."""
        weights = self._weights("transformer")
        if weights.path.is_dir():
            return {"out_channels": 16, **read_json(weights.path / "config.json")}
        return transformer_config(weights)

    def identity(self, part: str) -> str:
        identity = {"weights": fingerprint(self._place(part)[0]), "dtype": self.config.dtype}
        if part in self.text_encoders:
            identity["tokenizer"] = fingerprint(self._tokenizer_folder(part))
            identity["storage"] = self.text_dtype or ""
        return json.dumps(identity)

    # -- encoding, once per sample, cached ----------------------------------------------------------

    def load_vae(self, device: torch.device) -> nn.Module:
        vae: nn.Module = load_wan_vae(self._vae_source, self.dtype, device).eval()
        return vae

    def encode_media(
        self, vae: Any, pixels_NCFHW: torch.Tensor, generators: Sequence[torch.Generator]
    ) -> dict[str, torch.Tensor]:
        return {"latents": encode_normalised(vae, pixels_NCFHW.to(self.dtype), self.dtype).squeeze(2)}

    def load_text_encoder(self, name: str, device: torch.device) -> TextEncoder:
        tokenizer = transformers.T5TokenizerFast.from_pretrained(  # type: ignore[attr-defined]
            self._tokenizer_folder(name)
        )
        return TextEncoder(tokenizer, load_t5(self, self._weights(name), device))

    def encode_text(self, name: str, encoder: TextEncoder, captions: Sequence[str]) -> Encodings:
        """As `Family.encode_text`; embeddings are as long as their caption."""
        tokens = encoder.tokenizer(
            list(captions), padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
        )
        ids_NL, seen_NL = (value.to(encoder.model.device) for value in (tokens.input_ids, tokens.attention_mask))
        with torch.no_grad():
            states_NLD = encoder.model(ids_NL, attention_mask=seen_NL.bool()).last_hidden_state.to(self.dtype)
        lengths = seen_NL.sum(1).tolist()
        return {"t5_embeds": [states_LD[:length] for states_LD, length in zip(states_NLD, lengths, strict=True)]}

    # -- training -----------------------------------------------------------------------------------

    def learning_rates(self) -> dict[str, float]:
        config = self.config
        rates = {
            r"^transformer_blocks\.\d+\.attn1\.": config.self_attn_lr,
            r"^transformer_blocks\.\d+\.attn2\.": config.cross_attn_lr,
            r"^transformer_blocks\.\d+\.ff\.": config.mlp_lr,
            r"^(transformer_blocks\.\d+\.norm\d|norm_out)\.": config.mod_lr,
        }
        return {pattern: rate for pattern, rate in rates.items() if rate is not None}

    def build_denoiser(self) -> nn.Module:
        from .cosmos_predict2_attention import make_network

        return build(lambda: make_network(self._network))

    def denoiser_reader(self) -> Callable[[str], torch.Tensor]:
        weights = self._weights("transformer")
        return weights.read if weights.path.is_dir() else lambda name: weights.read(original_name(name))

    def layers(self, denoiser: Any) -> list[Layer]:
        return chain(denoiser, self.config.multiscale_loss_weight > 0)

    def collate(self, examples: Sequence[Example]) -> Batch:
        x_t_NCHW, t_N, velocity_NCHW = self.noised(examples)
        target, weight = velocity_NCHW, self.time_weight(t_N, velocity_NCHW)
        if self.config.multiscale_loss_weight and is_large(velocity_NCHW):
            target = with_half(velocity_NCHW)
            # the mean over all elements becomes the sum of the means over either size
            share = velocity_NCHW[0].numel() / target.shape[1]
            each = torch.full_like(target[:1], self.config.multiscale_loss_weight / (1 - share))
            each[:, : velocity_NCHW[0].numel()] = 1 / share
            weight = weight.flatten(1) * each
        inputs = x_t_NCHW.to(self.dtype), self._told(t_N), *self._text_inputs(examples)
        return Batch(inputs, target, weight)

    def _told(self, t_N: torch.Tensor) -> torch.Tensor:
        """The time as the pipeline rounds it, before the network is told it."""
        return t_N.to(self.dtype).float()

    def _text_inputs(self, examples: Sequence[Example]) -> tuple[torch.Tensor, ...]:
        return (filled_up([example.text["t5_embeds"].to(self.dtype) for example in examples], TEXT_LENGTH),)

    def cached_shapes(self, latent_size: tuple[int, int, int]) -> tuple[Shapes, Shapes]:
        text = {"t5_embeds": (TEXT_LENGTH, self._network["text_embed_dim"])}
        return {"latents": (self._network["in_channels"], *latent_size[1:])}, text

    def spread_mask(self, mask_NFHW: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if target.ndim == 4:
            return mask_NFHW
        return with_half(mask_NFHW.expand(-1, self._network["out_channels"], -1, -1))

    # -- results ------------------------------------------------------------------------------------

    @property
    def missing_for_samples(self) -> str:
        if import_utils.is_cosmos_guardrail_available():
            return ""
        return (
            "diffusers draws with Cosmos-Predict2 only beside NVIDIA's guardrail, as the model's licence asks; install "
            "the package cosmos_guardrail, or leave sample.prompts out"
        )

    def lora_keys(self, module_name: str) -> str:
        return f"diffusion_model.{original_name(module_name)}"

    def comfyui_tensors(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {f"net.{original_name(name)}": tensor for name, tensor in tensors.items()}

    def pipeline(self, denoiser: Any, device: torch.device, text_encoders: bool = True) -> Any:
        t5 = self.load_text_encoder("t5", device) if text_encoders else TextEncoder(None, None)
        return diffusers.Cosmos2TextToImagePipeline(
            text_encoder=t5.model,
            tokenizer=t5.tokenizer,
            transformer=denoiser,
            vae=self.load_vae(device),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler.from_config(self._schedule(SCHEDULE)),
        )

    def prompt_arguments(self, request: SampleRequest, device: torch.device) -> dict[str, Any]:
        return {
            f"{prefix}prompt_embeds": filled_up([text["t5_embeds"]], TEXT_LENGTH).to(device)
            for prefix, text in (("", request.text), ("negative_", request.negative_text))
        }

    @classmethod
    def write_miniature(cls, folder: Path) -> dict[str, Any]:
        vocabulary = write_t5_tokenizer(folder / "tokenizer")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            parts = _miniature_parts(vocabulary)
        index: dict[str, Any] = {
            "_class_name": "Cosmos2TextToImagePipeline",
            "_diffusers_version": diffusers.__version__,
            "tokenizer": ["transformers", "T5TokenizerFast"],
            "safety_checker": [None, None],
        }
        for name, part in parts.items():
            part.save_pretrained(folder / name)
            index[name] = [type(part).__module__.split(".")[0], type(part).__name__]
        write_json(folder / "model_index.json", index)
        return {"type": "cosmos_predict2", "diffusers_path": str(folder), "dtype": "float32"}


# -- links of the chain ---------------------------------------------------------------------------------

Tensors = tuple["torch.Tensor", ...]


def chain(network: Any, halves: bool = False) -> list[Layer]:
    """The links that compute ``network``.

    Args:
        halves: The prediction for a large picture has behind it the same at half the size.
    """
    modules = {name: getattr(network, name) for name in ("patch_embed", "time_embed", "rope")}
    layers = [Layer("embed", _embed, modules)]
    for index, block in enumerate(network.transformer_blocks):
        layers.append(Layer(f"transformer_blocks.{index}", _block, {"block": block}, is_block=True))
    modules = {"norm_out": network.norm_out, "proj_out": network.proj_out}
    return [*layers, Layer("out", partial(_out, halves=halves), modules)]


def _embed(modules: Any, x_t_NCHW: torch.Tensor, told_N: torch.Tensor, text_NLD: torch.Tensor) -> Tensors:
    """Also of the time what each block works on, and what all add to that; and the angles of the rotation."""
    x_NCFHW = torch.nn.functional.pad(x_t_NCHW, (0, 0, 0, 0, 0, 1)).unsqueeze(2)  # where it is padded: nowhere
    height, width = (side // 2 for side in x_t_NCHW.shape[2:])
    cos, sin = (angles.view(height, width, -1) for angles in modules.rope(x_NCFHW))
    x_NTD = modules.patch_embed(x_NCFHW).flatten(1, 3)
    shared_ND, time_ND = modules.time_embed(x_NTD, told_N)
    return x_NTD, text_NLD, time_ND, shared_ND, cos, sin


def _block(
    modules: Any, x_NTD: torch.Tensor, text_NLD: torch.Tensor, time_ND: torch.Tensor, shared_ND: torch.Tensor,
    cos_YXD: torch.Tensor, sin_YXD: torch.Tensor,
) -> Tensors:  # fmt: skip
    angles = cos_YXD.flatten(0, 1), sin_YXD.flatten(0, 1)
    x_NTD = modules.block(x_NTD, text_NLD, time_ND, shared_ND, angles)
    return x_NTD.contiguous(), text_NLD, time_ND, shared_ND, cos_YXD, sin_YXD


def _out(
    modules: Any, x_NTD: torch.Tensor, _text: Any, time_ND: torch.Tensor, shared_ND: torch.Tensor,
    cos_YXD: torch.Tensor, _sin: Any, *, halves: bool,
) -> torch.Tensor:  # fmt: skip
    patches_NTK = modules.proj_out(modules.norm_out(x_NTD, time_ND, shared_ND))
    (n, _, k), (height, width, _) = patches_NTK.shape, cos_YXD.shape
    # unlike in the patches that come in, channels are last in these
    x_NCYpXq = patches_NTK.view(n, height, width, 2, 2, k // 4).permute(0, 5, 1, 3, 2, 4)
    x_NCHW = x_NCYpXq.reshape(n, k // 4, 2 * height, 2 * width)
    return with_half(x_NCHW) if halves and is_large(x_NCHW) else x_NCHW


def is_large(x_NCHW: torch.Tensor) -> bool:
    """Whether the loss at half the size counts for it."""
    return x_NCHW.shape[2] * x_NCHW.shape[3] >= LARGE


def with_half(x_NCHW: torch.Tensor) -> torch.Tensor:
    """All elements, and behind them those at half the size, as means of four: N rows."""
    return torch.cat([x_NCHW.flatten(1), torch.nn.functional.avg_pool2d(x_NCHW, 2).flatten(1)], dim=1)


# -- the single files -------------------------------------------------------------------------------------

FOREIGN = ("extra_pos_embed_type", "use_crossattn_projection", "controlnet_block_every_n", "img_context_dim_in")
"""Arguments of CosmosTransformer3DModel that these models do without."""
RENAMED = {
    "time_embed.t_embedder.": "t_embedder.1.", "time_embed.norm.": "t_embedding_norm.",
    "patch_embed.proj.": "x_embedder.proj.1.", "transformer_blocks.": "blocks.",
    "norm_out.linear_": "final_layer.adaln_modulation.", "proj_out.": "final_layer.linear.",
    ".norm1.linear_": ".adaln_modulation_self_attn.", ".norm2.linear_": ".adaln_modulation_cross_attn.",
    ".norm3.linear_": ".adaln_modulation_mlp.", ".attn1.": ".self_attn.", ".attn2.": ".cross_attn.",
    ".to_out.0.": ".output_proj.", ".norm_q.": ".q_norm.", ".norm_k.": ".k_norm.",
    ".ff.net.0.proj.": ".mlp.layer1.", ".ff.net.2.": ".mlp.layer2.",
}  # fmt: skip
"""Parts of names in diffusers' transformer, and in NVIDIA's."""


def original_name(name: str) -> str:
    """Where a parameter or module of diffusers' transformer lies in NVIDIA's."""
    name = f"{name}."
    for ours, theirs in RENAMED.items():
        name = name.replace(ours, theirs)
    return re.sub(r"\.to_([qkv])\.", r".\1_proj.", name).removesuffix(".")


def transformer_config(weights: Weights) -> dict[str, Any]:
    """Arguments of CosmosTransformer3DModel for a single file, from names and shapes."""
    dim, patch = weights.shape("x_embedder.proj.1.weight")
    head_dim = weights.shape("blocks.0.self_attn.q_norm.weight")[0]
    return {
        "in_channels": patch // 4 - 1,
        "out_channels": weights.shape("final_layer.linear.weight")[0] // 4,
        "num_attention_heads": dim // head_dim,
        "attention_head_dim": head_dim,
        "num_layers": weights.count("blocks."),
        "mlp_ratio": weights.shape("blocks.0.mlp.layer1.weight")[0] / dim,
        "text_embed_dim": weights.shape("blocks.0.cross_attn.k_proj.weight")[1],
        "adaln_lora_dim": weights.shape("blocks.0.adaln_modulation_mlp.1.weight")[0],
        "rope_scale": (1.0, 4.0, 4.0),
        "extra_pos_embed_type": None,
    }


# -- miniature --------------------------------------------------------------------------------------------


def miniature_network(text_width: int) -> Any:
    """A small transformer of this kind."""
    return diffusers.CosmosTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, mlp_ratio=2.0, text_embed_dim=text_width,
        adaln_lora_dim=8, rope_scale=(1.0, 4.0, 4.0), extra_pos_embed_type=None)  # fmt: skip


def miniature_vae() -> Any:
    """A small VAE of Wan 2.1's kind."""
    return diffusers.AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)


def _miniature_parts(vocabulary: int) -> dict[str, Any]:
    t5 = transformers.T5Config(
        vocab_size=vocabulary, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        feed_forward_proj="relu")  # fmt: skip
    models: dict[str, Any] = {
        "transformer": miniature_network(32),
        "vae": miniature_vae(),
        "text_encoder": transformers.T5EncoderModel(t5),
    }
    return {
        **{name: model.to(torch.bfloat16) for name, model in models.items()},
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(**SCHEDULE),
    }
