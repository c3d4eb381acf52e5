"""Qwen-Image, Qwen-Image-Edit, Edit-2509 and Edit-2511, by Alibaba's Qwen team: 60 double blocks, 20 billion weights.

A rectified-flow transformer over 2x2 patches of the latents of Wan's VAE. Caption (Qwen2.5-VL's last hidden states, in
their own length) and picture pass the blocks as two streams with joint attention, the caption first. The network
predicts noise - x0. Control pictures come in twice: the language model looks at them when it reads the caption, and
their patches follow those of what is made, each picture one step further on the axis of frames; what the network says
of them is dropped. Edit takes one, 2509 and 2511 up to three, with words around each that number them. In 2511 control
pictures are modulated as at time 0.

Reference: https://github.com/QwenLM/Qwen-Image, and diffusers' QwenImagePipeline, QwenImageEditPipeline and
QwenImageEditPlusPipeline, which the layers here equal but for rounding: rotary embedding is in real numbers here. What
differs: latents are normalised in float32, as in ComfyUI, where the pipelines for edits round in between; the language
model is told which tokens are pictures (see `qwen25_vl`); control pictures have the size of what is made, where the
pipelines make them of a megapixel each. An odd number of patches has its middle where diffusers has it, one patch from
where ComfyUI has it. Licence of the weights: Apache-2.0.

Shape legend: N batch, C latent channels, F frames (1), H W height and width of the latents, T tokens of the picture
(H/2 * W/2) and of control pictures, L caption tokens, K features of a patch (4C), D features.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..utils.config import SettingsError, option
from ..utils.imports import lazy
from ..utils.weights import Weights, build, fill
from . import qwen25_vl, wan_files
from .base import Batch, Encodings, Example, Layer, SampleRequest, Shapes
from .captions import side_by_side
from .components import Component, FromComponents, TextEncoder
from .files import fingerprint, read_json, write_json
from .flow import FlowConfig, FlowFamily, pack
from .qwen25_vl import PICTURE, Qwen25VL

if TYPE_CHECKING:
    import diffusers
    import torch
    from PIL import Image, ImageOps
    from torch import nn
else:
    diffusers, torch = map(lazy, ("diffusers", "torch"))
    Image, ImageOps = map(lazy, ("PIL.Image", "PIL.ImageOps"))

SCHEDULE: dict[str, Any] = {
    "shift": 1.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "base_image_seq_len": 256,
    "max_image_seq_len": 8192, "shift_terminal": 0.02,
}  # fmt: skip
TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
EDIT_TEMPLATE = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a new image "
    "that meets the user's requirements while maintaining consistency with the original input where appropriate."
    "<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
DROPPED, EDIT_DROPPED = 34, 64
"""Tokens of the templates before the caption or the pictures; the transformer does not see them."""
SHOWN, SHOWN_PLUS = 1024 * 1024, 384 * 384
"""Pixels at which the language model looks at a control picture: of Edit, and of 2509 and 2511."""
TIME_ZERO = "__index_timestep_zero__"
"""A tensor without elements by which ComfyUI knows a file of 2511."""
LAYERED = ("time_text_embed.addition_t_embedding.weight",)
"""Of Qwen-Image-Layered, which draws several pictures at once."""


class QwenImageConfig(FlowConfig):
    """Qwen-Image and, with control pictures in the dataset, Qwen-Image-Edit."""

    type: Literal["qwen_image"] = "qwen_image"
    diffusers_path: str | None = option(
        None,
        "Folder of the whole model in diffusers layout. What a path below names is taken from there instead.",
        picker="diffusers",
    )
    transformer_path: str | None = option(
        None, "Transformer as a single file, such as qwen_image_bf16.safetensors.", picker="diffusion_models"
    )
    text_encoder_path: str | None = option(
        None, "Text encoder as a single file, such as qwen_2.5_vl_7b.safetensors.", picker="text_encoders"
    )
    tokenizer_path: str | None = option(
        None, "Folder of the tokenizer, if it is in neither the diffusers folder nor ComfyUI."
    )
    vae_path: str | None = option(None, "VAE as a single file, such as qwen_image_vae.safetensors.", picker="vae")
    edit_mode: Literal["auto", "edit", "edit_plus"] = option(
        "auto",
        "How control pictures are shown to the text encoder: edit one picture, as Qwen-Image-Edit; edit_plus up to "
        "three, as Edit-2509 and 2511. auto: edit_plus for 2511 or if the diffusers folder is one of 2509 or 2511.",
        advanced=True,
    )
    max_sequence_length: int = option(
        1024, "Tokens per caption; longer captions are cut, but not those of edits.", ge=16, le=1024, advanced=True
    )


class QwenImage2511Config(QwenImageConfig):
    """Qwen-Image-Edit-2511."""

    type: Literal["qwen2511"] = "qwen2511"  # type: ignore[assignment]


VAE_FILES = replace(wan_files.PARTS["vae"], title="the Qwen-Image VAE, such as qwen_image_vae.safetensors")
COMPONENTS = {
    "transformer": Component(
        "a Qwen-Image transformer, such as qwen_image_bf16.safetensors", "transformer_path", "transformer",
        "QwenImageTransformer2DModel", ("transformer_blocks.0.img_mod.1.weight", "txt_norm.weight"),
        ("model.diffusion_model.", "diffusion_model."), LAYERED),
    "vae": Component(VAE_FILES.title, "vae_path", "vae", "AutoencoderKLQwenImage", (), ()),
    "qwen": Component(
        qwen25_vl.FILES.title, "text_encoder_path", "text_encoder", "Qwen2_5_VL", (), (), (), "tokenizer_path",
        "tokenizer", "comfy/text_encoders/qwen25_tokenizer"),
}  # fmt: skip


class QwenImage(FromComponents, FlowFamily):
    """Qwen-Image in the hands of the trainer."""

    title = "Qwen-Image"
    Config: ClassVar[type[QwenImageConfig]] = QwenImageConfig
    config: QwenImageConfig
    components = COMPONENTS
    whole = "a Qwen-Image folder in diffusers layout"
    published = "Qwen-Image"
    size_multiple = 16
    max_controls = 1
    text_sees_controls = ("qwen",)
    text_encoders = ("qwen",)
    shared_inputs = (("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"))
    adapter_blocks = ("QwenImageTransformerBlock",)
    high_precision = ("^time_text_embed", "^img_in", "^txt_in", "^norm_out", "^proj_out")
    is_2511: ClassVar[bool] = False

    # -- files ------------------------------------------------------------------------------------

    def _weights(self, name: str) -> Weights:
        """Files of VAE and text encoder name their tensors in one of two ways."""
        path, setting = self._place(name)
        if name == "transformer" or path.is_dir():
            return super()._weights(name)
        return wan_files.open_part(VAE_FILES if name == "vae" else qwen25_vl.FILES, path, setting).weights

    def check_files(self) -> None:
        parts = {name: self._weights(name) for name in self.components}
        self._tokenizer_folder("qwen")
        transformer = parts["transformer"]
        self._check_widths(
            parts,
            {
                "vae": (_vae_channels(parts["vae"]), transformer.shape("img_in.weight")[1] // 4),
                "qwen": (qwen25_vl.width_of(parts["qwen"]), transformer.shape("txt_in.weight")[1]),
            },
        )
        config = self._transformer_config()
        if config.get("use_layer3d_rope") or config.get("use_additional_t_cond"):
            raise SettingsError(
                f"{transformer.option}: '{transformer.path}' is Qwen-Image-Layered, which cannot be trained; give "
                f"{self.components['transformer'].title}"
            )
        if self.is_2511 and not config.get("zero_cond_t"):
            raise SettingsError(
                f"{transformer.option}: '{transformer.path}' is not Qwen-Image-Edit-2511 (its config.json has no "
                "zero_cond_t); for other models give type = 'qwen_image'"
            )
        self.max_controls = 3 if self.is_plus else 1

    @property
    def is_plus(self) -> bool:
        """Whether control pictures are numbered, as in 2509 and 2511."""
        if self.config.edit_mode != "auto":
            return self.config.edit_mode == "edit_plus"
        index = Path(self.config.diffusers_path or "").expanduser() / "model_index.json"
        is_there = bool(self.config.diffusers_path) and index.is_file()
        return self.is_2511 or (is_there and read_json(index)["_class_name"] == "QwenImageEditPlusPipeline")

    @property
    def _processor_folder(self) -> Path:
        return Path(self.config.diffusers_path or "").expanduser() / "processor"

    def identity(self, part: str) -> str:
        identity = {"weights": fingerprint(self._place(part)[0]), "dtype": self.config.dtype}
        if part == "qwen":
            identity["tokenizer"] = fingerprint(self._tokenizer_folder(part))
            identity["length"] = str(self.config.max_sequence_length)
            identity["pictures"] = "numbered" if self.is_plus else "one"
            if (file := self._processor_folder / "preprocessor_config.json").is_file():
                identity["processor"] = fingerprint(file)
            if self.text_dtype:
                identity["storage"] = self.text_dtype
        return json.dumps(identity)

    # -- encoding, once per sample, cached ----------------------------------------------------------

    def load_vae(self, device: torch.device) -> nn.Module:
        weights = self._weights("vae")
        vae = build(lambda: diffusers.AutoencoderKLQwenImage.from_config(_vae_config(weights)))
        fill(vae, lambda name: weights.read(_vae_name(name, weights, vae.config.num_res_blocks)), self.dtype, device)
        return vae.eval()

    def encode_media(
        self, vae: Any, pixels_NCFHW: torch.Tensor, generators: Sequence[torch.Generator]
    ) -> dict[str, torch.Tensor]:
        """As `Family.encode_media`; the VAE is one of videos, and its latents keep their one frame."""
        with torch.no_grad():
            latents_NCFHW = vae.encode(pixels_NCFHW.to(self.dtype)).latent_dist.mode().float()
        mean, std = (
            torch.tensor(values, device=latents_NCFHW.device).view(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        return {"latents": ((latents_NCFHW - mean) / std).to(self.dtype)}

    def load_text_encoder(self, name: str, device: torch.device) -> Qwen25VL:
        folders = self._tokenizer_folder(name), self._processor_folder
        return qwen25_vl.load(self._weights(name), *folders, self.dtype, device, self.text_storage(("visual",)))

    def encode_text(self, name: str, encoder: Qwen25VL, captions: Sequence[str]) -> Encodings:
        texts = [TEMPLATE.format(caption) for caption in captions]
        states = qwen25_vl.encode(encoder, texts, self.config.max_sequence_length + DROPPED)
        return {"qwen_embeds": [states_LD[DROPPED:].to(self.dtype) for states_LD in states]}

    def encode_edit(
        self, name: str, encoder: Qwen25VL, captions: Sequence[str], controls: Sequence[Sequence[torch.Tensor]]
    ) -> Encodings:
        embeds: list[torch.Tensor] = []
        for caption, pictures_CHW in zip(captions, controls, strict=True):
            if not pictures_CHW:
                embeds += self.encode_text(name, encoder, [caption])["qwen_embeds"]
                continue
            pixels = SHOWN_PLUS if self.is_plus else SHOWN
            pictures = [shown(picture_CHW, pixels) for picture_CHW in pictures_CHW]
            numbered = [f"Picture {n}: {PICTURE}" if self.is_plus else PICTURE for n in range(1, len(pictures) + 1)]
            text = EDIT_TEMPLATE.format("".join(numbered) + caption)
            states_LD = qwen25_vl.encode_with_pictures(encoder, text, pictures)
            embeds.append(states_LD[EDIT_DROPPED:].to(self.dtype))
        return {"qwen_embeds": embeds}

    # -- training -----------------------------------------------------------------------------------

    def _transformer_config(self) -> dict[str, Any]:
        weights = self._weights("transformer")
        if weights.path.is_dir():
            return read_json(weights.path / "config.json")
        return transformer_config(weights) | {"zero_cond_t": self.is_2511 or TIME_ZERO in weights}

    def build_denoiser(self) -> nn.Module:
        config = self._transformer_config()
        return build(lambda: diffusers.QwenImageTransformer2DModel.from_config(config))

    def denoiser_reader(self) -> Callable[[str], torch.Tensor]:
        return self._weights("transformer").read

    def layers(self, denoiser: Any) -> list[Layer]:
        """As `Family.layers`; the denoiser's attention is given its real form, which pipelines run as well."""
        from .qwen_image_attention import real_angles, use_real_attention

        use_real_attention(denoiser)
        embedders = ("img_in", "time_text_embed", "txt_norm", "txt_in", "pos_embed")
        embed = partial(_embed, real_angles=real_angles, zero_cond_t=denoiser.config.zero_cond_t)
        block = partial(_block, zero_cond_t=denoiser.config.zero_cond_t)
        layers = [Layer("embed", embed, {name: getattr(denoiser, name) for name in embedders})]
        for index, each in enumerate(denoiser.transformer_blocks):
            layers.append(Layer(f"transformer_blocks.{index}", block, {"block": each}, is_block=True))
        layers.append(Layer("out", _out, {"norm_out": denoiser.norm_out, "proj_out": denoiser.proj_out}))
        return layers

    def collate(self, examples: Sequence[Example]) -> Batch:
        x_t_NCFHW, t_N, velocity_NCFHW = self.noised(examples)
        # The network is told the time as the pipeline rounds it: t * 1000 in the latents' precision.
        told_N = ((t_N * 1000).to(self.dtype) / 1000).float()
        text_NLD, seen_NL = side_by_side([example.text["qwen_embeds"].to(self.dtype) for example in examples])
        target_NTK = pack(velocity_NCFHW.squeeze(2))
        controls = zip(*([control["latents"] for control in example.controls] for example in examples), strict=True)
        return Batch(
            inputs=(
                x_t_NCFHW.to(self.dtype), told_N, text_NLD, seen_NL,
                *(torch.stack(pictures).to(self.dtype) for pictures in controls),
            ),
            target=target_NTK,
            weight=self.time_weight(t_N, target_NTK),
        )  # fmt: skip

    def cached_shapes(self, latent_size: tuple[int, int, int]) -> tuple[Shapes, Shapes]:
        config: Any = self.build_denoiser().config
        return {"latents": (config.in_channels // 4, *latent_size)}, {"qwen_embeds": (128, config.joint_attention_dim)}

    def with_controls(self, example: Example, number: int) -> Example:
        """As `Family.with_controls`; the language model has a token for each 28x28 pixels of a control picture."""
        example = super().with_controls(example, number)
        text_LD = example.text["qwen_embeds"]
        seen = len(example.controls) * (SHOWN_PLUS if self.is_plus else SHOWN) // 28**2
        return replace(example, text={"qwen_embeds": text_LD.new_zeros(len(text_LD) + seen, text_LD.shape[1])})

    def spread_mask(self, mask_NFHW: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return pack(mask_NFHW.expand(-1, target.shape[-1] // 4, -1, -1))

    # -- results ------------------------------------------------------------------------------------

    def lora_keys(self, module_name: str) -> str:
        return f"diffusion_model.{module_name}"

    def other_tensors(self, names: Container[str]) -> dict[str, torch.Tensor]:
        return {TIME_ZERO: torch.zeros(0)} if self._transformer_config().get("zero_cond_t") else {}

    def pipeline(self, denoiser: Any, device: torch.device, text_encoders: bool = True) -> Any:
        """As `Family.pipeline`; `sample` shows it control pictures."""
        from .qwen_image_attention import QwenImagePipeline, use_real_attention

        qwen = self.load_text_encoder("qwen", device) if text_encoders else TextEncoder(None, None)
        use_real_attention(denoiser)
        return QwenImagePipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler.from_config(self._schedule(SCHEDULE)),
            vae=self.load_vae(device),
            text_encoder=qwen.model,
            tokenizer=qwen.tokenizer,
            transformer=denoiser,
        )

    def prompt_arguments(self, request: SampleRequest, device: torch.device) -> dict[str, Any]:
        arguments: dict[str, Any] = {}
        for prefix, text in (("", request.text), ("negative_", request.negative_text)):
            embeds_NLD = text["qwen_embeds"][None].to(device)
            seen_NL = torch.ones(embeds_NLD.shape[:2], dtype=torch.int64, device=device)
            arguments |= {f"{prefix}prompt_embeds": embeds_NLD, f"{prefix}prompt_embeds_mask": seen_NL}
        return arguments

    def sample(self, pipeline: Any, request: SampleRequest) -> list[Image.Image]:
        """As `Family.sample`; ``guidance`` is the strength of the negative prompt. Control pictures have the size of
        what is drawn, as in training; diffusers' pipelines for edits would choose another."""
        size = request.width, request.height
        arguments = {} if request.guidance is None else {"true_cfg_scale": request.guidance}
        controls = [self._control(pipeline.vae, ImageOps.fit(image.convert("RGB"), size)) for image in request.images]
        with shown_controls(pipeline.transformer, controls):
            output = pipeline(
                width=request.width,
                height=request.height,
                **arguments,
                **self.prompt_arguments(request, pipeline._execution_device),
                num_inference_steps=request.steps,
                generator=torch.Generator().manual_seed(request.seed),
            )
        return [output.images[0]]

    def _control(self, vae: Any, picture: Image.Image) -> torch.Tensor:
        """Patches of a control picture: NTK."""
        pixels_HWC = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(*picture.size[::-1], 3)
        pixels_NCFHW = pixels_HWC.permute(2, 0, 1)[None, :, None].to(vae.device).float() / 127.5 - 1
        return pack(self.encode_media(vae, pixels_NCFHW, [])["latents"].squeeze(2))

    @classmethod
    def write_miniature(cls, folder: Path, edit: str = "") -> dict[str, Any]:
        """As `Family.write_miniature`.

        Args:
            edit: The pipeline that the folder names: "" of pictures alone, "Edit", or "EditPlus".
        """
        edit = "EditPlus" if cls.is_2511 else edit
        vocabulary = qwen25_vl.write_tokenizer(folder / "tokenizer", [TEMPLATE, EDIT_TEMPLATE, "Picture 1: a red cat"])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            parts = _miniature_parts(vocabulary, cls.is_2511)
        pipeline = f"QwenImage{edit}Pipeline"
        index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": diffusers.__version__}
        for name, part in parts.items():
            part.save_pretrained(folder / name)
            index[name] = [type(part).__module__.split(".")[0], type(part).__name__]
        index["tokenizer"] = ["transformers", "PreTrainedTokenizerFast"]
        if edit:
            qwen25_vl.write_processor(folder / "processor")
            index["processor"] = ["transformers", "Qwen2VLProcessor"]
        write_json(folder / "model_index.json", index)
        kind = cls.Config.model_fields["type"].default
        return {"type": kind, "diffusers_path": str(folder), "dtype": "float32", "max_sequence_length": 64}


class QwenImage2511(QwenImage):
    """Qwen-Image-Edit-2511, whose control pictures are modulated as at time 0."""

    title = "Qwen-Image-Edit-2511"
    Config = QwenImage2511Config
    config: QwenImage2511Config
    max_controls = 3
    is_2511 = True


def shown(picture_CHW: torch.Tensor, pixels: int) -> Image.Image:
    """A control picture (uint8) as the pipelines show it to the language model: of about so many pixels, both sides
    multiples of 32."""
    picture = Image.fromarray(picture_CHW.permute(1, 2, 0).contiguous().cpu().numpy())
    ratio = picture.width / picture.height
    width = math.sqrt(pixels * ratio)
    size = [max(32, round(side / 32) * 32) for side in (width, width / ratio)]
    return picture.resize((size[0], size[1]), Image.Resampling.LANCZOS)


@contextmanager
def shown_controls(transformer: nn.Module, controls: Sequence[torch.Tensor]) -> Iterator[None]:
    """Within it the transformer sees control pictures (each NTK) besides what its caller gives it."""

    def before(_module: Any, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        tokens_NTK = given["hidden_states"]
        shapes = [list(pictures[:1]) * (1 + len(controls)) for pictures in given["img_shapes"]]
        joined_NTK = torch.cat([tokens_NTK, *(control.to(tokens_NTK) for control in controls)], dim=1)
        return args, {**given, "hidden_states": joined_NTK, "img_shapes": shapes}

    def after(_module: Any, _args: Any, given: dict[str, Any], output: Any) -> Any:
        return (output[0][:, : given["hidden_states"].shape[1] // (1 + len(controls))],)

    hooks = []
    if controls:
        hooks.append(transformer.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(transformer.register_forward_hook(after, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# -- links of the chain ---------------------------------------------------------------------------------

Tensors = tuple["torch.Tensor", ...]


def _embed(
    modules: Any,
    x_t_NCFHW: torch.Tensor,
    told_N: torch.Tensor,
    text_NLD: torch.Tensor,
    seen_NL: torch.Tensor,
    *controls_NCFHW: torch.Tensor,
    real_angles: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    zero_cond_t: bool,
) -> Tensors:
    """With controls there is one tensor more, whose length is the number of tokens that are made."""
    tokens_NTK = pack(x_t_NCFHW.squeeze(2))
    made: Tensors = ()
    if controls_NCFHW:
        made = (torch.zeros(tokens_NTK.shape[1], dtype=torch.uint8, device=tokens_NTK.device),)
        tokens_NTK = torch.cat([tokens_NTK, *(pack(control.squeeze(2)) for control in controls_NCFHW)], dim=1)
    x_NTD = modules.img_in(tokens_NTK)
    told_N = told_N.to(x_NTD.dtype)
    if zero_cond_t and made:
        told_N = torch.cat([told_N, torch.zeros_like(told_N)])
    temb_ND = modules.time_text_embed(told_N, x_NTD)
    text_NLD = modules.txt_in(modules.txt_norm(text_NLD))
    grid = 1, x_t_NCFHW.shape[3] // 2, x_t_NCFHW.shape[4] // 2
    shapes = [[grid] * (1 + len(controls_NCFHW))]
    turns = modules.pos_embed(shapes, device=x_NTD.device, max_txt_seq_len=text_NLD.shape[1])
    cos_TD, sin_TD = real_angles(*turns)
    return x_NTD, text_NLD, temb_ND, cos_TD, sin_TD, seen_NL, *made


def _block(
    modules: Any,
    x_NTD: torch.Tensor,
    text_NLD: torch.Tensor,
    temb_ND: torch.Tensor,
    cos_TD: torch.Tensor,
    sin_TD: torch.Tensor,
    seen_NL: torch.Tensor,
    *made: torch.Tensor,
    zero_cond_t: bool,
) -> Tensors:
    text_NLD, x_NTD = modules.block(
        hidden_states=x_NTD,
        encoder_hidden_states=text_NLD,
        encoder_hidden_states_mask=seen_NL.bool() if seen_NL.shape[1] > 1 else None,
        temb=temb_ND,
        image_rotary_emb=(cos_TD, sin_TD),
        modulate_index=made[0] if zero_cond_t and made else None,
    )
    return x_NTD.contiguous(), text_NLD.contiguous(), temb_ND, cos_TD, sin_TD, seen_NL, *made


def _out(
    modules: Any, x_NTD: torch.Tensor, _text: Any, temb_ND: torch.Tensor, _cos: Any, _sin: Any, _seen: Any,
    *made: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    prediction_NTK: torch.Tensor = modules.proj_out(modules.norm_out(x_NTD, temb_ND[: len(x_NTD)]))
    return prediction_NTK[:, : made[0].shape[0]] if made else prediction_NTK


# -- the single files -------------------------------------------------------------------------------------


def transformer_config(weights: Weights) -> dict[str, Any]:
    """Arguments of QwenImageTransformer2DModel for a single file, from names and shapes."""
    head_dim = weights.shape("transformer_blocks.0.attn.norm_q.weight")[0]
    width, in_channels = weights.shape("img_in.weight")
    side = head_dim * 7 // 32 * 2  # 56 of 128, for rows and for columns; the first axis has what is left
    return {
        "in_channels": in_channels,
        "out_channels": weights.shape("proj_out.weight")[0] // 4,
        "num_layers": weights.count("transformer_blocks."),
        "attention_head_dim": head_dim,
        "num_attention_heads": width // head_dim,
        "joint_attention_dim": weights.shape("txt_in.weight")[1],
        "axes_dims_rope": (head_dim - 2 * side, side, side),
    }


ORIGINAL_VAE = "conv2.weight"
"""A tensor of VAE files in Wan's layout."""


def _vae_config(weights: Weights) -> dict[str, Any]:
    """Of AutoencoderKLQwenImage, from the folder, from beside a file that was in one, or from shapes."""
    file = (weights.path if weights.path.is_dir() else weights.path.parent) / "config.json"
    if ORIGINAL_VAE in weights:
        config = wan_files.vae_config(weights)
        return {key: config[key] for key in ("base_dim", "z_dim", "dim_mult", "num_res_blocks", "temperal_downsample")}
    if file.is_file():
        return read_json(file)
    return {"base_dim": weights.shape("encoder.conv_in.weight")[0], "z_dim": _vae_channels(weights)}


def _vae_name(name: str, weights: Weights, num_res_blocks: int) -> str:
    """Where a parameter of AutoencoderKLQwenImage lies."""
    return wan_files.original_vae_name(name, num_res_blocks, False) if ORIGINAL_VAE in weights else name


def _vae_channels(weights: Weights) -> int:
    return weights.shape("conv2.weight" if ORIGINAL_VAE in weights else "post_quant_conv.weight")[0]


# -- miniature --------------------------------------------------------------------------------------------


def _miniature_parts(vocabulary: Mapping[str, int], zero_cond_t: bool) -> dict[str, Any]:
    models: dict[str, Any] = {
        "transformer": diffusers.QwenImageTransformer2DModel(
            in_channels=64, out_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=32, axes_dims_rope=(4, 6, 6), zero_cond_t=zero_cond_t),
        "vae": diffusers.AutoencoderKLQwenImage(base_dim=8),
        "text_encoder": qwen25_vl.miniature(vocabulary),
    }  # fmt: skip
    for model in models.values():
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.ndim == 1:  # which are all ones, as if each were any other
                torch.nn.init.normal_(parameter, 1.0, 0.2)
    return {
        **{name: model.to(torch.bfloat16) for name, model in models.items()},
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(**SCHEDULE),
    }
