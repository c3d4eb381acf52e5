"""The settings of a run: what old files hold is taken, what cannot be is refused by name."""

import re
import tomllib
from pathlib import Path

import pytest
from diffusion_trainer.models import configs, families, planned
from diffusion_trainer.scripts import examples
from diffusion_trainer.utils.config import SettingsError, write_toml
from diffusion_trainer.utils.dataset_settings import parse_dataset_settings
from diffusion_trainer.utils.environment import Environment
from diffusion_trainer.utils.observation_settings import EvalDataset, Sampling
from diffusion_trainer.utils.settings import (
    TrainSettings,
    as_toml,
    family_of,
    load_train_settings,
    parse_train_settings,
)

ROOT = Path(__file__).resolve().parent.parent


def train(**changes):
    values = {"output_dir": "/o", "model": {"type": "flux", "diffusers_path": "/m"}, "adapter": {"type": "lora"},
              "optimizer": {"type": "adamw", "lr": 1e-4}}  # fmt: skip
    values |= changes
    return {key: value for key, value in values.items() if value is not None}


def dataset(**changes):
    return {"directory": [{"path": "/d"}], **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epoch": 3}, "epoch: unknown option; did you mean 'epochs'?"),
        ({"epochs": 0}, "epochs: must be at least 1, got 0"),
        ({"epochs": "many"}, "epochs: input should be a valid integer"),
        ({"model": None}, "model: required, but not given"),
        ({"optimizer": None}, "optimizer: required, but not given"),
        ({"model": {"type": "fluxx"}}, "model.type: 'fluxx' is unknown; known are"),
        ({"model": {"type": "flux", "difusers_path": "/m"}}, "model.difusers_path: unknown option; did you mean 'diffusers_path'?"),  # noqa: E501
        ({"model": {"type": "flux", "dtype": "bf16"}}, "model.dtype: must be"),
        ({"adapter": {"type": "lora", "rank": 0}}, "adapter.rank: must be at least 1, got 0"),
        ({"adapter": {"type": "lora", "rnk": 3}}, "adapter.rnk: unknown option; did you mean 'rank'?"),
        ({"optimizer": {"lr": 1e-4}}, "optimizer.type: required, but not given"),
        ({"optimizer": {"type": "adamw", "betas": [0.9, 1.0]}}, "optimizer.betas: each must be at least 0 and less than 1"),  # noqa: E501
        ({"lr_scheduler": "cosin"}, "lr_scheduler: must be 'constant', 'linear', 'cosine', 'polynomial' or 'one_cycle', got 'cosin'; did you mean 'cosine'?"),  # noqa: E501
        ({"activation_checkpointing": "all"}, "activation_checkpointing: must be true, false, a number of blocks, 'selective' or 'unsloth', got 'all'"),  # noqa: E501
        ({"partition_method": "manual", "pipeline_stages": 3, "partition_split": [4]}, "partition_split: needs 2 numbers"),  # noqa: E501
        ({"model": {"type": "flux", "quantized_matmul": True, "transformer_dtype": "nf4"}}, "model.quantized_matmul: multiplies weights as they are stored"),  # noqa: E501
        ({"transposed_weights": True}, "transposed_weights: only model.quantized_matmul has a use for them"),
        ({"model": {"type": "flux", "quantized_matmul": True, "transformer_dtype": "int8"}, "transposed_weights": True, "blocks_to_swap": 1}, "transposed_weights: takes more memory for speed, and blocks_to_swap less"),  # noqa: E501
        ({"partition_method": "memory"}, "partition_method: must be cost, parameters, uniform"),
    ],
)  # fmt: skip
def test_train_messages(changes, message):
    with pytest.raises(SettingsError) as caught:
        parse_train_settings(train(**changes))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "directory: required, but not given"),
        ({"directory": []}, "directory: "),
        ({"directory": [{}]}, "directory[0].path: required, but not given"),
        ({"directory": [{"path": "/d"}, {"pth": "/e", "path": "/f"}]}, "directory[1].pth: unknown option; did you mean 'path'?"),  # noqa: E501
        (dataset(resolutions=[]), "resolutions: needs at least one, such as [512]"),
        (dataset(resolutions=[8]), "resolutions: each must be a side of at least 16"),
        (dataset(resolutions=["512px"]), "resolutions[0]: "),
        (dataset(min_ar=2.0, max_ar=1.0), "min_ar: must not be above max_ar, got 2.0 and 1.0"),
        (dataset(num_ar_buckets=0), "num_ar_buckets: must be at least 1, got 0"),
    ],
)  # fmt: skip
def test_dataset_messages(values, message):
    with pytest.raises(SettingsError) as caught:
        parse_dataset_settings(values)
    assert message in str(caught.value)


def test_all_problems_come_at_once():
    with pytest.raises(SettingsError) as caught:
        parse_train_settings(train(epochs=0, seeed=1, optimizer={"type": "adamw", "lr": -1}))
    assert len(str(caught.value).splitlines()) == 3


def test_settings_survive_their_toml(tmp_path):
    place = '/o/it\'s "my" 猫 🐈\\x'
    settings = parse_train_settings(
        train(output_dir=place, max_steps=7, adapter={"type": "lora", "target_modules": ["a"]})
    )
    write_toml(tmp_path / "train.toml", as_toml(settings))
    again = load_train_settings(tmp_path / "train.toml")
    assert again == settings
    assert again.output_dir == place
    assert as_toml(again) == as_toml(settings)


def test_an_optimizer_may_have_arguments_of_its_own():
    settings = parse_train_settings(train(optimizer={"type": "Prodigy", "lr": 1.0, "d_coef": 0.5}))
    assert as_toml(settings)["optimizer"]["d_coef"] == 0.5


def test_the_family_comes_with_the_settings():
    settings = parse_train_settings(train())
    assert isinstance(family_of(settings), families()["flux"])


def test_a_table_is_declared_once():
    both = set(planned.CONFIGS) & set(families())
    assert not both, f"models/planned.py: delete the tables of {both}; the families' own files declare them"


def test_a_family_that_is_only_declared_is_refused_by_name():
    settings = parse_train_settings(train(model={"type": "hidream", "diffusers_path": "/m", "llama3_path": "/l"}))
    with pytest.raises(SettingsError, match=r"model\.type: 'hidream' is not implemented in this version; it can train"):
        family_of(settings)


def test_other_names_are_taken_with_one_warning(caplog):
    model = {"type": "krea2", "diffusion_model": "/d", "vae": "/v", "diffusion_model_dtype": "float8"}
    assert parse_train_settings(train(model=model)).model.transformer_dtype == "float8"
    assert caplog.text.count("diffusion_model_dtype: taken as transformer_dtype") == 1
    with pytest.raises(SettingsError, match="diffusion_model_dtype: is another name of transformer_dtype"):
        parse_train_settings(train(model={**model, "transformer_dtype": "bfloat16"}))


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "configs").glob("*.toml")))
def test_shipped_files_are_right(name):
    values = tomllib.loads((ROOT / "configs" / name).read_text("utf-8"))
    if "directory" in values:
        assert parse_dataset_settings(values)
        assert values == examples.DATASET[name][1]
    else:
        family_of(parse_train_settings(values))
        assert values == examples.TRAIN[name][1]


def test_every_example_is_shipped():
    assert {path.name for path in (ROOT / "configs").glob("*.toml")} == {*examples.TRAIN, *examples.DATASET}


def test_every_option_is_described():
    tables = [TrainSettings, Sampling, EvalDataset, Environment, *configs().values()]
    nested = {"model", "adapter", "optimizer", "monitoring", "sample", "environment", "type"}
    bare = [
        name
        for table in tables
        for name, field in table.model_fields.items()
        if not field.description and name not in nested
    ]
    assert bare == []


def test_groups_of_options_hide_nothing_of_each_other():
    """pydantic knows checks by their name, so two groups with a check of one name would lose one of them."""
    groups = TrainSettings.__bases__
    checks = [name for table in (TrainSettings, *groups) for name in vars(table) if re.match("_[a-z]", name)]
    names = [name for name in checks if name != "_abc_impl"] + [key for group in groups for key in group.model_fields]
    assert {"_micro_batch", "_eval_micro_batch", "epochs", "loss"} <= set(names)
    assert [name for name in names if names.count(name) > 1] == []
