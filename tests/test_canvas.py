"""What a TOML file can say, the canvas can say: every option, in every form that it may have."""

import json
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import pytest
from diffusion_trainer.diffusion_nodes.deferred import real
from diffusion_trainer.diffusion_nodes.schema import Widget, widget
from diffusion_trainer.diffusion_nodes.train import RUN_OPTIONS
from diffusion_trainer.models import families
from diffusion_trainer.nodes import NODE_CLASS_MAPPINGS as NODES
from diffusion_trainer.utils.config import SettingsError, Table, _tables, validate
from diffusion_trainer.utils.dataset_settings import DatasetSettings
from diffusion_trainer.utils.settings import TrainSettings, parse_train_settings

ELSEWHERE = {
    "Files.dataset": "Start Training writes it from what is linked to it",
    "Saving.resume_from_checkpoint": "resume of Start Training",
    "Evaluation.eval_datasets": "files by eval_datasets, tables by nodes that give EVAL_DATASET_CONFIG",
    "EvalDataset.config": "nodes that give EVAL_DATASET_CONFIG",
    "Optimizer.type": "optimizer_type and other_type; see below",
    "Optimizer.betas": "beta1 and beta2, or any number of them as an argument; see below",
    "AdapterTable.fuse_adapters": "lines, of the next two",
    "FusedAdapter.path": "a line of fuse_adapters",
    "FusedAdapter.weight": "the same line",
    "DatasetSettings.directory": "the path nodes and Add Dataset Folder",
    "Directory.control_paths": "Multi Image Edit Dataset Path",
    "FromComfyUI.text_encoders": "text_encoder_path of Flux.2 Model and Z-Image Model; Text_Encoder and ByT5 of "
    "HunyuanVideo 1.5 Model",
    "TextEncoderFiles.path": "the same",
    "TextEncoderFiles.paths": "the same",
    "TextEncoderFiles.type": "follows from the node",
}
PARTITIONS = ["cost", "parameters", "uniform", "type:Transformer"]
"""What partition_method may say besides manual, which partition_split implies."""


def all_tables() -> list[type[Table]]:
    found: list[type[Table]] = []
    waiting: list[type[Table]] = [TrainSettings, DatasetSettings, *(family.Config for family in families().values())]
    while waiting:
        table = waiting.pop()
        if table not in found:
            found.append(table)
            waiting += [inner for field in table.model_fields.values() for inner in _tables(field.annotation)]
    return found


def options() -> list[tuple[type[Table], str]]:
    """Each option once, by the table that declares it."""
    found = {}
    for table in all_tables():
        for key, field in table.model_fields.items():
            if field.description and f"{declares(table, key).__name__}.{key}" not in ELSEWHERE:
                found[declares(table, key), key] = table
    return [(table, key) for (_, key), table in found.items()]


def declares(table: type[Table], key: str) -> type[Table]:
    """Which of the parents of a table declares an option."""
    return next(parent for parent in reversed(table.__mro__) if key in getattr(parent, "model_fields", {}))


def inputs_of(table: type[Table], key: str) -> list[Widget]:
    found = [widget(TrainSettings, key)] if key in RUN_OPTIONS else []
    for cls in map(real, NODES.values()):
        for entry in {**getattr(cls, "REQUIRED", {}), **getattr(cls, "OPTIONAL", {})}.values():
            if isinstance(entry, Widget) and entry.key == key and key in entry.table.model_fields \
                    and declares(entry.table, key) is declares(table, key):  # fmt: skip
                found.append(entry)
    return found


def values_of(table: type[Table], key: str) -> list[Any]:
    """At least one value of each form that an option may have."""
    field = table.model_fields[key]
    if key == "partition_method":
        return PARTITIONS
    union = get_origin(field.annotation) in (Union, UnionType)
    members = get_args(field.annotation) if union else (field.annotation,)
    return [value for member in members if member is not NoneType for value in examples(member, field)]


def examples(member: Any, field: Any) -> list[Any]:
    if member is bool:
        return [True, False]
    if member in (int, float):
        low = max([getattr(rule, end) for rule in field.metadata for end in ("ge", "gt") if hasattr(rule, end)] or [0])
        step = field.json_schema_extra["widget"].get("step", 1 if member is int else 0.01)
        return [member(low + 2 * step)]
    if member is str:
        return ["/some thing, else"]
    if get_origin(member) is Literal:
        return list(get_args(member))
    if get_origin(member) is dict:
        return [{"some.thing": examples(get_args(member)[1], field)[0]}]
    inner = get_args(member)[0]
    if inner is str:
        return [["/some thing", "/else"]]
    forms = get_args(inner) if get_origin(inner) in (Union, UnionType) else (inner,)
    return [[512, 768] if form is int else [0.5, 0.75] if form is float else [[512, 512], [1024, 2]] for form in forms]


def can_say(entry: Widget, value: Any) -> bool:
    """Whether something can be typed or chosen that reads as the value."""
    if isinstance(entry.kind, list):
        typed: list[Any] = entry.kind
    elif entry.kind == "STRING":
        typed = [str(value), json.dumps(value)]
        typed += ["\n".join(map(str, value))] if isinstance(value, list) else []
        typed += ["\n".join(f"{name} = {number}" for name, number in value.items())] if isinstance(value, dict) else []
    elif isinstance(value, bool) != (entry.kind == "BOOLEAN") or not isinstance(value, (int, float)):
        return False
    else:
        typed = [value] if entry.low is None or entry.low <= value <= (entry.high or value) else []
    return any(same(entry, text, value) for text in typed)


def same(entry: Widget, typed: Any, value: Any) -> bool:
    try:
        read = entry.read(typed)
        table = type("Part", (Table,), {"__annotations__": {entry.key: entry.field.annotation}})
        return read is not None and validate(table, {entry.key: read}).model_dump()[entry.key] == value
    except SettingsError:
        return False


@pytest.mark.parametrize(("table", "key"), options(), ids=lambda part: getattr(part, "__name__", part))
def test_every_form_of_every_option_can_be_set_on_the_canvas(table, key):
    entries = inputs_of(table, key)
    unsaid = [value for value in values_of(table, key) if not any(can_say(entry, value) for entry in entries)]
    assert not unsaid, f"{table.__name__}.{key}: no node has an input that can say {unsaid}"


def call(node, **values):
    cls = NODES[node]
    return getattr(cls(), cls.FUNCTION)(**values)[0]


def general(advanced, **values):
    dataset = {"directory": [{"path": "/d"}]}
    model = call("ModelConfig", model_path=call("FluxModelNode", diffusers_path="/m"))
    train = call("GeneralConfig", optimizer_config=call("OptimizerConfigNode"), model_config=model,
                 dataset_config=dataset, advanced_config=advanced, adapter_config={"adapter": {"type": "lora"}},
                 **values)  # fmt: skip
    return parse_train_settings(train)


@pytest.mark.parametrize(
    ("typed", "means"),
    [({}, True), ({"activation_checkpointing_mode": "selective"}, "selective"),
     ({"activation_checkpointing_mode": "unsloth"}, "unsloth"), ({"activation_checkpointing_blocks": 3}, 3),
     ({"activation_checkpointing_blocks": 1}, 1)],
)  # fmt: skip
def test_activations_can_be_kept_in_every_way(typed, means):
    assert general(call("MoreTrainConfigNode", **typed)).activation_checkpointing == means
    off = general(call("MoreTrainConfigNode", **typed), activation_checkpointing=False)
    assert off.activation_checkpointing == (means if typed else False)


def test_two_inputs_for_one_option_do_not_both_count():
    with pytest.raises(SettingsError, match="activation_checkpointing_blocks: sets activation_checkpointing, as "
                       "activation_checkpointing_mode does; use one of them"):  # fmt: skip
        call("MoreTrainConfigNode", activation_checkpointing_mode="unsloth", activation_checkpointing_blocks=2)


def test_other_forms_count_instead_of_those_of_the_general_node():
    more = call("MoreTrainConfigNode", micro_batch_by_resolution="[[512, 4], [1024, 1]]", partition_by="cost",
                enable_wandb=True, wandb_run_name="first")  # fmt: skip
    settings = general(more, micro_batch_size_per_gpu=2, partition_method="uniform")
    assert settings.micro_batch_size_per_gpu == [[512, 4], [1024, 1]]
    assert settings.partition_method == "cost"
    assert (settings.monitoring.enable_wandb, settings.monitoring.wandb_run_name) == (True, "first")
    assert NODES["MoreTrainConfigNode"].VALIDATE_INPUTS(micro_batch_by_resolution="512: 4") is not True
    assert call("MoreTrainConfigNode") == {}


def test_any_optimizer_can_be_named():
    table = call("OptimizerConfigNode", other_type="Adan", lr=1e-3, arguments="betas = [0.98, 0.92, 0.99]")
    assert table == {"type": "Adan", "lr": 1e-3, "betas": [0.98, 0.92, 0.99]}


def test_a_dataset_with_options_of_its_own_can_be_measured():
    dataset = call("DatasetOptionsNode", dataset_config={"directory": [{"path": "/d", "num_repeats": 1}]},
                   trigger_word="ohwx", first_folder_repeats=0.5)  # fmt: skip
    first = call("EvalFromDatasetNode", dataset_config=dataset, name="held out")
    both = call("EvalFromDatasetNode", dataset_config={"directory": [{"path": "/e"}]}, name="other", others=first)
    settings = general({}, eval_dataset_config=both)
    assert [entry.name for entry in settings.eval_datasets] == ["held out", "other"]
    assert settings.eval_datasets[0].config == {
        "trigger_word": "ohwx", "directory": [{"path": "/d", "num_repeats": 0.5}]}  # fmt: skip
    with pytest.raises(SettingsError, match="name: 'other' is the name of another"):
        call("EvalFromDatasetNode", dataset_config=dataset, name="other", others=both)


def test_masks_go_with_pictures_to_start_from(tmp_path):
    for name in ("after", "before", "masks"):
        (tmp_path / name).mkdir()
    (tmp_path / "all.png").write_bytes(b"")
    given = {"mask_path": str(tmp_path / "masks"), "default_mask_file": str(tmp_path / "all.png")}
    edit = call("EditModelDatasetPathNode", target_path=str(tmp_path / "after"), control_path=str(tmp_path / "before"),
                **given)  # fmt: skip
    assert edit == {"path": str(tmp_path / "after"), "control_path": str(tmp_path / "before"), **given}
    several = call("MultiImageEditDatasetPathNode", target_path=str(tmp_path / "after"),
                   control_paths=str(tmp_path / "before"), **given)  # fmt: skip
    assert several["default_mask_file"] == given["default_mask_file"]
    answer = NODES["MaskDatasetPathNode"].VALIDATE_INPUTS(default_mask_file=str(tmp_path))
    assert answer == f"default_mask_file: '{tmp_path}' is not a file; give a picture"


def test_spaces_that_mean_something_stay(tmp_path):
    (tmp_path / "pictures").mkdir()
    dataset = call("GeneralDatasetConfig", input_path=str(tmp_path / "pictures"), caption_prefix="in ink, ")
    more = call("DatasetOptionsNode", dataset_config=dataset, cache_shuffle_delimiter="; ")
    assert (more["caption_prefix"], more["cache_shuffle_delimiter"]) == ("in ink, ", "; ")
