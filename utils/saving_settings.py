"""When a run writes exports and checkpoints, and how one goes on from them: options of the top level."""

from __future__ import annotations

from typing import Any

from pydantic import field_validator

from .config import Dtype, Table, option


class Saving(Table):
    """Exports, checkpoints and going on."""

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

    @field_validator(
        *(f"save_every_n_{unit}" for unit in ("epochs", "steps", "examples")),
        *(f"checkpoint_every_n_{unit}" for unit in ("epochs", "steps", "minutes")), mode="before",
    )  # fmt: skip
    @classmethod
    def _zero_saves_never(cls, value: Any) -> Any:
        return None if value == 0 else value
