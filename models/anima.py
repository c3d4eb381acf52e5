"""Anima, by CircleStone Labs and Comfy Org: Cosmos-Predict2 2B for anime, its text read by Qwen3 0.6B.

The transformer is Cosmos-Predict2's. In T5's place stands an adapter, a small transformer: its tokens are those that
T5's tokenizer makes of the caption, with embeddings of its own, and they attend to Qwen3's last hidden states of the
caption. What comes out is filled up with zeros to 512 tokens. Qwen3 is given the caption bare; of an empty one it sees
its padding token. Here captions have their own lengths, and nothing is masked where they are equally long.

Reference: https://huggingface.co/circlestone-labs/Anima, ComfyUI's `comfy/ldm/anima`, and diffusers'
AnimaModularPipeline, whose transformer and adapter the layers here equal bit for bit. Two things are as in ComfyUI and
not as in diffusers 0.42: the time is told in float32, and an empty caption has one token of Qwen3 where that hides all.
Licence of the weights: CircleStone Labs Non-Commercial License, on top of the NVIDIA Open Model License.

Shape legend: as in `cosmos_predict2`; S tokens of Qwen3, L tokens of T5.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..utils.config import option
from ..utils.imports import lazy
from ..utils.weights import Weights, build
from .base import Encodings, Example, Layer, SampleRequest, Shapes
from .captions import side_by_side
from .components import OLD_T5_XXL, Component, TextEncoder, width_of
from .cosmos_predict2 import (
    COMPONENTS,
    FOLDER,
    T5_TOKENIZER,
    TEXT_LENGTH,
    CosmosPredict2,
    Predict2Config,
    chain,
    miniature_network,
    miniature_vae,
    rate_option,
)
from .files import fingerprint, read_json, write_json
from .qwen3 import load_qwen, write_qwen_tokenizer
from .t5 import write_t5_tokenizer

if TYPE_CHECKING:
    import diffusers
    import torch
    import transformers
    from PIL import Image
    from torch import nn
else:
    diffusers, torch, transformers = map(lazy, ("diffusers", "torch", "transformers"))

SCHEDULE: dict[str, Any] = {"shift": 3.0}
USUAL_LENGTH = 128
"""Tokens of a caption, for estimates."""


class AnimaConfig(Predict2Config):
    """Anima, from single files as ComfyUI has them, from a diffusers folder, or from both."""

    unused: ClassVar = {**Predict2Config.unused, "t5_path": "Anima has no T5, only its tokenizer"}

    type: Literal["anima"] = "anima"
    llm_path: str | None = option(
        None,
        "Qwen3 0.6B as a single file, such as qwen_3_06b_base.safetensors, or its folder.",
        picker="text_encoders",
    )
    llm_adapter_path: str | None = option(
        None,
        "Adapter between language model and transformer, if it is not in the transformer's file.",
        picker="diffusion_models",
    )
    llm_adapter_lr: float | None = rate_option("the language model's adapter")
    diffusers_path: str | None = option(None, FOLDER, picker="diffusers")
    t5_tokenizer_path: str | None = option(None, T5_TOKENIZER, advanced=True)
    llm_tokenizer_path: str | None = option(
        None, "Folder of Qwen3's tokenizer, if it is in neither the diffusers folder nor ComfyUI.", advanced=True
    )


ANIMA = "an Anima transformer, such as anima-base-v1.0.safetensors"
TOKENS = replace(OLD_T5_XXL, tokenizer_folder="t5_tokenizer")
QWEN3_06B = Component(
    "Qwen3 0.6B, such as qwen_3_06b_base.safetensors", "llm_path", "text_encoder", "Qwen3",
    ("model.layers.0.self_attn.q_norm.weight", "model.embed_tokens.weight"),
    ("text_encoders.qwen3_06b.transformer.",), (), "llm_tokenizer_path", "tokenizer",
    "comfy/text_encoders/qwen25_tokenizer")  # fmt: skip
ADAPTER = Component(
    "Anima's adapter, or an Anima transformer that holds it", "llm_adapter_path", "text_conditioner",
    "AnimaTextConditioner", ("blocks.0.cross_attn.o_proj.weight", "embed.weight", "out_proj.weight"),
    tuple(f"{prefix}llm_adapter." for prefix in ("net.", "model.diffusion_model.", "diffusion_model.", ""))
)  # fmt: skip


class Anima(CosmosPredict2):
    """Anima in the hands of the trainer."""

    title = "Anima"
    Config = AnimaConfig  # type: ignore[assignment]
    config: AnimaConfig
    components: ClassVar[Mapping[str, Component]] = {
        "transformer": replace(COMPONENTS["transformer"], title=ANIMA, foreign=()),
        "adapter": ADAPTER,
        "vae": COMPONENTS["vae"],
        "qwen": QWEN3_06B,
    }
    whole = "an Anima folder in diffusers layout"
    published = "Anima in diffusers layout"
    text_encoders = ("qwen",)
    shared_inputs = (
        *CosmosPredict2.shared_inputs,
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("cross_attn.k_proj", "cross_attn.v_proj"),
    )
    adapter_blocks = ("CosmosTransformerBlock", "AnimaTextConditionerBlock")
    high_precision = (*CosmosPredict2.high_precision, "^llm_adapter")

    # -- files ------------------------------------------------------------------------------------

    def check_files(self) -> None:
        parts = {name: self._weights(name) for name in self.components}
        self._check_network()
        self._tokenizer_folder("t5")
        self._tokenizer_folder("qwen")
        widths = {
            "vae": (self._vae_channels, self._network["in_channels"]),
            "qwen": (width_of(parts["qwen"]), self._adapter["source_dim"]),
            "adapter": (self._adapter["target_dim"], self._network["text_embed_dim"]),
        }
        self._check_widths(parts, widths)

    def _component(self, name: str) -> Component:
        return TOKENS if name == "t5" else super()._component(name)

    def _given(self, name: str) -> tuple[str | None, str]:
        """The adapter is in the transformer's file unless one is named for it."""
        value, setting = super()._given(name)
        if name == "adapter" and not value and self.config.transformer_path:
            return self.config.transformer_path, "model.transformer_path"
        return value, setting

    def _tokenizer_folder(self, name: str) -> Path:
        """Qwen3's may lie in the folder of the model."""
        if name == "qwen" and self.config.llm_path and not self.config.llm_tokenizer_path:
            folder = Path(self.config.llm_path).expanduser()
            if any((folder / file).is_file() for file in ("tokenizer.json", "vocab.json")):
                return folder
        return super()._tokenizer_folder(name)

    @cached_property
    def _adapter(self) -> dict[str, Any]:
        """Arguments of AnimaTextConditioner."""
        weights = self._weights("adapter")
        found = read_json(weights.path / "config.json") if weights.path.is_dir() else adapter_config(weights)
        return {**found, "min_sequence_length": TEXT_LENGTH}

    def identity(self, part: str) -> str:
        identity = json.loads(super().identity(part))
        if part == "qwen":
            identity["t5_tokenizer"] = fingerprint(self._tokenizer_folder("t5"))
        return json.dumps(identity)

    # -- encoding, once per sample, cached ----------------------------------------------------------

    def load_text_encoder(self, name: str, device: torch.device) -> TextEncoder:
        """Qwen3; its tokenizer is two: its own, and T5's as ``t5`` of it."""
        storage = self.text_storage()
        qwen = load_qwen(self._weights(name), self._tokenizer_folder(name), self.dtype, device, storage)
        t5 = transformers.T5TokenizerFast.from_pretrained(  # type: ignore[attr-defined]
            self._tokenizer_folder("t5")
        )
        return TextEncoder((qwen.tokenizer, t5), qwen.model)

    def encode_text(self, name: str, encoder: TextEncoder, captions: Sequence[str]) -> Encodings:
        """Qwen3's states and T5's tokens of each caption, each in its own length."""
        own, t5 = encoder.tokenizer
        embeds, ids = [], []
        for caption in captions:  # one by one: what a causal model makes of padding before a caption is no part of it
            tokens = own(caption, truncation=True, max_length=TEXT_LENGTH).input_ids or [own.pad_token_id]
            with torch.no_grad():
                states_1SD = encoder.model(torch.tensor([tokens], device=encoder.model.device)).last_hidden_state
            embeds.append(states_1SD[0].to(self.dtype))
            ids.append(torch.tensor(t5(caption, truncation=True, max_length=TEXT_LENGTH).input_ids))
        return {"qwen_embeds": embeds, "t5_ids": ids}

    # -- training -----------------------------------------------------------------------------------

    def learning_rates(self) -> dict[str, float]:
        rate = self.config.llm_adapter_lr
        return ({} if rate is None else {"^llm_adapter\\.": rate}) | super().learning_rates()

    def build_denoiser(self) -> nn.Module:
        """The transformer, with the adapter as ``llm_adapter`` of it."""
        network: Any = super().build_denoiser()
        network.llm_adapter = build(lambda: diffusers.AnimaTextConditioner.from_config(self._adapter))
        return network

    def denoiser_reader(self) -> Callable[[str], torch.Tensor]:
        read, adapter = super().denoiser_reader(), self._weights("adapter")
        prefix = "llm_adapter."
        return lambda name: adapter.read(name.removeprefix(prefix)) if name.startswith(prefix) else read(name)

    def layers(self, denoiser: Any) -> list[Layer]:
        adapter = Layer("llm_adapter", _adapt, {"adapter": denoiser.llm_adapter})
        return [adapter, *chain(denoiser, self.config.multiscale_loss_weight > 0)]

    def _told(self, t_N: torch.Tensor) -> torch.Tensor:
        return t_N

    def _text_inputs(self, examples: Sequence[Example]) -> tuple[torch.Tensor, ...]:
        """Of each kind of token the captions side by side, and which are theirs."""
        qwen_NSD, read_NS = side_by_side([example.text["qwen_embeds"].to(self.dtype) for example in examples])
        ids_NL1, seen_NL = side_by_side([example.text["t5_ids"].long()[:, None] for example in examples])
        return ids_NL1[..., 0].contiguous(), seen_NL, qwen_NSD, read_NS

    def cached_shapes(self, latent_size: tuple[int, int, int]) -> tuple[Shapes, Shapes]:
        text = {"qwen_embeds": (USUAL_LENGTH, self._adapter["source_dim"]), "t5_ids": (USUAL_LENGTH,)}
        return {"latents": (self._network["in_channels"], *latent_size[1:])}, text

    # -- results ------------------------------------------------------------------------------------

    @property
    def missing_for_samples(self) -> str:
        return ""

    def pipeline(self, denoiser: Any, device: torch.device, text_encoders: bool = True) -> Any:
        blocks = diffusers.AnimaAutoBlocks()
        parts: dict[str, Any] = {}
        if text_encoders:
            qwen = self.load_text_encoder("qwen", device)
            own, t5 = qwen.tokenizer
            parts = {"text_encoder": qwen.model, "tokenizer": own, "t5_tokenizer": t5}
        else:
            blocks.sub_blocks.pop("text_encoder")
        pipeline = blocks.init_pipeline()
        schedule = self._schedule(SCHEDULE)
        pipeline.update_components(
            transformer=denoiser,
            text_conditioner=denoiser.llm_adapter,
            vae=self.load_vae(device),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler.from_config(schedule),
            **parts,
        )
        return pipeline

    def prompt_arguments(self, request: SampleRequest, device: torch.device) -> dict[str, Any]:
        arguments: dict[str, Any] = {}
        for prefix, text in (("", request.text), ("negative_", request.negative_text)):
            embeds_NSD, ids_NL = (text[name][None].to(device) for name in ("qwen_embeds", "t5_ids"))
            arguments[f"{prefix}qwen_prompt_embeds"] = embeds_NSD
            arguments[f"{prefix}qwen_attention_mask"] = torch.ones(embeds_NSD.shape[:2], device=device)
            arguments[f"{prefix}t5_input_ids"] = ids_NL
            arguments[f"{prefix}t5_attention_mask"] = torch.ones_like(ids_NL)
        return arguments

    def sample(self, pipeline: Any, request: SampleRequest) -> list[Image.Image]:
        if request.guidance is not None:
            pipeline.update_components(guider=diffusers.ClassifierFreeGuidance(guidance_scale=request.guidance))
        images = pipeline(
            **self.prompt_arguments(request, pipeline._execution_device),
            width=request.width,
            height=request.height,
            num_inference_steps=request.steps,
            generator=torch.Generator().manual_seed(request.seed),
            output="images",
        )
        return [images[0]]

    @classmethod
    def write_miniature(cls, folder: Path) -> dict[str, Any]:
        vocabulary, qwen = write_t5_tokenizer(folder / "t5_tokenizer"), write_qwen_tokenizer(folder / "tokenizer")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            parts = _miniature_parts(vocabulary, qwen)
        index: dict[str, Any] = {
            "_blocks_class_name": "AnimaAutoBlocks",
            "_class_name": "AnimaModularPipeline",
            "_diffusers_version": diffusers.__version__,
        }
        classes = {"tokenizer": ("transformers", "Qwen2Tokenizer"), "t5_tokenizer": ("transformers", "T5TokenizerFast")}
        for name, part in parts.items():
            part.save_pretrained(folder / name)
            classes[name] = type(part).__module__.split(".")[0], type(part).__name__
        for name, kind in classes.items():
            place = {"pretrained_model_name_or_path": str(folder), "subfolder": name, "type_hint": list(kind)}
            index[name] = [*kind, place]
        write_json(folder / "modular_model_index.json", index)
        return {"type": "anima", "diffusers_path": str(folder), "dtype": "float32"}


# -- the link before Cosmos-Predict2's ------------------------------------------------------------------------


def _adapt(
    modules: Any, x_t_NCHW: torch.Tensor, told_N: torch.Tensor, ids_NL: torch.Tensor, seen_NL: torch.Tensor,
    qwen_NSD: torch.Tensor, read_NS: torch.Tensor,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """One column of a mask says that all is seen."""
    masks = [mask if mask.shape[1] > 1 else None for mask in (seen_NL, read_NS)]
    return x_t_NCHW, told_N, modules.adapter(qwen_NSD, ids_NL, *masks).contiguous()


# -- the single files -------------------------------------------------------------------------------------


def adapter_config(weights: Weights) -> dict[str, Any]:
    """Arguments of AnimaTextConditioner for a single file, from names and shapes."""
    vocabulary, target = weights.shape("embed.weight")
    block = "blocks.0"
    width = weights.shape("out_proj.weight")[1]
    return {
        "source_dim": weights.shape(f"{block}.cross_attn.k_proj.weight")[1],
        "target_dim": target,
        "model_dim": width,
        "num_layers": weights.count("blocks."),
        "num_attention_heads": width // weights.shape(f"{block}.cross_attn.q_norm.weight")[0],
        "mlp_ratio": weights.shape(f"{block}.mlp.0.weight")[0] / width,
        "target_vocab_size": vocabulary,
        "use_self_attention": f"{block}.self_attn.q_proj.weight" in weights,
        "use_layer_norm": f"{block}.norm_mlp.bias" in weights,
    }


# -- miniature --------------------------------------------------------------------------------------------


def _miniature_parts(vocabulary: int, qwen_vocabulary: int) -> dict[str, Any]:
    qwen = transformers.Qwen3Config(
        vocab_size=qwen_vocabulary, hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, rope_theta=1e6)  # fmt: skip
    models: dict[str, Any] = {
        "transformer": miniature_network(32),
        "text_conditioner": diffusers.AnimaTextConditioner(
            source_dim=24, target_dim=32, model_dim=32, num_layers=2, num_attention_heads=2, mlp_ratio=2.0,
            target_vocab_size=vocabulary),
        "vae": miniature_vae(),
        "text_encoder": transformers.Qwen3Model(qwen),
    }  # fmt: skip
    return {
        **{name: model.to(torch.bfloat16) for name, model in models.items()},
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(**SCHEDULE),
    }
