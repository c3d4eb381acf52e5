"""Stable Diffusion 3 and 3.5, by Stability AI: picture and caption in two streams with joint attention.

A rectified-flow transformer (MMDiT) over 2x2 patches of 16-channel latents, each with a fixed embedding of its place,
which is cropped from the middle of a table in the file. The caption is 77 tokens of CLIP-L's and OpenCLIP bigG's
penultimate states side by side, filled up with zeros to T5's width, then T5-XXL's; the pooled text of both CLIPs and
the time steer the blocks. 3.5 norms queries and keys; in 3.5 medium the first blocks have a second attention of the
picture alone. The last block drops the caption. The network predicts noise - x0.

CLIP-L's pooled text has a projection in diffusers' folder. ComfyUI, Stability AI's reference code and diffusers'
converter take it as it is from a single file, whatever projection lies there, and so does this.

Reference: https://github.com/Stability-AI/sd3.5, and diffusers' StableDiffusion3Pipeline, which the layers here equal
bit for bit where there are no fused kernels. Licence of the weights: Stability AI Community License.

Shape legend: N batch, C latent channels, H W height and width of the latents, T image tokens (H/2 * W/2), L text
tokens, D features.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..utils.config import SettingsError, option
from ..utils.imports import lazy
from ..utils.weights import Weights, build, fill
from . import autoencoder
from .base import Batch, Example, Layer, SampleRequest, Shapes
from .clip import CLIP_LENGTH, chunks, clip_name, projected_config, write_clip_tokenizer
from .components import CLIP_L, FLUX_VAE, T5_XXL, Component, FromComponents, TextEncoder, width_of
from .files import fingerprint, read_json, require_path, write_json
from .flow import FlowConfig, FlowFamily
from .fused import ROWS, swap_halves, to_fused
from .t5 import load_t5, write_t5_tokenizer

if TYPE_CHECKING:
    import diffusers
    import torch
    import transformers
    from torch import nn
else:
    diffusers, torch, transformers = map(lazy, ("diffusers", "torch", "transformers"))

SCHEDULE: dict[str, Any] = {"shift": 3.0, "use_dynamic_shifting": False}
SAMPLE_SIZE = 128
"""Latents across a picture of the usual size."""


class SD3Config(FlowConfig):
    """Stable Diffusion 3 and 3.5, from a diffusers folder, from single files as ComfyUI has them, or from both."""

    type: Literal["sd3"] = "sd3"
    diffusers_path: str | None = option(
        None,
        "Folder of the whole model in diffusers layout. What a path below names is taken from there instead.",
        picker="diffusers",
    )
    checkpoint_path: str | None = option(
        None,
        "The model as a single file, such as sd3.5_large.safetensors. What it lacks, perhaps text encoders, a path "
        "below or the folder gives.",
        picker="checkpoints",
    )
    transformer_path: str | None = option(None, "Transformer as a single file.", picker="diffusion_models")
    vae_path: str | None = option(None, "VAE as a single file.", picker="vae")
    clip_l_path: str | None = option(
        None, "CLIP-L text encoder as a single file, such as clip_l.safetensors.", picker="text_encoders"
    )
    clip_g_path: str | None = option(
        None, "OpenCLIP bigG text encoder as a single file, such as clip_g.safetensors.", picker="text_encoders"
    )
    t5_path: str | None = option(
        None, "T5-XXL text encoder as a single file, such as t5xxl_fp16.safetensors.", picker="text_encoders"
    )
    clip_tokenizer_path: str | None = option(
        None, "Folder of the CLIP tokenizer, if it is in neither the diffusers folder nor ComfyUI.", advanced=True
    )
    t5_tokenizer_path: str | None = option(
        None, "Folder of the T5 tokenizer, if it is in neither the diffusers folder nor ComfyUI.", advanced=True
    )
    max_sequence_length: int = option(
        256, "T5 tokens per caption, beside CLIP's 77; longer captions are cut.", ge=1, le=512, advanced=True
    )


COMPONENTS = {
    "transformer": Component(
        "a Stable Diffusion 3 transformer, such as sd3.5_large.safetensors", "transformer_path", "transformer",
        "SD3Transformer2DModel", ("joint_blocks.0.context_block.attn.qkv.weight", "pos_embed"),
        ("model.diffusion_model.", "diffusion_model.")),
    "vae": replace(FLUX_VAE, title="the VAE of Stable Diffusion 3, such as sd3_vae.safetensors"),
    "clip_l": replace(CLIP_L, option="clip_l_path", class_name="CLIPTextModelWithProjection"),
    "clip_g": replace(
        CLIP_L, title="OpenCLIP bigG, such as clip_g.safetensors", option="clip_g_path", folder="text_encoder_2",
        class_name="CLIPTextModelWithProjection", markers=(*CLIP_L.markers, "text_projection.weight"),
        prefixes=("text_encoders.clip_g.transformer.",), tokenizer_folder="tokenizer_2"),
    "t5": replace(T5_XXL, folder="text_encoder_3", tokenizer_folder="tokenizer_3"),
}  # fmt: skip


class SD3(FromComponents, FlowFamily):
    """Stable Diffusion 3 in the hands of the trainer."""

    title = "Stable Diffusion 3"
    Config = SD3Config
    config: SD3Config
    components = COMPONENTS
    whole = "a Stable Diffusion 3 folder in diffusers layout"
    published = "stable-diffusion-3.5-medium"
    size_multiple = 16
    text_encoders = ("clip_l", "clip_g", "t5")
    shared_inputs = (
        ("attn.to_q", "attn.to_k", "attn.to_v"),
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    )
    adapter_blocks = ("JointTransformerBlock",)
    says_alpha = False  # diffusers refuses a file that does
    high_precision = ("^pos_embed", "^time_text_embed", "^context_embedder", "^norm_out", "^proj_out")

    # -- files ------------------------------------------------------------------------------------

    def _given(self, name: str) -> tuple[str | None, str]:
        """`checkpoint_path` has what no other option names, if it has it."""
        value, setting = super()._given(name)
        if value or not self.config.checkpoint_path:
            return value, setting
        part, checkpoint = self.components[name], "model.checkpoint_path"
        path = require_path(self.config.checkpoint_path, checkpoint, "a checkpoint file of Stable Diffusion 3")
        if path.is_dir():
            raise SettingsError(f"{checkpoint}: '{path}' is a folder; name it in model.diffusers_path")
        tensors = Weights(path, checkpoint)
        if any(prefix + part.markers[0] in tensors for prefix in part.prefixes):
            return str(path), checkpoint
        if not self.config.diffusers_path:
            raise SettingsError(f"{setting}: give {part.title}, or model.diffusers_path; '{path}' has none")
        return None, setting

    def check_files(self) -> None:
        parts = {name: self._weights(name) for name in self.components}
        for name in self.text_encoders:
            self._tokenizer_folder(name)
        network, left, right = self._network, self._clip_config("clip_l"), self._clip_config("clip_g")
        widths = {
            "vae": (parts["vae"].shape("decoder.conv_in.weight")[1], network["in_channels"]),
            "t5": (width_of(parts["t5"]), network["joint_attention_dim"]),
        }
        self._check_widths(parts, widths)
        pooled, taken = left["projection_dim"] + right["projection_dim"], network["pooled_projection_dim"]
        if left["hidden_size"] > right["hidden_size"]:
            raise SettingsError(
                f"{parts['clip_l'].option}: '{parts['clip_l'].path}' is wider than '{parts['clip_g'].path}'; "
                "exchange clip_l_path and clip_g_path"
            )
        if pooled != taken:
            raise SettingsError(
                f"{parts['clip_l'].option}: '{parts['clip_l'].path}' and '{parts['clip_g'].path}' have {pooled} "
                f"features together, but the transformer works with {taken}; give CLIP-L in clip_l_path and OpenCLIP "
                "bigG in clip_g_path"
            )

    def identity(self, part: str) -> str:
        identity = {"weights": fingerprint(self._place(part)[0]), "dtype": self.config.dtype}
        if part in self.text_encoders:
            identity["tokenizer"] = fingerprint(self._tokenizer_folder(part))
            identity["length"] = str(self.config.max_sequence_length if part == "t5" else CLIP_LENGTH)
            if part == "t5" and self.text_dtype:
                identity["storage"] = self.text_dtype
        return json.dumps(identity)

    @cached_property
    def _network(self) -> dict[str, Any]:
        """Arguments of SD3Transformer2DModel."""
        weights = self._weights("transformer")
        return read_json(weights.path / "config.json") if weights.path.is_dir() else transformer_config(weights)

    def _clip_config(self, name: str) -> dict[str, Any]:
        weights = self._weights(name)
        if weights.path.is_dir():
            return read_json(weights.path / "config.json")
        return projected_config(weights, "quick_gelu" if name == "clip_l" else "gelu")

    # -- encoding, once per sample, cached ----------------------------------------------------------

    def load_vae(self, device: torch.device) -> nn.Module:
        return autoencoder.load_autoencoder(
            self._weights("vae"), self.dtype, device, autoencoder.SD3_SCALING, autoencoder.SD3_SHIFT
        )

    def encode_media(
        self, vae: Any, pixels_NCFHW: torch.Tensor, generators: Sequence[torch.Generator]
    ) -> dict[str, torch.Tensor]:
        height, width = pixels_NCFHW.shape[-2:]
        longest = self._network["pos_embed_max_size"] * self.size_multiple
        if max(height, width) > longest:
            raise SettingsError(
                f"dataset: pictures of {width}x{height} are too long for this model, which has places for {longest} "
                "pixels at most each way; choose smaller resolutions or sides that differ less"
            )
        return autoencoder.encode(vae, pixels_NCFHW, generators, self.dtype)

    def load_text_encoder(self, name: str, device: torch.device) -> TextEncoder:
        weights, folder = self._weights(name), self._tokenizer_folder(name)
        if name == "t5":
            tokenizer = transformers.T5TokenizerFast.from_pretrained(folder)  # type: ignore[attr-defined]
            return TextEncoder(tokenizer, load_t5(self, weights, device))
        config: Any = transformers.CLIPTextConfig(**self._clip_config(name))
        model = build(lambda: transformers.CLIPTextModelWithProjection(config))

        def read(tensor: str) -> torch.Tensor:
            if name == "clip_l" and tensor == "text_projection.weight" and not weights.path.is_dir():
                return torch.eye(config.projection_dim, config.hidden_size)
            return weights.read(clip_name(tensor, weights))

        fill(model, read, self.dtype, device)
        return TextEncoder(transformers.CLIPTokenizer.from_pretrained(folder), model.eval())

    def encode_text(self, name: str, encoder: TextEncoder, captions: Sequence[str]) -> dict[str, torch.Tensor]:
        device = encoder.model.device
        if name == "t5":
            tokens = encoder.tokenizer(
                list(captions), padding="max_length", max_length=self.config.max_sequence_length, truncation=True,
                return_tensors="pt",
            )  # fmt: skip
            with torch.no_grad():  # without the attention mask: the model was trained to see the padding
                states = encoder.model(tokens.input_ids.to(device)).last_hidden_state
            return {"t5_embeds": states.to(self.dtype)}
        # CLIP-L's texts are filled up with the end token, bigG's with token 0; the first piece is all that is seen
        pad = encoder.tokenizer.eos_token_id if name == "clip_l" else 0
        ids_NL = torch.stack([pieces[0] for pieces in chunks(encoder.tokenizer, captions, pad)]).to(device)
        with torch.no_grad():
            output = encoder.model(ids_NL, output_hidden_states=True)
        return {
            f"{name}_embeds": output.hidden_states[-2].to(self.dtype),
            f"{name}_pooled": output.text_embeds.to(self.dtype),
        }

    # -- training -----------------------------------------------------------------------------------

    def build_denoiser(self) -> nn.Module:
        """Its table of places is one zero seen many times: diffusers would compute another, which takes gigabytes,
        and `load_denoiser` reads the file's."""
        size = self._network["pos_embed_max_size"]
        config = {**self._network, "pos_embed_max_size": 1}
        denoiser: Any = build(lambda: diffusers.SD3Transformer2DModel.from_config(config))
        denoiser.register_to_config(pos_embed_max_size=size)
        patches = denoiser.pos_embed
        patches.pos_embed_max_size = size
        patches.pos_embed = torch.zeros(1, 1, 1, dtype=self.dtype).expand(1, size**2, patches.pos_embed.shape[2])
        return denoiser

    def denoiser_reader(self) -> Callable[[str], torch.Tensor]:
        weights = self._weights("transformer")
        return weights.read if weights.path.is_dir() else partial(read_original, weights)

    def load_denoiser(
        self,
        device: torch.device,
        denoiser: nn.Module | None = None,
        only: Container[nn.Parameter] | None = None,
        read: Callable[[str], torch.Tensor] | None = None,
    ) -> nn.Module:
        """As `Family.load_denoiser`; with the first link the table of places is read, which is no parameter."""
        network: Any = denoiser or self.build_denoiser()
        read = read or self.denoiser_reader()
        patches = network.pos_embed
        is_first = only is None or patches.proj.weight in only
        table, patches.pos_embed = patches.pos_embed, None
        super().load_denoiser(device, network, only, read)
        if device.type == "meta":
            table = table.to(device)
        elif is_first:
            table = read("pos_embed.pos_embed").to(device, self.dtype, copy=True)
        patches.pos_embed = table
        return network

    def layers(self, denoiser: Any) -> list[Layer]:
        """As `Family.layers`; the denoiser's attention is given its fused form, which pipelines run as well."""
        from .sd3_attention import FusedJointAttention

        denoiser.set_attn_processor(FusedJointAttention())
        embedders = ("pos_embed", "time_text_embed", "context_embedder")
        layers = [Layer("embed", _embed, {name: getattr(denoiser, name) for name in embedders})]
        *blocks, last = denoiser.transformer_blocks
        for index, block in enumerate(blocks):
            layers.append(Layer(f"transformer_blocks.{index}", _block, {"block": block}, is_block=True))
        layers.append(Layer(f"transformer_blocks.{len(blocks)}", _last_block, {"block": last}, is_block=True))
        layers.append(Layer("out", _out, {"norm_out": denoiser.norm_out, "proj_out": denoiser.proj_out}))
        return layers

    def collate(self, examples: Sequence[Example]) -> Batch:
        x_t_NCHW, t_N, velocity_NCHW = self.noised(examples)
        texts = [joined_text(example.text) for example in examples]
        text_NLD, pooled_ND = (torch.stack(values).to(self.dtype) for values in zip(*texts, strict=True))
        return Batch(
            inputs=(x_t_NCHW.to(self.dtype), t_N * 1000, text_NLD, pooled_ND),
            target=velocity_NCHW,
            weight=self.time_weight(t_N, velocity_NCHW),
        )

    def cached_shapes(self, latent_size: tuple[int, int, int]) -> tuple[Shapes, Shapes]:
        text: dict[str, tuple[int, ...]] = {}
        for name in ("clip_l", "clip_g"):
            config = self._clip_config(name)
            text[f"{name}_embeds"] = (CLIP_LENGTH, config["hidden_size"])
            text[f"{name}_pooled"] = (config["projection_dim"],)
        text["t5_embeds"] = (self.config.max_sequence_length, self._network["joint_attention_dim"])
        return {"latents": (self._network["in_channels"], *latent_size[1:])}, text

    # -- results ------------------------------------------------------------------------------------

    def lora_keys(self, module_name: str) -> str:
        return f"transformer.{module_name}"

    def comfyui_rows(self, module_name: str, scale: torch.Tensor) -> torch.Tensor:
        part = original_source(f"{module_name}.weight", self._network["num_layers"])[1]
        return swap_halves(scale) if part == "swapped" else scale

    def comfyui_tensors(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return to_original(tensors, self._network["num_layers"])

    def other_tensors(self, names: Container[str]) -> dict[str, torch.Tensor]:
        return {"pos_embed": self.denoiser_reader()("pos_embed.pos_embed").to(self.dtype)}

    def pipeline(self, denoiser: Any, device: torch.device, text_encoders: bool = True) -> Any:
        clip_l, clip_g, t5 = (
            self.load_text_encoder(name, device) if text_encoders else TextEncoder(None, None)
            for name in self.text_encoders
        )
        return diffusers.StableDiffusion3Pipeline(
            transformer=denoiser,
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler.from_config(self._schedule(SCHEDULE)),
            vae=self.load_vae(device),
            text_encoder=clip_l.model,
            tokenizer=clip_l.tokenizer,
            text_encoder_2=clip_g.model,
            tokenizer_2=clip_g.tokenizer,
            text_encoder_3=t5.model,
            tokenizer_3=t5.tokenizer,
        )

    def prompt_arguments(self, request: SampleRequest, device: torch.device) -> dict[str, Any]:
        arguments: dict[str, Any] = {}
        for prefix, text in (("", request.text), ("negative_", request.negative_text)):
            text_LD, pooled_D = joined_text(text)
            arguments[f"{prefix}prompt_embeds"] = text_LD[None].to(device)
            arguments[f"{prefix}pooled_prompt_embeds"] = pooled_D[None].to(device)
        return arguments

    @classmethod
    def write_miniature(
        cls, folder: Path, variant: Literal["sd3", "sd35_medium", "sd35_large"] = "sd35_medium"
    ) -> dict[str, Any]:
        vocabularies = write_clip_tokenizer(folder / "tokenizer"), write_t5_tokenizer(folder / "tokenizer_3")
        write_clip_tokenizer(folder / "tokenizer_2", pad="!")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            parts = _miniature_parts(variant, *vocabularies)
        index: dict[str, Any] = {
            "_class_name": "StableDiffusion3Pipeline",
            "_diffusers_version": diffusers.__version__,
        }
        for name, part in parts.items():
            part.save_pretrained(folder / name)
            index[name] = [type(part).__module__.split(".")[0], type(part).__name__]
        index |= {name: ["transformers", "CLIPTokenizer"] for name in ("tokenizer", "tokenizer_2")}
        index["tokenizer_3"] = ["transformers", "T5TokenizerFast"]
        write_json(folder / "model_index.json", index)
        return {"type": "sd3", "diffusers_path": str(folder), "dtype": "float32", "max_sequence_length": 32}


# -- links of the chain ---------------------------------------------------------------------------------

Tensors = tuple["torch.Tensor", ...]


def joined_text(text: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """A caption's values as the transformer takes them: LD, CLIP's tokens before T5's, and the pooled D."""
    clip_LD = torch.cat([text["clip_l_embeds"], text["clip_g_embeds"]], dim=-1)
    t5_LD = text["t5_embeds"]
    clip_LD = torch.nn.functional.pad(clip_LD, (0, t5_LD.shape[-1] - clip_LD.shape[-1]))
    return torch.cat([clip_LD, t5_LD]), torch.cat([text["clip_l_pooled"], text["clip_g_pooled"]])


def _embed(
    modules: Any, x_t_NCHW: torch.Tensor, told_N: torch.Tensor, text_NLD: torch.Tensor, pooled_ND: torch.Tensor
) -> Tensors:
    """Also a tensor of as many rows and columns as there are patches."""
    x_NTD = modules.pos_embed(x_t_NCHW).contiguous()
    temb_ND = modules.time_text_embed(told_N, pooled_ND)
    height, width = (side // 2 for side in x_t_NCHW.shape[2:])
    grid = torch.zeros(height, width, dtype=torch.uint8, device=x_NTD.device)
    return x_NTD, modules.context_embedder(text_NLD), temb_ND, grid


def _block(
    modules: Any, x_NTD: torch.Tensor, text_NLD: torch.Tensor, temb_ND: torch.Tensor, grid: torch.Tensor
) -> Tensors:
    text_NLD, x_NTD = modules.block(x_NTD, text_NLD, temb_ND)
    return x_NTD.contiguous(), text_NLD.contiguous(), temb_ND, grid


def _last_block(
    modules: Any, x_NTD: torch.Tensor, text_NLD: torch.Tensor, temb_ND: torch.Tensor, grid: torch.Tensor
) -> Tensors:
    """It gives no text."""
    return modules.block(x_NTD, text_NLD, temb_ND)[1].contiguous(), temb_ND, grid


def _out(modules: Any, x_NTD: torch.Tensor, temb_ND: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    prediction_NTD = modules.proj_out(modules.norm_out(x_NTD, temb_ND))
    (n, _, d), (height, width) = prediction_NTD.shape, grid.shape
    patches = prediction_NTD.reshape(n, height, width, 2, 2, d // 4).permute(0, 5, 1, 3, 2, 4)
    return patches.reshape(n, d // 4, height * 2, width * 2)


# -- the transformer in Stability AI's layout ---------------------------------------------------------------

TOP_MODULES = {
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "norm_out.linear": "final_layer.adaLN_modulation.1:swapped",
    "proj_out": "final_layer.linear",
}
BLOCK_MODULES = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.to_q": "x_block.attn.qkv:q",
    "attn.to_k": "x_block.attn.qkv:k",
    "attn.to_v": "x_block.attn.qkv:v",
    "attn.add_q_proj": "context_block.attn.qkv:q",
    "attn.add_k_proj": "context_block.attn.qkv:k",
    "attn.add_v_proj": "context_block.attn.qkv:v",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.to_q": "x_block.attn2.qkv:q",
    "attn2.to_k": "x_block.attn2.qkv:k",
    "attn2.to_v": "x_block.attn2.qkv:v",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}


def original_source(name: str, num_blocks: int) -> tuple[str, str]:
    """Where a tensor of diffusers' transformer lies in the original one: the tensor's name and the part of it.

    As `fused` has it. What the last block does to the caption gives shift before scale, as the last modulation does.
    """
    if name == "pos_embed.pos_embed":
        return "pos_embed", ""
    module, _, leaf = name.rpartition(".")
    target = TOP_MODULES.get(module, "")
    if match := re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", module):
        target = f"joint_blocks.{match[1]}.{BLOCK_MODULES[match[2]]}"
        if match[2] == "norm1_context.linear" and int(match[1]) == num_blocks - 1:
            target += ":swapped"
    assert target, name
    target, _, part = target.partition(":")
    return f"{target}.{leaf}", part


def read_original(weights: Weights, name: str) -> torch.Tensor:
    """A tensor of diffusers' transformer from a file in the original layout."""
    source, part = original_source(name, weights.count("joint_blocks."))
    if part in ROWS:
        rows, index = weights.shape(source)[0] // 3, ROWS.index(part)
        return weights.read(source, slice(index * rows, (index + 1) * rows))
    return swap_halves(weights.read(source)) if part else weights.read(source)


def to_original(tensors: Mapping[str, torch.Tensor], num_blocks: int) -> dict[str, torch.Tensor]:
    """The tensors of diffusers' transformer in the original layout; the inverse of `read_original`."""
    return to_fused(tensors, partial(original_source, num_blocks=num_blocks))


def transformer_config(weights: Weights) -> dict[str, Any]:
    """Arguments of SD3Transformer2DModel for a file in the original layout, from names and shapes.

    Heads have 64 features in every published model; norms, where there are some, tell.
    """
    width, in_channels, patch, _ = weights.shape("x_embedder.proj.weight")
    norm, num_layers = "joint_blocks.0.x_block.attn.ln_q.weight", weights.count("joint_blocks.")
    head_dim = weights.shape(norm)[0] if norm in weights else min(64, width)
    return {
        "sample_size": SAMPLE_SIZE,
        "patch_size": patch,
        "in_channels": in_channels,
        "num_layers": num_layers,
        "attention_head_dim": head_dim,
        "num_attention_heads": width // head_dim,
        "joint_attention_dim": weights.shape("context_embedder.weight")[1],
        "caption_projection_dim": width,
        "pooled_projection_dim": weights.shape("y_embedder.mlp.0.weight")[1],
        "out_channels": weights.shape("final_layer.linear.weight")[0] // patch**2,
        "pos_embed_max_size": math.isqrt(weights.shape("pos_embed")[1]),
        "dual_attention_layers": tuple(
            n for n in range(num_layers) if f"joint_blocks.{n}.x_block.attn2.qkv.weight" in weights
        ),
        "qk_norm": "rms_norm" if norm in weights else None,
    }


# -- miniature --------------------------------------------------------------------------------------------


def _miniature_parts(variant: str, clip_vocabulary: int, t5_vocabulary: int) -> dict[str, Any]:
    text = {"vocab_size": clip_vocabulary, "num_hidden_layers": 2, "num_attention_heads": 1, "bos_token_id": 0,
            "eos_token_id": 2, "pad_token_id": 1}  # fmt: skip
    first = transformers.CLIPTextConfig(
        **text, hidden_size=8, intermediate_size=32, hidden_act="quick_gelu", projection_dim=8)  # fmt: skip
    second = transformers.CLIPTextConfig(
        **text, hidden_size=16, intermediate_size=64, hidden_act="gelu", projection_dim=16)  # fmt: skip
    t5 = transformers.T5Config(
        vocab_size=t5_vocabulary, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu")  # fmt: skip
    heads: dict[str, Any] = {"attention_head_dim": 32, "num_attention_heads": 1, "qk_norm": None}
    if variant != "sd3":
        heads = {"attention_head_dim": 16, "num_attention_heads": 2, "qk_norm": "rms_norm"}
    models: dict[str, Any] = {
        "transformer": diffusers.SD3Transformer2DModel(
            **heads, num_layers=3, dual_attention_layers=(0, 1) if variant == "sd35_medium" else (),
            joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=24, pos_embed_max_size=64),
        "vae": autoencoder.miniature(autoencoder.SD3_SCALING, autoencoder.SD3_SHIFT),
        "text_encoder": transformers.CLIPTextModelWithProjection(first),
        "text_encoder_2": transformers.CLIPTextModelWithProjection(second),
        "text_encoder_3": transformers.T5EncoderModel(t5),
    }  # fmt: skip
    with torch.no_grad():
        models["text_encoder"].text_projection.weight.copy_(torch.eye(8))  # as published
    return {
        **{name: model.to(torch.bfloat16) for name, model in models.items()},
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(**SCHEDULE),
    }
