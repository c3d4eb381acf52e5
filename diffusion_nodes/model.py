"""One node per model family, made from the family's options.

`NODES` holds what saved workflows rely on: the id, the function and which inputs come first. All
further options of the family follow by themselves, so a new option or family needs nothing here but,
for a family, its line.

Changed against the earlier package: ``FluxModelNode`` takes single files for every part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..models import families
from ..models.base import Family, ModelConfig
from .schema import SettingsNode, widget

IN_MODEL_CONFIG = ("type", "dtype", "transformer_dtype", "timestep_sample_method")
"""Options that the ModelConfig node sets for every family."""


@dataclass(frozen=True)
class Contract:
    """What is fixed of a family's node."""

    family: str
    function: str
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    """In this order; what the family has besides comes after."""


NODES = {
    "FluxModelNode": Contract(
        "flux", "get_flux_config",
        optional=("diffusers_path", "transformer_path", "bypass_guidance_embedding", "flux_shift")),
}  # fmt: skip


class ModelNode(SettingsNode):
    """What the nodes of all families share."""

    CATEGORY = "Diffusion-Pipe/Model"
    RETURN_TYPES = ("model_path",)
    RETURN_NAMES = ("model_path",)
    OUTPUT_TOOLTIPS = ("The model, for Model Config.",)
    FAMILY: ClassVar[str]

    def config(self, **values: Any) -> tuple[dict[str, Any]]:
        """The family's part of the [model] table."""
        return ({"type": self.FAMILY, **self.read(values)},)


def model_nodes() -> dict[str, type[ModelNode]]:
    """The node of each family in `NODES`, by id."""
    known = families()
    return {name: _node(name, contract, known[contract.family]) for name, contract in NODES.items()}


def _node(name: str, contract: Contract, family: type[Family]) -> type[ModelNode]:
    listed = (*contract.required, *contract.optional)
    own = [key for key in family.Config.model_fields if key not in ModelConfig.model_fields]
    shared = [key for key in ModelConfig.model_fields if key not in IN_MODEL_CONFIG]
    later = [key for key in (*own, *shared) if key not in listed]
    required, optional = ({key: widget(family.Config, key, prefix="model") for key in keys}
                          for keys in (contract.required, (*contract.optional, *later)))  # fmt: skip
    return type(name, (ModelNode,), {
        "__doc__": family.Config.__doc__, "__module__": __name__, "FAMILY": contract.family,
        "FUNCTION": contract.function, contract.function: ModelNode.config,
        "REQUIRED": required, "OPTIONAL": optional})  # fmt: skip
