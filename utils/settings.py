"""All settings of a run: the top level of ``train.toml`` with its tables, and what does not go together in them.

Options are declared by what they are about, in the modules imported here; those of the data are in
`dataset_settings`. Keys are those of the files that people already have.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, create_model, field_validator, model_validator

from ..models import configs, family_named
from ..models.base import Family, ModelConfig
from .adapter_settings import Adapter
from .config import SettingsError, Table, bad_pattern, option, read_toml, validate, without_none
from .device_settings import Devices
from .environment import Environment
from .observation_settings import Evaluation, Logging, Monitoring, Sampling
from .preparation_settings import Preparation, Start
from .saving_settings import Saving
from .step_settings import Average, LearningRates, Loss, Optimizer, Steps, micro_batch_size

logger = logging.getLogger(__name__)

_OF_THE_RUN = re.compile(
    r"epochs|output_dir|dataset|\w+_per_gpu|\w+_every_n_\w+|gradient_accumulation_steps|pipeline_stages|blocks_to_swap|"
    r"activation_checkpointing|save_dtype|resume_from_checkpoint"
)
"""Options of the top level that mean nothing in a table below it."""


class Files(Table):
    """Where the data comes from and where the results go."""

    output_dir: str = option(
        "output", "Folder that receives one run folder for each training, relative to where training is started."
    )
    dataset: str | None = option(None, "The dataset's TOML. Left out: dataset.toml beside this file.")

    @field_validator("dataset", mode="before")
    @classmethod
    def _one_file(cls, value: Any) -> Any:
        if isinstance(value, list):
            raise ValueError("must be one file; put the [[directory]] tables of all into it, each with its own options")
        return value


class TrainSettings(
    Loss, Logging, Evaluation, Start, Preparation, Saving, Devices, Average, LearningRates, Steps, Files
):  # pydantic takes the fields of the last class first; nodes and documentation have that order
    """The top level of ``train.toml``. Its ``[model]`` is one of the families' tables, told apart by ``type``."""

    unused: ClassVar = {
        "output_name": "exports are named by their epoch or step, below the run folder",
        "mixed_precision": "model.dtype says it",
        "deepspeed": "DeepSpeed's settings follow from these, such as micro_batch_size_per_gpu at the top level",
    }

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

    @model_validator(mode="after")
    def _test_sample(self) -> TrainSettings:
        if self.test_sample:
            self.sample.before_first_step = True
            if not self.sample.prompts:
                self.sample.prompts, self.sample.width, self.sample.height = ["a photo of a cat"], 512, 512
        return self

    @model_validator(mode="after")
    def _consistent(self) -> TrainSettings:
        problems = [problem for check in CHECKS for problem in check(self)]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def micro_batch(self, width: int, height: int, frames: int = 1) -> int:
        """Samples of this size that one GPU works on at once."""
        value = self.image_micro_batch_size_per_gpu if frames == 1 else None
        return micro_batch_size(value or self.micro_batch_size_per_gpu, width, height)

    def eval_micro_batch(self, width: int, height: int, frames: int = 1) -> int:
        """The same for evaluation."""
        value = self.eval_image_micro_batch_size_per_gpu if frames == 1 else None
        value = value or self.eval_micro_batch_size_per_gpu
        return micro_batch_size(value, width, height) if value else self.micro_batch(width, height, frames)


def _partition_problems(settings: TrainSettings) -> list[str]:
    found, method, split = [], settings.partition_method, settings.partition_split
    if method == "manual" and len(split or []) != settings.pipeline_stages - 1:
        found.append(
            f"partition_split: needs {settings.pipeline_stages - 1} numbers for {settings.pipeline_stages} "
            f"pipeline_stages, got {split}"
        )
    if method.split(":")[0] not in ("cost", "parameters", "uniform", "type", "manual"):
        found.append(f"partition_method: must be cost, parameters, uniform, type:NAME or manual, got '{method}'")
    return found


def _loss_problems(settings: TrainSettings) -> list[str]:
    losses = [key for key in ("huber_delta", "smooth_l1_beta", "pseudo_huber_c") if getattr(settings, key)]
    if len(losses) > 1:
        return [f"{losses[1]}: only one loss can be used; leave out this or {losses[0]}"]
    return []


def _weight_problems(settings: TrainSettings) -> list[str]:
    """What does not go together with training all weights, or those of an adapter alone."""
    model, found = settings.model, []
    if settings.adapter is not None:
        if chosen := "train_only" if settings.train_only else "freeze" if settings.freeze else "":
            found.append(
                f"{chosen}: chooses among all weights; with an adapter use adapter.target_modules and "
                "adapter.exclude_modules"
            )
        return found
    if model.dtype == "float16":
        found.append("model.dtype: float16 cannot hold gradients of all weights; use bfloat16")
    if model.transformer_dtype not in (None, model.dtype):
        found.append(
            f"model.transformer_dtype: all weights are trained, so they cannot be stored as {model.transformer_dtype}; "
            "leave it out, or add a table [adapter]"
        )
    return found


def _bad_patterns(settings: TrainSettings) -> list[str]:
    found = []
    for key in ("train_only", "freeze", "learning_rates"):
        problems = [bad_pattern(pattern) for pattern in getattr(settings, key) or ()]
        found += [f"{key}: {problem}" for problem in problems if problem]
    return found


def _release_problems(settings: TrainSettings) -> list[str]:
    """What does not go together with stepping in the backward pass."""
    if not settings.optimizer.gradient_release:
        return []
    if settings.gradient_accumulation_steps > 1:
        return ["optimizer.gradient_release: steps after each micro-batch; set gradient_accumulation_steps = 1"]
    if settings.zero_stage:
        return ["optimizer.gradient_release: steps before ranks have shared gradients; set zero_stage = 0"]
    if settings.optimizer.offload:
        return ["optimizer.gradient_release: steps on the GPU; leave optimizer.offload out"]
    return []


ELEMENTWISE = ("adamw", "adamw_optimi", "sgd", "lion")
"""Optimizers that step each weight by itself, so that a share of a matrix is stepped like the whole."""


def _zero_problems(settings: TrainSettings) -> list[str]:
    """What does not go together with ZeRO 2 and 3."""
    if settings.zero_stage < 2:
        return []
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


def _matmul_problems(settings: TrainSettings) -> list[str]:
    model, found = settings.model, []
    if model.quantized_matmul and model.transformer_dtype not in ("float8", "float8_e4m3fn", "int8"):
        found.append(
            "model.quantized_matmul: multiplies weights as they are stored; set transformer_dtype to 'float8' or "
            "'int8', or leave it out"
        )
    if settings.transposed_weights and not model.quantized_matmul:
        found.append("transposed_weights: only model.quantized_matmul has a use for them; set that, or leave this out")
    if settings.transposed_weights and settings.blocks_to_swap:
        found.append("transposed_weights: takes more memory for speed, and blocks_to_swap less; leave one of them out")
    return found


CHECKS = (_partition_problems, _loss_problems, _weight_problems, _bad_patterns, _release_problems, _zero_problems,
          _matmul_problems)  # fmt: skip
"""Each says what does not go together; the user gets all of it at once."""


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
