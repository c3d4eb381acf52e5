"""The nodes on the canvas: what they give for what was typed, and what they refuse."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from diffusion_trainer.diffusion_nodes import comfy, files
from diffusion_trainer.diffusion_nodes.config import OPTIMIZER_TAKES
from diffusion_trainer.nodes import NODE_CLASS_MAPPINGS as NODES
from diffusion_trainer.scripts.workflow import widget_names
from diffusion_trainer.utils.config import SettingsError
from diffusion_trainer.utils.dataset_settings import parse_dataset_settings
from diffusion_trainer.utils.settings import parse_train_settings

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def base(tmp_path):
    before = comfy.base_directory()
    for folder in ("input/pictures", "output", "user", "temp", "models/diffusers/flux"):
        (tmp_path / folder).mkdir(parents=True)
    comfy.set_base_directory(tmp_path)
    yield tmp_path
    comfy.set_base_directory(before)


def call(node, **values):
    """Runs a node with the values that its widgets start with, changed by ``values``."""
    cls = NODES[node]
    start = {name: default for name, default in widget_names(cls) if name is not None}
    return getattr(cls(), cls.FUNCTION)(**{**start, **values})


def dataset(**values):
    return call(
        "GeneralDatasetConfig", input_path=call("GeneralDatasetPathNode", dataset_path="pictures")[0], **values
    )[0]


def general(advanced=None, adapter=None, optimizer=None, model=None, **values):
    return call(
        "GeneralConfig",
        optimizer_config=call("OptimizerConfigNode", **(optimizer or {}))[0],
        model_config=call("ModelConfig", model_path=call("FluxModelNode", diffusers_path="flux")[0], **(model or {}))[
            0
        ],
        dataset_config=dataset(),
        adapter_config=call("AdapterConfigNode", **(adapter or {}))[0],
        advanced_config=call("AdvancedTrainConfig", **(advanced or {}))[0],
        **values,
    )


# -- whole graphs ------------------------------------------------------------------------------------------


def test_the_defaults_make_valid_settings(base):
    train, output_dir, config_path = general()
    assert parse_train_settings(train).epochs == 50
    assert parse_dataset_settings(dataset())
    assert "dataset" not in train
    assert train["model"] == {"type": "flux", "dtype": "bfloat16", "timestep_sample_method": "logit_normal",
                              "diffusers_path": str(base / "models/diffusers/flux"), "bypass_guidance_embedding": False,
                              "flux_shift": False, "guidance": 1.0, "max_sequence_length": 512, "sigmoid_scale": 1.0,
                              "logit_mean": 0.0, "loss_weighting": "none",
                              "min_t": 0.0, "max_t": 1.0, "quantized_matmul": False}  # fmt: skip
    assert train["optimizer"] == {"type": "adamw", "lr": 1e-4, "betas": [0.9, 0.99], "weight_decay": 0.01, "eps": 1e-8}
    assert train["adapter"] == {"type": "lora", "rank": 32, "dropout": 0.0}
    assert output_dir == train["output_dir"] == str(base / "output/training")
    assert config_path == ""


def test_everything_a_node_gives_is_plain(base):
    for value in (general()[0], dataset(), call("AdvancedTrainConfig", max_steps=3)[0]):
        assert json.loads(json.dumps(value)) == value


def test_advanced_and_general_settings_arrive():
    train = general(
        {"max_steps": 60, "lr_scheduler": "cosine"}, training_seed=7, save_every_n_epochs=0, gradient_clipping=0.5
    )[0]
    assert (train["max_steps"], train["lr_scheduler"], train["seed"], train["gradient_clipping"]) == (
        60,
        "cosine",
        7,
        0.5,
    )
    assert "save_every_n_epochs" not in train
    split = general({"partition_split": "10, 20"}, pipeline_stages=3)[0]
    assert (split["partition_method"], split["partition_split"]) == ("manual", [10, 20])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"blocks_to_swap": -1}, "blocks_to_swap: must be at least 0, got -1"),
        ({"epochs": 0}, "epochs: must be at least 1, got 0"),
        ({"epochs": "ten"}, "epochs: input should be a valid integer"),
        ({"adapter": {"rank": 2.5}}, "adapter.rank: input should be a valid integer"),
        ({"adapter": {"rank": 0}}, "adapter.rank: must be at least 1, got 0"),
        ({"model": {"dtype": "bf16"}}, "model.dtype: must be"),
        ({"optimizer": {"weight_decay": -1}}, "optimizer.weight_decay: must be at least 0"),
    ],
)
def test_what_cannot_be_is_refused_by_name(values, message):
    with pytest.raises(SettingsError) as caught:
        general(**values)
    assert message in str(caught.value)


def test_a_wrong_link_is_refused_by_name():
    with pytest.raises(SettingsError, match="model_config: must come from"):
        call("GeneralConfig", optimizer_config={}, model_config="error", dataset_config=dataset())
    with pytest.raises(SettingsError, match=r"model\.type: 'sdxl9' is unknown"):
        call("ModelConfig", model_path={"type": "sdxl9"})


# -- several folders, edit and mask datasets, evaluation, samples ---------------------------------------------


@pytest.fixture
def folders(base):
    for name in ("target", "start1", "start2", "masks", "more"):
        (base / "input" / name).mkdir()
    return base / "input"


def test_edit_and_mask_folders(folders):
    (edit,) = call("EditModelDatasetPathNode", target_path="target", control_path="start1")
    assert edit == {"path": str(folders / "target"), "control_path": str(folders / "start1")}
    (alone,) = call("EditModelDatasetPathNode", target_path="target")
    assert alone == {"path": str(folders / "target")}
    (several,) = call("MultiImageEditDatasetPathNode", target_path="target", control_paths="start1\n\nstart2\n")
    assert several["control_paths"] == [str(folders / "start1"), str(folders / "start2")]
    (masked,) = call("MaskDatasetPathNode", dataset_path="target", mask_path="masks")
    assert masked["mask_path"] == str(folders / "masks")
    for path in (edit, alone, several, masked):
        (tables,) = call("GeneralDatasetConfig", input_path=path, num_repeats=3)
        assert tables["directory"] == [{**path, "num_repeats": 3.0}]
        assert parse_dataset_settings(tables)


def test_missing_folders_are_refused_before_anything_runs(folders):
    cases = {
        "EditModelDatasetPathNode": ({"target_path": "target", "control_path": "x"}, "control_path: '"),
        "MultiImageEditDatasetPathNode": (
            {"target_path": "target", "control_paths": "start1\nx"}, "control_paths, line 2: '"),
        "MaskDatasetPathNode": ({"dataset_path": "", "mask_path": "masks"}, "dataset_path: required, but empty"),
    }  # fmt: skip
    for name, (values, message) in cases.items():
        assert NODES[name].VALIDATE_INPUTS(**values).startswith(message)
        assert NODES[name].VALIDATE_INPUTS(**dict.fromkeys(values)) is True  # linked


def test_folders_in_a_row_have_settings_of_their_own(folders):
    tables = dataset(caption_prefix="a photo")
    (more,) = call("GeneralDatasetPathNode", dataset_path="more")
    (two,) = call("AddDatasetFolderNode", dataset_config=tables, input_path=more, num_repeats=0.5,
                  resolutions="[1280, 720]", caption_prefix="a drawing", shuffle_tags="true",
                  caption_dropout=0.1)  # fmt: skip
    (three,) = call("AddDatasetFolderNode", dataset_config=two, input_path={"path": str(folders / "target")})
    first, second, third = parse_dataset_settings(three).directory
    assert (first.caption_prefix, second.caption_prefix, third.caption_prefix) == ("a photo", "a drawing", "a photo")
    assert (second.num_repeats, second.resolutions, second.shuffle_tags) == (0.5, [[1280, 720]], True)
    assert (third.num_repeats, third.resolutions, third.shuffle_tags) == (1, [512], False)
    assert second.caption_dropout == 0.1
    assert len(tables["directory"]) == 1  # the node before keeps what it gave
    with pytest.raises(SettingsError, match="dataset_config: must come from a dataset node"):
        call("AddDatasetFolderNode", dataset_config="x", input_path=more)


def test_evaluation_sets_have_names(folders):
    (one,) = call("EvalDatasetConfig", input_path=str(folders / "more"))
    assert one[0]["name"] == "validation_set"
    (two,) = call("EvalDatasetConfig", input_path=str(folders / "target"), name="targets", others=one)
    assert [entry["name"] for entry in two] == ["validation_set", "targets"]
    assert parse_dataset_settings(two[1]["config"]).directory[0].path == str(folders / "target")
    with pytest.raises(SettingsError, match="name: 'targets' is the name of another"):
        call("EvalDatasetConfig", input_path=str(folders / "more"), name="targets", others=two)


def test_samples_are_asked_for_by_prompt():
    assert call("TrainingSamplerConfig") == ({},)
    (sample,) = call("TrainingSamplerConfig", sample_prompt="a cat, sitting\n[a] dog", sample_every_n_steps=0,
                     num_inference_steps=4, guidance_scale=5.0, guidance_value=3.5)  # fmt: skip
    assert sample["prompts"] == ["a cat, sitting", "[a] dog"]
    assert (sample["every_n_epochs"], sample["steps"], sample["guidance"]) == (1, 4, 5.0)
    assert "every_n_steps" not in sample


def test_more_settings_add_to_the_advanced_ones():
    (advanced,) = call("AdvancedTrainConfig", max_steps=9)
    (more,) = call("MoreTrainConfigNode", advanced_config=advanced, ema_decay=0.999,
                   learning_rates="attn = 1e-5\nff=0", train_only="a{1,2}\nb")  # fmt: skip
    assert more == {"max_steps": 9, "ema_decay": 0.999, "learning_rates": {"attn": 1e-5, "ff": 0.0},
                    "train_only": ["a{1,2}", "b"]}  # fmt: skip
    with pytest.raises(SettingsError, match="learning_rates: each line must be such as"):
        call("MoreTrainConfigNode", learning_rates="attn")


def test_more_dataset_options_hold_for_all_folders():
    (tables,) = call("DatasetOptionsNode", dataset_config=dataset(), trigger_word="ohwx", subsample_ratio=0.5)
    settings = parse_dataset_settings(tables)
    assert (settings.directory[0].trigger_word, settings.subsample_ratio) == ("ohwx", 0.5)
    assert "shuffle_tags" not in tables


def test_an_optimizer_may_have_arguments_of_its_own():
    (table,) = call("OptimizerConfigNode", optimizer_type="Prodigy", lr=1.0,
                    arguments="d_coef = 0.5\nuse_bias_correction = true\nname = text")  # fmt: skip
    assert (table["d_coef"], table["use_bias_correction"], table["name"]) == (0.5, True, "text")
    assert "arguments" not in table


def test_adapters_of_every_kind(base):
    assert call("AdapterConfigNode", adapter_type="lokr", decompose_factor=8)[0]["adapter"]["decompose_factor"] == 8
    with pytest.raises(SettingsError, match=r"adapter\.decompose_factor: unknown option"):
        call("AdapterConfigNode", adapter_type="lora", decompose_factor=8)
    (base / "models/loras").mkdir(parents=True)
    (base / "models/loras/a.safetensors").write_bytes(b"")
    (adapter,) = call("AdapterConfigNode", fuse_adapters="a.safetensors * 0.5", rank_pattern="attn = 4")
    assert adapter["adapter"]["fuse_adapters"] == [
        {"path": str(base / "models/loras/a.safetensors"), "weight": 0.5}]  # fmt: skip
    assert adapter["adapter"]["rank_pattern"] == {"attn": 4}


# -- models ---------------------------------------------------------------------------------------------------


def model_table(node, **values):
    return call(node, **values)[0]


def test_model_nodes_give_the_table_of_their_family(base):
    kontext = model_table("FluxKontextModelNode", diffusers_path="/m")
    assert (kontext["type"], kontext["flux_shift"]) == ("flux", True)
    assert "single_file_path" not in model_table("LTXVideoModelNode", diffusers_path="/m", single_file_path="/x")
    single = model_table("LTXVideoModelNode", diffusers_path="/m", single_file_path="/x", use_single_file=True)
    assert single["single_file_path"] == "/x"
    assert model_table("QwenImageModelNode", diffusers_path="/m", qwen_2511=True)["type"] == "qwen2511"
    image = model_table("ZImageModelNode", diffusion_path="/d", vae_path="/v", text_encoder_path="/t",
                        merge_adapters="/a,b.safetensors")  # fmt: skip
    assert image["text_encoders"] == [{"path": "/t", "type": "lumina2"}]
    assert (image["diffusion_model"], image["vae"]) == ("/d", "/v")
    assert image["merge_adapters"] == ["/a,b.safetensors"]
    video = model_table("hunyuanvideo15ModelNode", diffusion_path="/d", vae_path="/v", Text_Encoder="/t", ByT5="/b",
                        shift="3")  # fmt: skip
    assert video["text_encoders"] == [{"paths": ["/t", "/b"], "type": "hunyuan_video_15"}]
    assert video["shift"] == 3.0


def test_families_that_cannot_be_trained_are_refused_before_anything_runs():
    answer = NODES["HiDreamModelNode"].VALIDATE_INPUTS(diffusers_path="/m", llama3_path="/l")
    assert answer.startswith("model.type: 'hidream' is not implemented in this version")
    assert NODES["FluxModelNode"].VALIDATE_INPUTS(diffusers_path="/m") is True
    answer = NODES["FluxKontextModelNode"].VALIDATE_INPUTS(diffusers_path=" ")
    assert answer is True or "diffusers_path" in answer


def test_path_inputs_stay_texts_and_offer_what_the_model_folders_hold(base):
    (base / "models/diffusion_models/sub").mkdir(parents=True)
    (base / "models/diffusion_models/sub/flux1-dev.safetensors").write_bytes(b"")
    (base / "models/diffusers/flux/model_index.json").write_text("{}")
    inputs = NODES["FluxModelNode"].INPUT_TYPES()["optional"]
    assert inputs["transformer_path"][0] == inputs["diffusers_path"][0] == "STRING"
    assert inputs["transformer_path"][1]["suggestions"] == ["sub/flux1-dev.safetensors"]
    assert inputs["diffusers_path"][1]["suggestions"] == ["flux"]
    chosen = model_table("FluxModelNode", transformer_path="sub/flux1-dev.safetensors", diffusers_path="flux")
    assert chosen["transformer_path"] == str(base / "models/diffusion_models/sub/flux1-dev.safetensors")
    assert chosen["diffusers_path"] == str(base / "models/diffusers/flux")
    (base / "models/vae").mkdir()
    for kind in ("vae", "diffusion_models"):
        (base / "models" / kind / "model.safetensors").write_bytes(b"")
    both = model_table("FluxModelNode", transformer_path="model.safetensors", vae_path="model.safetensors")
    assert both["transformer_path"] == str(base / "models/diffusion_models/model.safetensors")
    assert both["vae_path"] == str(base / "models/vae/model.safetensors")


# -- values of old workflow files ----------------------------------------------------------------------------


def test_wrong_types_with_a_clear_meaning_are_taken():
    train = general(
        epochs="12", micro_batch_size_per_gpu=2.0, gradient_accumulation_steps=0, gradient_clipping=1,
        activation_checkpointing="true", checkpoint_every_n_minutes="", save_every_n_epochs=None,
        optimizer={"lr": "2e-5", "weight_decay": 0}, adapter={"alpha": "16", "init_from_existing": "None", "dtype": ""},
        model={"transformer_dtype": "none"})[0]  # fmt: skip
    assert (train["epochs"], train["micro_batch_size_per_gpu"], train["gradient_clipping"]) == (12, 2, 1.0)
    assert isinstance(train["gradient_clipping"], float)
    assert train["activation_checkpointing"] is True
    assert not {"gradient_accumulation_steps", "checkpoint_every_n_minutes", "save_every_n_epochs"} & set(train)
    assert train["optimizer"]["lr"] == 2e-5
    assert train["optimizer"]["weight_decay"] == 0.0
    assert train["adapter"] == {"type": "lora", "rank": 32, "alpha": 16.0, "dropout": 0.0}
    assert "transformer_dtype" not in train["model"]


def test_inputs_that_a_prompt_leaves_out_have_their_defaults():
    assert NODES["FluxModelNode"]().get_flux_config() == call("FluxModelNode")
    assert NODES["AdapterConfigNode"]().generate_adapter_config(adapter_type="lora") == call("AdapterConfigNode")


def test_windows_paths_become_paths_of_this_machine():
    (config,) = call("FluxModelNode", diffusers_path="\\\\wsl.localhost\\Ubuntu\\home\\x\\flux")
    assert config["diffusers_path"] == "/home/x/flux"


@pytest.mark.parametrize("kind", OPTIMIZER_TAKES)
def test_an_optimizer_gets_only_what_it_takes(kind):
    (table,) = call("OptimizerConfigNode", optimizer_type=kind, lr=1.0)
    assert list(table) == ["type", *OPTIMIZER_TAKES[kind]]


def test_zero_leaves_the_rate_to_the_optimizer():
    assert "lr" not in call("OptimizerConfigNode", optimizer_type="Prodigy", lr=0)[0]


def test_target_modules_by_comma_or_line():
    (table,) = call("AdapterConfigNode", target_modules="to_q, to_k\n to_v \n", alpha=8)
    assert table["adapter"]["target_modules"] == ["to_q", "to_k", "to_v"]
    assert table["adapter"]["alpha"] == 8.0


# -- datasets --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "sizes"),
    [("[512]", [512]), ("512", [512]), (" 512 ", [512]), ("[1280, 720]", [[1280, 720]]), ("[[1280, 720]]", [[1280, 720]]),  # noqa: E501  # noqa: E501
     ("[[1280, 720], [768, 768]]", [[1280, 720], [768, 768]]), ("[512, 768, 1024]", [512, 768, 1024]),
     ("512，768，1024", [512, 768, 1024]), ("[512, [1280, 720]]", [512, [1280, 720]])],
)  # fmt: skip
def test_resolutions(typed, sizes):
    assert dataset(resolutions=typed)["resolutions"] == sizes


@pytest.mark.parametrize("typed", ["", "[]", "big", "[512", "[true]", '["512"]', "[8]", "[512.5]"])
def test_bad_resolutions_are_refused_by_name(typed):
    with pytest.raises(SettingsError, match="resolutions"):
        dataset(resolutions=typed)


def test_buckets_come_by_their_own_links(base):
    shapes = call("ArBucketsNode", ar_buckets="[[512, 512], 1.5]")[0]
    frames = call("FrameBucketsNode", frame_buckets="1, 33")[0]
    tables = dataset(ar_buckets=shapes, frame_buckets=frames, num_repeats=3, caption_prefix="a photo, ")
    assert tables["ar_buckets"] == [[512, 512], 1.5]
    assert tables["frame_buckets"] == [1, 33]
    assert tables["directory"] == [{"path": str(base / "input/pictures"), "num_repeats": 3}]
    off = dataset(enable_ar_bucket=False)
    assert not {"min_ar", "max_ar", "num_ar_buckets"} & set(off)


def test_what_is_wrong_is_said_before_the_queue_runs():
    path = NODES["GeneralDatasetPathNode"].VALIDATE_INPUTS
    assert path(dataset_path="pictures") is True
    assert path(dataset_path=None) is True  # linked
    assert "is not a folder" in path(dataset_path="nowhere")
    assert "required" in path(dataset_path="")
    config = NODES["GeneralDatasetConfig"].VALIDATE_INPUTS
    assert config(resolutions="[512]", output_path="") is True
    assert config(resolutions=None, output_path=None) is True
    assert config(resolutions="x", output_path="").startswith("resolutions: must be a list")
    assert ".toml" in config(resolutions="[512]", output_path="x.py")
    assert NODES["AdvancedTrainConfig"].VALIDATE_INPUTS(partition_split="a").startswith("partition_split: ")
    assert NODES["FrameBucketsNode"].VALIDATE_INPUTS(frame_buckets="[[1]]").startswith("frame_buckets")


def test_only_texts_and_files_are_validated_here_so_comfyui_checks_the_rest():
    for name, cls in NODES.items():
        if name in ("Train", "TensorBoardMonitor") or "ImageSet" in name or not hasattr(cls, "VALIDATE_INPUTS"):
            continue
        kinds = {key: entry[0] for entries in cls.INPUT_TYPES().values() for key, entry in entries.items()}
        code = cls.VALIDATE_INPUTS.__func__.__code__
        checked = [kinds[key] for key in code.co_varnames[1 : code.co_argcount]]
        assert all(kind == "STRING" or isinstance(kind, list) for kind in checked), name  # a list: files come and go


# -- files -------------------------------------------------------------------------------------------------


def test_copies_are_written_on_request(base):
    train, _, path = general(config_save_path="my config/train.toml")
    assert path == str(base / "output/my config/train.toml")
    assert tomllib.loads(Path(path).read_text("utf-8")) == train
    tables = dataset(output_path=str(base / "user/it's.toml"))
    assert tomllib.loads((base / "user/it's.toml").read_text("utf-8")) == tables


@pytest.mark.parametrize("text", ["../x.toml", "a/../../x.toml", "train.py", "output", "/dev/null", "folder"])
def test_copies_are_not_written_just_anywhere(base, text):
    with pytest.raises(SettingsError, match="config_save_path: "):
        files.write_copy("config_save_path", text, {})


def test_links_do_not_lead_out(base):
    (base / "output/away").symlink_to("/tmp")
    (base / "output/file.toml").symlink_to("/tmp/somewhere.toml")
    for text in ("away/x.toml", "file.toml"):
        with pytest.raises(SettingsError):
            files.copy_path("output_path", text)


def test_elsewhere_only_when_nobody_else_can_send_prompts(base, tmp_path_factory, monkeypatch, caplog):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "train.toml"
    with caplog.at_level("INFO"):
        assert files.copy_path("output_path", str(elsewhere)) == elsewhere
    assert "outside ComfyUI's folders" in caplog.text
    monkeypatch.setattr(files, "_only_this_machine", lambda: False)
    with pytest.raises(SettingsError, match="can be reached from other machines"):
        files.copy_path("output_path", str(elsewhere))
    assert files.copy_path("output_path", "in.toml") == base / "output/in.toml"


def test_run_folders_follow_the_same_rule(base, tmp_path_factory, monkeypatch):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.setattr(files, "_only_this_machine", lambda: False)
    answer = NODES["GeneralConfig"].VALIDATE_INPUTS(output_dir=str(elsewhere / "runs"))
    assert answer.startswith(f"output_dir: '{elsewhere}/runs' is outside ComfyUI's output")
    with pytest.raises(SettingsError, match=r"output_dir: .* is outside"):
        general(output_dir=str(elsewhere / "runs"))
    (base / "output/big").symlink_to(elsewhere)
    with pytest.raises(SettingsError, match=r"output_dir: .* leads out of ComfyUI's folders by a symbolic link"):
        files.output_folder("big")
    settings = base / "config/diffusion-trainer/settings.toml"
    settings.parent.mkdir(parents=True)
    settings.write_text(f"writable_folders = ['{elsewhere}']")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(base / "config"))
    assert files.output_folder(str(elsewhere / "runs")) == str(elsewhere / "runs")
    assert files.output_folder("big") == str(base / "output/big")
    settings.write_text("writeable_folders = []")
    with pytest.raises(SettingsError, match="writeable_folders: unknown option; did you mean 'writable_folders'"):
        files.output_folder("big")


@pytest.mark.parametrize("text", ["a/../b", "x" * 300, "a/" * 2100, "bell\a", "/dev/null", "taken"])
def test_names_that_are_no_folders_are_refused(base, text):
    (base / "output/taken").write_text("")
    with pytest.raises(SettingsError, match="output_dir: "):
        files.output_folder(text)


def test_a_copy_that_cannot_be_written_is_an_error(base):
    (base / "output/blocked").write_text("")
    with pytest.raises(SettingsError, match=r"output_path: .* cannot be written"):
        files.write_copy("output_path", "blocked/x.toml", {})


@pytest.mark.parametrize(
    ("typed", "folder"),
    [("", "training"), ("  ", "training"), ("runs/flux", "runs/flux"),
     ("\\ComfyUI\\custom_nodes\\Diffusion_pipe_in_ComfyUI\\output", "training"),
     ("/ComfyUI/custom_nodes/Diffusion_pipe_in_ComfyUI/output/cat", "training/cat")],
)  # fmt: skip
def test_where_runs_go(base, typed, folder):
    assert files.output_folder(typed) == str(base / "output" / folder)


def test_absolute_folders_are_kept(tmp_path):
    kept = tmp_path / "custom_nodes/Diffusion_pipe_in_ComfyUI/output"
    kept.mkdir(parents=True)
    assert files.output_folder(str(kept)) == str(kept)
    assert files.output_folder("/data/runs") == "/data/runs"


def test_old_places_of_copies_land_in_the_output_folder(base):
    old = "/ComfyUI/custom_nodes/Diffusion_pipe_in_ComfyUI/train_config/trainconfig.toml"
    assert files.copy_path("config_save_path", old) == base / "output/training/train_config/trainconfig.toml"
    drive = "D:/ComfyUI/custom_nodes/Diffusion_pipe_in_ComfyUI/dataset/dataset.toml"
    assert files.copy_path("output_path", drive) == base / "output/training/dataset/dataset.toml"


# -- loading ---------------------------------------------------------------------------------------------


IMPORT = """
import sys, time, importlib.util, asyncio, logging, psutil, tomli_w
from pydantic import BaseModel, Field, create_model, field_validator, model_validator
class Loaded(BaseModel):
    field: int = 1
root = sys.argv[1]
begin = time.process_time()
spec = importlib.util.spec_from_file_location(root, root + "/__init__.py", submodule_search_locations=[root])
module = importlib.util.module_from_spec(spec)
sys.modules[root] = module
spec.loader.exec_module(module)
print(round(1000 * (time.process_time() - begin)), "ms")
took = time.process_time() - begin
assert took < 0.1, f"{took:.3f} s"
for node in module.NODE_CLASS_MAPPINGS.values():
    node.INPUT_TYPES()
print(round(1000 * (time.process_time() - begin)), "ms with all inputs")
heavy = {"torch", "diffusers", "transformers", "deepspeed", "peft", "numpy", "PIL", "tensorboard"} & set(sys.modules)
assert not heavy, heavy
assert module.WEB_DIRECTORY == "./web" and len(module.NODE_CLASS_MAPPINGS) >= 13
"""


def test_loading_the_package_is_cheap(tmp_path):
    """As ComfyUI loads it: named by its path, with what ComfyUI has loaded by then, from compiled files."""
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path), "PYTHONDONTWRITEBYTECODE": ""}
    for _ in ("compile", "measure"):
        done = subprocess.run([sys.executable, "-c", IMPORT, str(ROOT)], env=environment, capture_output=True, text=True,  # noqa: E501
                              check=False)  # fmt: skip
        assert done.returncode == 0, done.stderr
    print("importing the package:", done.stdout.strip())
