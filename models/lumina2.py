"""Lumina Image 2, by Alpha-VLLM, also as Neta Lumina and NetaYume Lumina: one stream of caption and picture, 2.6
billion weights.

A rectified-flow transformer over 2x2 patches of Flux's latents. The caption (Gemma 2's last hidden states but one, in
its own length) and the picture are refined apart by a few blocks, and then pass the layers as one sequence, the caption
first; queries share keys and values in groups. The network is told 1 - t and predicts data minus noise.

Captions are encoded as they are. The model was trained with a system prompt before them, which diffusers' pipeline and
ComfyUI's CLIPTextEncodeLumina2 add, ending in " <Prompt Start> "; here it is for the dataset's ``caption_prefix``, and
for the prompts of samples, which are not changed either.

Reference: https://github.com/Alpha-VLLM/Lumina-Image-2.0, and diffusers' Lumina2Pipeline, which the layers here equal
but for rounding: rotary embedding is in real numbers of single precision here. Gemma bounds its attention scores as its
makers and diffusers have it, ComfyUI does not. Licence of the weights: Apache-2.0; of Gemma: the Gemma terms of use.

Shape legend: N batch, C latent channels, H W height and width of the latents, T picture tokens (H/2 * W/2), L caption
tokens, S both, K features of a patch (4C), D features, P pairs of features of a head.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..utils.config import SettingsError, option
from ..utils.imports import lazy
from ..utils.weights import Weights, build, fill
from . import autoencoder
from .base import Batch, Encodings, Example, Layer, ModelConfig, SampleRequest, Shapes
from .captions import side_by_side
from .components import FLUX_VAE, Component, FromComponents, TextEncoder, language_model_name, width_of
from .files import fingerprint, read_json, require_path, write_json
from .flow import SHIFT_BY_SIZE, FlowFamily, resolution_shift
from .next_dit import patches

if TYPE_CHECKING:
    import diffusers
    import sentencepiece
    import torch
    import transformers
    from torch import nn
else:
    diffusers, sentencepiece, torch = map(lazy, ("diffusers", "sentencepiece", "torch"))
    transformers = lazy("transformers")

SCHEDULE: dict[str, Any] = {"shift": 6.0, "use_dynamic_shifting": False}
USUAL_LENGTH = 128
"""Tokens of a caption of the usual length, with the system prompt."""
PLACES = [1024, 512, 512]
"""Tokens, rows and columns that diffusers' table of angles has room for; its 300 tokens are fewer than one may ask."""
BASE = 10000.0
"""Of the angles' frequencies."""
EMBEDDED_TOKENIZER = ("spiece_model", "text_encoders.spiece_model")
"""Gemma's SentencePiece model in ComfyUI's file of it, and in a file of the whole model."""


class Lumina2Config(ModelConfig):
    """Lumina Image 2, Neta Lumina and NetaYume Lumina, from single files as ComfyUI has them, from a diffusers folder,
    or from both."""

    type: Literal["lumina_2"] = "lumina_2"
    transformer_path: str | None = option(
        None, "Transformer as a single file, such as lumina_2_model_bf16.safetensors.", picker="diffusion_models"
    )
    llm_path: str | None = option(
        None,
        "Gemma 2 2B as a single file, such as gemma_2_2b_fp16.safetensors. Captions go to it as they are: put the "
        "system prompt, which ends in '<Prompt Start> ', into caption_prefix and before sample prompts.",
        picker="text_encoders",
    )
    vae_path: str | None = option(None, "VAE as a single file, such as ae.safetensors.", picker="vae")
    lumina_shift: bool = option(False, SHIFT_BY_SIZE)
    diffusers_path: str | None = option(
        None,
        "Folder of the whole model in diffusers layout. What a file given elsewhere holds is taken from there instead.",
        picker="diffusers",
    )
    checkpoint_path: str | None = option(None, "The whole model as a single file.", picker="checkpoints")
    tokenizer_path: str | None = option(
        None,
        "Folder of the tokenizer, if it is neither in the diffusers folder nor in the text encoder's file.",
        advanced=True,
    )
    max_sequence_length: int = option(
        256, "Gemma tokens per caption; longer captions are cut.", ge=16, le=512, advanced=True
    )


COMPONENTS = {
    "transformer": Component(
        "a Lumina Image 2 transformer, such as lumina_2_model_bf16.safetensors", "transformer_path", "transformer",
        "Lumina2Transformer2DModel", ("noise_refiner.0.attention.qkv.weight", "layers.0.adaLN_modulation.1.weight"),
        ("model.diffusion_model.", "diffusion_model."),
        # Z-Image; NewBie, which takes pooled text, too
        ("cap_pad_token", "clip_text_pooled_proj.0.weight")),
    "vae": FLUX_VAE,
    "gemma": Component(
        "Gemma 2 2B, such as gemma_2_2b_fp16.safetensors", "llm_path", "text_encoder", "Gemma2",
        ("model.layers.0.pre_feedforward_layernorm.weight", "model.embed_tokens.weight"),
        ("text_encoders.gemma2_2b.transformer.",),
        ("model.layers.0.self_attn.q_norm.weight",),  # Gemma 3
        "tokenizer_path", "tokenizer"),
}  # fmt: skip


class Lumina2(FromComponents, FlowFamily):
    """Lumina Image 2 in the hands of the trainer."""

    title = "Lumina Image 2"
    Config = Lumina2Config
    config: Lumina2Config  # type: ignore[assignment]
    components = COMPONENTS
    whole = "a Lumina Image 2 folder in diffusers layout"
    published = "Lumina-Image-2.0"
    size_multiple = 16
    text_encoders = ("gemma",)
    shared_inputs = (("feed_forward.linear_1", "feed_forward.linear_3"),)
    adapter_blocks = ("Lumina2TransformerBlock",)
    high_precision = ("^x_embedder", "^time_caption_embed", "^norm_out")
    says_alpha = False

    # -- files ------------------------------------------------------------------------------------

    def _given(self, name: str) -> tuple[str | None, str]:
        """`checkpoint_path` has what no other option names."""
        value, setting = super()._given(name)
        if not value and self.config.checkpoint_path:
            return self.config.checkpoint_path, "model.checkpoint_path"
        return value, setting

    def check_files(self) -> None:
        parts = {name: self._weights(name) for name in self.components}
        self._tokenizer_place()
        transformer, is_single = parts["transformer"], not parts["transformer"].path.is_dir()

        def shape(name: str) -> tuple[int, ...]:
            return transformer.shape(original_name(name) if is_single else name)

        self._check_widths(
            parts,
            {
                "vae": (parts["vae"].shape("decoder.conv_in.weight")[1], shape("x_embedder.weight")[1] // 4),
                "gemma": (width_of(parts["gemma"]), shape("time_caption_embed.caption_embedder.1.weight")[1]),
            },
        )

    def _tokenizer_place(self) -> Path | Weights:
        """The tokenizer's folder, or the file in which it lies."""
        setting, expected = "model.tokenizer_path", f"a folder like 'tokenizer' of {self.published}"
        path, of_gemma = self._place("gemma")
        places = [path] if path.is_dir() else []
        if self.config.diffusers_path:
            places.append(Path(self.config.diffusers_path).expanduser() / "tokenizer")
        if self.config.tokenizer_path:
            places = [require_path(self.config.tokenizer_path, setting, expected)]
        for folder in places:
            if any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer.model")):
                return folder
        if path.is_file() and not self.config.tokenizer_path:
            file = Weights(path, of_gemma)
            if any(name in file for name in EMBEDDED_TOKENIZER):
                return file
        raise SettingsError(
            f"{setting}: no tokenizer found{f' in {places[-1]!s}' if places else ''}; give {expected}, or "
            "model.diffusers_path, or in model.llm_path a file of ComfyUI, which holds it"
        )

    def identity(self, part: str) -> str:
        identity = {"weights": fingerprint(self._place(part)[0]), "dtype": self.config.dtype}
        if part == "gemma":
            place = self._tokenizer_place()
            identity["tokenizer"] = fingerprint(place) if isinstance(place, Path) else "in the file"
            identity["length"] = str(self.config.max_sequence_length)
            if self.text_dtype:
                identity["storage"] = self.text_dtype
        return json.dumps(identity)

    # -- encoding, once per sample, cached ----------------------------------------------------------

    def load_vae(self, device: torch.device) -> nn.Module:
        return autoencoder.load_autoencoder(
            self._weights("vae"), self.dtype, device, autoencoder.FLUX_SCALING, autoencoder.FLUX_SHIFT
        )

    def encode_media(
        self, vae: Any, pixels_NCFHW: torch.Tensor, generators: Sequence[torch.Generator]
    ) -> dict[str, torch.Tensor]:
        return autoencoder.encode(vae, pixels_NCFHW, generators, self.dtype)

    def load_text_encoder(self, name: str, device: torch.device) -> TextEncoder:
        weights = self._weights(name)
        settings = read_json(weights.path / "config.json") if weights.path.is_dir() else gemma_config(weights)
        model = build(lambda: transformers.Gemma2Model(transformers.Gemma2Config(**settings)))
        fill(model, lambda tensor: weights.read(language_model_name(tensor, weights)), self.dtype, device,
             storage=self.text_storage())  # fmt: skip
        return TextEncoder(self._load_tokenizer(), model.eval())

    def _load_tokenizer(self) -> Any:
        place = self._tokenizer_place()
        if isinstance(place, Path):
            return _tokenizer_in(place)
        with tempfile.TemporaryDirectory() as temporary:
            name = next(name for name in EMBEDDED_TOKENIZER if name in place)
            (Path(temporary) / "tokenizer.model").write_bytes(place.raw(name))
            return _tokenizer_in(Path(temporary))

    def encode_text(self, name: str, encoder: TextEncoder, captions: Sequence[str]) -> Encodings:
        """As `Family.encode_text`; embeddings are as long as their caption."""
        tokens = encoder.tokenizer(
            list(captions), padding="max_length", max_length=self.config.max_sequence_length, truncation=True,
            return_tensors="pt", padding_side="right",
        )  # fmt: skip
        device = encoder.model.device
        seen_NL = tokens.attention_mask.to(device)
        with torch.no_grad():
            output = encoder.model(tokens.input_ids.to(device), attention_mask=seen_NL, output_hidden_states=True)
        states_NLD = output.hidden_states[-2].to(self.dtype)
        lengths = seen_NL.sum(1).tolist()
        return {"gemma_embeds": [states_LD[:length] for states_LD, length in zip(states_NLD, lengths, strict=True)]}

    # -- training -----------------------------------------------------------------------------------

    def timestep_shift(self, latent_size: tuple[int, ...]) -> float:
        if self.config.shift is None:
            return resolution_shift(latent_size) if self.config.lumina_shift else 1.0
        return self.config.shift

    def build_denoiser(self) -> nn.Module:
        """diffusers' transformer, its attention fused."""
        from .lumina2_attention import fuse_attention

        weights = self._weights("transformer")
        is_folder = weights.path.is_dir()
        config = read_json(weights.path / "config.json") if is_folder else transformer_config(weights)
        config = {**config, "axes_lens": PLACES}
        return fuse_attention(build(lambda: diffusers.Lumina2Transformer2DModel.from_config(config)))

    def denoiser_reader(self) -> Callable[[str], torch.Tensor]:
        weights = self._weights("transformer")
        if weights.path.is_dir():
            return partial(_read_folder, weights)
        return lambda name: weights.read(original_name(name))

    def layers(self, denoiser: Any) -> list[Layer]:
        modules = {name: getattr(denoiser, name) for name in ("x_embedder", "time_caption_embed")}
        layers = [Layer("embed", partial(_embed, sides=tuple(denoiser.config.axes_dim_rope)), modules)]
        for stack, run in (("context_refiner", _caption), ("noise_refiner", _picture), ("layers", _both)):
            if stack == "layers":
                layers.append(Layer("join", _join, {}))
            for index, block in enumerate(getattr(denoiser, stack)):
                layers.append(Layer(f"{stack}.{index}", run, {"block": block}, is_block=True))
        layers.append(Layer("out", _out, {"norm_out": denoiser.norm_out}))
        return layers

    def collate(self, examples: Sequence[Example]) -> Batch:
        x_t_NCHW, t_N, velocity_NCHW = self.noised(examples)
        text_NLD, seen_NL = side_by_side([example.text["gemma_embeds"].to(self.dtype) for example in examples])
        target_NTK = -patches(velocity_NCHW)
        return Batch(
            inputs=(x_t_NCHW.to(self.dtype), 1 - t_N * 1000 / 1000, text_NLD, seen_NL),
            target=target_NTK,
            weight=self.time_weight(t_N, target_NTK),
        )

    def cached_shapes(self, latent_size: tuple[int, int, int]) -> tuple[Shapes, Shapes]:
        config: Any = self.build_denoiser().config
        text = {"gemma_embeds": (min(USUAL_LENGTH, self.config.max_sequence_length), config.cap_feat_dim)}
        return {"latents": (config.in_channels, *latent_size[1:])}, text

    def spread_mask(self, mask_NFHW: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return patches(mask_NFHW.expand(-1, target.shape[-1] // 4, -1, -1))

    # -- results ------------------------------------------------------------------------------------

    def lora_keys(self, module_name: str) -> str:
        return f"diffusion_model.{original_name(f'{module_name}.weight').removesuffix('.weight')}"

    def comfyui_tensors(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {original_name(name): tensor for name, tensor in tensors.items()}

    def pipeline(self, denoiser: Any, device: torch.device, text_encoders: bool = True) -> Any:
        gemma = self.load_text_encoder("gemma", device) if text_encoders else TextEncoder(None, None)
        return diffusers.Lumina2Pipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler.from_config(self._schedule(SCHEDULE)),
            vae=self.load_vae(device),
            text_encoder=gemma.model,
            tokenizer=gemma.tokenizer,
            transformer=denoiser,
        )

    def prompt_arguments(self, request: SampleRequest, device: torch.device) -> dict[str, Any]:
        """Padded, as the pipeline does it: it takes prompt and negative prompt in one length alone."""
        arguments: dict[str, Any] = {}
        places_L = torch.arange(self.config.max_sequence_length)
        for prefix, text in (("", request.text), ("negative_", request.negative_text)):
            text_LD = text["gemma_embeds"]
            missing = text_LD.new_zeros(len(places_L) - len(text_LD), text_LD.shape[1])
            arguments[f"{prefix}prompt_embeds"] = torch.cat([text_LD, missing])[None].to(device)
            arguments[f"{prefix}prompt_attention_mask"] = (places_L < len(text_LD)).to(device, torch.int64)[None]
        return arguments

    @classmethod
    def write_miniature(cls, folder: Path) -> dict[str, Any]:
        vocabulary = _write_tokenizer(folder / "tokenizer")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            parts = _miniature_parts(vocabulary)
        index: dict[str, Any] = {"_class_name": "Lumina2Pipeline", "_diffusers_version": diffusers.__version__}
        for name, part in parts.items():
            part.save_pretrained(folder / name)
            index[name] = [type(part).__module__.split(".")[0], type(part).__name__]
        index["tokenizer"] = ["transformers", "GemmaTokenizer"]
        write_json(folder / "model_index.json", index)
        return {"type": "lumina_2", "diffusers_path": str(folder), "dtype": "float32", "max_sequence_length": 64}


# -- links of the chain ---------------------------------------------------------------------------------
#
# Between them travel the tokens (of the picture, then of both), the embedded time, how far each pair of features is
# turned (SP2, or NSP2 where captions differ in length), what is seen (of the captions, then of both; one column where
# all is), a tensor as long as there are tokens of the picture, and up to where they are joined the captions.

Tensors = tuple["torch.Tensor", ...]


def _embed(
    modules: Any, x_t_NCHW: torch.Tensor, told_N: torch.Tensor, text_NLD: torch.Tensor, seen_NL: torch.Tensor,
    *, sides: Sequence[int],
) -> Tensors:  # fmt: skip
    x_NTD = modules.x_embedder(patches(x_t_NCHW))
    time_ND, caption_NLD = modules.time_caption_embed(x_t_NCHW, told_N, text_NLD)
    places = _places(seen_NL, text_NLD.shape[1], x_t_NCHW.shape[2] // 2, x_t_NCHW.shape[3] // 2)
    made_T = torch.zeros(x_NTD.shape[1], dtype=torch.uint8, device=x_NTD.device)
    return x_NTD, time_ND, _turns(places, sides), seen_NL, made_T, caption_NLD


def _places(seen_NL: torch.Tensor, length: int, height: int, width: int) -> torch.Tensor:
    """(place, row, column) of each token, captions first: S3, or NS3 where they differ in length. The picture's place
    is the one after the caption."""
    is_ragged, device = seen_NL.shape[1] > 1, seen_NL.device
    n = len(seen_NL) if is_ragged else 1
    caption_NL3 = torch.zeros(n, length, 3, dtype=torch.int64, device=device)
    caption_NL3[..., 0] = torch.arange(length, device=device)
    grid_NHW3 = torch.zeros(n, height, width, 3, dtype=torch.int64, device=device)
    grid_NHW3[..., 0] = seen_NL.sum(1)[:, None, None] if is_ragged else length
    grid_NHW3[..., 1] = torch.arange(height, device=device)[:, None]
    grid_NHW3[..., 2] = torch.arange(width, device=device)
    places = torch.cat([caption_NL3, grid_NHW3.flatten(1, 2)], dim=1)
    return places if is_ragged else places[0]


def _turns(places: torch.Tensor, sides: Sequence[int]) -> torch.Tensor:
    """Cosine and sine by which each pair of features is turned, float32.

    Args:
        places: (..., 3)
        sides: Features that are turned by each of the three.
    """
    angles = []
    for axis, side in enumerate(sides):
        steps = torch.arange(0, side, 2, dtype=torch.float64, device=places.device)
        angles.append(places[..., axis, None] * (1.0 / BASE ** (steps / side)))
    together = torch.cat(angles, dim=-1)
    return torch.stack([together.cos(), together.sin()], dim=-1).float()


def _caption(
    modules: Any, x_NTD: torch.Tensor, time_ND: torch.Tensor, turns: torch.Tensor, seen_NL: torch.Tensor,
    made_T: torch.Tensor, caption_NLD: torch.Tensor,
) -> Tensors:  # fmt: skip
    mask = seen_NL if seen_NL.shape[1] > 1 else None
    caption_NLD = modules.block(caption_NLD, mask, turns.narrow(-3, 0, caption_NLD.shape[1]))
    return x_NTD, time_ND, turns, seen_NL, made_T, caption_NLD


def _picture(
    modules: Any, x_NTD: torch.Tensor, time_ND: torch.Tensor, turns: torch.Tensor, seen_NL: torch.Tensor,
    made_T: torch.Tensor, caption_NLD: torch.Tensor,
) -> Tensors:  # fmt: skip
    x_NTD = modules.block(x_NTD, None, turns.narrow(-3, caption_NLD.shape[1], x_NTD.shape[1]), time_ND)
    return x_NTD, time_ND, turns, seen_NL, made_T, caption_NLD


def _join(
    _modules: Any, x_NTD: torch.Tensor, time_ND: torch.Tensor, turns: torch.Tensor, seen_NL: torch.Tensor,
    made_T: torch.Tensor, caption_NLD: torch.Tensor,
) -> Tensors:  # fmt: skip
    """Each caption is followed by its picture; what fills up the batch comes last."""
    joined_NSD = torch.cat([caption_NLD, x_NTD], dim=1)
    if seen_NL.shape[1] == 1:
        return joined_NSD, time_ND, turns, seen_NL, made_T
    lengths_N1, places_S = seen_NL.sum(1, keepdim=True), torch.arange(joined_NSD.shape[1], device=x_NTD.device)
    source_NS = torch.where(places_S < lengths_N1, places_S, places_S + caption_NLD.shape[1] - lengths_N1)
    source_NS = source_NS.clamp(max=len(places_S) - 1)
    seen_NS = (places_S < lengths_N1 + len(made_T)).to(torch.uint8)
    turns = _taken(turns.flatten(2), source_NS).unflatten(2, turns.shape[2:])
    return _taken(joined_NSD, source_NS), time_ND, turns, seen_NS, made_T


def _taken(x_NSD: torch.Tensor, source_NT: torch.Tensor) -> torch.Tensor:
    """Tokens of each sample in another order."""
    return x_NSD.gather(1, source_NT[..., None].expand(-1, -1, x_NSD.shape[2]))


def _both(
    modules: Any, joined_NSD: torch.Tensor, time_ND: torch.Tensor, turns: torch.Tensor, seen_NS: torch.Tensor,
    made_T: torch.Tensor,
) -> Tensors:  # fmt: skip
    mask = seen_NS if seen_NS.shape[1] > 1 else None
    return modules.block(joined_NSD, mask, turns, time_ND), time_ND, turns, seen_NS, made_T


def _out(
    modules: Any, joined_NSD: torch.Tensor, time_ND: torch.Tensor, _turns: Any, seen_NS: torch.Tensor,
    made_T: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    prediction_NSK: torch.Tensor = modules.norm_out(joined_NSD, time_ND)
    if seen_NS.shape[1] == 1:
        return prediction_NSK[:, -len(made_T) :]
    starts_N1 = seen_NS.sum(1, keepdim=True) - len(made_T)
    return _taken(prediction_NSK, starts_N1 + torch.arange(len(made_T), device=made_T.device))


# -- the files --------------------------------------------------------------------------------------------

RENAMED = {
    "time_caption_embed.timestep_embedder.linear_1.": "t_embedder.mlp.0.",
    "time_caption_embed.timestep_embedder.linear_2.": "t_embedder.mlp.2.",
    "time_caption_embed.caption_embedder.": "cap_embedder.",
    "norm_out.linear_1.": "final_layer.adaLN_modulation.1.",
    "norm_out.linear_2.": "final_layer.linear.",
    ".attn.to_qkv.": ".attention.qkv.",
    ".attn.to_out.0.": ".attention.out.",
    ".attn.norm_q.": ".attention.q_norm.",
    ".attn.norm_k.": ".attention.k_norm.",
    ".feed_forward.linear_": ".feed_forward.w",
    ".norm1.linear.": ".adaLN_modulation.1.",
    ".norm1.norm.": ".attention_norm1.",
    ".norm1.": ".attention_norm1.",
    ".norm2.": ".attention_norm2.",
}
"""Parts of names in diffusers' transformer with fused attention, and in the original one. Earlier ones come first."""


def original_name(name: str) -> str:
    """What the original transformer calls a parameter of diffusers' with fused attention."""
    for part, other in RENAMED.items():
        name = name.replace(part, other)
    return name


def _read_folder(weights: Weights, name: str) -> torch.Tensor:
    """A parameter of the transformer with fused attention from a diffusers folder."""
    if ".to_qkv." not in name:
        return weights.read(name)
    return torch.cat([weights.read(name.replace("to_qkv", part)) for part in ("to_q", "to_k", "to_v")])


def transformer_config(weights: Weights) -> dict[str, Any]:
    """Arguments of Lumina2Transformer2DModel for a file in the original layout, from names and shapes."""
    dim, text = weights.shape("cap_embedder.1.weight")
    head_dim = weights.shape("layers.0.attention.q_norm.weight")[0]
    inner = weights.shape("layers.0.feed_forward.w1.weight")[0]
    return {
        "in_channels": weights.shape("x_embedder.weight")[1] // 4,
        "hidden_size": dim,
        "num_layers": weights.count("layers."),
        "num_refiner_layers": weights.count("noise_refiner."),
        "num_attention_heads": dim // head_dim,
        "num_kv_heads": (weights.shape("layers.0.attention.qkv.weight")[0] - dim) // (2 * head_dim),
        # diffusers rounds a width up to the multiple: whatever the width, here it becomes the file's
        "multiple_of": inner,
        "ffn_dim_multiplier": inner / (8 * dim),
        "axes_dim_rope": [head_dim // 3] * 3,
        "cap_feat_dim": text,
    }


def gemma_config(weights: Weights) -> dict[str, Any]:
    """Arguments of Gemma2Config for a single file, from names and shapes. Heads are as wide in all that are published
    in this size."""
    vocabulary, width = weights.shape("model.embed_tokens.weight")
    layer, head_dim = "model.layers.0", 256
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": weights.shape(f"{layer}.mlp.gate_proj.weight")[0],
        "num_hidden_layers": weights.count("model.layers."),
        "num_attention_heads": weights.shape(f"{layer}.self_attn.q_proj.weight")[0] // head_dim,
        "num_key_value_heads": weights.shape(f"{layer}.self_attn.k_proj.weight")[0] // head_dim,
        "head_dim": head_dim,
        "query_pre_attn_scalar": head_dim,
    }


def _tokenizer_in(folder: Path) -> Any:
    """Gemma's tokenizer, from its own file or from a SentencePiece model, which does not say where a text begins."""
    if (folder / "tokenizer.json").is_file():
        return transformers.AutoTokenizer.from_pretrained(folder)
    return transformers.GemmaTokenizer.from_pretrained(folder, add_bos_token=True)


# -- miniature --------------------------------------------------------------------------------------------


def _miniature_parts(vocabulary: int) -> dict[str, Any]:
    gemma = transformers.Gemma2Config(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1)  # fmt: skip
    models: dict[str, Any] = {
        "transformer": diffusers.Lumina2Transformer2DModel(
            in_channels=16, hidden_size=48, num_layers=2, num_refiner_layers=1, num_attention_heads=4, num_kv_heads=2,
            multiple_of=32, axes_dim_rope=(4, 4, 4), cap_feat_dim=32),
        "vae": autoencoder.miniature(),
        "text_encoder": transformers.Gemma2Model(gemma),
    }  # fmt: skip
    with torch.no_grad():
        for parameter in models["transformer"].parameters():
            if parameter.ndim == 1:  # norms that are not all the same
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return {
        **{name: model.to(torch.bfloat16) for name, model in models.items()},
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(**SCHEDULE),
    }


def _write_tokenizer(folder: Path) -> int:
    """A SentencePiece model of Gemma's kind learnt from a few words; returns the size of its vocabulary."""
    words = ("a red cat on a roof", "a photo of a dog", "abcdefghijklmnopqrstuvwxyz 0123456789 .,;:!?<>")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words * 3), model_writer=model, vocab_size=360, model_type="bpe", pad_id=0, eos_id=1,
        bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>", byte_fallback=True,
        add_dummy_prefix=False, remove_extra_whitespaces=False, normalization_rule_name="identity", split_digits=True,
        user_defined_symbols=["<mask>", "<start_of_turn>", "<end_of_turn>"], hard_vocab_limit=False, num_threads=1,
        minloglevel=2)  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer: Any = _tokenizer_in(folder)
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    write_json(file, {key: value for key, value in read_json(file).items() if key != "vocab_file"})  # an absolute path
    return len(tokenizer)
