"""The steps of a training: run one, report the one before, save and stop when it is time."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..models.base import Batch, Family
from .checkpoint import save_checkpoint
from .control import STOP, Control
from .exports import Exporter
from .loader import Loader
from .metrics import Curves, Gpu
from .optimizers import learning_rate_factor
from .pipeline import Engine, as_micro_batches
from .randomness import derive_seed
from .run_folder import RunFolder
from .sampler import Sampler
from .settings import TrainSettings
from .trained import Trained
from .world import World

logger = logging.getLogger(__name__)


@dataclass
class Position:
    """Where training stands."""

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    epoch_loss: float = 0.0
    """Sum of the losses of this epoch's steps so far."""


@dataclass
class _Running:
    """A step that the device may still be working on."""

    step: int
    learning_rate: float
    num_samples: int
    values: torch.Tensor
    """Loss and gradient norm, on the CPU once `done`."""
    done: torch.cuda.Event | None


@dataclass
class Loop:
    """Trains from `position` to step `total`.

    The host reads a step's loss after it has issued the next, so that the device never waits for logging,
    status and data.
    """

    settings: TrainSettings
    family: Family
    world: World
    folder: RunFolder
    control: Control
    engine: Engine
    trained: Trained
    exporter: Exporter
    sampler: Sampler
    loader: Loader
    position: Position
    total: int
    num_samples: int
    _running: _Running | None = field(default=None, init=False)
    _finished_at: float = field(default=0.0, init=False)

    def run(self, curves: Curves) -> None:
        """Trains, exports and writes checkpoints; says "finished" or "stopped" at the end."""
        self._curves, self._gpu = curves, Gpu(self.world.device)
        position, last_checkpoint = self.position, time.monotonic()
        exported = saved = position.step
        while position.step < self.total:
            plan = self.sampler.epoch(position.epoch)
            for batches in self.loader.steps(position.epoch, plan[position.step_in_epoch :]):
                self._step(batches)
                end_of_epoch = position.step_in_epoch == len(plan)
                if end_of_epoch:
                    self._end_epoch(len(plan))
                asked = self.control.agree(self._minutes_are_over(last_checkpoint))
                name = self._export_due(end_of_epoch)
                if name or (asked and position.step != exported):
                    self._export(name or f"step{position.step}")
                    exported = position.step
                if asked or self._checkpoint_due(end_of_epoch):
                    self._checkpoint()
                    saved, last_checkpoint = position.step, time.monotonic()
                if asked & STOP:
                    logger.info("stopped as asked after step %d", position.step)
                    self.control.say(state="stopped", eta=None)
                    return
                if position.step >= self.total:
                    break
        if exported != position.step:
            self._export(f"step{position.step}" if position.step_in_epoch else f"epoch{position.epoch}")
        if saved != position.step:
            self._checkpoint()
        logger.info("finished after %d steps", position.step)
        self.control.say(state="finished", eta=0.0)

    # -- steps --------------------------------------------------------------------------------------

    def _step(self, batches: Sequence[Batch]) -> None:
        s, position, groups = self.settings, self.position, self.trained.groups
        factor = learning_rate_factor(s, position.step, self.total)
        for group in groups:
            group["lr"] = group["initial_lr"] * factor
        stage, rank = self.engine.grid.get_stage_id(), self.engine.grid.get_data_parallel_rank()
        torch.manual_seed(derive_seed("dropout", s.seed, position.step, stage, rank))
        before, started = self._running, time.monotonic()
        loss = self.engine.train_batch(as_micro_batches(batches))
        position.step += 1
        position.step_in_epoch += 1
        self._running = self._follow(loss, groups[0]["lr"] if groups else 0.0, batches)
        if before is None:
            self._finished_at = started
        else:
            self._report(before)

    def _follow(self, loss: torch.Tensor, learning_rate: float, batches: Sequence[Batch]) -> _Running:
        num_samples = sum(len(batch.target) for batch in batches) * self.world.size // self.settings.pipeline_stages
        values = torch.stack([loss.detach().float().reshape(()), self.engine.grad_norm.reshape(())])
        done = None
        if values.is_cuda:
            values = torch.empty(2, pin_memory=True).copy_(values, non_blocking=True)  # unpinned, the copy would wait
            done = torch.cuda.Event()
            done.record()
        return _Running(self.position.step, learning_rate, num_samples, values, done)

    def _settle(self) -> None:
        """Waits for the running step and reports it."""
        if self._running:
            running, self._running = self._running, None
            self._report(running)

    def _report(self, running: _Running) -> None:
        if running.done:
            running.done.synchronize()
        loss, grad_norm = running.values.tolist()
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss} at step {running.step}; lower the learning rate"
                + ("" if self.settings.model.dtype != "float16" else " or use dtype bfloat16")
            )
        seconds, self._finished_at = time.monotonic() - self._finished_at, time.monotonic()
        self.position.epoch_loss += loss
        if running.step % self.settings.logging_steps == 0:
            curves = {"loss": loss, "lr": running.learning_rate, "grad_norm": grad_norm, "step_seconds": seconds}
            curves["samples_per_second"] = running.num_samples / seconds
            self._curves.add(running.step, **curves, **self._gpu.values())
        self._say(running, loss, seconds)

    def _say(self, running: _Running, loss: float, seconds: float) -> None:
        status, epoch = self.control.status, self.position.epoch + 1
        smooth = seconds if status.seconds_per_step is None else 0.9 * status.seconds_per_step + 0.1 * seconds
        if running.step % self.settings.steps_per_print == 0:
            text = "step %d/%d  epoch %d  loss %.4f  lr %.3g  %.2f s/step"
            logger.info(text, running.step, self.total, epoch, loss, running.learning_rate, seconds)
        self.control.say(
            now=running.step == self.total,
            step=running.step,
            epoch=epoch,
            loss=loss,
            first_loss=loss if status.first_loss is None else status.first_loss,
            learning_rate=running.learning_rate,
            seconds_per_step=smooth,
            eta=smooth * (self.total - running.step),
            gpu_memory=self._gpu.peak_memory(),
        )

    def _end_epoch(self, num_steps: int) -> None:
        self._settle()
        position = self.position
        self._curves.add(position.epoch + 1, epoch_loss=position.epoch_loss / num_steps)
        position.epoch, position.step_in_epoch, position.epoch_loss = position.epoch + 1, 0, 0.0

    # -- saving -------------------------------------------------------------------------------------

    def _minutes_are_over(self, last_checkpoint: float) -> bool:
        minutes = self.settings.checkpoint_every_n_minutes
        return bool(self.world.rank == 0 and minutes and time.monotonic() - last_checkpoint >= 60 * minutes)

    def _export_due(self, end_of_epoch: bool) -> str | None:
        s, position = self.settings, self.position
        if end_of_epoch and s.save_every_n_epochs and position.epoch % s.save_every_n_epochs == 0:
            return f"epoch{position.epoch}"
        if s.save_every_n_steps and position.step % s.save_every_n_steps == 0:
            return f"step{position.step}"
        return None

    def _checkpoint_due(self, end_of_epoch: bool) -> bool:
        every = self.settings.checkpoint_every_n_epochs
        return bool(end_of_epoch and every and self.position.epoch % every == 0)

    def _export(self, name: str) -> None:
        self._settle()
        with self.engine.module.at_rest():
            path = str(self.exporter.write(name, self.position.step, self.position.epoch))
        status = self.control.status
        status.exports = [*(export for export in status.exports if export != path), path]
        self.control.say(now=True)

    def _checkpoint(self) -> None:
        self._settle()
        s, grid = self.settings, self.engine.grid
        progress = {"position": vars(self.position), "seed": s.seed, "num_samples": self.num_samples}
        path = save_checkpoint(
            self.folder,
            self.position.step,
            f"{grid.get_stage_id()}-{self.trained.share.rank}",
            grid.get_data_parallel_rank() == self.trained.share.rank,
            self.world.rank == 0,
            self.trained,
            progress,
            self.world.barrier,
            s.checkpoints_to_keep,
        )
        self.control.status.checkpoint = str(path)
        logger.info("checkpoint written to %s", path)
        self.control.say(now=True)
