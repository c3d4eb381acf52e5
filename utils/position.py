"""Where training stands, and whether an interval has passed."""

from __future__ import annotations

from dataclasses import dataclass, field


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
    past: list[tuple[dict[str, int], int]] = field(default_factory=list)
    """Earlier parts of this epoch that were cut into steps of other sizes: samples of a step by bucket, and the number
    of steps. `step_in_epoch` counts from their end."""

    def advance(self, examples: int) -> None:
        """One more step, of so many samples."""
        self.step, self.step_in_epoch = self.step + 1, self.step_in_epoch + 1
        self.examples, self.newest = self.examples + examples, examples

    def end_epoch(self) -> None:
        """The last step was the epoch's last."""
        self.epoch += 1
        self.restart_epoch()

    def restart_epoch(self) -> None:
        """This epoch begins with its first step."""
        self.step_in_epoch, self.epoch_loss, self.past = 0, 0.0, []

    def cut_otherwise(self, batch: dict[str, int]) -> None:
        """The rest of this epoch is cut into steps of other sizes than so far, which were those of ``batch``."""
        if self.step_in_epoch:
            self.past = [*self.past, (batch, self.step_in_epoch)]
            self.step_in_epoch = 0

    @property
    def at_end_of_epoch(self) -> bool:
        """Whether the last step was the last of its epoch."""
        return self.step_in_epoch == 0 and not self.past

    def place(self, in_examples: bool) -> int:
        """Where the last step lies on the curves."""
        return self.examples if in_examples else self.step

    def passed(self, steps: int | None = None, examples: int | None = None, epochs: int | None = None) -> bool:
        """Whether one of these intervals ended with the last step."""
        return bool(
            (steps and self.step % steps == 0)
            or (examples and self.examples // examples > (self.examples - self.newest) // examples)
            or (epochs and self.at_end_of_epoch and self.epoch % epochs == 0)
        )
