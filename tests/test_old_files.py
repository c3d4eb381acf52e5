"""Files written for the earlier trainer: every key of its reference, for every type of model."""

import copy
import tomllib

import diffusion_trainer.train as entry
import pytest
import tomli_w
from diffusion_trainer.models import configs, families
from diffusion_trainer.utils.config import SettingsError
from diffusion_trainer.utils.dataset_settings import parse_dataset_settings
from diffusion_trainer.utils.settings import parse_train_settings

COMMON = {"dtype": "bfloat16", "timestep_sample_method": "logit_normal"}
FLOW = {"sigmoid_scale": 1.0, "shift": 3.0, "flux_shift": True}
FLOAT8 = {"transformer_dtype": "float8"}
ENCODERS = [{"path": "/m/te.safetensors", "type": "lumina2"}]
FROM_COMFYUI = {"diffusion_model": "/m/d.safetensors", "vae": "/m/v.safetensors", "text_encoders": ENCODERS,
                "diffusion_model_dtype": "float8", "merge_adapters": ["/m/l.safetensors"], **FLOW}  # fmt: skip
RATES = dict.fromkeys(("self_attn_lr", "cross_attn_lr", "mlp_lr", "mod_lr", "llm_adapter_lr"), 1e-05)
PREDICT2 = {"transformer_path": "/m/t", "vae_path": "/m/v", "llm_adapter_path": "/m/a", "cache_text_embeddings": True,
            "text_encoder_nf4": True, "text_encoder_fp8": False, "multiscale_loss_weight": 0.5, **RATES, **FLOAT8,
            **FLOW}  # fmt: skip

MODELS = {
    "sdxl": {"checkpoint_path": "/m/x.safetensors", "v_pred": True, "min_snr_gamma": 5,
             "debiased_estimation_loss": False, "unet_lr": 4e-5, "text_encoder_1_lr": 0, "text_encoder_2_lr": 2e-5},
    "flux": {"diffusers_path": "/m", "transformer_path": "/m/t", "bypass_guidance_embedding": True, "guidance": 1.0,
             **FLOAT8, **FLOW},
    "ltx-video": {"diffusers_path": "/m", "single_file_path": "/m/x", "first_frame_conditioning_p": 1.0, **FLOAT8},
    "hunyuan-video": {"ckpt_path": "/m", "transformer_path": "/m/t", "vae_path": "/m/v", "llm_path": "/m/l",
                      "clip_path": "/m/c", "guidance": 1.0, "shift": 7.0, **FLOAT8},
    "cosmos": {"transformer_path": "/m/t", "vae_path": "/m/v", "text_encoder_path": "/m/e"},
    "lumina_2": {"transformer_path": "/m/t", "llm_path": "/m/l", "vae_path": "/m/v", "lumina_shift": True,
                 "shift": 2.0},
    "wan": {"ckpt_path": "/m", "transformer_path": "/m/t", "llm_path": "/m/l", "text_encoder_fp8": True,
            "cache_text_embeddings": True, "min_t": 0.0, "max_t": 0.875, **FLOAT8, **FLOW},
    "chroma": {"diffusers_path": "/m", "transformer_path": "/m/t", **FLOAT8, **FLOW},
    "hidream": {"diffusers_path": "/m", "llama3_path": "/m/l", "llama3_4bit": True, "max_llama3_sequence_length": 128,
                "transformer_dtype": "nf4", **FLOW},
    "sd3": {"diffusers_path": "/m", **FLOAT8, **FLOW},
    "cosmos_predict2": {"t5_path": "/m/t5", **PREDICT2},
    "anima": {"llm_path": "/m/llm", **PREDICT2},
    "omnigen2": {"diffusers_path": "/m", **FLOW},
    "qwen_image": {"diffusers_path": "/m", "transformer_path": "/m/t", "text_encoder_path": "/m/e", "vae_path": "/m/v",
                   **FLOAT8, **FLOW},
    "qwen2511": {"diffusers_path": "/m", **FLOAT8},
    "hunyuan_image": {"transformer_path": "/m/t", "vae_path": "/m/v", "text_encoder_path": "/m/e", "byt5_path": "/m/b",
                      **FLOAT8, **FLOW},
    "auraflow": {"transformer_path": "/m/t", "text_encoder_path": "/m/e", "vae_path": "/m/v",
                 "max_sequence_length": 768, **FLOAT8, **FLOW},
    "z_image": FROM_COMFYUI, "flux2": FROM_COMFYUI, "ernie_image": FROM_COMFYUI, "ideogram4": FROM_COMFYUI,
    "krea2": FROM_COMFYUI,
    "hunyuan_video_15": {**FROM_COMFYUI, "text_encoders": [
        {"paths": ["/m/qwen", "/m/byt5"], "type": "hunyuan_video_15"}]},
    "ltx2": {"diffusion_model": "/m/d", "text_encoder": "/m/e", "diffusion_model_dtype": "bfloat16",
             "merge_adapters": ["/m/l"], **FLOW},
    "minimax_h3": {**FROM_COMFYUI, "audio_vae": "/m/a", "image_shift": 1.0, "cfg": 1.0},
}  # fmt: skip
TOP = {
    "output_dir": "/data/runs", "dataset": "/data/dataset.toml", "epochs": 1000, "max_steps": 5000,
    "micro_batch_size_per_gpu": [[512, 4], [1024, 1]], "image_micro_batch_size_per_gpu": 2, "pipeline_stages": 1,
    "gradient_accumulation_steps": 4, "gradient_clipping": 1.0, "warmup_steps": 100, "lr_scheduler": "cosine",
    "force_constant_lr": 1e-5, "activation_checkpointing": True, "reentrant_activation_checkpointing": True,
    "partition_method": "parameters", "disable_block_swap_for_eval": False, "compile": True,
    "save_every_n_epochs": 5, "save_every_n_steps": 500, "checkpoint_every_n_epochs": 10,
    "checkpoint_every_n_minutes": 120, "save_dtype": "bfloat16", "caching_batch_size": 1, "map_num_proc": 8,
    "video_clip_mode": "single_middle", "steps_per_print": 1, "logging_steps": 1, "x_axis_examples": True,
    "uncond_fraction": 0.1, "pseudo_huber_c": 0.5, "resume_from_checkpoint": False, "regenerate_cache": False,
    "eval_every_n_epochs": 1, "eval_every_n_steps": 100, "eval_before_first_step": True,
    "eval_micro_batch_size_per_gpu": 1, "eval_gradient_accumulation_steps": 1, "number_of_gpus": 1,
}  # fmt: skip
ADAPTER = {"type": "lora", "rank": 32, "dtype": "bfloat16", "dropout": 0.1, "exclude_modules": ["proj_out"],
           "init_from_existing": "/data/lora"}  # fmt: skip
OPTIMIZER = {"type": "adamw_optimi", "lr": 2e-5, "betas": [0.9, 0.99], "weight_decay": 0.01, "eps": 1e-8}
DATASET = {
    "resolutions": [512, [1280, 720]], "enable_ar_bucket": True, "min_ar": 0.5, "max_ar": 2.0, "num_ar_buckets": 7,
    "ar_buckets": [[512, 512], 0.75], "frame_buckets": [1, 33], "size_buckets": [[512, 512, 1]], "num_repeats": 1,
    "caption_prefix": "a ", "shuffle_tags": True, "cache_shuffle_num": 4, "cache_shuffle_delimiter": ", ",
    "skip_empty_caption": True, "shuffle_metadata": True, "online_captions": False, "subsample_ratio": 0.5,
    "directory": [{"path": "/data/a", "mask_path": "/data/masks", "control_path": "/data/control",
                   "default_mask_file": "/data/mask.png", "num_repeats": 0.5, "resolutions": [768]}],
}  # fmt: skip


def train_file(kind):
    return copy.deepcopy({**TOP, "model": {"type": kind, **COMMON, **MODELS[kind]}, "adapter": ADAPTER,
                          "optimizer": OPTIMIZER, "monitoring": {"enable_wandb": False, "wandb_api_key": "secret",
                          "wandb_tracker_name": "p", "wandb_run_name": "r"}})  # fmt: skip


OTHER_FORMS = [
    {"eval_datasets": [{"name": "a", "config": "/data/a.toml"}, {"name": "b", "config": "/data/b.toml"}]},
    {"eval_datasets": ["/data/a.toml", "/other/a.toml"]},
    {"blocks_to_swap": 20, "disable_block_swap_for_eval": True},
    {"activation_checkpointing": "unsloth"},
    {"save_every_n_examples": 1000, "eval_every_n_examples": 1000},
    {"image_eval_micro_batch_size_per_gpu": 4},
    {"eval_image_micro_batch_size_per_gpu": 4, "eval_micro_batch_size_per_gpu": [[512, 4]]},
    {"pseudo_huber_c": None, "huber_delta": 0.1},
    {"pseudo_huber_c": None, "smooth_l1_beta": 0.1},
    {"partition_method": "manual", "pipeline_stages": 2, "partition_split": [20]},
    {"lr_scheduler": "linear", "resume_from_checkpoint": "20260131_12-00-00"},
    {"adapter": {"type": "lokr", "rank": 16, "decompose_factor": 8, "rank_dropout": 0.1, "dtype": "bfloat16"}},
    {"adapter": {**ADAPTER, "fuse_adapters": [{"path": "/a.safetensors", "weight": 0.5}]}},
    {"adapter": None},
    {"optimizer": {"type": "genericoptim", "lr": 1e-4, "momentum_type": "ema", "second_moment_type": "sn"}},
    {"optimizer": {"type": "automagic"}},
    {"eval_every_n_steps": 0, "save_every_n_examples": 0, "checkpoint_every_n_minutes": 0},
    {"optimizer": {"type": "Prodigy", "lr": 1, "d_coef": 0.5, "beta2_half_life": 1000, "gradient_release": False}},
    {"training_sampler": {"sample_every_n_steps": 0, "sample_every_n_epochs": 1, "height": 1024, "width": 1024,
                          "num_inference_steps": 20, "guidance_scale": 5.0, "sample_prompt": "a cat"}},
]  # fmt: skip


@pytest.mark.parametrize("changes", OTHER_FORMS, ids=lambda changes: " ".join(changes))
def test_other_forms_of_keys_are_taken(changes, tmp_path, capsys):
    values = {key: value for key, value in (train_file("flux") | changes).items() if value is not None}
    if "adapter" in changes and changes["adapter"] is None:
        del values["model"]["transformer_dtype"]  # all weights are trained
    status, said = check(tmp_path / "train.toml", values, capsys)
    assert status == 0, said.err


def check(path, values, capsys):
    path.write_text(tomli_w.dumps(values), "utf-8")
    status = entry.main(["--config", str(path), "--check_config"])
    return status, capsys.readouterr()


def test_every_type_has_a_file_here():
    assert set(MODELS) == set(configs())


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_files_for_every_model_are_taken(kind, tmp_path, capsys):
    status, said = check(tmp_path / "train.toml", train_file(kind), capsys)
    assert status == 0, said.err
    assert ("is not implemented in this version" in said.err) == (kind not in families())
    assert "secret" not in said.out


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_one_wrong_key_is_refused_by_name(kind, tmp_path, capsys):
    wrong = train_file(kind)
    key = next(iter(MODELS[kind]))
    wrong["model"][f"{key}x"] = wrong["model"].pop(key)
    status, said = check(tmp_path / "train.toml", wrong, capsys)
    assert status == 2
    assert f"model.{key}x: unknown option; did you mean '{key}'?" in said.err


@pytest.mark.parametrize("key", sorted(TOP))
def test_one_wrong_key_of_the_top_level_is_refused_by_name(key):
    wrong = train_file("flux") | {f"{key}_": 1}
    with pytest.raises(ValueError, match=f"{key}_: unknown option; did you mean '{key}'?"):
        parse_train_settings(wrong)


def test_a_dataset_with_every_key_is_taken():
    directory = parse_dataset_settings(DATASET).directory[0]
    assert (directory.num_repeats, directory.resolutions, directory.cache_shuffle_num) == (0.5, [768], 4)


def test_what_the_product_documents_runs_as_it_stands(tmp_path, capsys):
    (tmp_path / "dataset.toml").write_text("""
[[image_text]]
dataset_paths = ["/path/to/dataset"]
num_repeats = 1
default_caption_prefix = ""
resolutions = [[1024, 1024]]
enable_ar_bucket = true
min_ar = 0.5
max_ar = 2.0
num_ar_buckets = 7
""")
    (tmp_path / "train.toml").write_text("""
epochs = 100
micro_batch_size_per_gpu = 2
gradient_accumulation_steps = 4
save_every_n_epochs = 10
[model]
type = "flux"
diffusers_path = "/path/to/flux-dev"
dtype = "bfloat16"
transformer_dtype = "float8"
[adapter]
type = "lora"
rank = 16
alpha = 16
target_modules = ["to_q", "to_k", "to_v", "to_out.0"]
[optimizer]
type = "adamw"
lr = 1e-4
betas = [0.9, 0.999]
weight_decay = 0.01
""")
    for arguments in ([], ["--dataset", str(tmp_path / "dataset.toml")]):
        assert entry.main(["--config", str(tmp_path / "train.toml"), "--check_config", *arguments]) == 0
        train, dataset = map(tomllib.loads, capsys.readouterr().out.split("# dataset\n"))
        assert (train["adapter"]["alpha"], train["optimizer"]["betas"]) == (16, [0.9, 0.999])
        assert dataset["directory"][0]["path"] == "/path/to/dataset"
        assert dataset["directory"][0]["resolutions"] == [[1024, 1024]]


def test_flags_of_the_earlier_trainer_are_taken():
    arguments = entry.parse_arguments([
        "--deepspeed", "--config", "t.toml", "--local_rank", "0", "--resume_from_checkpoint", "--reset_dataloader",
        "--reset_optimizer", "--reset_optimizer_params", "--regenerate_cache", "--cache_only", "--trust_cache",
        "--i_know_what_i_am_doing", "--test_sample", "--master_port", "29501", "--dump_dataset", "d"])  # fmt: skip
    assert arguments.resume_from_checkpoint is True
    assert all(getattr(arguments, name) for name in entry.SWITCHES)


def test_forms_that_users_files_have_are_taken_for_their_evident_meaning(caplog):
    """Each is said once: another name, a table for one option, a layer list by another program's names."""
    file = train_file("flux")
    del file["max_steps"], file["warmup_steps"]
    file |= {"num_steps": 400, "output_name": "mine", "mixed_precision": "bf16",
             "deepspeed": {"train_micro_batch_size_per_gpu": 1},
             "lr_scheduler": {"type": "cosine", "num_warmup_steps": 30, "min_lr": 1e-6}}  # fmt: skip
    file["model"] |= {"load_dtype": "bfloat16", "attn_implementation": "flash_attention_2"}
    file["partition"] = file.pop("partition_method")
    file["adapter"] = {"type": "lora", "rank": 8, "lora_dtype": "float32", "only_double_blocks": True,
                       "exclude_linear_modules": ["proj_out"]}  # fmt: skip
    settings = parse_train_settings(file)
    assert (settings.max_steps, settings.warmup_steps, settings.lr_scheduler) == (400, 30, "cosine")
    assert settings.lr_min_ratio == pytest.approx(1e-6 / OPTIMIZER["lr"])
    assert settings.adapter.dtype == "float32"
    assert settings.adapter.exclude_modules == ["proj_out", "single_transformer_blocks"]
    said = [record.getMessage() for record in caplog.records]
    for key in ("num_steps", "output_name", "mixed_precision", "load_dtype", "attn_implementation", "partition",
                "deepspeed", "[lr_scheduler]", "lora_dtype", "only_double_blocks",
                "exclude_linear_modules"):  # fmt: skip
        assert sum(line.startswith(f"{key}: ") for line in said) == 1, key


def test_options_of_the_run_below_a_table_are_taken(caplog):
    """TOML gives what follows [optimizer] to that table; an optimizer's own arguments stay there."""
    file = train_file("flux")
    for key in ("epochs", "save_every_n_epochs", "micro_batch_size_per_gpu", "eval_micro_batch_size_per_gpu"):
        file["optimizer"][key] = file.pop(key)
    file["adapter"]["gradient_accumulation_steps"] = file.pop("gradient_accumulation_steps")
    file["optimizer"]["warmup_steps"] = 7
    settings = parse_train_settings(file)
    assert (settings.epochs, settings.save_every_n_epochs, settings.gradient_accumulation_steps) == (1000, 5, 4)
    assert settings.micro_batch_size_per_gpu == [[512, 4], [1024, 1]]
    assert settings.optimizer.model_extra == {"warmup_steps": 7}
    said = [record.getMessage() for record in caplog.records]
    assert "optimizer.epochs: taken as epochs, which belongs above the first table" in said
    with pytest.raises(SettingsError, match=r"adapter.epochs: unknown option"):
        parse_train_settings(train_file("flux") | {"adapter": {"type": "lora", "epochs": 3}})


def test_a_scheduler_table_is_checked():
    cases = [({"type": "cosine", "warmup_step": 5}, r"lr_scheduler.warmup_step: unknown option"),
             ({"type": "cosine", "warmup_steps": 5}, r"warmup_steps: 100 here, but 5 in \[lr_scheduler\]"),
             ({"type": "sine"}, "lr_scheduler: must be 'constant'")]  # fmt: skip
    for table, message in cases:
        with pytest.raises(SettingsError, match=message):
            parse_train_settings(train_file("flux") | {"lr_scheduler": table})


def test_several_dataset_files_are_refused_with_what_to_do():
    with pytest.raises(SettingsError, match=r"dataset: must be one file; put the \[\[directory\]\] tables"):
        parse_train_settings(train_file("flux") | {"dataset": ["/a.toml", "/b.toml"]})


def test_forms_of_users_datasets_are_taken(caplog):
    """Sizes for each folder and none at the top; captions and buckets by another program's names."""
    file = {"shuffle_caption": True, "keep_tokens": 2, "bucket_resolution_steps": 64, "directory": [
        {"path": "/data/a", "size_buckets": [[256, 256, 33]], "caption_extension": ".txt"},
        {"path": "/data/b", "control_paths": ["/data/c", "/data/d"], "frame_buckets": [1]}]}  # fmt: skip
    dataset = parse_dataset_settings(file)
    assert [(folder.shuffle_tags, folder.keep_tokens) for folder in dataset.directory] == [(True, 2)] * 2
    assert dataset.directory[0].size_buckets == [[256, 256, 33]]
    said = [record.getMessage() for record in caplog.records]
    assert sum(line.startswith("bucket_resolution_steps: not used") for line in said) == 1
    assert sum(line.startswith("caption_extension: not used") for line in said) == 1
    with pytest.raises(SettingsError, match="caption_extensions: unknown option"):
        parse_dataset_settings({"directory": [{"path": "/data/a", "caption_extensions": ".txt"}]})
