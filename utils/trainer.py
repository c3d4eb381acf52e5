"""The run from settings to LoRA: dataset, cache, denoiser, engine, loop, export."""

from __future__ import annotations

import json
import logging
import math
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from . import attention
from .adapters import alpha_of, export_tensors, inject, load_existing
from .buckets import Bucket
from .cache import Cache
from .checkpoint import Trained, export_adapter, load_checkpoint, newest_checkpoint, save_checkpoint
from .config import SettingsError, write_toml, write_whole
from .dataset import Sample, recall, remember, scan, scan_name
from .dataset_report import Report
from .index import Index
from .loader import Loader
from .metrics import Curves, Gpu
from .optimizers import build_optimizer, learning_rate_factor
from .pipeline import Chain, Engine, World, as_micro_batches, build_engine, mean_squared_error, partition
from .randomness import derive_seed
from .run_folder import RunFolder, Status
from .sampler import Sampler
from .settings import DatasetSettings, Lora, TrainSettings, as_toml, family_of
from .sources import printable

logger = logging.getLogger(__name__)

SAVE, STOP = 1, 2
"""What a step may be asked to do after it; the highest that any rank was asked wins."""


class Stopped(Exception):
    """The run was asked to end before training began."""


@dataclass
class Position:
    """Where training stands."""

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    epoch_loss: float = 0.0
    """Sum of the losses of this epoch's steps so far."""


class Trainer:
    """One training run; every process of it makes one and calls `run`."""

    def __init__(
        self, settings: TrainSettings, dataset: DatasetSettings, world: World, folder: RunFolder, resume: bool = False
    ) -> None:
        self.settings, self.dataset, self.world, self.folder = settings, dataset, world, folder
        self._resume = resume
        self.family = family_of(settings)
        self.status = Status(epochs=settings.epochs)
        self._asked = 0
        self._written = 0.0
        self._phase_started = self._phase_said = 0.0
        self._checks_stages()

    def _checks_stages(self) -> None:
        stages = self.settings.pipeline_stages
        if self.world.size % stages:
            raise SettingsError(
                f"pipeline_stages: {stages} does not divide the {self.world.size} processes of this run; "
                f"start with a multiple of {stages} (--num_gpus)"
            )

    # -- the run ------------------------------------------------------------------------------------

    def run(self) -> None:
        """Trains from start or checkpoint to end or stop; leaves status "finished", "stopped" or "failed"."""
        handlers = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._train()
        except Stopped:
            logger.info("stopped before the first step")
            self._say(state="stopped", phase="")
        except BaseException as error:
            self.status.state, self.status.error = "failed", _describe(error)
            if self.world.rank == 0:
                _write_status_anyway(self.folder, self.status)
            raise
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _train(self) -> None:
        s = self.settings
        self.family.check_files()
        cache = self._prepare_data()
        if s.cache_only:
            logger.info("the cache is complete, and cache_only is on: done")
            self._say(state="finished", phase="")
            return
        engine, trained = self._build()
        global_batch = self._global_batch(cache.samples[0].bucket)
        sampler = Sampler(cache.samples, self._global_batch, s.seed)
        total = sampler.total_steps(s.epochs)
        total = min(total, s.max_steps or total)
        position = Position()
        if self._resume:
            progress = load_checkpoint(newest_checkpoint(self.folder), trained)
            _refuse_changed(progress, s, len(cache.samples))
            position = Position(**progress["position"])
            logger.info("resumed after step %d", position.step)
        loader = Loader(
            cache,
            self.family,
            s.seed,
            s.gradient_accumulation_steps,
            engine.grid.get_data_parallel_rank(),
            self.world.size // s.pipeline_stages,
            s.uncond_fraction,
        )
        logger.info("training %d steps over %d epochs, %d pictures a step", total, s.epochs, global_batch)
        self._say(state="training", phase="", eta=None, total_steps=total, step=position.step, epoch=position.epoch)
        with Curves(
            self.folder.path if self.world.rank == 0 else None,
            s.x_axis_examples,
            global_batch,
            position.step if self._resume else None,
        ) as curves:
            self._loop(engine, trained, sampler, loader, position, total, curves, len(cache.samples))

    def _global_batch(self, bucket: Bucket) -> int:
        """Samples of one step over all processes."""
        s = self.settings
        micro_batch = s.micro_batch(bucket.width, bucket.height, bucket.frames)
        return micro_batch * s.gradient_accumulation_steps * (self.world.size // s.pipeline_stages)

    def _prepare_data(self) -> Cache:
        s = self.settings
        folder = Path(s.cache_dir or Path(s.output_dir) / "cache").expanduser()
        self._say(state="caching", phase="looking through the dataset")
        found: Any = None
        if self.world.rank == 0:
            try:
                found = self._scan(folder)
            except (SettingsError, OSError, Stopped) as error:
                found = error
        samples, report = self.world.share(found)
        cache = Cache(folder, self.family, samples, uncond=s.uncond_fraction > 0)
        failed = cache.fill(
            self.world.device,
            s.caching_batch_size,
            self._on_progress,
            self.world.rank,
            self.world.size,
            self.world.barrier,
            regenerate=s.regenerate_cache,
            num_readers=s.map_num_proc,
        )
        unreadable = {path: reason for part in self.world.gather(failed) for path, reason in part.items()}
        cache.samples = cache.without(unreadable)
        if self.world.rank == 0:
            self._report_data(cache, report, unreadable)
        if not cache.samples:
            reasons = "; ".join(f"{printable(path)}: {reason}" for path, reason in unreadable.items())
            raise SettingsError(f"dataset: no picture could be decoded: {reasons}")
        return cache

    def _scan(self, folder: Path) -> tuple[list[Sample], Report]:
        s = self.settings
        last = folder / "scans" / f"{scan_name(self.dataset, self.family, s.video_clip_mode)}.jsonl"
        samples = recall(last) if s.trust_cache else None
        if samples is not None:
            logger.info("dataset: %d samples as found last time, because trust_cache is on", len(samples))
            report = Report()
            report.count(samples)
            return samples, report
        index = Index(folder / "index.sqlite", forget=s.regenerate_cache)
        try:
            samples, report = scan(self.dataset, index, self.family, s.video_clip_mode, self._on_progress)
        finally:
            index.close()
        remember(last, samples)
        return samples, report

    def _report_data(self, cache: Cache, report: Report, unreadable: dict[str, str]) -> None:
        s = self.settings
        report.left_out |= {printable(path): reason for path, reason in unreadable.items()}
        report.count(cache.samples)
        sampler = Sampler(cache.samples, self._global_batch, s.seed)
        report.steps_per_epoch = sampler.num_steps(0)
        report.total_steps = min(sampler.total_steps(s.epochs), s.max_steps or sys.maxsize)
        report.cache_bytes = cache.note_use(scan_name(self.dataset, self.family, s.video_clip_mode))
        report.log()
        logger.info(
            "cache: %s for this dataset in %s",
            f"{report.cache_bytes / 2**20:.0f} MiB",
            s.cache_dir or "output_dir/cache",
        )
        text = json.dumps(report.as_dict(), indent=1, ensure_ascii=False)
        write_whole(self.folder.path / "dataset_report.json", text)

    def _build(self) -> tuple[Engine, Trained]:
        s = self.settings
        self._say(phase="loading the model")
        attention.choose(s.attention_backend, self.world.device)
        # With several stages each GPU holds only its own layers, so the whole model passes through main memory.
        device = self.world.device if s.pipeline_stages == 1 else torch.device("cpu")
        denoiser = self.family.load_denoiser(device)
        assert isinstance(s.adapter, Lora)  # settings refuse anything else
        inject(denoiser, self.family, s.adapter, s.seed)
        if s.adapter.init_from_existing:
            load_existing(denoiser, self.family, Path(s.adapter.init_from_existing).expanduser())
        layers = self.family.layers(denoiser)
        names = {parameter: name for name, parameter in denoiser.named_parameters()}
        bounds = partition(layers, s.pipeline_stages, s.partition_method, s.partition_split)
        chain = Chain(
            layers,
            s.pipeline_stages,
            bounds,
            mean_squared_error,
            checkpointing=bool(s.activation_checkpointing),
            compiled=s.compile,
            memory_budget=s.activation_memory_budget,
            random=s.adapter.dropout > 0,
        )
        del denoiser, layers
        parameters = [p for p in chain.parameters() if p.requires_grad]
        if not parameters:  # DeepSpeed wants an optimizer on every stage
            parameters = [nn.Parameter(torch.zeros((), device=self.world.device), requires_grad=False)]
        optimizer = build_optimizer(s.optimizer, parameters, self.world.device)
        for group in optimizer.param_groups:
            group["initial_lr"] = s.force_constant_lr or group["lr"]
        engine = build_engine(
            chain,
            optimizer,
            self.world,
            micro_batch=s.micro_batch_size_per_gpu if isinstance(s.micro_batch_size_per_gpu, int) else 1,
            num_micro_batches=s.gradient_accumulation_steps,
            max_norm=s.gradient_clipping,
            use_graphs=s.cuda_graphs and not s.adapter.dropout,
        )
        return engine, Trained(names, chain, optimizer)

    def _loop(
        self,
        engine: Engine,
        trained: Trained,
        sampler: Sampler,
        loader: Loader,
        position: Position,
        total: int,
        curves: Curves,
        num_samples: int,
    ) -> None:
        gpu = Gpu(self.world.device)
        last_checkpoint = time.monotonic()
        exported = saved = position.step
        while position.step < total:
            plan = sampler.epoch(position.epoch)
            for batches in loader.steps(position.epoch, plan[position.step_in_epoch :]):
                started = time.monotonic()
                self._step(engine, trained, batches, position, total, curves, gpu, started)
                end_of_epoch = position.step_in_epoch == len(plan)
                if end_of_epoch:
                    curves.add(position.epoch + 1, epoch_loss=position.epoch_loss / len(plan))
                    position.epoch, position.step_in_epoch, position.epoch_loss = position.epoch + 1, 0, 0.0
                asked = self._agree(last_checkpoint)
                name = self._export_due(position, end_of_epoch)
                if name or asked & STOP or (asked and position.step != exported):
                    self._export(engine, trained, name or f"step{position.step}", position)
                    exported = position.step
                if asked or self._checkpoint_due(position, end_of_epoch):
                    self._checkpoint(engine, trained, position, num_samples)
                    saved, last_checkpoint = position.step, time.monotonic()
                if asked & STOP:
                    logger.info("stopped as asked after step %d", position.step)
                    self._say(state="stopped", eta=None)
                    return
                if position.step >= total:
                    break
        if exported != position.step:
            self._export(
                engine,
                trained,
                f"epoch{position.epoch}" if position.step_in_epoch == 0 else f"step{position.step}",
                position,
            )
        if saved != position.step:
            self._checkpoint(engine, trained, position, num_samples)
        logger.info("finished after %d steps", position.step)
        self._say(state="finished", eta=0.0)

    def _step(
        self,
        engine: Engine,
        trained: Trained,
        batches: list[Any],
        position: Position,
        total: int,
        curves: Curves,
        gpu: Gpu,
        started: float,
    ) -> None:
        s = self.settings
        factor = learning_rate_factor(s, position.step, total)
        for group in trained.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        stage, rank = engine.grid.get_stage_id(), engine.grid.get_data_parallel_rank()
        torch.manual_seed(derive_seed("dropout", s.seed, position.step, stage, rank))
        loss = float(engine.train_batch(as_micro_batches(batches)))
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss} at step {position.step + 1}; lower the learning rate"
                + ("" if s.model.dtype != "float16" else " or use dtype bfloat16")
            )
        position.step += 1
        position.step_in_epoch += 1
        position.epoch_loss += loss
        seconds = time.monotonic() - started
        global_batch = sum(len(batch.target) for batch in batches) * self.world.size // s.pipeline_stages
        if position.step % s.logging_steps == 0:
            curves.add(
                position.step,
                loss=loss,
                lr=trained.optimizer.param_groups[0]["lr"],
                grad_norm=engine.last_grad_norm(),
                step_seconds=seconds,
                samples_per_second=global_batch / seconds,
                **gpu.values(),
            )
        self._report(position, total, loss, trained.optimizer.param_groups[0]["lr"], seconds, gpu)

    def _report(self, position: Position, total: int, loss: float, lr: float, seconds: float, gpu: Gpu) -> None:
        status = self.status
        smooth = seconds if status.seconds_per_step is None else 0.9 * status.seconds_per_step + 0.1 * seconds
        if position.step % self.settings.steps_per_print == 0:
            logger.info(
                "step %d/%d  epoch %d  loss %.4f  lr %.3g  %.2f s/step",
                position.step,
                total,
                position.epoch + 1,
                loss,
                lr,
                seconds,
            )
        self._say(
            now=position.step == total,
            step=position.step,
            epoch=position.epoch + 1,
            loss=loss,
            first_loss=loss if status.first_loss is None else status.first_loss,
            learning_rate=lr,
            seconds_per_step=smooth,
            eta=smooth * (total - position.step),
            gpu_memory=gpu.peak_memory(),
        )

    # -- stopping and saving ------------------------------------------------------------------------

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._asked & STOP and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked |= STOP

    def _agree(self, last_checkpoint: float) -> int:
        """What all ranks do after this step, as asked of any of them."""
        asked, self._asked = self._asked, self._asked & STOP
        if self.world.rank == 0:
            for command in self.folder.take_requests():
                asked |= STOP | SAVE if command == "save_quit" else SAVE
            minutes = self.settings.checkpoint_every_n_minutes
            if minutes and time.monotonic() - last_checkpoint >= 60 * minutes:
                asked |= SAVE
        return self.world.highest(asked)

    def _on_progress(self, phase: str, done: int, total: int) -> None:
        if self.world.rank == 0:
            for command in self.folder.take_requests():
                self._asked |= STOP if command == "save_quit" else 0
            now = time.monotonic()
            if phase != self.status.phase:
                self._phase_started = self._phase_said = now
            left = (now - self._phase_started) / done * (total - done) if done else None
            self._say(phase=phase, phase_done=done, phase_total=total, eta=left)
            if done in (0, total) or now - self._phase_said > 10:
                self._phase_said = now
                logger.info("%s: %d of %d%s", phase, done, total, f", {left:.0f} s left" if left else "")
        if self._asked & STOP:
            raise Stopped

    def _export_due(self, position: Position, end_of_epoch: bool) -> str | None:
        s = self.settings
        if end_of_epoch and s.save_every_n_epochs and position.epoch % s.save_every_n_epochs == 0:
            return f"epoch{position.epoch}"
        if s.save_every_n_steps and position.step % s.save_every_n_steps == 0:
            return f"step{position.step}"
        return None

    def _checkpoint_due(self, position: Position, end_of_epoch: bool) -> bool:
        every = self.settings.checkpoint_every_n_epochs
        return bool(end_of_epoch and every and position.epoch % every == 0)

    def _export(self, engine: Engine, trained: Trained, name: str, position: Position) -> None:
        parts = self.world.gather(trained.weights() if engine.grid.get_data_parallel_rank() == 0 else {})
        if self.world.rank == 0:
            s = self.settings
            assert isinstance(s.adapter, Lora)
            weights = {key: value for part in parts for key, value in part.items()}
            tensors = export_tensors(weights, self.family, s.adapter, getattr(torch, s.adapter.dtype or s.save_dtype))
            export_adapter(
                self.folder.path / name,
                tensors,
                self._metadata(position),
                self._adapter_config(weights),
                [self.folder.train_toml, self.folder.dataset_toml],
            )
            path = str(self.folder.path / name)
            self.status.exports = [*(e for e in self.status.exports if e != path), path]
            logger.info("LoRA written to %s", path)
        self.world.barrier()
        self._say(now=True)

    def _checkpoint(self, engine: Engine, trained: Trained, position: Position, num_samples: int) -> None:
        s = self.settings
        progress = {
            "position": vars(position),
            "seed": s.seed,
            "num_samples": num_samples,
        }
        path = save_checkpoint(
            self.folder,
            position.step,
            engine.grid.get_stage_id(),
            engine.grid.get_data_parallel_rank() == 0,
            self.world.rank == 0,
            trained,
            progress,
            self.world.barrier,
            s.checkpoints_to_keep,
        )
        self.status.checkpoint = str(path)
        logger.info("checkpoint written to %s", path)
        self._say(now=True)

    def _metadata(self, position: Position) -> dict[str, str]:
        s = self.settings
        assert isinstance(s.adapter, Lora)
        return {
            "format": "pt",
            "base_model": s.model.type,
            "network_alpha": str(alpha_of(s.adapter)),
            "rank": str(s.adapter.rank),
            "steps": str(position.step),
            "epoch": str(position.epoch),
            "seed": str(s.seed),
            "trained_with": "diffusion-trainer",
        }

    def _adapter_config(self, weights: dict[str, torch.Tensor]) -> dict[str, Any]:
        s = self.settings
        assert isinstance(s.adapter, Lora)
        modules = sorted({name.rsplit(".lora_", 1)[0] for name in weights})
        return {
            "peft_type": "LORA",
            "r": s.adapter.rank,
            "lora_alpha": alpha_of(s.adapter),
            "lora_dropout": s.adapter.dropout,
            "bias": "none",
            "target_modules": modules,
            "base_model_type": s.model.type,
        }

    # -- saying how it goes -------------------------------------------------------------------------

    def _say(self, now: bool = False, **changes: Any) -> None:
        """Updates the status; writes it at once when the state changes or ``now``, else twice a second at most."""
        now = now or changes.get("state", self.status.state) != self.status.state
        for name, value in changes.items():
            setattr(self.status, name, value)
        if self.world.rank == 0 and (now or time.monotonic() - self._written > 0.5):
            self._written = time.monotonic()
            self.folder.write_status(self.status)


def prepare_folder(settings: TrainSettings, dataset: DatasetSettings, folder: RunFolder) -> None:
    """Puts both TOMLs, as used, into the run folder."""
    write_toml(folder.dataset_toml, as_toml(dataset))
    write_toml(folder.train_toml, as_toml(settings) | {"dataset": str(folder.dataset_toml)})


def _refuse_changed(progress: dict[str, Any], settings: TrainSettings, num_samples: int) -> None:
    """Order and noise of the rest depend on these; with others it would not be the same run."""
    if progress["seed"] != settings.seed:
        raise SettingsError(f"seed: the checkpoint was made with {progress['seed']}; set that to resume")
    if progress["num_samples"] != num_samples:
        logger.warning(
            "the dataset has %d samples, the checkpoint saw %d: the rest of this epoch differs",
            num_samples,
            progress["num_samples"],
        )


def _describe(error: BaseException) -> str:
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return (
            "out of GPU memory: use smaller pictures or micro_batch_size_per_gpu, activation_checkpointing = true "
            f"or transformer_dtype = 'float8' ({str(error).splitlines()[0]})"
        )
    if isinstance(error, OSError) and error.errno == 28:
        return f"no space left on the disk: {error.filename or ''}; make room and resume the run"
    return f"{error}" if isinstance(error, SettingsError) else f"{type(error).__name__}: {error}"


def _write_status_anyway(folder: RunFolder, status: Status) -> None:
    """The last word of a failing run; a full disk must not hide why it failed."""
    try:
        folder.write_status(status)
    except OSError as error:
        logger.error("the status could not be written: %s", error)
