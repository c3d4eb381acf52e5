"""Where training stands, and whether an interval has passed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Position:
    """Where training stands; part of every checkpoint."""

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    epoch_loss: float = 0.0
    """Sum of the losses of this epoch's steps so far."""
    examples: int = 0
    """Samples trained so far; a sample that only fills up a step does not count."""
    newest: int = 0
    """How many of them came with the last step."""

    def advance(self, examples: int) -> None:
        """One more step, of so many samples."""
        self.step, self.step_in_epoch = self.step + 1, self.step_in_epoch + 1
        self.examples, self.newest = self.examples + examples, examples

    def end_epoch(self) -> None:
        """The last step was the epoch's last."""
        self.epoch, self.step_in_epoch, self.epoch_loss = self.epoch + 1, 0, 0.0

    def place(self, in_examples: bool) -> int:
        """Where the last step lies on the curves."""
        return self.examples if in_examples else self.step

    def passed(self, steps: int | None = None, examples: int | None = None, epochs: int | None = None) -> bool:
        """Whether one of these intervals ended with the last step."""
        return bool(
            (steps and self.step % steps == 0)
            or (examples and self.examples // examples > (self.examples - self.newest) // examples)
            or (epochs and self.step_in_epoch == 0 and self.epoch % epochs == 0)
        )
