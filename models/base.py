"""What the trainer asks of a model family, and what families share.

A family is one file in this folder. It says what the model is made of (`Config`), how pictures and
captions become cached tensors, how a batch becomes the denoiser's inputs and target, and how the
denoiser is cut into a chain of layers. The trainer calls nothing that is not declared here.

Shape legend: N batch, C channels, F frames, H W height and width (of pixels or latents, as said),
L text tokens, D features.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import model_validator

from ..utils.config import Dtype, Table, option
from ..utils.imports import lazy
from ..utils.weights import fill, held_bytes

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import nn

    from ..utils import storage as stored
    from ..utils.storage import Storage
else:
    torch = lazy("torch")
    stored = lazy(__name__.split(".models.")[0] + ".utils.storage")

Encodings = Mapping[str, "torch.Tensor | Sequence[torch.Tensor]"]
"""Values of captions by name, batch first; a list where captions differ in length."""
StorageDtype = Literal["bfloat16", "float16", "float32", "float8", "float8_e4m3fn", "float8_e5m2", "int8", "nf4"]


LossWeighting = Literal["none", "sigma_sqrt", "cosmap"]


class ModelConfig(Table):
    """What every ``[model]`` table has."""

    unused: ClassVar = {
        "load_dtype": "weights are read in dtype, or in transformer_dtype",
        "attn_implementation": "attention_backend at the top level chooses",
    }

    type: str
    dtype: Dtype = option("bfloat16", "Precision that the model computes in.")
    transformer_dtype: StorageDtype | None = option(
        None,
        "Precision that the frozen transformer weights are stored in; float8 and int8 halve their memory, nf4 (4 bits) "
        "halves it again. Left out: the same as dtype.",
        also=("diffusion_model_dtype",),
    )
    quantized_matmul: bool = option(
        False,
        "With transformer_dtype float8 or int8: multiply in that precision as well, activations too. float8 is faster "
        "on RTX 40 and newer, H100 and newer; int8 on RTX 30.",
        advanced=True,
    )
    text_encoder_dtype: StorageDtype | None = option(
        None,
        "Precision that the large text encoders' weights are stored in, for GPUs that cannot hold them otherwise. "
        "Changes cached captions a little. Left out: the same as dtype.",
        advanced=True,
    )
    merge_adapters: list[str] | None = option(
        None, "LoRAs that are merged into the model before training, one per line.", lines=True, advanced=True
    )
    timestep_sample_method: Literal["logit_normal", "uniform"] = option(
        "logit_normal", "Which noise levels are trained most: logit_normal the middle ones, uniform all alike."
    )
    sigmoid_scale: float = option(
        1.0, "Width of the logit_normal distribution; larger reaches more of the ends.", gt=0, step=0.1, advanced=True
    )
    logit_mean: float = option(
        0.0,
        "Middle of the logit_normal distribution: above 0 trains high noise more, below 0 low noise.",
        ge=-10,
        le=10,
        step=0.1,
        advanced=True,
    )
    loss_weighting: LossWeighting = option(
        "none",
        "How much the loss at each noise level counts: none all alike, sigma_sqrt low noise much more (1 / t^2), "
        "cosmap the middle more.",
        advanced=True,
    )
    shift: float | None = option(
        None,
        "Moves training towards high noise: t' = shift*t / (1 + (shift - 1)*t). 3 is usual for large pictures.",
        gt=0,
        step=0.1,
        advanced=True,
    )
    min_t: float = option(0.0, "Lowest noise level that is trained.", ge=0, lt=1, step=0.001, advanced=True)
    max_t: float = option(1.0, "Highest noise level that is trained.", gt=0, le=1, step=0.001, advanced=True)

    @model_validator(mode="after")
    def _some_noise(self) -> ModelConfig:
        if self.min_t >= self.max_t:
            raise ValueError(f"min_t must be below max_t, got {self.min_t:g} and {self.max_t:g}")
        return self


Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Layer:
    """One link of the chain that computes the denoiser; a pipeline stage may end after any link.

    ``forward(modules, *tensors)`` takes the tuple that the link before returned and returns the next
    one; `modules` carries the entries of `submodules` as attributes. The last link returns the
    prediction alone. Tuples between links hold contiguous tensors, of any number and dtype (a U-Net's
    skip connections travel along until they are used).
    """

    name: str
    """The module's name in the denoiser, or a name of our own for a link made of several."""
    forward: Callable[..., Any]
    submodules: Mapping[str, Any]
    is_block: bool = False
    """One of the many alike blocks: checkpointed, swapped and balanced between stages."""


@dataclass
class Example:
    """One cached sample as the trainer hands it to `Family.collate`."""

    media: dict[str, torch.Tensor]
    """What `encode_media` gave for it, without the batch dimension."""
    text: dict[str, torch.Tensor]
    """What the text encoders gave for its caption, without the batch dimension, one dict for all."""
    noise: torch.Tensor
    """Standard normal, shaped like ``media["latents"]``, float32."""
    quantile: float
    """Uniform in (0, 1); `timestep` turns it into the noise level."""
    controls: tuple[dict[str, torch.Tensor], ...] = ()
    """What `encode_media` gave for each control picture, at the size of ``media``."""
    seed: int = 0
    """For what else a family draws at random; it depends on what noise and quantile depend on."""


@dataclass
class Batch:
    """What one micro-batch feeds to the chain of layers and compares its output with."""

    inputs: tuple[torch.Tensor, ...]
    """Arguments of the first link."""
    target: torch.Tensor
    """Shaped like the prediction, float32."""
    weight: torch.Tensor = field(default_factory=lambda: torch.ones(()))
    """Weight of each element of the loss; broadcasts against `target`."""

    def pinned(self) -> Batch:
        """The same in page-locked memory, from which copies to a GPU run beside its work."""
        inputs = tuple(tensor.pin_memory() for tensor in self.inputs)
        return Batch(inputs, self.target.pin_memory(), self.weight.contiguous().pin_memory())


@dataclass(frozen=True)
class SampleRequest:
    """A picture or clip to draw while training, to see how it goes."""

    text: Mapping[str, torch.Tensor]
    """What `encode_text` gave for the prompt, without the batch dimension, one dict for all text encoders."""
    negative_text: Mapping[str, torch.Tensor]
    """The same for the negative prompt."""
    width: int
    height: int
    """In pixels, multiples of the family's `size_multiple`."""
    frames: int = 1
    """A length that the family has; 1 for a picture."""
    steps: int = 20
    guidance: float | None = None
    """Left out: the pipeline's usual one."""
    true_cfg: float = 1.0
    """For models with distilled guidance: strength of the negative prompt; 1 leaves it out."""
    seed: int = 0
    images: tuple[Image, ...] = ()
    """What edit models and image-to-video models start from."""


class Family(ABC):
    """A model family. One instance lives in each process of a run."""

    title: ClassVar[str]
    """Name for people, such as "Flux"."""
    Config: ClassVar[type[ModelConfig]]
    size_multiple: int = 16
    """Pixel width and height must be multiples of this. It and the next three may differ from variant to
    variant of a family; `check_files` sets them then."""
    latent_multiple: int = 8
    """Pixels that one latent stands for, across and down."""
    fps: float | None = None
    """Frames in a second of the videos that it makes; None where it makes pictures alone."""
    takes_pictures: bool = True
    """Pictures can be trained; not so where the first frame is given and the rest is to be made."""
    frame_multiple: ClassVar[int] = 4
    frame_remainder: ClassVar[int] = 1
    """Videos have ``frame_multiple * n + frame_remainder`` frames; each n is one frame of latents."""
    max_controls: int = 0
    """Most control pictures that it takes, as edit models do; may differ from variant to variant, too."""
    text_sees_controls: ClassVar[tuple[str, ...]] = ()
    """Text encoders that look at the control pictures, too; see `encode_edit`."""
    text_encoders: ClassVar[tuple[str, ...]]
    """Names of the text encoders, each cached by itself."""
    adapter_blocks: ClassVar[tuple[str, ...]]
    """Class names of the blocks whose linear layers get an adapter unless the user says otherwise."""
    shared_inputs: ClassVar[tuple[tuple[str, ...], ...]] = ()
    """Linear layers that are given the same tensor one after the other, by the ends of their names; with a LoRA they
    are computed together."""
    model_folder: ClassVar[str] = "diffusion_models"
    """Folder of ComfyUI's models in which an exported model belongs."""
    lora_sides: ClassVar[tuple[str, str]] = ("lora_A", "lora_B")
    """What ComfyUI and diffusers call the two matrices of this family's LoRA: into the rank and out of it."""
    says_alpha: ClassVar[bool] = True
    """The file of a LoRA says alpha; not so where diffusers takes matrices alone, which then carry it."""
    float32: ClassVar[tuple[str, ...]] = ()
    """Denoiser parameters with one of these in their name are kept in float32."""
    high_precision: ClassVar[tuple[str, ...]] = ()
    """Parameters in whose name one of these regular expressions is found stay at `dtype` when
    `transformer_dtype` is float8."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    @property
    def dtype(self) -> torch.dtype:
        """The precision that the model computes in."""
        return getattr(torch, self.config.dtype)

    @property
    def storage(self) -> Storage | None:
        """How the denoiser's linear layers are stored; None: at `dtype`."""
        return self._storage(self.config.transformer_dtype, self.high_precision)

    def text_storage(self, kept: Sequence[str] = ()) -> Storage | None:
        """How a large text encoder's linear layers are stored, but those of ``kept``; None: at `dtype`."""
        return self._storage(self.text_dtype, kept)

    @property
    def text_dtype(self) -> str | None:
        """What a large text encoder is stored in; None: `dtype`."""
        return self.config.text_encoder_dtype

    def _storage(self, name: str | None, kept: Sequence[str]) -> Storage | None:
        return None if name in (None, self.config.dtype) else stored.Storage.named(str(name), kept)

    # -- files ------------------------------------------------------------------------------------

    @abstractmethod
    def check_files(self) -> None:
        """Sees that what the paths name is there and is what it should be; loads nothing. Called before all else.

        Raises:
            SettingsError: Names the option, the path and what was expected.
        """

    @property
    def starts_from_pictures(self) -> bool:
        """Previews may begin with a picture; asked after `check_files`."""
        return self.max_controls > 0 or not self.takes_pictures

    @abstractmethod
    def identity(self, part: str) -> str:
        """A text that changes when the values of a part may change: "vae" or a text encoder's name.

        It is part of every cache key; `fingerprint` and the part's own constants (length, template)
        make it up.
        """

    # -- encoding, once per sample, cached ----------------------------------------------------------

    @abstractmethod
    def load_vae(self, device: torch.device) -> nn.Module:
        """The image encoder on ``device``, in eval mode."""

    @abstractmethod
    def encode_media(
        self, vae: nn.Module, pixels_NCFHW: torch.Tensor, generators: Sequence[torch.Generator]
    ) -> dict[str, torch.Tensor]:
        """Latents of pictures or clips, normalised as the denoiser wants them.

        Args:
            pixels_NCFHW: In [-1, 1], on the device of ``vae``; F is 1 for pictures.
            generators: One for each picture, on the CPU, for encoders that draw from their posterior.

        Returns:
            At least ``latents``, batch first. Pictures of image models have no frame dimension, unless their VAE is
            one of videos.
        """

    @abstractmethod
    def load_text_encoder(self, name: str, device: torch.device) -> Any:
        """Text encoder ``name`` with its tokenizer, on ``device``."""

    @abstractmethod
    def encode_text(self, name: str, encoder: Any, captions: Sequence[str]) -> Encodings:
        """What the denoiser needs of each caption, batch first, names unlike those of other encoders.

        Where the denoiser holds the encoder to train it, that is the caption's tokens.
        """

    def encode_edit(
        self, name: str, encoder: Any, captions: Sequence[str], controls: Sequence[Sequence[torch.Tensor]]
    ) -> Encodings:
        """`encode_text` for the encoders of `text_sees_controls`.

        Args:
            controls: The control pictures of each caption, as CHW, uint8, in their own shape, of about a
                megapixel at most.
        """
        return self.encode_text(name, encoder, captions)

    # -- training -----------------------------------------------------------------------------------

    def latent_size(self, width: int, height: int, frames: int = 1) -> tuple[int, int, int]:
        """Frames, height and width of the latents of a picture or clip of this size in pixels."""
        count = -(-frames // self.frame_multiple) if frames > 1 else 1
        return count, height // self.latent_multiple, width // self.latent_multiple

    def learning_rates(self) -> dict[str, float]:
        """Learning rates of the family's own options, by regular expression of parameter names; the first that is
        found in a name counts, 0 freezes. Names without a match take the optimizer's."""
        return {}

    def blank_example(self, width: int, height: int, frames: int = 1) -> Example:
        """An example of zeros, shaped as a sample of this size in pixels with a caption of the usual length."""
        media, text = self.cached_shapes(self.latent_size(width, height, frames))
        blank = {name: torch.zeros(shape, dtype=self.dtype) for name, shape in media.items()}
        return Example(
            blank,
            {name: torch.zeros(shape, dtype=self.dtype) for name, shape in text.items()},
            noise=torch.zeros(media["latents"]),
            quantile=0.5,
        )

    def with_controls(self, example: Example, number: int) -> Example:
        """A blank example with so many control pictures, at most as many as the family takes."""
        return replace(example, controls=(example.media,) * min(self.max_controls, number))

    @abstractmethod
    def cached_shapes(self, latent_size: tuple[int, int, int]) -> tuple[Shapes, Shapes]:
        """Shapes of what `encode_media` and the text encoders give for a sample with latents of this size."""

    def spread_mask(self, mask_NFHW: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Weights of latents as weights of the target's elements; broadcasts against ``target``.

        Here for targets that are shaped like latents, with a frame dimension or without.
        """
        return mask_NFHW[:, None] if target.ndim == 5 else mask_NFHW

    @abstractmethod
    def build_denoiser(self) -> nn.Module:
        """The network that is trained, its parameters on the meta device: names and shapes without memory.

        It may hold text encoders, too, where those are trained.
        """

    @abstractmethod
    def denoiser_reader(self) -> Callable[[str], torch.Tensor]:
        """Reads a parameter of the denoiser by its name: on the CPU, in the file's precision; from several threads."""

    def load_denoiser(
        self,
        device: torch.device,
        denoiser: nn.Module | None = None,
        only: Container[nn.Parameter] | None = None,
        read: Callable[[str], torch.Tensor] | None = None,
    ) -> nn.Module:
        """The network with its weights, at `dtype` or as stored, on ``device``.

        Args:
            denoiser: A network of `build_denoiser`, to be filled in place.
            only: Parameters to read; the others stay on the meta device. Left out: all.
            read: A `denoiser_reader`, when there is one already.
        """
        denoiser = denoiser or self.build_denoiser()
        fill(denoiser, read or self.denoiser_reader(), self.dtype, device, self.float32, self.storage, only)
        return denoiser

    def denoiser_bytes(self, denoiser: nn.Module, only: Container[nn.Parameter] | None = None) -> int:
        """What `load_denoiser` takes on the device, called with the same."""
        return held_bytes(denoiser, self.dtype, self.float32, self.storage, only)

    @abstractmethod
    def layers(self, denoiser: nn.Module) -> list[Layer]:
        """The chain that computes exactly what ``denoiser.forward`` computes, over the same submodules."""

    @abstractmethod
    def collate(self, examples: Sequence[Example]) -> Batch:
        """Stacks examples of one bucket and as many controls, adds noise and says what the network should answer."""

    def timestep(self, quantile: float, latent_size: tuple[int, ...]) -> float:
        """Noise level in (0, 1) at which the fraction ``quantile`` of training lies below it.

        The distribution is that of `timestep_sample_method`, shifted, then cut to [min_t, max_t]; so a
        uniform quantile samples it and a fixed one evaluates at a fixed place.

        Args:
            latent_size: Height and width of the latents, after their frames where there are, for shifts that depend
                on them.
        """
        shift = self.timestep_shift(latent_size)
        low, high = (self._quantile_of(t, shift) for t in (self.config.min_t, self.config.max_t))
        q = low + (high - low) * quantile
        t = q
        if self.config.timestep_sample_method == "logit_normal":
            if not 0 < q < 1:
                return q
            normal = math.sqrt(2) * _erfinv(2 * q - 1)
            t = 1 / (1 + math.exp(-normal * self.config.sigmoid_scale - self.config.logit_mean))
        return shift * t / (1 + (shift - 1) * t)

    def timestep_shift(self, latent_size: tuple[int, ...]) -> float:
        """Factor of the shift t' = s*t / (1 + (s - 1)*t)."""
        return self.config.shift or 1.0

    def _quantile_of(self, t: float, shift: float) -> float:
        if not 0 < t < 1:
            return t
        t = t / (shift - (shift - 1) * t)
        if self.config.timestep_sample_method == "uniform":
            return t
        normal = (math.log(t / (1 - t)) - self.config.logit_mean) / self.config.sigmoid_scale
        return 0.5 * (1 + math.erf(normal / math.sqrt(2)))

    # -- results ------------------------------------------------------------------------------------

    @abstractmethod
    def lora_keys(self, module_name: str) -> str:
        """The name that ComfyUI reads for module ``module_name`` of the denoiser, without suffix."""

    def comfyui_rows(self, module_name: str, scale: torch.Tensor) -> torch.Tensor:
        """A DoRA's ``dora_scale`` of a module, rows first, in the order in which ComfyUI's weight has the rows; its own
        inverse. ComfyUI reorders what a LoRA adds to such a weight, but not this."""
        return scale

    def comfyui_tensors(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A denoiser's parameters, by name, as the single file that ComfyUI loads has them."""
        return dict(tensors)

    def other_tensors(self, names: Container[str]) -> dict[str, torch.Tensor]:
        """What the single file that ComfyUI loads holds besides `comfyui_tensors`: parts that are not trained.

        Args:
            names: Parameters of the denoiser that are written as trained.
        """
        return {}

    def exported_metadata(self) -> dict[str, str]:
        """What the header of that file says, where ComfyUI reads more there than tensors tell."""
        return {}

    @abstractmethod
    def pipeline(self, denoiser: nn.Module, device: torch.device, text_encoders: bool = True) -> Any:
        """The family's diffusers pipeline around a live denoiser.

        Args:
            text_encoders: Load them, too; without, the pipeline takes embeddings alone, as `sample` gives it.
        """

    def vae_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents of the denoiser, batch first, in the shape in which the VAE decodes them."""
        return latents

    @abstractmethod
    def prompt_arguments(self, request: SampleRequest, device: torch.device) -> dict[str, Any]:
        """Prompt, negative prompt and pictures of a request as arguments of the family's pipeline: batches of
        one, on ``device``."""

    @property
    def missing_for_samples(self) -> str:
        """What `pipeline` lacks here and how to get it, in words; empty where it can be made. Asked before all else
        where samples are to be drawn."""
        return ""

    def sample(self, pipeline: Any, request: SampleRequest) -> list[Image]:
        """Draws with `pipeline` (made without text encoders); gives the frames, one for a picture.

        Here for pipelines that give ``images`` and take ``guidance_scale``; videos and others override it.
        """
        arguments: dict[str, Any] = {"width": request.width, "height": request.height}
        if request.guidance is not None:
            arguments["guidance_scale"] = request.guidance
        output = pipeline(
            **arguments,
            **self.prompt_arguments(request, pipeline._execution_device),
            num_inference_steps=request.steps,
            generator=torch.Generator().manual_seed(request.seed),
        )
        return [output.images[0]]

    @classmethod
    @abstractmethod
    def write_miniature(cls, folder: Path) -> dict[str, Any]:
        """Writes the family with its real architecture and file layout, random weights and a few
        thousand parameters, below ``folder``; returns the ``[model]`` table that trains it."""


def _erfinv(x: float) -> float:
    return float(torch.erfinv(torch.tensor(x, dtype=torch.float64)))
