"""The nodes that set how training goes: model precision, adapter, optimizer, general and advanced settings.

Changed defaults against the earlier package, whose own did not work or worked badly: transformer_dtype
and the adapter's dtype are automatic; the optimizer is adamw with lr 1e-4; micro_batch_size_per_gpu 1;
gradient_accumulation_steps 1; gradient_clipping 1.0 (and a decimal number); warmup_steps 0;
blocks_to_swap 0; evaluation off; output_dir and config_save_path empty.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from ..models import family_named
from ..models.base import ModelConfig as ModelTable
from ..utils.adapter_settings import AdapterTable, Loha, Lokr, Lora
from ..utils.config import SettingsError, Table, option, validate
from ..utils.dataset_settings import parse_dataset_settings
from ..utils.settings import TrainSettings, parse_train_settings
from ..utils.step_settings import Optimizer
from . import comfy
from .files import copy_path, output_folder, write_copy
from .schema import SettingsNode, Socket, Widget, further, widget, widgets

logger = logging.getLogger(__name__)

CATEGORY = "Diffusion-Pipe/Config"

OPTIMIZER_TAKES = {
    "adamw": ("lr", "betas", "weight_decay", "eps"),
    "adamw8bit": ("lr", "betas", "weight_decay", "eps"),
    "adamw_optimi": ("lr", "betas", "weight_decay", "eps"),
    "AdamW8bitKahan": ("lr", "betas", "weight_decay"),
    "Lion": ("lr", "betas", "weight_decay"),
    "Adafactor": ("lr", "weight_decay"),
    "Prodigy": ("lr", "betas", "weight_decay"),
    "automagic": ("weight_decay",),
    "sgd": ("lr", "weight_decay"),
    "stableadamw": ("lr", "betas", "weight_decay", "eps"),
    "ScheduleFreeAdamW": ("lr", "betas", "weight_decay", "eps"),
    "Muon": ("lr", "weight_decay"),
    "genericoptim": ("lr", "betas", "weight_decay", "eps"),
}
"""The optimizers on offer and which of the inputs each of them knows."""


DISTILLED = ("flux", "flux2", "hunyuan-video")
"""Families whose pipeline takes the built-in guidance, not that of a negative prompt."""


class AdapterChoice(Table):
    """Whether there is an adapter."""

    adapter_type: Literal["lora", "none", "loha", "lokr"] = option(
        "lora",
        "lora, loha and lokr train a small file beside the model, none the model itself. LoHa and LoKr put more into "
        "as large a file; LoRA is understood everywhere.",
    )


class OptimizerChoice(Table):
    """Which optimizer, of those that the node offers."""

    type: str = option(
        "adamw",
        "The optimizer. adamw is a safe choice; the 8-bit ones save memory; Prodigy and automagic "
        "find the learning rate themselves. Further ones: other_type.",
    )
    other_type: str | None = option(
        None,
        "Another optimizer: any class of pytorch_optimizer, by name. Of the numbers here it gets lr alone; the rest "
        "goes into arguments. Left out: optimizer_type.",
        advanced=True,
    )


class OptimizerArguments(Table):
    """Whatever else the chosen optimizer takes."""

    arguments: dict[str, Any] = option(
        {}, "Further arguments of the optimizer, a line such as d_coef = 0.5 for each.", advanced=True
    )


class Betas(Table):
    """The two numbers of the optimizer's ``betas``."""

    beta1: float = option(0.9, "Decay of the running average of the gradient.", ge=0, lt=1, step=0.0001)
    beta2: float = option(0.99, "Decay of the running average of the squared gradient.", ge=0, lt=1, step=0.0001)


class TrainCopy(Table):
    """Where GeneralConfig writes besides the run folder."""

    config_save_path: str | None = option(
        None,
        "Also write the training's TOML to this file, relative to ComfyUI's output folder; to train with it by "
        "hand, put the dataset's TOML beside it as dataset.toml. Left out: only the run folder gets it.",
    )


class ModelConfig(SettingsNode):
    """The precision of a model and which noise levels are trained most."""

    CATEGORY = CATEGORY
    FUNCTION = "generate_model_config"
    RETURN_TYPES = ("model_config",)
    RETURN_NAMES = ("model_config",)
    OUTPUT_TOOLTIPS = ("The model with its precision, for General Training Config.",)
    REQUIRED: ClassVar = {
        "model_path": Socket("model_path", "The model, from a model node."),
        **widgets(ModelTable, "dtype", "transformer_dtype", "timestep_sample_method", prefix="model"),
    }

    def generate_model_config(self, model_path: Any, **values: Any) -> tuple[dict[str, Any]]:
        """The [model] table, checked against the options of its family."""
        table = {**linked("model_path", model_path), **self.read(values)}
        validate(family_named(table.get("type")).Config, table, "model")
        return (table,)


OLD_ADAPTER_INPUTS = ("type", "rank", "dtype", "init_from_existing", "alpha", "dropout", "target_modules",
                      "exclude_modules")  # fmt: skip
ADAPTERS: dict[str, type[AdapterTable]] = {"lora": Lora, "loha": Loha, "lokr": Lokr}


class AdapterConfigNode(SettingsNode):
    """The low-rank adapter (LoRA) that is trained, and what of the model it changes."""

    CATEGORY = CATEGORY
    FUNCTION = "generate_adapter_config"
    RETURN_TYPES = ("ADAPTER_CONFIG",)
    RETURN_NAMES = ("adapter_config",)
    OUTPUT_TOOLTIPS = ("The adapter, for General Training Config.",)
    REQUIRED: ClassVar = {"adapter_type": widget(AdapterChoice, "adapter_type", prefix="adapter")}
    OPTIONAL: ClassVar = {
        **widgets(Lora, "rank", "dtype", "init_from_existing", "alpha", "dropout", "target_modules", "exclude_modules",
                  prefix="adapter"),
        **widgets(Lora, *further(Lora, without=OLD_ADAPTER_INPUTS), prefix="adapter"),
        **widgets(Lokr, *further(Lokr, without=Lora.model_fields), prefix="adapter"),
    }  # fmt: skip

    def generate_adapter_config(self, **values: Any) -> tuple[dict[str, Any]]:
        """``{"adapter": ...}``, or nothing when all weights are to be trained."""
        settings = self.read(values)
        kind = settings.pop("adapter_type")
        if kind == "none":
            return ({},)
        defaults = {**Lora.model_fields, **Lokr.model_fields}
        table = {"type": kind, **{key: value for key, value in settings.items()
                                  if key in OLD_ADAPTER_INPUTS or value != defaults[key].default}}  # fmt: skip
        validate(ADAPTERS[kind], table, "adapter")
        fused = table.get("fuse_adapters") or []
        for entry in fused:
            entry["path"] = comfy.resolve(entry["path"], "loras")
        return ({"adapter": table},)

    @classmethod
    def VALIDATE_INPUTS(cls, target_modules: str | None = None, exclude_modules: str | None = None) -> bool | str:
        """Refuses lists that cannot be read."""
        return cls.check(target_modules=target_modules, exclude_modules=exclude_modules)


class OptimizerConfigNode(SettingsNode):
    """The optimizer and its numbers. What an optimizer does not know is not handed to it."""

    CATEGORY = CATEGORY
    FUNCTION = "generate_optimizer_config"
    RETURN_TYPES = ("OPTIMIZER_CONFIG",)
    RETURN_NAMES = ("optimizer_config",)
    OUTPUT_TOOLTIPS = ("The optimizer, for General Training Config.",)
    REQUIRED: ClassVar = {
        "optimizer_type": widget(OptimizerChoice, "type", prefix="optimizer", choices=OPTIMIZER_TAKES)
    }
    OPTIONAL: ClassVar = {
        "lr": widget(Optimizer, "lr", prefix="optimizer", default=1e-4, off=0, note="0: the optimizer's own."),
        **widgets(Betas, "beta1", "beta2", prefix="optimizer"),
        "weight_decay": widget(Optimizer, "weight_decay", prefix="optimizer", default=0.01, off=None, high=10.0),
        "eps": widget(Optimizer, "eps", prefix="optimizer", default=1e-8, high=1.0),
        **widgets(Optimizer, "beta2_half_life", "offload", "gradient_release", prefix="optimizer"),
        "arguments": widget(OptimizerArguments, "arguments", prefix="optimizer"),
        "other_type": widget(OptimizerChoice, "other_type", prefix="optimizer"),
    }

    def generate_optimizer_config(self, **values: Any) -> tuple[dict[str, Any]]:
        """The [optimizer] table."""
        settings = self.read(values)
        chosen, other = settings.pop("type"), settings.pop("other_type", None)
        takes = ("lr",) if other else OPTIMIZER_TAKES[chosen]
        kind = other or chosen
        settings["betas"] = [settings.pop("beta1"), settings.pop("beta2")]
        table = {"type": kind, **{key: settings[key] for key in takes if key in settings}}
        if "betas" in takes and "beta2_half_life" in settings:
            table["beta2_half_life"] = settings["beta2_half_life"]
        table |= {key: True for key in ("offload", "gradient_release") if settings.get(key)}
        table |= {key: _value(text) for key, text in settings.get("arguments", {}).items()}
        validate(Optimizer, table, "optimizer")
        if kind == "Prodigy" and table.get("lr", 1) < 0.1:
            logger.warning(
                "optimizer.lr: Prodigy finds the rate itself and multiplies it by lr; %s will hardly train, "
                "1.0 is usual",
                table["lr"],
            )
        return (table,)


class AdvancedTrainConfig(SettingsNode):
    """Settings that most trainings leave alone: the rate's course, step counts, curves, pipeline cuts."""

    CATEGORY = CATEGORY
    FUNCTION = "generate_advanced_config"
    RETURN_TYPES = ("ADVANCED_TRAIN_CONFIG",)
    RETURN_NAMES = ("advanced_config",)
    OUTPUT_TOOLTIPS = ("The settings, for General Training Config.",)
    OPTIONAL: ClassVar = widgets(
        TrainSettings, "max_steps", "force_constant_lr", "lr_scheduler", "pseudo_huber_c", "map_num_proc", "compile",
        "steps_per_print", "x_axis_examples", "save_every_n_steps", "eval_every_n_steps", "checkpoint_every_n_epochs",
        "partition_split", "reentrant_activation_checkpointing", "checkpoints_to_keep", "logging_steps")  # fmt: skip

    def generate_advanced_config(self, **values: Any) -> tuple[dict[str, Any]]:
        """The part of the top level of a train.toml that differs from the defaults."""
        settings = self.read(values)
        if "partition_split" in settings:
            settings["partition_method"] = "manual"
        return ({key: value for key, value in settings.items() if value != TrainSettings.model_fields[key].default},)

    @classmethod
    def VALIDATE_INPUTS(cls, partition_split: str | None = None) -> bool | str:
        """Refuses what is no list of whole numbers."""
        return cls.check(partition_split=partition_split)


class GeneralConfig(SettingsNode):
    """All settings of a training: joins model, adapter, optimizer and the settings here."""

    CATEGORY = CATEGORY
    FUNCTION = "generate_settings"
    RETURN_TYPES = ("TRAIN_CONFIG", "STRING", "config_path")
    RETURN_NAMES = ("train_config", "output_dir", "config_path")
    OUTPUT_TOOLTIPS = (
        "The settings, for Start Training.",
        "The absolute folder that receives the runs, for TensorBoard Monitor.",
        "The file of config_save_path; empty when none was asked for.",
    )
    REQUIRED: ClassVar[dict[str, Widget | Socket]] = {
        "optimizer_config": Socket("OPTIMIZER_CONFIG", "The optimizer, from Optimizer Config."),
        "model_config": Socket("model_config", "The model, from Model Config."),
        "dataset_config": Socket(
            "DATASET_CONFIG", "The dataset, from General Dataset Config; checked here, trained by Start Training."
        ),
        **widgets(TrainSettings, "epochs", "micro_batch_size_per_gpu", "number_of_gpus", "pipeline_stages"),
        "gradient_accumulation_steps": widget(
            TrainSettings, "gradient_accumulation_steps", off=0, note="0: the same as 1."
        ),
        **widgets(
            TrainSettings,
            "gradient_clipping",
            "warmup_steps",
            "blocks_to_swap",
        ),
        "activation_checkpointing": widget(
            TrainSettings,
            "activation_checkpointing",
            note="Here on or off; the rest is in More Training Settings.",
        ),
        "save_dtype": widget(TrainSettings, "save_dtype"),
        "partition_method": widget(
            TrainSettings,
            "partition_method",
            choices=("cost", "parameters", "uniform"),
            note="Here manual is set by partition_split in Advanced Training Config, type:NAME by partition_by in "
            "More Training Settings.",
        ),
        "output_dir": widget(
            TrainSettings,
            "output_dir",
            default="",
            note="Empty: 'training' in ComfyUI's output folder, where relative paths lie too.",
        ),
        "config_save_path": widget(TrainCopy, "config_save_path", written=True),
    }
    OPTIONAL: ClassVar[dict[str, Widget | Socket]] = {
        "adapter_config": Socket(
            "ADAPTER_CONFIG", "The adapter, from Adapter Config. Not connected: all weights are trained."),
        "advanced_config": Socket("ADVANCED_TRAIN_CONFIG", "More settings, from Advanced Training Config or "
                                  "More Training Settings; they count instead of those here."),
        **widgets(TrainSettings, "eval_every_n_epochs", "eval_before_first_step", "eval_micro_batch_size_per_gpu",
                  "eval_gradient_accumulation_steps"),
        "save_every_n_epochs": widget(TrainSettings, "save_every_n_epochs", default=1),
        "checkpoint_every_n_minutes": widget(TrainSettings, "checkpoint_every_n_minutes", default=120),
        **widgets(TrainSettings, "caching_batch_size", "disable_block_swap_for_eval", "video_clip_mode"),
        "eval_datasets": widget(TrainSettings, "eval_datasets", off="", note="Here files, one per line."),
        "training_seed": widget(TrainSettings, "seed"),
        "eval_dataset_config": Socket(
            "EVAL_DATASET_CONFIG", "Datasets whose loss is measured, from Evaluation Dataset Config."),
        "sampler_config": Socket("SAMPLER_CONFIG", "Pictures while training, from Training Sampler Config."),
    }  # fmt: skip

    def generate_settings(
        self, optimizer_config: Any, model_config: Any, dataset_config: Any, adapter_config: Any = None,
        advanced_config: Any = None, eval_dataset_config: Any = None, sampler_config: Any = None, **values: Any,
    ) -> tuple[dict[str, Any], str, str]:  # fmt: skip
        """The tables of a train.toml without its ``dataset``, the folder of runs and the copy's path."""
        settings = self.read(values)
        copy = settings.pop("config_save_path", "")
        settings["output_dir"] = output_folder(settings["output_dir"])
        settings |= linked("advanced_config", advanced_config or {})
        settings["model"] = linked("model_config", model_config)
        settings["optimizer"] = linked("optimizer_config", optimizer_config)
        settings |= linked("adapter_config", adapter_config or {})
        files = [{**entry, "config": comfy.resolve(entry["config"])} for entry in settings.get("eval_datasets", [])]
        settings["eval_datasets"] = [*files, *(eval_dataset_config or [])]
        if sampler_config:
            settings["sample"] = sample = linked("sampler_config", sampler_config)
            distilled = sample.pop("guidance_value", None)
            if distilled is not None and settings["model"].get("type") in DISTILLED:
                sample["guidance"] = distilled
        parse_train_settings(settings)
        parse_dataset_settings(linked("dataset_config", dataset_config))
        return settings, settings["output_dir"], write_copy("config_save_path", copy, settings)

    @classmethod
    def VALIDATE_INPUTS(cls, config_save_path: str | None = None, output_dir: str | None = None) -> bool | str:
        """Refuses places where nothing may be written."""
        try:
            output_folder(output_dir or "")
            if (config_save_path or "").strip():
                copy_path("config_save_path", str(config_save_path))
        except SettingsError as error:
            return str(error)
        return True


def _value(text: Any) -> Any:
    """A number, a list or true and false as such; anything else as the text that it is."""
    try:
        return json.loads(text)
    except (TypeError, ValueError):
        return text


def linked(name: str, value: Any) -> dict[str, Any]:
    """What came through a link, if it is a table."""
    if not isinstance(value, Mapping):
        raise SettingsError(f"{name}: must come from the node of this package that gives it, got {value!r}")
    return dict(value)
