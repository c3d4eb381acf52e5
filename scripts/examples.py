"""The example files of ``configs/``: their values. `scripts/docs.py` writes them, with the options' descriptions."""

from __future__ import annotations

from typing import Any

COMMAND = "deepspeed --num_gpus=1 train.py --deepspeed --config configs/{name}"
SCHEDULE: dict[str, Any] = {
    "output_dir": "/data/training/my_lora", "dataset": "/data/dataset.toml", "epochs": 100,
    "micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0, "warmup_steps": 20,
    "lr_scheduler": "constant", "save_every_n_epochs": 10, "save_dtype": "bfloat16", "checkpoint_every_n_minutes": 60,
}  # fmt: skip
LORA: dict[str, Any] = {"type": "lora", "rank": 32}
ADAMW: dict[str, Any] = {"type": "adamw", "lr": 1e-4, "betas": [0.9, 0.99], "weight_decay": 0.01}
FLUX: dict[str, Any] = {"type": "flux", "diffusers_path": "/data/models/FLUX.1-dev", "dtype": "bfloat16",
                        "transformer_dtype": "float8", "flux_shift": True}  # fmt: skip
SHAPES: dict[str, Any] = {"resolutions": [512], "enable_ar_bucket": True, "min_ar": 0.5, "max_ar": 2.0,
                          "num_ar_buckets": 7}  # fmt: skip


LUMINA_SYSTEM_PROMPT = ("You are an assistant designed to generate superior images with the superior degree of "
                        "image-text alignment based on textual prompts or user prompts. <Prompt Start> ")  # fmt: skip
"""As diffusers' pipeline and ComfyUI's CLIPTextEncodeLumina2 put it before prompts."""


def _train(model: dict[str, Any], adapter: dict[str, Any] | None = LORA, optimizer: dict[str, Any] = ADAMW,
           **changes: Any) -> dict[str, Any]:  # fmt: skip
    top = {key: value for key, value in changes.items() if not isinstance(value, dict) and not _are_tables(value)}
    tables = {key: value for key, value in changes.items() if key not in top}
    return {**SCHEDULE, **top, "model": model, **({"adapter": adapter} if adapter else {}), "optimizer": optimizer,
            **tables}  # fmt: skip


def _are_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


TRAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "flux_lora.toml": ("A LoRA for Flux", _train(FLUX)),
    "flux_lora_comfyui_files.toml": (
        "A LoRA for Flux from the single files that ComfyUI has",
        _train({"type": "flux", "transformer_path": "/data/ComfyUI/models/diffusion_models/flux1-dev.safetensors",
                "vae_path": "/data/ComfyUI/models/vae/ae.safetensors",
                "clip_path": "/data/ComfyUI/models/text_encoders/clip_l.safetensors",
                "t5_path": "/data/ComfyUI/models/text_encoders/t5xxl_fp16.safetensors", "dtype": "bfloat16",
                "transformer_dtype": "float8", "flux_shift": True})),
    "flux_lora_small_card.toml": (
        "A LoRA for Flux on a card with little memory: frozen weights in float8, most blocks in main memory",
        _train(FLUX, {"type": "lora", "rank": 16}, {"type": "adamw8bit", "lr": 1e-4, "weight_decay": 0.01},
               activation_checkpointing=True, blocks_to_swap=40,
               environment={"cuda_allocator": "expandable_segments:True"})),
    "flux_lora_two_gpus.toml": (
        "A LoRA for Flux over two GPUs, each with half of the layers",
        _train({**FLUX, "transformer_dtype": "bfloat16"}, pipeline_stages=2, gradient_accumulation_steps=4,
               partition_method="parameters")),
    "flux_full.toml": (
        "All weights of Flux's double blocks",
        _train({key: value for key, value in FLUX.items() if key != "transformer_dtype"}, None,
               {"type": "adamw_optimi", "lr": 1e-5, "betas": [0.9, 0.99], "weight_decay": 0.01},
               train_only=["^transformer_blocks"], activation_checkpointing=True)),
    "flux_kontext_edit.toml": (
        "A LoRA for Flux Kontext, from an edit dataset",
        _train({**FLUX, "diffusers_path": "/data/models/FLUX.1-Kontext-dev"}, dataset="/data/dataset_edit.toml")),
    "chroma_lora.toml": (
        "A LoRA for Chroma from its single file, with VAE and T5 of a Flux folder",
        _train({"type": "chroma", "diffusers_path": "/data/models/FLUX.1-schnell",
                "transformer_path": "/data/ComfyUI/models/diffusion_models/Chroma1-HD.safetensors",
                "dtype": "bfloat16", "transformer_dtype": "float8", "flux_shift": True})),
    "z_image_lora.toml": (
        "A LoRA for Z-Image from the single files that ComfyUI has",
        _train({"type": "z_image", "diffusion_model": "/data/ComfyUI/models/diffusion_models/z_image_bf16.safetensors",
                "vae": "/data/ComfyUI/models/vae/ae.safetensors",
                "text_encoders": [{"path": "/data/ComfyUI/models/text_encoders/qwen_3_4b.safetensors",
                                   "type": "lumina2"}], "dtype": "bfloat16", "shift": 3.0})),
    "sd3_lora.toml": (
        "A LoRA for Stable Diffusion 3.5 medium from its single file and ComfyUI's text encoders",
        _train({"type": "sd3", "checkpoint_path": "/data/ComfyUI/models/checkpoints/sd3.5_medium.safetensors",
                "clip_l_path": "/data/ComfyUI/models/text_encoders/clip_l.safetensors",
                "clip_g_path": "/data/ComfyUI/models/text_encoders/clip_g.safetensors",
                "t5_path": "/data/ComfyUI/models/text_encoders/t5xxl_fp16.safetensors", "dtype": "bfloat16",
                "shift": 3.0})),
    "lumina2_lora.toml": (
        "A LoRA for Lumina Image 2, or a model made from it, from the single files that ComfyUI has",
        _train({"type": "lumina_2",
                "transformer_path": "/data/ComfyUI/models/diffusion_models/lumina_2_model_bf16.safetensors",
                "llm_path": "/data/ComfyUI/models/text_encoders/gemma_2_2b_fp16.safetensors",
                "vae_path": "/data/ComfyUI/models/vae/ae.safetensors", "dtype": "bfloat16", "lumina_shift": True},
               dataset="/data/dataset_system_prompt.toml")),
    "flux2_lora.toml": (
        "A LoRA for FLUX.2 klein from the single files that ComfyUI has: base is the one to train, not the distilled",
        _train({"type": "flux2",
                "diffusion_model": "/data/ComfyUI/models/diffusion_models/flux-2-klein-base-4b.safetensors",
                "vae": "/data/ComfyUI/models/vae/flux2-vae.safetensors",
                "text_encoders": [{"path": "/data/ComfyUI/models/text_encoders/qwen_3_4b.safetensors",
                                   "type": "flux2"}], "dtype": "bfloat16", "shift": 3.0})),
    "qwen_image_lora.toml": (
        "A LoRA for Qwen-Image from the single files that ComfyUI has: weights in float8, text encoder too",
        _train({"type": "qwen_image",
                "transformer_path": "/data/ComfyUI/models/diffusion_models/qwen_image_bf16.safetensors",
                "text_encoder_path": "/data/ComfyUI/models/text_encoders/qwen_2.5_vl_7b.safetensors",
                "vae_path": "/data/ComfyUI/models/vae/qwen_image_vae.safetensors", "dtype": "bfloat16",
                "transformer_dtype": "float8", "text_encoder_dtype": "float8", "shift": 2.0},
               activation_checkpointing=True)),
    "qwen_image_edit_lora.toml": (
        "A LoRA for Qwen-Image-Edit-2511, from an edit dataset",
        _train({"type": "qwen2511", "diffusers_path": "/data/models/Qwen-Image-Edit-2511", "dtype": "bfloat16",
                "transformer_dtype": "float8", "shift": 2.0}, activation_checkpointing=True,
               dataset="/data/dataset_edit.toml")),
    "cosmos_predict2_lora.toml": (
        "A LoRA for Cosmos-Predict2 2B from the single files that ComfyUI has",
        _train({"type": "cosmos_predict2",
                "transformer_path": "/data/ComfyUI/models/diffusion_models/cosmos_predict2_2B_t2i.safetensors",
                "vae_path": "/data/ComfyUI/models/vae/wan_2.1_vae.safetensors",
                "t5_path": "/data/ComfyUI/models/text_encoders/oldt5_xxl_fp16.safetensors",
                "dtype": "bfloat16"})),
    "anima_lora.toml": (
        "A LoRA for Anima from the single files that ComfyUI has; the adapter of its text is left as it is",
        _train({"type": "anima",
                "transformer_path": "/data/ComfyUI/models/diffusion_models/anima-base-v1.0.safetensors",
                "vae_path": "/data/ComfyUI/models/vae/qwen_image_vae.safetensors",
                "llm_path": "/data/ComfyUI/models/text_encoders/qwen_3_06b_base.safetensors",
                "dtype": "bfloat16", "llm_adapter_lr": 0.0})),
    "ltx_video_lora.toml": (
        "A LoRA for LTX-Video 0.9.5 from its single file; half of the clips are trained from a first frame",
        _train({"type": "ltx-video",
                "single_file_path": "/data/ComfyUI/models/checkpoints/ltx-video-2b-v0.9.5.safetensors",
                "t5_path": "/data/ComfyUI/models/text_encoders/t5xxl_fp16.safetensors", "dtype": "bfloat16",
                "first_frame_conditioning_p": 0.5, "flux_shift": True},
               dataset="/data/dataset_video.toml", video_clip_mode="single_beginning")),
    "sdxl_lora.toml": (
        "A LoRA for SDXL, its U-Net and both text encoders",
        _train({"type": "sdxl", "checkpoint_path": "/data/models/sd_xl_base_1.0.safetensors", "dtype": "bfloat16",
                "min_snr_gamma": 5.0, "unet_lr": 4e-5, "text_encoder_1_lr": 2e-5, "text_encoder_2_lr": 2e-5})),
    "sdxl_full.toml": (
        "All weights of SDXL's U-Net; the text encoders stay as they are, so captions are encoded once",
        _train({"type": "sdxl", "checkpoint_path": "/data/models/sd_xl_base_1.0.safetensors", "dtype": "bfloat16",
                "min_snr_gamma": 5.0, "text_encoder_1_lr": 0.0, "text_encoder_2_lr": 0.0}, None,
               {"type": "adamw_optimi", "lr": 1e-5, "betas": [0.9, 0.99], "weight_decay": 0.01})),
    "wan_lora.toml": (
        "A LoRA for Wan 2.1, trained on clips and pictures",
        _train({"type": "wan", "ckpt_path": "/data/models/Wan2.1-T2V-1.3B", "dtype": "bfloat16"},
               dataset="/data/dataset_video.toml", video_clip_mode="single_beginning")),
    "wan22_high_noise_lora.toml": (
        "A LoRA for the high-noise model of Wan 2.2; train the low-noise one with max_t = 0.875 and no min_t",
        _train({"type": "wan", "ckpt_path": "/data/models/Wan2.2-T2V-A14B",
                "transformer_path": "/data/models/Wan2.2-T2V-A14B/high_noise_model", "dtype": "bfloat16",
                "transformer_dtype": "float8", "min_t": 0.875}, dataset="/data/dataset_video.toml")),
    "hunyuan_video_lora.toml": (
        "A LoRA for HunyuanVideo from the single files that ComfyUI has, trained on clips and pictures",
        _train({"type": "hunyuan-video",
                "transformer_path": "/data/ComfyUI/models/diffusion_models/hunyuan_video_t2v_720p_bf16.safetensors",
                "vae_path": "/data/ComfyUI/models/vae/hunyuan_video_vae_bf16.safetensors",
                "llm_path": "/data/ComfyUI/models/text_encoders/llava_llama3_fp8_scaled.safetensors",
                "clip_path": "/data/ComfyUI/models/text_encoders/clip_l.safetensors", "dtype": "bfloat16",
                "transformer_dtype": "float8"},
               dataset="/data/dataset_video.toml", activation_checkpointing=True)),
    "samples_and_evaluation.toml": (
        "Pictures while training, the loss of pictures that are not trained, and an average of the weights",
        _train(FLUX, ema_decay=0.999, eval_every_n_epochs=1,
               sample={"prompts": ["a cat on a roof", "a portrait of a sailor"], "every_n_epochs": 5, "width": 768,
                       "height": 768, "steps": 20, "guidance": 3.5, "seed": 7},
               eval_datasets=[{"name": "held_back", "config": "/data/held_back.toml"}])),
}  # fmt: skip
"""Title and values of each train.toml."""
DATASET: dict[str, tuple[str, dict[str, Any]]] = {
    "dataset.toml": (
        "Pictures to train on, each with its caption beside it: a.png and a.txt",
        {**SHAPES, "directory": [{"path": "/data/pictures", "num_repeats": 1}]}),
    "dataset_several_folders.toml": (
        "Several folders: what a folder says counts for it, what the top says for the others",
        {**SHAPES, "caption_prefix": "a photo of ", "directory": [
            {"path": "/data/portraits", "num_repeats": 2},
            {"path": "/data/landscapes", "resolutions": [768, [1280, 720]], "caption_prefix": ""}]}),
    "dataset_system_prompt.toml": (
        "For Lumina Image 2, which was trained with a system prompt before each caption",
        {**SHAPES, "resolutions": [512, 1024], "caption_prefix": LUMINA_SYSTEM_PROMPT,
         "directory": [{"path": "/data/pictures"}]}),
    "dataset_captions.toml": (
        "Captions made of tags: shuffled, some left out, a trigger word always first",
        {**SHAPES, "trigger_word": "ohwx style", "shuffle_tags": True, "keep_tokens": 1, "tag_dropout": 0.1,
         "caption_dropout": 0.05, "caption_wildcards": True, "directory": [{"path": "/data/pictures"}]}),
    "dataset_video.toml": (
        "Clips and pictures in one folder; a clip is cut to the longest length that it has",
        {**SHAPES, "resolutions": [[640, 368]], "frame_buckets": [1, 33, 65], "directory": [{"path": "/data/clips"}]}),
    "dataset_masks.toml": (
        "Pictures with masks of the same names: white is trained, black is not",
        {**SHAPES, "directory": [{"path": "/data/pictures", "mask_path": "/data/masks"}]}),
    "dataset_edit.toml": (
        "For edit models: pictures as they should become, those to start from, and captions that say what is done",
        {**SHAPES, "directory": [{"path": "/data/after", "control_path": "/data/before"}]}),
    "dataset_sizes.toml": (
        "Sizes of your own: width, height and frames",
        {"size_buckets": [[1024, 1024, 1], [832, 1216, 1]], "directory": [{"path": "/data/pictures"}]}),
}  # fmt: skip
"""Title and values of each dataset.toml."""
