"""What is looked at while training: the losses of eval sets and samples, at intervals and on demand."""

from __future__ import annotations

import logging
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

from ..models.base import Family
from .control import Control
from .evaluation import Evaluation
from .metrics import Curves
from .position import Position
from .run_folder import RunFolder
from .samples import Previews, save
from .settings import TrainSettings
from .trained import Trained
from .world import World

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Due:
    """What is to be done."""

    measure: bool = False
    draw: bool = False

    def __bool__(self) -> bool:
        return self.measure or self.draw


@dataclass
class Observation:
    """Measures and draws when it is time; training is the same without it."""

    settings: TrainSettings
    family: Family
    world: World
    folder: RunFolder
    control: Control
    evaluation: Evaluation
    previews: Previews
    trained: Trained

    def due_at_start(self) -> Due:
        """What is to be looked at before the first step."""
        return self._possible(self.settings.eval_before_first_step, self.settings.sample.before_first_step)

    def due(self, position: Position) -> Due:
        """What is to be looked at after the last step."""
        s = self.settings
        return self._possible(
            position.passed(s.eval_every_n_steps, s.eval_every_n_examples, s.eval_every_n_epochs),
            position.passed(s.sample.every_n_steps, None, s.sample.every_n_epochs),
        )

    def _possible(self, measure: bool, draw: bool) -> Due:
        return Due(measure and bool(self.evaluation), draw and bool(self.previews))

    def observe(self, position: Position, curves: Curves, due: Due) -> None:
        """Measures and draws with the weights that are for use; all processes do."""
        with self.trained.averaged(ema=self.settings.ema_for_samples) if due else nullcontext():
            if due.measure:
                self._measure(position, curves)
            if due.draw:
                self._draw(position, curves)
        self.control.say(now=bool(due), phase="", phase_done=0, phase_total=0)

    def _measure(self, position: Position, curves: Curves) -> None:
        started = time.monotonic()
        values = self.evaluation.measure(partial(self.control.report, "measuring the loss of eval sets"))
        values["eval/seconds"] = time.monotonic() - started
        curves.add_all(position.place(self.settings.x_axis_examples), values)
        losses = {name.removesuffix("/loss"): value for name, value in values.items() if name.endswith("/loss")}
        self.control.say(eval_losses=losses, eval_step=position.step)

    def _draw(self, position: Position, curves: Curves) -> None:
        if not self.previews:
            logger.warning("nothing to draw: [sample] has no prompts")
            return
        drawn = self.previews.draw(partial(self.control.report, "drawing samples"))
        if self.world.rank == 0:
            fps = self.family.fps or 16.0
            files = save(drawn, self.folder.samples, f"step{position.step:06d}", fps)
            curves.add_pictures(position.place(self.settings.x_axis_examples), drawn, files, fps)
            self.control.say(samples=[str(file) for file in files], samples_step=position.step)
