"""Trains a LoRA on a model that ComfyUI has loaded: the loop, without any node around it.

Read in this order: lora_settings, lora_samples (what is trained on), lora_objective (the loss), adapter_layers and
lora_layers (what is trained, and how it is put into the model; lora_weights, lora_norms and lora_recompute serve it),
lora_files (what comes in and goes out), this.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..utils.adapter_layers import Adapter, new_adapter
from ..utils.config import SettingsError
from . import comfy
from .lora_files import STEPS_KEY, Existing, TrainedLora, optimizer_state, restore_optimizer, state_of
from .lora_layers import attached, shape_of, targets
from .lora_objective import draw_sigmas, loss, noisy
from .lora_recompute import Copies
from .lora_samples import (
    Conditioning,
    Sample,
    batches,
    generator,
    groups,
    joined,
    paired,
    prepare,
    split_conditioning,
    split_latents,
)  # fmt: skip
from .lora_settings import LoraTraining

logger = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CHECKPOINTED, KEPT = 3.0, 12.0
"""Memory of a training step as a multiple of what ComfyUI estimates for a picture of the same size."""


@dataclass
class Inputs:
    """What is trained on."""

    latents: Sequence[Mapping[str, Any]]
    positive: Sequence[Conditioning]
    negative: Conditioning | None = None
    masks: Sequence[Tensor] = ()


@dataclass
class Report:
    """How the training stands; handed to the caller after every step."""

    step: int
    """Steps of this training that are done."""
    losses: list[float]
    rate: float
    """Learning rate of the last step."""


@dataclass
class Result:
    """What came out."""

    lora: TrainedLora
    losses: list[float]
    steps: int
    """Steps in all, those of the existing LoRA included."""
    interrupted: bool = False


Watch = Callable[[Report], None]
Save = Callable[[TrainedLora, int], None]


@dataclass
class Hooks:
    """What the caller wants to be told."""

    watch: Watch = field(default=lambda report: None)
    """Called after every step; may raise to end the training."""
    save: Save = field(default=lambda lora, steps: None)
    preview: Save = field(default=lambda lora, steps: None)


def train(model: Any, inputs: Inputs, settings: LoraTraining, existing: Existing | None, hooks: Hooks) -> Result:
    """A LoRA for ``model``, which stays as it is.

    Args:
        model: ComfyUI's MODEL.
        existing: A LoRA to go on with; it is trained in place.

    Raises:
        SettingsError: Inputs that do not go together.
        FloatingPointError: The loss is no number any more.
    """
    with untouched():
        torch.manual_seed(settings.seed)
        run = _Run(model, inputs, settings, existing or Existing(), hooks)
        try:
            run.start()
            return run.all_steps()
        finally:
            run.close()


@contextmanager
def untouched() -> Iterator[None]:
    """Inside, autograd works; outside, autograd, random numbers and backend flags are as they were."""
    import comfy.model_management as management
    import numpy

    numbers = torch.get_rng_state(), random.getstate(), numpy.random.get_state()  # the global one
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    backends = torch.backends
    flags = [(owner, name, getattr(owner, name)) for owner, names in (
        (backends.cudnn, ("enabled", "benchmark", "deterministic", "allow_tf32")),
        (backends.cuda.matmul, ("allow_tf32", "allow_fp16_reduced_precision_reduction",
                                "allow_bf16_reduced_precision_reduction")),
    ) for name in names]  # fmt: skip
    precision, training = torch.get_float32_matmul_precision(), getattr(management, "in_training", None)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            if training is not None:  # some models otherwise use kernels without a gradient
                management.in_training = True
            yield
    finally:
        if training is not None:
            management.in_training = training
        for owner, name, value in flags:
            if getattr(owner, name) != value:
                setattr(owner, name, value)
        if torch.get_float32_matmul_precision() != precision:
            torch.set_float32_matmul_precision(precision)
        torch.set_rng_state(numbers[0])
        random.setstate(numbers[1])
        numpy.random.set_state(numbers[2])
        if on_gpus:
            torch.cuda.set_rng_state_all(on_gpus)


class _Run:
    """One training, from the sockets to the finished LoRA."""

    def __init__(self, model: Any, inputs: Inputs, settings: LoraTraining, existing: Existing, hooks: Hooks) -> None:
        self.settings, self.existing, self.hooks, self.model = settings, existing, hooks, model
        self.latents = split_latents(inputs.latents)
        self.captions = paired(len(self.latents), split_conditioning(inputs.positive))
        self.negative = split_conditioning([inputs.negative])[0] if inputs.negative is not None else None
        self.masks = inputs.masks
        self.was_loaded = _is_loaded(model)
        self.patcher = _with_kept(model, existing.kept)
        self.device: torch.device = self.patcher.load_device
        self.dtype = DTYPES[settings.training_dtype]
        self.copies = Copies()
        self.losses: list[float] = []
        self.done = 0
        self.rate = 0.0

    # -- around the steps --

    def start(self) -> None:
        """Loads the model and makes ready what the steps need."""
        settings, existing = self.settings, self.existing
        self.load()
        with torch.no_grad():
            self.samples = prepare(
                self.patcher.model, self.latents, self.captions, self.negative, self.masks, self.device
            )
        self.adapters = existing.adapters or self._new_adapters()
        for adapter in self.adapters.values():
            adapter.to(self.device)
        self.parameters = [parameter for adapter in self.adapters.values() for parameter in adapter.parameters()]
        self.optimizer = _optimizer(settings, self.parameters)
        self.recovered = bool(existing.optimizer) and restore_optimizer(
            self.optimizer, self.adapters, existing.optimizer
        )
        if existing.optimizer and not self.recovered:
            logger.warning("the optimizer's memory beside the LoRA is not of it or of another optimizer; starting anew")
        self.order = batches(self.samples, settings.batch_size, settings.seed)
        for _ in range(existing.steps * settings.gradient_accumulation):
            next(self.order)

    def load(self) -> None:
        """Has ComfyUI bring the model to its device, with room for a step."""
        import comfy.model_management as management

        shape = max((latent.shape for latent, _ in self.latents), key=math.prod)
        factor = CHECKPOINTED if self.settings.gradient_checkpointing else KEPT
        needed = self.patcher.memory_required([self.settings.batch_size, *shape[1:]]) * factor
        with torch.inference_mode():  # quantised weights that were made in it can only be moved in it
            management.load_models_gpu([self.patcher], memory_required=1e20 if self.settings.offloading else needed)

    def close(self) -> None:
        """Lets go of the model unless it was loaded before."""
        import comfy.model_management as management

        self.optimizer = None  # type: ignore[assignment]
        if not self.was_loaded or self.patcher is not self.model:
            loaded = management.current_loaded_models
            for entry in [entry for entry in loaded if entry.model is not None and entry.model.is_clone(self.patcher)]:
                with torch.inference_mode():
                    entry.model_unload()
                loaded.remove(entry)
            management.soft_empty_cache()

    def _new_adapters(self) -> dict[str, Adapter]:
        settings = self.settings
        patterns = [part.strip() for part in settings.target.replace("\n", ",").split(",") if part.strip()]
        chosen = targets(self.patcher.model, patterns)
        if not chosen:
            raise SettingsError(f"target: no layer of this model matches '{settings.target}'; leave it empty for all")
        alpha = settings.alpha or settings.rank
        return {
            name: new_adapter(settings.algorithm, shape, settings.rank, alpha, generator(settings.seed, "start", name))
            for name, module in chosen.items() if (shape := shape_of(module)) is not None
        }  # fmt: skip

    def result(self) -> TrainedLora:
        """The LoRA as it is now."""
        metadata = {STEPS_KEY: str(self.steps), "algorithm": self.settings.algorithm, "seed": str(self.settings.seed),
                    "learning_rate": str(self.settings.learning_rate), "batch_size": str(self.settings.batch_size),
                    "optimizer": self.settings.optimizer, "base_model": type(self.patcher.model).__name__}  # fmt: skip
        tensors = state_of(self.adapters, self.existing.kept, DTYPES[self.settings.lora_dtype])
        return TrainedLora(tensors, metadata, optimizer_state(self.optimizer, self.adapters))

    @property
    def steps(self) -> int:
        """Steps in all."""
        return self.existing.steps + self.done

    # -- the steps --

    def all_steps(self) -> Result:
        """Trains to the end, or to where the user cancels."""
        interrupted = False
        try:
            while self.done < self.settings.steps:
                self._until(self._next_stop())
                self._stopped_at()
        except BaseException as error:
            if self.settings.save_every and self.done % self.settings.save_every:
                self.hooks.save(self.result(), self.steps)
            if not (is_interrupt(error) and self.settings.on_cancel == "keep" and self.done):
                raise
            interrupted = True
        return Result(self.result(), self.losses, self.steps, interrupted)

    def _next_stop(self) -> int:
        """The step after which something is to be saved or shown, which needs the model as ComfyUI has it."""
        intervals = [n for n in (self.settings.save_every, self.settings.preview_every) if n]
        return min([self.settings.steps, *(self.done - self.done % n + n for n in intervals)])

    def _stopped_at(self) -> None:
        settings = self.settings
        if settings.save_every and self.done % settings.save_every == 0:
            self.hooks.save(self.result(), self.steps)
        if settings.preview_every and self.done % settings.preview_every == 0:
            self.hooks.preview(self.result(), self.steps)
            self.load()

    def _until(self, stop: int) -> None:
        settings, patcher = self.settings, self.patcher
        keep = torch.autograd.graph.save_on_cpu(pin_memory=self.device.type == "cuda")
        offloads = settings.offloading and self.device.type != "cpu"  # autograd does not watch over what is kept so
        with ExitStack() as inside:
            refresh = inside.enter_context(attached(
                patcher.model, self.adapters, self.dtype, self.copies,
                checkpointing=settings.gradient_checkpointing))  # fmt: skip
            inside.enter_context(keep if offloads else nullcontext())
            while self.done < stop:
                comfy.check_interrupted()
                value = self._step()
                refresh()
                self.done += 1
                self.losses.append(value)
                self.hooks.watch(Report(self.done, self.losses, self.rate))

    def _step(self) -> float:
        settings = self.settings
        drawn = [next(self.order) for _ in range(settings.gradient_accumulation)]
        total = self._gradients(drawn)
        if total is None:
            self.optimizer.zero_grad(set_to_none=True)
            self.copies.made = True
            total = self._gradients(drawn)
        assert total is not None, "with copies an error is one"
        self.copies.tried = True
        if not math.isfinite(total):
            raise FloatingPointError(
                f"training: the loss of step {self.steps + 1} is {total}; lower learning_rate, or choose fp32 as "
                "training_dtype")  # fmt: skip
        if settings.gradient_clipping:
            torch.nn.utils.clip_grad_norm_(self.parameters, settings.gradient_clipping)
        self.rate = settings.learning_rate * schedule(settings, self.done)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def _gradients(self, drawn: list[list[int]]) -> float | None:
        """Loss of these batches, and its gradients; None if the model needs copies that were not made."""
        draws = generator(self.settings.seed, "step", self.steps)
        losses = []
        try:
            for part in (part for batch in drawn for part in self._losses(batch, draws)):
                value = part / len(drawn)
                if not value.requires_grad:
                    raise SettingsError(
                        "model: no gradient comes through it, because something computes its layers in another way "
                        "(compiled, or quantised by another package); load it with ComfyUI's own loader, or GGUF's"
                    )
                value.backward()
                losses.append(value.detach())
        except RuntimeError as error:
            if self.copies.would_help(error):
                return None
            raise
        return torch.stack(losses).sum().item()

    def _losses(self, batch: list[int], draws: torch.Generator) -> Iterator[Tensor]:
        """Parts of the mean loss over the batch; conditions of unlike sizes are computed one after another."""
        samples = [self.samples[index] for index in batch]
        sampling = self.patcher.model.model_sampling
        sigmas = draw_sigmas(sampling, len(samples), self.settings.timestep_sampling, draws)
        dropped = torch.rand(len(samples), generator=draws) < self.settings.caption_dropout
        noise = torch.randn(len(samples), *samples[0].latent.shape[1:], generator=draws)
        conds = [sample.dropped if drop else sample.conds
                 for sample, drop in zip(samples, dropped.tolist(), strict=True)]  # fmt: skip
        for group in groups(conds):
            part = self._part([samples[n] for n in group], [conds[n] for n in group], noise[group], sigmas[group])
            yield part * (len(group) / len(samples))

    def _part(self, samples: list[Sample], conds: list[dict[str, Any]], noise: Tensor, sigmas: Tensor) -> Tensor:
        model = self.patcher.model
        latent = torch.cat([sample.latent for sample in samples]).to(self.device)
        sigma = sigmas.to(self.device)
        noised = noisy(model.model_sampling, latent, noise.to(self.device), sigma)
        options = _transformer_options(self.patcher, sigma)
        denoised = model.apply_model(noised, sigma, transformer_options=options, **joined(conds, self.device))
        mask = None
        if any(sample.mask is not None for sample in samples):
            whole = torch.ones_like(latent[:1, :1])
            mask = torch.cat([whole if s.mask is None else s.mask.to(whole).expand_as(whole) for s in samples])
        return loss(model.model_sampling, denoised, latent, sigma, mask, self.settings.loss_function)


def schedule(settings: LoraTraining, done: int) -> float:
    """Factor of the learning rate for the step after ``done`` ones."""
    if done < settings.warmup_steps:
        return (done + 1) / (settings.warmup_steps + 1)
    rest = max(settings.steps - settings.warmup_steps, 1)
    at = min((done - settings.warmup_steps) / rest, 1.0)
    return {"constant": 1.0, "linear": 1.0 - at, "cosine": 0.5 + 0.5 * math.cos(math.pi * at)}[settings.schedule]


def is_interrupt(error: BaseException) -> bool:
    """Whether the user pressed Cancel."""
    import comfy.model_management as management

    return isinstance(error, (management.InterruptProcessingException, comfy.Interrupted))


def _optimizer(settings: LoraTraining, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    rate = settings.learning_rate
    if settings.optimizer == "AdamW":
        return torch.optim.AdamW(parameters, rate, weight_decay=settings.weight_decay, fused=True)
    if settings.optimizer == "Adam":
        return torch.optim.Adam(parameters, rate, fused=True)
    if settings.optimizer == "SGD":
        return torch.optim.SGD(parameters, rate, fused=True)
    return torch.optim.RMSprop(parameters, rate, foreach=True)


def _is_loaded(model: Any) -> bool:
    import comfy.model_management as management

    return any(entry.model is not None and entry.model.is_clone(model) for entry in management.current_loaded_models)


def _with_kept(model: Any, kept: Mapping[str, Tensor]) -> Any:
    """The model with those tensors of a LoRA that are not trained; itself if none is of it."""
    if not kept:
        return model
    import comfy.lora as lora

    patches = lora.load_lora(dict(kept), lora.model_lora_keys_unet(model.model, {}), log_missing=False)
    if not patches:
        return model
    patched = model.clone()
    patched.add_patches(patches)
    return patched


def _transformer_options(patcher: Any, sigma: Tensor) -> dict[str, Any]:
    """What ComfyUI's sampler hands the model, with attention that has a gradient."""
    import comfy.ldm.modules.attention as attention

    options = dict(patcher.model_options.get("transformer_options", {}))
    options |= {"cond_or_uncond": [0], "sigmas": sigma, "sample_sigmas": sigma}
    if attention.optimized_attention is not attention.attention_pytorch:
        options.setdefault("optimized_attention_override", _attention)
    return options


def _attention(_: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    import comfy.ldm.modules.attention as attention

    return attention.attention_pytorch(*args, **kwargs)
