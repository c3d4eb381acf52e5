"""Nodes beside General Training Config: further options, pictures while training, and where the processes run."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from ..utils.config import Table, option, validate
from ..utils.environment import Environment
from ..utils.observation_settings import Monitoring, Sampling
from ..utils.settings import TrainSettings
from . import comfy
from .config import CATEGORY, AdvancedTrainConfig, GeneralConfig, linked
from .schema import SettingsNode, Socket, further, widget, widgets
from .train import RUN_OPTIONS

SET_ELSEWHERE = ("dataset", "resume_from_checkpoint", "partition_method", *RUN_OPTIONS)
"""Options that the Train node sets, or other inputs decide."""
AS_GENERAL = "as General Training Config says."
OTHER_FORMS = {
    "activation_checkpointing_mode": widget(TrainSettings, "activation_checkpointing", only=Literal,
                                            note=f"auto: {AS_GENERAL}"),
    "activation_checkpointing_blocks": widget(TrainSettings, "activation_checkpointing", only=int,
                                              note=f"0: {AS_GENERAL}"),
    "micro_batch_by_resolution": widget(TrainSettings, "micro_batch_size_per_gpu", only=list,
                                        note=f"Empty: {AS_GENERAL}"),
    "image_micro_batch_by_resolution": widget(TrainSettings, "image_micro_batch_size_per_gpu", only=list),
    "eval_micro_batch_by_resolution": widget(TrainSettings, "eval_micro_batch_size_per_gpu", only=list),
    "eval_image_micro_batch_by_resolution": widget(TrainSettings, "eval_image_micro_batch_size_per_gpu", only=list),
    "partition_by": widget(TrainSettings, "partition_method", default="", off="", note=f"Empty: {AS_GENERAL}"),
}  # fmt: skip
"""Inputs for what an option may be besides what its input in General Training Config, or here, can hold."""


class DistilledGuidance(Table):
    """The second guidance of the earlier package's sampler node."""

    guidance_value: float | None = option(
        None, "Guidance for models that have it built in, such as Flux dev. Left out: guidance_scale.", ge=0, le=100,
        step=0.1)  # fmt: skip


class MoreTrainConfigNode(SettingsNode):
    """Every further option of a training. What stays as it is has no effect."""

    CATEGORY = CATEGORY
    FUNCTION = "more"
    RETURN_TYPES = ("ADVANCED_TRAIN_CONFIG",)
    RETURN_NAMES = ("advanced_config",)
    OUTPUT_TOOLTIPS = ("The settings, for General Training Config.",)

    OPTIONAL: ClassVar = {
        "advanced_config": Socket("ADVANCED_TRAIN_CONFIG", "Settings to add to, from Advanced Training Config."),
        **widgets(TrainSettings, *further(TrainSettings, GeneralConfig.REQUIRED, GeneralConfig.OPTIONAL,
                                          AdvancedTrainConfig.OPTIONAL, without=SET_ELSEWHERE)),
        **OTHER_FORMS,
        **widgets(Monitoring, *Monitoring.model_fields, prefix="monitoring"),
    }  # fmt: skip

    def more(self, advanced_config: Any = None, **values: Any) -> tuple[dict[str, Any]]:
        """The part of a train.toml that differs from the defaults, or is set in another form than elsewhere."""
        read = self.read(values)
        monitoring = {key: read.pop(key) for key in Monitoring.model_fields if key in read}
        others = {entry.key for entry in OTHER_FORMS.values()}
        settings = {key: value for key, value in read.items()
                    if key in others or value != TrainSettings.model_fields[key].default}  # fmt: skip
        if any(monitoring.values()):
            settings["monitoring"] = monitoring
        return ({**linked("advanced_config", advanced_config or {}), **settings},)

    @classmethod
    def VALIDATE_INPUTS(
        cls, micro_batch_by_resolution: str | None = None, image_micro_batch_by_resolution: str | None = None,
        eval_micro_batch_by_resolution: str | None = None, eval_image_micro_batch_by_resolution: str | None = None,
        learning_rates: str | None = None,
    ) -> bool | str:  # fmt: skip
        """Refuses lists that cannot be read."""
        return cls.check(
            micro_batch_by_resolution=micro_batch_by_resolution, learning_rates=learning_rates,
            image_micro_batch_by_resolution=image_micro_batch_by_resolution,
            eval_micro_batch_by_resolution=eval_micro_batch_by_resolution,
            eval_image_micro_batch_by_resolution=eval_image_micro_batch_by_resolution)  # fmt: skip


class TrainingSamplerConfig(SettingsNode):
    """Pictures or videos that are made while training, to see how it goes. Without a prompt there are none."""

    CATEGORY = CATEGORY
    FUNCTION = "generate_sampler_config"
    RETURN_TYPES = ("SAMPLER_CONFIG",)
    RETURN_NAMES = ("sampler_config",)
    OUTPUT_TOOLTIPS = ("What to make and when, for General Training Config.",)
    OPTIONAL: ClassVar = {
        "sample_every_n_steps": widget(Sampling, "every_n_steps", prefix="sample"),
        "sample_every_n_epochs": widget(Sampling, "every_n_epochs", prefix="sample", default=1),
        "num_inference_steps": widget(Sampling, "steps", prefix="sample"),
        "guidance_scale": widget(Sampling, "guidance", prefix="sample"),
        "guidance_value": widget(DistilledGuidance, "guidance_value", prefix="sample"),
        **widgets(Sampling, "height", "width", prefix="sample"),
        "sample_prompt": widget(Sampling, "prompts", prefix="sample", default="", off=""),
        **widgets(Sampling, "negative_prompt", "images", "frames", "before_first_step", "true_cfg", prefix="sample"),
        "sample_seed": widget(Sampling, "seed", prefix="sample"),
    }  # fmt: skip

    def generate_sampler_config(self, **values: Any) -> tuple[dict[str, Any]]:
        """The [sample] table, and guidance_value; empty without a prompt."""
        settings = self.read(values)
        if not settings.get("prompts"):
            return ({},)
        settings["images"] = [comfy.resolve(path) for path in settings.get("images", [])]
        validate(Sampling, {key: value for key, value in settings.items() if key != "guidance_value"}, "sample")
        return (settings,)


class RunEnvironmentNode(SettingsNode):
    """Where and how the processes of a training run: GPUs, machines, and what CUDA and NCCL are told."""

    CATEGORY = "Diffusion-Pipe/Train"
    FUNCTION = "environment"
    RETURN_TYPES = ("RUN_ENVIRONMENT",)
    RETURN_NAMES = ("environment",)
    OUTPUT_TOOLTIPS = ("For Start Training; the run folder's train.toml records it.",)
    OPTIONAL: ClassVar = widgets(Environment, *Environment.model_fields, prefix="environment")

    def environment(self, **values: Any) -> tuple[dict[str, Any]]:
        """The [environment] table: what differs from the defaults."""
        checked = validate(Environment, self.read(values), "environment")
        return (checked.model_dump(exclude_defaults=True),)

    @classmethod
    def VALIDATE_INPUTS(cls, visible_gpus: str | None = None, variables: str | None = None) -> bool | str:
        """Refuses what cannot be read or may not be set."""
        return cls.check(visible_gpus=visible_gpus, variables=variables)
