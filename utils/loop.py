"""The steps of a training: run one, report the one before, save and stop when it is time."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from ..models.base import Batch, Family
from .checkpoint import save_checkpoint
from .control import PAUSE, SAMPLE, SAVE, STOP, Control
from .exports import Exporter
from .loader import Loader
from .metrics import Curves, Gpu
from .observation import Due, Observation
from .pipeline import Engine, as_micro_batches
from .position import Position
from .randomness import derive_seed
from .run_folder import RunFolder
from .sampler import Sampler
from .schedules import learning_rate_factor
from .settings import TrainSettings
from .trained import Trained
from .watch import Watch
from .world import World

logger = logging.getLogger(__name__)


@dataclass
class _Running:
    """A step that the device may still be working on."""

    step: int
    place: int
    """Where it lies on the curves."""
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
    observation: Observation
    position: Position
    total: int
    identity: dict[str, Any]
    """What a checkpoint remembers of the run."""
    watch: Watch
    _running: _Running | None = field(default=None, init=False)
    _finished_at: float = field(default=0.0, init=False)
    _exported: int = field(default=0, init=False)
    _saved: int = field(default=0, init=False)
    _saved_at: float = field(default=0.0, init=False)

    def run(self, curves: Curves) -> None:
        """Trains, exports and writes checkpoints; says "finished" or "stopped" at the end."""
        self._curves, self._gpu = curves, Gpu(self.world.device)
        position = self.position
        self._exported = self._saved = position.step
        self._saved_at = time.monotonic()
        if position.step == 0 or self.settings.test_sample:
            self.observation.observe(position, curves, self.observation.due_at_start())
        while position.step < self.total:
            plan = self.sampler.epoch(position.epoch, position.past)
            steps = plan[position.step_in_epoch :]
            for draws, batches in zip(steps, self.loader.steps(position.epoch, steps), strict=True):
                self._step(batches, sum(draw.weight > 0 for draw in draws))
                if position.step_in_epoch == len(plan):
                    self._end_epoch(len(plan) + sum(steps for _, steps in position.past))
                if self._between_steps() & STOP:
                    logger.info("stopped as asked after step %d", position.step)
                    self.control.say(state="stopped", phase="", eta=None)
                    return
                if position.step >= self.total:
                    break
        if self._exported != position.step:
            self._export(f"epoch{position.epoch}" if position.at_end_of_epoch else f"step{position.step}")
        if self._saved != position.step:
            self._checkpoint()
        logger.info("finished after %d steps", position.step)
        self.control.say(state="finished", eta=0.0)

    def _between_steps(self) -> int:
        """Saves, measures and draws what is due or asked for, waits while the run is paused; what was asked."""
        asked = self.control.agree(self._minutes_are_over())
        self._save(asked, self._export_due(), self._checkpoint_due())
        due = self.observation.due(self.position)
        while not asked & STOP:
            if asked & SAMPLE:
                due = replace(due, draw=True)
            if due:
                self._settle()
                self.observation.observe(self.position, self._curves, due)
                self._finished_at, due = time.monotonic(), Due()
            if not asked & PAUSE:
                break
            asked = self._wait()
            self._save(asked)
        return asked

    def _save(self, asked: int, name: str | None = None, checkpoint: bool = False) -> None:
        """Exports as ``name``, or if asked to save, and writes a checkpoint."""
        asked_to_save = bool(asked & (SAVE | STOP))
        if name or (asked_to_save and self.position.step != self._exported):
            self._export(name or f"step{self.position.step}")
        if (asked_to_save and self.position.step != self._saved) or checkpoint:
            self._checkpoint()

    def _wait(self) -> int:
        """Waits until something else is asked than to wait; what that is."""
        self._settle()
        logger.info("paused after step %d; remove the file 'pause' or leave one called 'resume'", self.position.step)
        self.control.say(state="paused", phase="", eta=None)
        while (asked := self.control.agree()) == PAUSE:
            time.sleep(0.25)
        self.control.say(state="training")
        self._finished_at = time.monotonic()
        return asked

    # -- steps --------------------------------------------------------------------------------------

    def _step(self, batches: Sequence[Batch], num_examples: int) -> None:
        s, position, groups = self.settings, self.position, self.trained.groups
        factor = learning_rate_factor(s, position.step, self.total)
        for group in groups:
            group["lr"] = group["initial_lr"] * factor
        stage, rank = self.engine.grid.get_stage_id(), self.engine.grid.get_data_parallel_rank()
        torch.manual_seed(derive_seed("dropout", s.seed, position.step, stage, rank))
        before, started = self._running, time.monotonic()
        loss = self.engine.train_batch(as_micro_batches(batches))
        position.advance(num_examples)
        self._running = self._follow(loss, groups[0]["lr"] if groups else 0.0, batches)
        if before is None:
            self._finished_at = started
        else:
            self._report(before)
        if not self.watch.steps:  # people wait for a first sign; the next step has graphs to record, and takes long
            self._settle()

    def _follow(self, loss: torch.Tensor, learning_rate: float, batches: Sequence[Batch]) -> _Running:
        num_samples = sum(len(batch.target) for batch in batches) * self.world.size // self.settings.pipeline_stages
        values = torch.stack([loss.detach().float().reshape(()), self.engine.grad_norm.reshape(())])
        done = None
        if values.is_cuda:
            values = torch.empty(2, pin_memory=True).copy_(values, non_blocking=True)  # unpinned, the copy would wait
            done = torch.cuda.Event()
            done.record()
        place = self.position.place(self.settings.x_axis_examples)
        return _Running(self.position.step, place, learning_rate, num_samples, values, done)

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
        self.watch.step(seconds)
        self.position.epoch_loss += loss
        if running.step % self.settings.logging_steps == 0:
            curves = {"loss": loss, "lr": running.learning_rate, "grad_norm": grad_norm, "step_seconds": seconds}
            curves["samples_per_second"] = running.num_samples / seconds
            self._curves.add(running.place, **curves, **self.trained.curves(), **self._gpu.values())
            self._curves.add_spread(running.place, "automagic_lrs", self.trained.rates())
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
        position.end_epoch()

    # -- saving -------------------------------------------------------------------------------------

    def _minutes_are_over(self) -> bool:
        minutes = self.settings.checkpoint_every_n_minutes
        return bool(self.world.rank == 0 and minutes and time.monotonic() - self._saved_at >= 60 * minutes)

    def _export_due(self) -> str | None:
        s, position = self.settings, self.position
        if position.passed(epochs=s.save_every_n_epochs):
            return f"epoch{position.epoch}"
        return f"step{position.step}" if position.passed(s.save_every_n_steps, s.save_every_n_examples) else None

    def _checkpoint_due(self) -> bool:
        s = self.settings
        return self.position.passed(s.checkpoint_every_n_steps, epochs=s.checkpoint_every_n_epochs)

    def _export(self, name: str) -> None:
        self._exported = self.position.step
        self._settle()
        with self.engine.module.at_rest():
            paths = [str(path) for path in self.exporter.write(name, self.position.step, self.position.epoch)]
        status = self.control.status
        status.exports = [*(export for export in status.exports if export not in paths), *paths]
        self.control.say(now=True)

    def _checkpoint(self) -> None:
        self._saved = self.position.step
        self._settle()
        s, grid = self.settings, self.engine.grid
        progress = {**self.identity, "position": asdict(self.position)}
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
        self._saved_at = time.monotonic()
        self.control.say(now=True)
