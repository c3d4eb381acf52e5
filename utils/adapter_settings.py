"""The adapter that is trained: ``[adapter]``, of three kinds told apart by ``type``."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from .config import Dtype, Table, bad_pattern, option

logger = logging.getLogger(__name__)

SINGLE_BLOCKS = "single_transformer_blocks"


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
