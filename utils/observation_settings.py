"""How a run is watched: eval sets, samples, log and curves.

Samples are ``[sample]``, ``[monitoring]`` is a table of its own; the rest stands at the top level of ``train.toml``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from pydantic import field_validator, model_validator

from .config import Table, option
from .dataset_settings import parse_dataset_settings
from .step_settings import MicroBatch, checked_micro_batch


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


class Evaluation(Table):
    """Which datasets' loss is measured, and when."""

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
    eval_micro_batch_size_per_gpu: MicroBatch | None = option(
        None, "Pictures of one evaluation batch on each GPU. Left out: as in training.", step=1, ui_min=1, ui_max=1024
    )
    eval_image_micro_batch_size_per_gpu: MicroBatch | None = option(
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

    @field_validator(*(f"eval_every_n_{unit}" for unit in ("epochs", "steps", "examples")), mode="before")
    @classmethod
    def _zero_measures_never(cls, value: Any) -> Any:
        return None if value == 0 else value

    @field_validator("eval_micro_batch_size_per_gpu", "eval_image_micro_batch_size_per_gpu")
    @classmethod
    def _eval_micro_batch(cls, value: MicroBatch | None) -> MicroBatch | None:
        return checked_micro_batch(value)

    @model_validator(mode="after")
    def _distinct_names(self) -> Evaluation:
        names = [dataset.name for dataset in self.eval_datasets]
        for number, dataset in enumerate(self.eval_datasets, 1):
            if names.count(dataset.name) > 1:
                dataset.name = f"{dataset.name}_{number}"
        return self


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


class Logging(Table):
    """Lines of the log and points of the curves."""

    steps_per_print: int = option(1, "Steps between two lines in the log.", ge=1, step=1, ui_max=100000)
    logging_steps: int = option(
        1, "Steps between two points of the curves.", ge=1, step=1, ui_max=100000, advanced=True
    )
    x_axis_examples: bool = option(False, "Curves over pictures seen instead of steps.", advanced=True)


class Monitoring(Table):
    """Where curves go besides TensorBoard."""

    unused: ClassVar = {
        "wandb_api_key": "a key in a file is copied into every run folder; put it into the variable WANDB_API_KEY"
    }

    enable_wandb: bool = option(False, "Also log to Weights & Biases; the key comes from WANDB_API_KEY.")
    wandb_tracker_name: str | None = option(None, "Project name there.")
    wandb_run_name: str | None = option(None, "Run name there.")
