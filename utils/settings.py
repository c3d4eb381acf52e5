"""Every setting of a run: the top level of ``train.toml`` and its tables; those of its data are in `dataset_settings`.

The order of fields is the order in documentation. Keys are those of the files that people already have.
"""

from __future__ import annotations

import difflib
import logging
import math
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, create_model, field_validator, model_validator

from ..models import configs, family_named
from ..models.base import Family, ModelConfig
from .config import Dtype, SettingsError, Table, option, read_toml, validate, without_none
from .dataset_settings import parse_dataset_settings
from .environment import Environment

logger = logging.getLogger(__name__)


SINGLE_BLOCKS = "single_transformer_blocks"
_OF_THE_RUN = re.compile(
    r"epochs|output_dir|dataset|\w+_per_gpu|\w+_every_n_\w+|gradient_accumulation_steps|pipeline_stages|blocks_to_swap|"
    r"activation_checkpointing|save_dtype|resume_from_checkpoint"
)
"""Options of the top level that mean nothing in a table below it."""
ActivationCheckpointing = bool | int | Literal["selective", "unsloth"]


class FusedAdapter(Table):
    """An adapter file that becomes part of the base."""

    path: str = option(..., "A .safetensors file, or a folder that holds one.", picker="loras")
    weight: float = option(1.0, "Its strength.", step=0.05)

    @model_validator(mode="before")
    @classmethod
    def _typed(cls, value: Any) -> Any:
        """``a.safetensors * 0.8``, or the file alone."""
        if not isinstance(value, str):
            return value
        path, star, weight = value.rpartition(" * ")
        return {"path": path.strip(), "weight": weight.strip()} if star else {"path": value}


class AdapterTable(Table):
    """What every kind of adapter has."""

    title: ClassVar[str]
    type: str
    rank: int = option(
        32, "Rank of the update: higher learns more detail and makes a larger file.", ge=1, le=1024, step=1
    )
    alpha: float | None = option(
        None,
        "The update is scaled by alpha / rank. Left out: equal to rank, that is no scaling.",
        gt=0,
        step=0.5,
        ui_max=1024,
    )
    dropout: float = option(0.0, "Share of the adapter's inputs that is dropped while training.", ge=0, lt=1, step=0.01)
    dtype: Dtype | None = option(
        None,
        "Precision of the adapter file's weights; training itself keeps float32 weights. Left out: save_dtype.",
        also=("lora_dtype",),
    )
    target_modules: list[str] | None = option(
        None,
        "Modules that get an adapter, by the end of their name, such as to_q or ff.net.0.proj, or by a regular "
        "expression. Left out: every linear layer of the blocks.",
        multiline=True,
    )
    exclude_modules: list[str] | None = option(
        None,
        "Modules that get no adapter although they are targets, named in the same way.",
        advanced=True,
        also=("exclude_linear_modules",),
    )
    convolutions: bool = option(
        False, "Also adapt the convolutions of the blocks, which U-Nets such as SDXL have.", advanced=True
    )
    rank_pattern: dict[str, int] = option(
        {}, "Other ranks for layers in whose name a regular expression is found; the first counts.", advanced=True
    )
    alpha_pattern: dict[str, float] = option(
        {}, "Other alphas for layers in whose name a regular expression is found; the first counts.", advanced=True
    )
    init_from_existing: str | None = option(
        None, "An adapter to start from: a .safetensors file or a folder that holds one.", picker="loras"
    )
    fuse_adapters: list[FusedAdapter] = option(
        [],
        "Adapters that are added to the base before training: tables with path and weight, or lines such as "
        "style.safetensors * 0.8.",
        lines=True,
        advanced=True,
    )

    @property
    def drops(self) -> bool:
        """Whether a training step draws what it leaves out."""
        return self.dropout > 0

    @model_validator(mode="before")
    @classmethod
    def _double_blocks(cls, values: Any) -> Any:
        """``only_double_blocks`` of older files leaves out the blocks in which text and picture are one sequence."""
        if not isinstance(values, Mapping) or "only_double_blocks" not in values:
            return values
        kept = {key: value for key, value in values.items() if key != "only_double_blocks"}
        if values["only_double_blocks"] is True:
            logger.warning("only_double_blocks: taken as exclude_modules = ['%s']", SINGLE_BLOCKS)
            name = "exclude_linear_modules" if "exclude_linear_modules" in values else "exclude_modules"
            others = values.get(name) or []
            kept[name] = [*([others] if isinstance(others, str) else others), SINGLE_BLOCKS]
        return kept

    @field_validator("target_modules", "exclude_modules", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _patterns(cls, value: dict[str, float]) -> dict[str, float]:
        for pattern, number in value.items():
            if problem := bad_pattern(pattern):
                raise ValueError(problem)
            if number <= 0:
                raise ValueError(f"'{pattern}': must be more than 0, got {number}")
        return value


class Lora(AdapterTable):
    """Low-rank adapter. Leave the table out to train all weights."""

    title = "LoRA"
    type: Literal["lora"] = "lora"
    use_rslora: bool = option(
        False, "Scale the update by alpha / sqrt(rank), so that high ranks learn as fast as low ones.", advanced=True
    )
    use_dora: bool = option(
        False, "DoRA: also train how long each row of the weight is. Slower steps and more memory.", advanced=True
    )


class Loha(AdapterTable):
    """Adapter that multiplies two low-rank updates element by element: twice the weights for a higher rank."""

    title = "LoHa"
    type: Literal["loha"] = "loha"


class Lokr(AdapterTable):
    """Adapter that is the Kronecker product of two small matrices: the smallest files."""

    title = "LoKr"
    type: Literal["lokr"] = "lokr"
    decompose_factor: int = option(
        -1, "Largest side of the first matrix; -1: as square as the layer allows.", ge=-1, step=1, ui_max=1024
    )
    rank_dropout: float = option(
        0.0, "Share of a layer's outputs that get no update in a training step.", ge=0, lt=1, step=0.01, advanced=True
    )

    @property
    def drops(self) -> bool:
        return self.dropout > 0 or self.rank_dropout > 0

    @field_validator("decompose_factor")
    @classmethod
    def _factor(cls, value: int) -> int:
        if value == 0:
            raise ValueError("must be -1 or at least 1, got 0")
        return value


Adapter = Annotated[Lora | Loha | Lokr, Field(discriminator="type")]


class Optimizer(Table):
    """Which optimizer, and its arguments; what is left out is the optimizer's own default."""

    type: str = option(
        ...,
        "adamw, adamw8bit, adamw_optimi, stableadamw, AdamW8bitKahan, Lion, Adafactor, Prodigy, ScheduleFreeAdamW, "
        "Muon, automagic, genericoptim, sgd, offload, or the name of any class in pytorch_optimizer.",
    )
    lr: float | None = option(
        None, "Learning rate. Prodigy finds its own and wants 1.0 here; automagic ignores it.", ge=0, le=10, step=1e-8
    )
    betas: list[float] | None = option(None, "Decay of the running averages of gradient and squared gradient.")
    weight_decay: float | None = option(None, "Pull of the weights towards zero.", ge=0, step=0.001)
    eps: float | None = option(
        None, "Guards the division by the root of the squared gradient.", gt=0, step=1e-12, advanced=True
    )
    beta2_half_life: float | None = option(
        None,
        "Samples after which the running average of the squared gradient has half forgotten; sets the second of betas, "
        "whatever the batch.",
        gt=0,
        step=1,
        advanced=True,
    )
    offload: bool = option(
        False,
        "Keep the optimizer's state and float32 weights in main memory and step there: slower, much less GPU memory.",
        advanced=True,
    )
    gradient_release: bool = option(
        False,
        "Step each weight as soon as its gradient is there, so that gradients take no memory. Without accumulation, "
        "clipping and further GPUs for the same weights.",
        advanced=True,
    )
    model_config = ConfigDict(extra="allow")

    @field_validator("betas")
    @classmethod
    def _betas(cls, value: list[float] | None) -> list[float] | None:
        if value is not None and not all(0 <= beta < 1 for beta in value):
            raise ValueError(f"each must be at least 0 and less than 1, got {value}")
        return value


class Monitoring(Table):
    """Where curves go besides TensorBoard."""

    unused: ClassVar = {
        "wandb_api_key": "a key in a file is copied into every run folder; put it into the variable WANDB_API_KEY"
    }

    enable_wandb: bool = option(False, "Also log to Weights & Biases; the key comes from WANDB_API_KEY.")
    wandb_tracker_name: str | None = option(None, "Project name there.")
    wandb_run_name: str | None = option(None, "Run name there.")


class EvalDataset(Table):
    """One ``[[eval_datasets]]``: pictures whose loss is measured, but which are not trained."""

    name: str = option(..., "What its curves are called.", min_length=1)
    config: str | dict[str, Any] = option(..., "The dataset's TOML.")

    @model_validator(mode="before")
    @classmethod
    def _file_alone(cls, value: Any) -> Any:
        return {"name": Path(value).stem, "config": value} if isinstance(value, str) else value

    @field_validator("config")
    @classmethod
    def _dataset(cls, value: str | dict[str, Any]) -> str | dict[str, Any]:
        if isinstance(value, dict):  # from the canvas; the run folder gets it as a file
            parse_dataset_settings(value)
        return value


class Sampling(Table):
    """Pictures or clips that are drawn while training, always from the same noise, to see how it goes."""

    prompts: list[str] = option(
        [], "What is drawn, one prompt each. Left out: nothing.", lines=True, also=("sample_prompt",)
    )
    negative_prompt: str = option("", "What is not to be seen, for all prompts.")
    images: list[str] = option(
        [],
        "For edit models and image-to-video models: the picture that each prompt starts from, or one for all.",
        lines=True,
    )
    every_n_epochs: int | None = option(
        None, "Draw after every so many epochs. Left out: not by epochs.", ge=1, step=1, also=("sample_every_n_epochs",)
    )
    every_n_steps: int | None = option(
        None, "Draw after every so many steps. Left out: not by steps.", ge=1, step=1, also=("sample_every_n_steps",)
    )
    before_first_step: bool = option(True, "Draw also before training begins, to compare with.")
    width: int = option(1024, "Width in pixels; rounded to what the model takes.", ge=16, step=16, ui_max=8192)
    height: int = option(1024, "Height in pixels; rounded to what the model takes.", ge=16, step=16, ui_max=8192)
    frames: int = option(
        1, "Frames of each clip, for video models; rounded to what the model takes. 1 draws a picture.",
        ge=1, step=1, ui_max=1000,
    )  # fmt: skip
    steps: int = option(20, "Denoising steps.", ge=1, step=1, ui_max=1000, also=("num_inference_steps",))
    guidance: float | None = option(
        None,
        "Guidance scale of the model's pipeline. Left out: what is usual for the model.",
        ge=0,
        step=0.1,
        ui_max=100,
        also=("guidance_scale",),
    )
    true_cfg: float = option(
        1.0,
        "For models with distilled guidance, such as Flux: strength of the negative prompt. 1 leaves it out; more "
        "takes twice as long.",
        ge=1,
        step=0.1,
        ui_max=100,
        advanced=True,
    )
    seed: int = option(0, "Fixes the noise that each drawing begins with.", ge=0, le=2**63 - 1, step=1)

    @field_validator("prompts", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("every_n_steps", "every_n_epochs", mode="before")
    @classmethod
    def _zero_is_never(cls, value: Any) -> Any:
        return value or None

    @model_validator(mode="after")
    def _images(self) -> Sampling:
        if len(self.images) not in (0, 1, len(self.prompts)):
            raise ValueError(
                f"sample.images: give one for all prompts or one for each of the {len(self.prompts)}, "
                f"got {len(self.images)}"
            )
        return self


class TrainSettings(Table):
    """The top level of ``train.toml``. Its ``[model]`` is one of the families' tables, told apart by ``type``."""

    unused: ClassVar = {
        "output_name": "exports are named by their epoch or step, below the run folder",
        "mixed_precision": "model.dtype says it",
        "deepspeed": "DeepSpeed's settings follow from these, such as micro_batch_size_per_gpu at the top level",
    }

    output_dir: str = option(
        "output", "Folder that receives one run folder for each training, relative to where training is started."
    )
    dataset: str | None = option(None, "The dataset's TOML. Left out: dataset.toml beside this file.")

    epochs: int = option(50, "How often each picture is trained (times its num_repeats).", ge=1, step=1, ui_max=100000)
    max_steps: int | None = option(
        None,
        "Stop after this many optimizer steps even if epochs are left. Left out: all epochs.",
        ge=1,
        step=1,
        also=("num_steps",),
    )
    micro_batch_size_per_gpu: int | list[list[int]] = option(
        1,
        "Pictures that one GPU works on at once; or by resolution, such as [[512, 4], [1024, 1]].",
        step=1,
        ui_min=1,
        ui_max=1024,
    )
    image_micro_batch_size_per_gpu: int | list[list[int]] | None = option(
        None,
        "The same for pictures among videos. Left out: as for videos.",
        step=1,
        ui_min=1,
        ui_max=1024,
        advanced=True,
    )
    gradient_accumulation_steps: int = option(
        1,
        "Micro-batches that make up one optimizer step; also what fills the pipeline with several stages.",
        ge=1,
        step=1,
        ui_max=1024,
    )
    gradient_clipping: float = option(
        1.0, "Largest length of the gradient; longer ones are shortened to it. 0 switches clipping off.", ge=0, step=0.1
    )
    seed: int = option(
        0, "Fixes order, noise, timesteps and the adapter's initial weights.", ge=0, le=2**63 - 1, step=1
    )

    train_only: list[str] | None = option(
        None,
        "Without an adapter: train weights in whose name one of these regular expressions is found. Left out: all.",
        lines=True,
        advanced=True,
    )
    freeze: list[str] | None = option(
        None,
        "Without an adapter: do not train weights in whose name one of these regular expressions is found.",
        lines=True,
        advanced=True,
    )
    learning_rates: dict[str, float] = option(
        {},
        "Learning rates of weights in whose name a regular expression is found; the first counts, 0 freezes.",
        advanced=True,
    )

    lr_scheduler: Literal["constant", "linear", "cosine", "polynomial", "one_cycle"] = option(
        "constant",
        "How the learning rate goes on after warm-up, up to the last step: stays, falls straight, along a cosine or a "
        "power, or rises and falls once (one_cycle).",
    )
    lr_min_ratio: float = option(
        0.0, "Share of the learning rate that falling schedules end with.", ge=0, le=1, step=0.01, advanced=True
    )
    lr_power: float = option(
        2.0,
        "For lr_scheduler polynomial: 1 falls straight, more falls sooner.",
        gt=0,
        step=0.1,
        ui_max=100,
        advanced=True,
    )
    lr_cycles: int = option(
        1,
        "For lr_scheduler cosine: how often it falls, beginning anew each time.",
        ge=1,
        step=1,
        ui_max=1000,
        advanced=True,
    )
    warmup_steps: int = option(0, "Steps over which the learning rate rises from 0.", ge=0, step=1, ui_max=100000)
    force_constant_lr: float | None = option(
        None,
        "Use exactly this learning rate everywhere, also when resuming. Left out: the optimizer's lr and lr_scheduler.",
        gt=0,
        step=1e-8,
        advanced=True,
    )

    ema_decay: float | None = option(
        None,
        "Keep a moving average of the trained weights that keeps this share of itself at each step, such as 0.999. "
        "Left out: none.",
        gt=0,
        lt=1,
        step=0.0001,
    )
    ema_start_step: int = option(0, "Steps before the average begins.", ge=0, step=1, ui_max=1000000, advanced=True)
    ema_on_cpu: bool = option(False, "Keep the average in main memory: less on the GPU, slower steps.", advanced=True)
    ema_export: Literal["both", "ema", "trained"] = option(
        "both",
        "Which weights are exported: the average (in a folder whose name ends in _ema if both are), those of the last "
        "step, or both.",
        advanced=True,
    )
    ema_for_samples: bool = option(
        True, "Draw samples and measure eval sets with the average, not with the last step's weights.", advanced=True
    )

    number_of_gpus: int = option(
        1,
        "Processes, one per GPU. From the command line the launcher's --num_gpus counts instead.",
        ge=1,
        step=1,
        ui_max=1024,
    )
    pipeline_stages: int = option(1, "Into how many parts the model is cut, one GPU each.", ge=1, step=1, ui_max=64)
    zero_stage: int = option(
        0,
        "ZeRO: what the GPUs that train the same weights share out. 1: the optimizer's state and master weights; 2: "
        "gradients, too; 3: weights, too. 2 and 3 without adapter and pipeline stages.",
        ge=0,
        le=3,
        step=1,
        advanced=True,
    )
    partition_method: str = option(
        "cost",
        "How layers are shared out over stages: cost (equal time), parameters (equal weights), uniform (equal count), "
        "type:NAME (equal count of layers whose name matches), or manual.",
        advanced=True,
        also=("partition",),
    )
    partition_split: list[int] | None = option(
        None, "For partition_method manual: the number of the first layer of each stage after the first.", advanced=True
    )
    activation_checkpointing: ActivationCheckpointing = option(
        True,
        "Recompute each block in the backward pass instead of keeping activations: much less memory, a third more "
        "time. Also a number (2: every second block), 'selective' (keep results of matrix products and attention, "
        "recompute the rest) or 'unsloth' (recompute, and keep the blocks' inputs in main memory).",
        step=1,
        ui_min=1,
        ui_max=200,
    )
    reentrant_activation_checkpointing: bool = option(
        False,
        "Accepted from older files; checkpointing always takes the newer form, whose results are the same.",
        advanced=True,
    )
    blocks_to_swap: int = option(
        0,
        "Blocks whose frozen weights wait in main memory until they are needed. Two at a time are on the GPU.",
        ge=0,
        step=1,
        ui_max=200,
    )
    disable_block_swap_for_eval: bool = option(False, "Keep all blocks on the GPU during evaluation.", advanced=True)
    compile: bool = option(
        False, "Compile the blocks with torch.compile: faster steps after a slower start.", advanced=True
    )
    activation_memory_budget: float | None = option(
        None,
        "With compile: share of a block's activations that is kept, between 0 and 1; the cheapest of the rest are "
        "recomputed. Takes the place of activation_checkpointing.",
        ge=0,
        le=1,
        step=0.05,
        advanced=True,
    )
    cuda_graphs: bool = option(
        True, "Replay each step as a CUDA graph where that is possible: one pipeline stage, no dropout.", advanced=True
    )
    attention_backend: Literal["auto", "native", "cudnn"] = option(
        "auto", "Attention kernel: torch's own choice, cuDNN's, or the faster one for this GPU.", advanced=True
    )

    save_every_n_epochs: int | None = option(
        None, "Export the adapter or model after every so many epochs. Left out: not by epochs.", ge=1, step=1
    )
    save_every_n_steps: int | None = option(
        None, "Export the adapter or model after every so many steps. Left out: not by steps.", ge=1, step=1
    )
    save_every_n_examples: int | None = option(
        None, "Export the adapter or model after every so many pictures. Left out: not by pictures.", ge=1, step=1
    )
    save_dtype: Dtype = option("bfloat16", "Precision of exported weights.")
    checkpoint_every_n_epochs: int | None = option(
        None,
        "Write a checkpoint, from which training can go on, after every so many epochs. Left out: not by epochs.",
        ge=1,
        step=1,
    )
    checkpoint_every_n_steps: int | None = option(
        None, "Write a checkpoint after every so many steps. Left out: not by steps.", ge=1, step=1
    )
    checkpoint_every_n_minutes: int | None = option(
        None, "Write a checkpoint every so many minutes. Left out: not by time.", ge=1, step=1
    )
    checkpoints_to_keep: int = option(2, "Older checkpoints are removed.", ge=1, step=1, ui_max=1000, advanced=True)
    resume_from_checkpoint: bool | str = option(
        False, "Go on from the newest run (true) or from the run folder of this name.", advanced=True
    )

    reset_dataloader: bool = option(
        False, "When resuming, begin the epoch that was stopped with its first picture again.", advanced=True
    )
    reset_optimizer: bool = option(
        False, "When resuming, take the weights alone: running averages of the optimizer begin anew.", advanced=True
    )
    reset_optimizer_params: bool = option(
        False,
        "When resuming, take the optimizer's numbers (weight_decay, betas ...) from these settings, not from the "
        "checkpoint. Its learning rate always comes from here.",
        advanced=True,
    )

    caching_batch_size: int = option(
        1, "Pictures or captions encoded at once while caching.", ge=1, step=1, ui_max=1024
    )
    cache_dir: str | None = option(
        None, "Where encoded pictures and captions are kept. Left out: 'cache' in output_dir.", advanced=True
    )
    map_num_proc: int | None = option(
        None,
        "Processes of each GPU that read pictures while caching. Left out: up to eight, as there are cores.",
        ge=1,
        step=1,
        advanced=True,
    )
    video_clip_mode: Literal["none", "single_beginning", "single_middle", "multiple_overlapping"] = option(
        "none", "Which part of a video that is longer than its frame bucket is trained."
    )

    uncond_fraction: float = option(
        0.0,
        "Share of the times that a picture is trained without its caption, for guidance. Adds to caption_dropout.",
        ge=0,
        le=1,
        step=0.01,
    )
    regenerate_cache: bool = option(
        False, "Encode everything of this dataset again although it is cached.", advanced=True
    )
    trust_cache: bool = option(
        False, "Take the dataset as it was found last time, without looking at its files.", advanced=True
    )
    cache_only: bool = option(False, "Fill the cache and stop.", advanced=True)
    test_sample: bool = option(
        False,
        "Draw the samples of [sample] with the model as it is and stop; without prompts one picture of 512x512.",
        advanced=True,
    )
    dump_dataset: str | None = option(
        None,
        "Write up to 100 samples as the model will see them, cropped and resized, into this folder and stop. "
        "Left out: train.",
        advanced=True,
    )
    i_know_what_i_am_doing: bool = option(
        False,
        "Go on from a checkpoint although seed, model, adapter or kind of optimizer are others now. Sizes and numbers "
        "of resolutions are not limited anyway.",
        advanced=True,
    )

    eval_datasets: list[EvalDataset] = option(
        [], "Datasets whose loss is measured while training: TOML files, or tables with name and config.", lines=True
    )
    eval_every_n_epochs: int | None = option(
        None, "Measure the loss of eval_datasets every so many epochs. Left out: not by epochs.", ge=1, step=1
    )
    eval_every_n_steps: int | None = option(
        None, "Measure the loss of eval_datasets every so many steps. Left out: not by steps.", ge=1, step=1
    )
    eval_every_n_examples: int | None = option(
        None, "Measure the loss of eval_datasets every so many pictures. Left out: not by pictures.", ge=1, step=1
    )
    eval_before_first_step: bool = option(True, "Measure it also before training begins.")
    eval_micro_batch_size_per_gpu: int | list[list[int]] | None = option(
        None, "Pictures of one evaluation batch on each GPU. Left out: as in training.", step=1, ui_min=1, ui_max=1024
    )
    eval_image_micro_batch_size_per_gpu: int | list[list[int]] | None = option(
        None,
        "The same for pictures among videos. Left out: as for videos.",
        step=1,
        ui_min=1,
        ui_max=1024,
        advanced=True,
        also=("image_eval_micro_batch_size_per_gpu",),
    )
    eval_gradient_accumulation_steps: int = option(
        1,
        "Accepted from older files: evaluation always hands on one micro-batch after the other.",
        ge=1,
        step=1,
        ui_max=1024,
        advanced=True,
    )

    steps_per_print: int = option(1, "Steps between two lines in the log.", ge=1, step=1, ui_max=100000)
    logging_steps: int = option(
        1, "Steps between two points of the curves.", ge=1, step=1, ui_max=100000, advanced=True
    )
    x_axis_examples: bool = option(False, "Curves over pictures seen instead of steps.", advanced=True)
    loss: Literal["mse", "l1"] = option(
        "mse", "Squared error, or its plain size, which minds outliers less.", advanced=True
    )
    huber_delta: float | None = option(
        None, "Use the Huber loss: squared below this error, linear above.", gt=0, step=0.01, advanced=True
    )
    smooth_l1_beta: float | None = option(
        None, "Use the smooth L1 loss: squared below this error, linear above.", gt=0, step=0.01, advanced=True
    )
    pseudo_huber_c: float | None = option(
        None, "Use the pseudo-Huber loss with this c. Left out: the mean squared error.", gt=0, step=0.01, advanced=True
    )

    model: Any
    adapter: Adapter | None = None
    optimizer: Optimizer
    monitoring: Monitoring = Monitoring()
    environment: Environment = Environment()
    sample: Sampling = Field(Sampling(), json_schema_extra={"also": ["training_sampler"]})

    @model_validator(mode="before")
    @classmethod
    def _below_a_table(cls, values: Any) -> Any:
        """Options that follow a table in the file belong to it in TOML, but not in what people mean."""
        if not isinstance(values, Mapping):
            return values
        values = dict(values)
        for name in ("model", "adapter", "optimizer", "monitoring"):
            table = values.get(name)
            for key in list(table) if isinstance(table, Mapping) else []:
                if key in cls.model_fields and key not in values and _OF_THE_RUN.fullmatch(key):
                    logger.warning("%s.%s: taken as %s, which belongs above the first table", name, key, key)
                    values[key] = values[name][key]
                    values[name] = {other: value for other, value in values[name].items() if other != key}
        return values

    @model_validator(mode="before")
    @classmethod
    def _scheduler_table(cls, values: Any) -> Any:
        """``[lr_scheduler]`` with type, num_warmup_steps and min_lr is taken as the options that these are here."""
        table = values.get("lr_scheduler") if isinstance(values, Mapping) else None
        if not isinstance(table, Mapping):
            return values
        rate = values["optimizer"].get("lr") if isinstance(values.get("optimizer"), Mapping) else None
        said: dict[str, Any] = {"lr_scheduler": table.get("type", "constant")}
        for key, value in table.items():
            if key in ("num_warmup_steps", "warmup_steps"):
                said["warmup_steps"] = value
            elif key == "min_lr" and rate:
                said["lr_min_ratio"] = value / rate
            elif key != "type":
                raise ValueError(f"lr_scheduler.{key}: unknown option; known are type, warmup_steps, min_lr")
        logger.warning("[lr_scheduler]: taken as %s", ", ".join(f"{key} = {value!r}" for key, value in said.items()))
        for key in said.keys() & values.keys() - {"lr_scheduler"}:
            if said[key] != values[key]:
                raise ValueError(f"{key}: {values[key]} here, but {said[key]} in [lr_scheduler]; leave one of them out")
        return {**values, **said}

    @field_validator("dataset", mode="before")
    @classmethod
    def _one_file(cls, value: Any) -> Any:
        if isinstance(value, list):
            raise ValueError("must be one file; put the [[directory]] tables of all into it, each with its own options")
        return value

    @field_validator(
        *(f"{what}_every_n_{unit}" for what in ("save", "eval") for unit in ("epochs", "steps", "examples")),
        *(f"checkpoint_every_n_{unit}" for unit in ("epochs", "steps", "minutes")), mode="before",
    )  # fmt: skip
    @classmethod
    def _zero_is_never(cls, value: Any) -> Any:
        return None if value == 0 else value

    @field_validator(
        "micro_batch_size_per_gpu",
        "image_micro_batch_size_per_gpu",
        "eval_micro_batch_size_per_gpu",
        "eval_image_micro_batch_size_per_gpu",
    )
    @classmethod
    def _micro_batch(cls, value: int | list[list[int]] | None) -> int | list[list[int]] | None:
        pairs = [[1, value]] if isinstance(value, int) else value
        if pairs is not None and (not pairs or not all(len(pair) == 2 and min(pair) >= 1 for pair in pairs)):
            raise ValueError(f"must be at least 1, or pairs such as [[512, 4], [1024, 1]], got {value}")
        return value

    @field_validator("activation_checkpointing", mode="before")
    @classmethod
    def _checkpointing(cls, value: Any) -> Any:
        if not (isinstance(value, int) and value >= 0) and value not in ("selective", "unsloth"):
            raise ValueError(f"must be true, false, a number of blocks, 'selective' or 'unsloth', got {value!r}")
        return value

    def micro_batch(self, width: int, height: int, frames: int = 1) -> int:
        """Samples of this size that one GPU works on at once."""
        value = self.image_micro_batch_size_per_gpu if frames == 1 else None
        return _by_size(value or self.micro_batch_size_per_gpu, width, height)

    def eval_micro_batch(self, width: int, height: int, frames: int = 1) -> int:
        """The same for evaluation."""
        value = self.eval_image_micro_batch_size_per_gpu if frames == 1 else None
        value = value or self.eval_micro_batch_size_per_gpu
        return _by_size(value, width, height) if value else self.micro_batch(width, height, frames)

    @model_validator(mode="after")
    def _consistent(self) -> TrainSettings:
        problems = list[str]()
        if self.test_sample:
            self.sample.before_first_step = True
            if not self.sample.prompts:
                self.sample.prompts, self.sample.width, self.sample.height = ["a photo of a cat"], 512, 512
        names = [dataset.name for dataset in self.eval_datasets]
        for number, dataset in enumerate(self.eval_datasets, 1):
            if names.count(dataset.name) > 1:
                dataset.name = f"{dataset.name}_{number}"
        if self.partition_method == "manual" and len(self.partition_split or []) != self.pipeline_stages - 1:
            problems.append(
                f"partition_split: needs {self.pipeline_stages - 1} numbers for {self.pipeline_stages} "
                f"pipeline_stages, got {self.partition_split}"
            )
        losses = [key for key in ("huber_delta", "smooth_l1_beta", "pseudo_huber_c") if getattr(self, key)]
        if len(losses) > 1:
            problems.append(f"{losses[1]}: only one loss can be used; leave out this or {losses[0]}")
        if self.adapter is None:
            problems += _full_problems(self)
        elif self.train_only or self.freeze:
            problems.append(
                f"{'train_only' if self.train_only else 'freeze'}: chooses among all weights; with an adapter use "
                "adapter.target_modules and adapter.exclude_modules"
            )
        problems += _bad_patterns(self)
        problems += _release_problems(self) if self.optimizer.gradient_release else []
        problems += _zero_problems(self) if self.zero_stage >= 2 else []
        if self.model.quantized_matmul and self.model.transformer_dtype not in ("float8", "float8_e4m3fn", "int8"):
            problems.append(
                "model.quantized_matmul: multiplies weights as they are stored; set transformer_dtype to 'float8' or "
                "'int8', or leave it out"
            )
        if self.partition_method.split(":")[0] not in ("cost", "parameters", "uniform", "type", "manual"):
            problems.append(
                "partition_method: must be cost, parameters, uniform, type:NAME or manual, got "
                f"'{self.partition_method}'"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self


def _by_size(value: int | list[list[int]], width: int, height: int) -> int:
    """A micro-batch size, or that of the nearest resolution."""
    if isinstance(value, int):
        return value
    return min(value, key=lambda pair: abs(pair[0] - math.sqrt(width * height)))[1]


def _full_problems(settings: TrainSettings) -> list[str]:
    """What does not go together with training all weights."""
    model, found = settings.model, []
    if model.dtype == "float16":
        found.append("model.dtype: float16 cannot hold gradients of all weights; use bfloat16")
    if model.transformer_dtype not in (None, model.dtype):
        found.append(
            f"model.transformer_dtype: all weights are trained, so they cannot be stored as {model.transformer_dtype}; "
            "leave it out, or add a table [adapter]"
        )
    return found


ELEMENTWISE = ("adamw", "adamw_optimi", "sgd", "lion")
"""Optimizers that step each weight by itself, so that a share of a matrix is stepped like the whole."""


def _zero_problems(settings: TrainSettings) -> list[str]:
    """What does not go together with ZeRO 2 and 3."""
    with_stage = f"zero_stage: {settings.zero_stage} does not go together with"
    found = []
    if settings.adapter is not None:
        found.append(
            f"{with_stage} an adapter: its weights are few, and frozen ones are not shared out; set 0 or 1, "
            "and save memory with pipeline_stages, blocks_to_swap or model.transformer_dtype"
        )
    if settings.pipeline_stages > 1:
        found.append(f"{with_stage} pipeline_stages, which already part the model; set 1")
    if settings.blocks_to_swap:
        found.append(f"{with_stage} blocks_to_swap; set that to 0")
    if settings.model.merge_adapters:
        found.append(f"{with_stage} model.merge_adapters; merge them into the file first")
    if settings.optimizer.type.lower() not in ELEMENTWISE:
        found.append(
            f"optimizer.type: {settings.optimizer.type} looks at whole matrices, of which zero_stage "
            f"{settings.zero_stage} leaves a share to each GPU; use {', '.join(ELEMENTWISE)}, or zero_stage 1"
        )
    return found


def _release_problems(settings: TrainSettings) -> list[str]:
    """What does not go together with stepping in the backward pass."""
    if settings.gradient_accumulation_steps > 1:
        return ["optimizer.gradient_release: steps after each micro-batch; set gradient_accumulation_steps = 1"]
    if settings.zero_stage:
        return ["optimizer.gradient_release: steps before ranks have shared gradients; set zero_stage = 0"]
    if settings.optimizer.offload:
        return ["optimizer.gradient_release: steps on the GPU; leave optimizer.offload out"]
    return []


def _bad_patterns(settings: TrainSettings) -> list[str]:
    found = []
    for key in ("train_only", "freeze", "learning_rates"):
        problems = [bad_pattern(pattern) for pattern in getattr(settings, key) or ()]
        found += [f"{key}: {problem}" for problem in problems if problem]
    return found


def bad_pattern(pattern: str) -> str:
    """What is wrong with a regular expression; empty when nothing is."""
    try:
        re.compile(pattern)
    except re.error as error:
        return f"'{pattern}' is not a regular expression ({error})"
    return ""


@cache
def train_settings(config: type[ModelConfig]) -> type[TrainSettings]:
    """`TrainSettings` whose ``model`` is this family's table."""
    return create_model("TrainSettings", __base__=TrainSettings, __doc__=TrainSettings.__doc__, model=(config, ...))


def load_train_settings(path: Path) -> TrainSettings:
    """Settings of a ``train.toml``; raises `SettingsError` with all problems at once."""
    return parse_train_settings(read_toml(path))


def parse_train_settings(values: Mapping[str, Any]) -> TrainSettings:
    """Settings from the tables of a ``train.toml``; the graph and the file come through here."""
    model = values.get("model")
    kind = model.get("type") if isinstance(model, Mapping) else None
    if kind is not None and kind not in configs():
        near = difflib.get_close_matches(str(kind), configs(), 1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise SettingsError(f"model.type: '{kind}' is unknown; known are {', '.join(configs())}{hint}")
    return validate(train_settings(configs()[kind] if kind else ModelConfig), values)


def family_of(settings: TrainSettings) -> Family:
    """The family that ``[model]`` names, ready to load its parts.

    Raises:
        SettingsError: This version cannot train it.
    """
    config: ModelConfig = settings.model
    return family_named(config.type)(config)


def as_toml(settings: Table) -> dict[str, Any]:
    """The tables to write for ``settings``: what is unset stays out, defaults are written."""
    return without_none(settings.model_dump(mode="json"))
