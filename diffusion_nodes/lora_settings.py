"""The options of training a LoRA inside ComfyUI, each declared once."""

from __future__ import annotations

from typing import Literal

from ..utils.config import Table, option


class LoraTraining(Table):
    """Training a LoRA on a model that ComfyUI has loaded."""

    batch_size: int = option(1, "Pictures per step. More gives a steadier direction and takes more memory and time.",
                             ge=1, le=10000)  # fmt: skip
    steps: int = option(16, "Steps to train. A LoRA of a subject takes some hundreds, a style a few thousand.",
                        ge=1, le=100000)  # fmt: skip
    learning_rate: float = option(0.0005, "How far a step goes. Lower it when the loss jumps; SGD wants a higher one.",
                                  ge=1e-7, le=1.0, step=1e-7)  # fmt: skip
    rank: int = option(8, "Size of the LoRA. An existing LoRA keeps its own.", ge=1, le=128)
    optimizer: Literal["AdamW", "Adam", "SGD", "RMSprop"] = option(
        "AdamW", "How gradients become steps. AdamW suits almost everything.")  # fmt: skip
    loss_function: Literal["MSE", "L1", "Huber", "SmoothL1"] = option(
        "MSE", "How errors are weighed. Huber and SmoothL1 care less about outliers.")  # fmt: skip
    seed: int = option(0, "Start values, order, noise levels and noise follow from it: the same seed gives the same "
                          "LoRA.", ge=0, le=2**53 - 1)  # fmt: skip
    training_dtype: Literal["bf16", "fp32"] = option(
        "bf16", "Precision of the computation. fp32 is exact and slow; the LoRA's own weights are always trained in "
                "fp32.")  # fmt: skip
    lora_dtype: Literal["bf16", "fp32"] = option("bf16", "Precision of the finished LoRA.")
    existing_lora: str = option(
        "[None]", "A LoRA to go on with: LoRA, LoHa or LoKr in any spelling that ComfyUI loads. Its layers, rank and "
                  "alpha are kept and the steps add up.")  # fmt: skip
    gradient_accumulation: int = option(1, "Batches whose gradients are averaged for one step.", ge=1, le=1024,
                                        advanced=True)  # fmt: skip
    alpha: float = option(0.0, "Strength of the LoRA is alpha / rank. 0: the rank itself, which is strength 1.", ge=0.0,
                          le=1024.0, step=0.5, advanced=True)  # fmt: skip
    weight_decay: float = option(0.01, "Pulls the LoRA towards nothing at every step. Used by AdamW alone.", ge=0.0,
                                 le=1.0, step=0.001, advanced=True)  # fmt: skip
    schedule: Literal["constant", "linear", "cosine"] = option(
        "constant", "How the learning rate goes: stays, or falls to nothing along a line or a cosine.")  # fmt: skip
    warmup_steps: int = option(0, "Steps in which the learning rate rises from nothing.", ge=0, le=100000,
                               advanced=True)  # fmt: skip
    gradient_clipping: float = option(1.0, "Longest gradient; a longer one is shortened to it. 0: never.", ge=0.0,
                                      le=1000.0, step=0.1, advanced=True)  # fmt: skip
    target: str = option("", "Layers to train, by patterns of their names, separated by commas: attn, *.ffn.*; -mod "
                             "takes layers away. Empty: all linear layers of the blocks.", advanced=True)  # fmt: skip
    algorithm: Literal["LoRA", "LoHa", "LoKr"] = option(
        "LoRA", "LoRA is understood everywhere. LoHa and LoKr put more into as large a file.",
        advanced=True)  # fmt: skip
    gradient_checkpointing: bool = option(True, "Compute parts twice instead of keeping them: much less memory, a "
                                                "third slower.")  # fmt: skip
    offloading: bool = option(False, "Keep the model in system RAM and bring each layer to the GPU when it is used, "
                                     "for models that do not fit. Slow.", advanced=True)  # fmt: skip
    caption_dropout: float = option(0.0, "Share of pictures that are trained without their caption, so that guidance "
                                         "keeps working; 0.05 to 0.1 in long trainings.", ge=0.0, le=1.0, step=0.01,
                                    advanced=True)  # fmt: skip
    timestep_sampling: Literal["auto", "uniform", "logit_normal"] = option(
        "auto", "Which noise levels are trained. auto: logit-normal for flow models, uniform for others.",
        advanced=True)  # fmt: skip
    save_every: int = option(0, "Save the LoRA after so many steps, and when the training is interrupted. 0: never.",
                             ge=0, le=100000)  # fmt: skip
    save_prefix: str = option("loras/trained_lora", "Name in ComfyUI's output folder for what is saved on the way.",
                              advanced=True)  # fmt: skip
    preview_every: int = option(0, "Make a picture with the LoRA so far after so many steps; needs a VAE. 0: never.",
                                ge=0, le=100000, advanced=True)  # fmt: skip
    on_cancel: Literal["discard", "keep"] = option(
        "discard", "What Cancel does: end without a result, or go on with the LoRA trained so far.")  # fmt: skip
