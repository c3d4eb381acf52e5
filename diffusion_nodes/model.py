"""One node per model family, made from the family's options; what is fixed of each is in `model_contracts`.

Changed against the earlier package: ``FluxModelNode`` takes single files for every part; the first frame
of LTX-Video is not conditioned on unless asked for.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any, ClassVar

from ..models import configs, families, family_named
from ..models.base import ModelConfig
from ..utils.config import SettingsError, Table, option
from .model_contracts import Contract, contracts
from .schema import SettingsNode, Socket, Widget, can_be_typed, widget

IN_MODEL_CONFIG = ("type", "dtype", "transformer_dtype", "timestep_sample_method")
"""Options that the ModelConfig node sets for every family."""
TEXT_ENCODERS = {"flux2": "flux2", "z_image": "lumina2"}
"""What ComfyUI calls the text encoder of families whose node has an input for one file."""
NOT_YET = "This version cannot train it yet."


class NodeOptions(Table):
    """Inputs that are no option of a family, but decide on some."""

    use_single_file: bool = option(False, "Take the model from single_file_path.")
    qwen_2511: bool = option(False, "The model is Qwen-Image-Edit-2511.")
    text_encoder_path: str | None = option(None, "Text encoder as a single file.", picker="text_encoders")
    Text_Encoder: str = option(..., "The Qwen2.5-VL text encoder as a single file.", picker="text_encoders")
    ByT5: str = option(..., "The ByT5 text encoder as a single file.", picker="text_encoders")


class ModelNode(SettingsNode):
    """What the nodes of all families share."""

    CATEGORY = "Diffusion-Pipe/Model"
    RETURN_TYPES = ("model_path",)
    RETURN_NAMES = ("model_path",)
    OUTPUT_TOOLTIPS = ("The model, for Model Config.",)
    FAMILY: ClassVar[str]

    def config(self, **values: Any) -> tuple[dict[str, Any]]:
        """The family's part of the [model] table."""
        return (_as_table({"type": self.FAMILY, **self.read(values)}),)

    @classmethod
    def validate(cls, **values: Any) -> bool | str:
        """What VALIDATE_INPUTS answers: refuses families that cannot be trained, and lists that are none."""
        try:
            family_named(cls.FAMILY)
        except SettingsError as error:
            return str(error)
        return cls.check(**values)


def _as_table(settings: dict[str, Any]) -> dict[str, Any]:
    """``settings`` with what `NodeOptions` decided carried out."""
    if not settings.pop("use_single_file", True):
        settings.pop("single_file_path", None)
    if settings.pop("qwen_2511", False):
        settings["type"] = "qwen2511"
    if settings["type"] in TEXT_ENCODERS and (path := settings.pop("text_encoder_path", None)):
        settings["text_encoders"] = [{"path": path, "type": TEXT_ENCODERS[settings["type"]]}]
    if settings["type"] == "hunyuan_video_15":
        paths = [settings.pop("Text_Encoder"), settings.pop("ByT5")]
        settings["text_encoders"] = [{"paths": paths, "type": "hunyuan_video_15"}]
    return settings


def __getattr__(name: str) -> type[ModelNode]:
    """The node of this id, as an attribute of the module."""
    if name not in contracts():
        raise AttributeError(name)
    return _node(name)


@cache
def _node(name: str) -> type[ModelNode]:
    contract = contracts()[name]
    table = configs()[contract.family]
    keys = (contract.required, (*contract.optional, *_further(table, contract)))
    required, optional = ({key: _input(table, contract, key) for key in section} for section in keys)
    texts = [key for key, entry in {**required, **optional}.items() if isinstance(entry, Widget)
             and entry.kind == "STRING"]  # fmt: skip
    doc = table.__doc__ if contract.family in families() else f"{table.__doc__} {NOT_YET}"
    return type(name, (ModelNode,), {
        "__doc__": doc, "__module__": __name__, "FAMILY": contract.family,
        "FUNCTION": contract.function, contract.function: ModelNode.config,
        "VALIDATE_INPUTS": classmethod(_validator(texts)), "REQUIRED": required, "OPTIONAL": optional})  # fmt: skip


def _validator(texts: list[str]) -> Any:
    """`ModelNode.validate` with a signature that names ``texts``: ComfyUI passes what is named, and leaves its own
    checks of that away, which texts have none of."""

    def validate_inputs(cls: type[ModelNode], **values: Any) -> bool | str:
        return cls.validate(**values)

    names = ("cls", *texts)
    kind, default = inspect.Parameter.POSITIONAL_OR_KEYWORD, None
    parameters = [inspect.Parameter(name, kind, default=inspect.Parameter.empty if name == "cls" else default)
                  for name in names]  # fmt: skip
    validate_inputs.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return validate_inputs


def _further(table: type[ModelConfig], contract: Contract) -> list[str]:
    """Options that no input of the contract sets; entries with tables in them are for files alone."""
    set_by = {contract.keys.get(key, key) for key in (*contract.required, *contract.optional)}
    own = [key for key in table.model_fields if key not in ModelConfig.model_fields]
    shared = [key for key in ModelConfig.model_fields if key not in IN_MODEL_CONFIG]
    return [key for key in (*own, *shared) if key not in set_by and can_be_typed(table.model_fields[key])]


def _input(table: type[ModelConfig], contract: Contract, name: str) -> Widget | Socket:
    key = contract.keys.get(name, name)
    owner: type[Table] = table if key in table.model_fields else NodeOptions
    fixed = contract.defaults.get(name)
    default = fixed if fixed is not None else "" if owner.model_fields[key].is_required() else ...
    off = None if isinstance(fixed, float) else ...  # 0 then is a value like others
    return widget(owner, key, prefix="model", kind=contract.kinds.get(name), default=default, off=off)
