"""Loss curves as a picture: smoothed, logarithmic if wanted, with a grid, several trainings in one."""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import comfy

if TYPE_CHECKING:
    from PIL.Image import Image

COLORS = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189))
MARGINS = (64, 16, 16, 36)
"""Left, top, right and bottom of the plot, in pixels."""
GRID, INK = (224, 224, 224), (40, 40, 40)


def smoothed(values: Sequence[float], amount: float) -> list[float]:
    """Running average that forgets with ``amount`` per step, without the pull of its start."""
    result, mean, weight = [], 0.0, 0.0
    for value in values:
        mean = amount * mean + (1 - amount) * value
        weight = amount * weight + (1 - amount)
        result.append(mean / weight)
    return result


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from ``low`` to ``high``, about ``count`` of them."""
    raw = (high - low) / max(count, 1)
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def draw(
    runs: Sequence[tuple[str, Sequence[float], int]], *, smoothing: float = 0.9, logarithmic: bool = False,
    width: int = 840, height: int = 520,
) -> Image:  # fmt: skip
    """The curves of ``runs`` (name, losses, first step); values that are no numbers are left out."""
    from PIL import Image as pillow
    from PIL import ImageDraw

    picture = pillow.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(picture)
    shown = [(name, _finite(values, first, logarithmic)) for name, values, first in runs]
    points = [point for _, values in shown for point in values]
    if not points:
        pen.text((MARGINS[0], MARGINS[1]), "no loss yet", fill=INK)
        return picture
    scale = _Scale(points, logarithmic, width, height)
    scale.draw_grid(pen)
    for index, (name, values) in enumerate(shown):
        color = COLORS[index % len(COLORS)]
        raw = [scale.place(step, value) for step, value in values]
        line = smoothed([value for _, value in values], smoothing)
        smooth = [scale.place(step, value) for (step, _), value in zip(values, line, strict=True)]
        if smoothing > 0 and len(raw) > 1:
            pen.line(raw, fill=tuple((channel + 2 * 255) // 3 for channel in color))
        if len(smooth) > 1:
            pen.line(smooth, fill=color, width=2)
        else:
            x, y = (smooth or [(0, 0)])[0]
            pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill=color)
        if len(shown) > 1:
            pen.text((width - 150, MARGINS[1] + 4 + 14 * index), name, fill=color)
    return picture


def _finite(values: Sequence[float], first: int, logarithmic: bool) -> list[tuple[int, float]]:
    return [(first + index + 1, value) for index, value in enumerate(values)
            if math.isfinite(value) and (value > 0 or not logarithmic)]  # fmt: skip


class _Scale:
    """Where a step and a loss lie in the picture."""

    def __init__(self, points: Sequence[tuple[int, float]], logarithmic: bool, width: int, height: int) -> None:
        self.logarithmic = logarithmic
        left, top, right, bottom = MARGINS
        self.box = (left, top, width - right, height - bottom)
        steps, values = [step for step, _ in points], [self._value(value) for _, value in points]
        self.steps = min(steps), max(max(steps), min(steps) + 1)
        low, high = min(values), max(values)
        room = (high - low) * 0.05 or abs(high) * 0.05 or 1.0  # a constant loss is a line in the middle
        self.values = low - room, high + room

    def _value(self, value: float) -> float:
        return math.log10(value) if self.logarithmic else value

    def place(self, step: float, value: float) -> tuple[float, float]:
        """Pixels from the top left."""
        return self._x(step), self._y(self._value(value))

    def _x(self, step: float) -> float:
        left, _, right, _ = self.box
        return left + (step - self.steps[0]) / (self.steps[1] - self.steps[0]) * (right - left)

    def _y(self, value: float) -> float:
        _, top, _, bottom = self.box
        return bottom - (value - self.values[0]) / (self.values[1] - self.values[0]) * (bottom - top)

    def draw_grid(self, pen: Any) -> None:
        """Lines at round values, with what they mean."""
        left, top, right, bottom = self.box
        for value in ticks(*self.values):
            y = self._y(value)
            pen.line((left, y, right, y), fill=GRID)
            pen.text((6, y - 6), f"{10**value if self.logarithmic else value:.3g}", fill=INK)
        for step in ticks(*self.steps, count=8):
            if step == int(step):
                pen.line((self._x(step), top, self._x(step), bottom), fill=GRID)
                pen.text((self._x(step) - 8, bottom + 8), str(int(step)), fill=INK)
        pen.rectangle(self.box, outline=INK)


class PlotTrainingLossNode:
    """Draws the loss of one or more trainings: each value faint, the smoothed curve strong."""

    CATEGORY = "Diffusion-Pipe/LoRA"
    DESCRIPTION = "Draws the loss of one or more trainings: each value faint, the smoothed curve strong."
    FUNCTION = "plot"
    OUTPUT_NODE = True
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("image",)
    OUTPUT_TOOLTIPS = ("The drawing.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:
        more = {f"loss_{n}": ("LOSS_MAP", {"tooltip": "Another training to compare with."}) for n in (2, 3, 4)}
        return {
            "required": {"loss": ("LOSS_MAP", {"tooltip": "From Train LoRA."})},
            "optional": {
                "smoothing": ("FLOAT", {"default": 0.9, "min": 0.0, "max": 0.999, "step": 0.001,
                                        "tooltip": "How calm the strong curve is; 0 shows the values alone."}),
                "logarithmic": ("BOOLEAN", {"default": False, "tooltip": "Draw powers of ten at equal distances."}),
                "width": ("INT", {"default": 840, "min": 256, "max": 4096, "step": 8,
                                  "tooltip": "Width of the drawing in pixels."}),
                "height": ("INT", {"default": 520, "min": 160, "max": 4096, "step": 8,
                                   "tooltip": "Height of the drawing in pixels."}),
                **more,
            },
        }  # fmt: skip

    def plot(
        self, loss: Mapping[str, Any], smoothing: float = 0.9, logarithmic: bool = False, width: int = 840,
        height: int = 520, **more: Mapping[str, Any] | None,
    ) -> dict[str, Any]:  # fmt: skip
        """The drawing as IMAGE, and on the node."""
        import numpy
        import torch

        curves = [loss, *(value for value in more.values() if value is not None)]
        runs = [(f"training {number}", list(curve["loss"]), int(curve.get("first_step", 0)))
                for number, curve in enumerate(curves, 1)]  # fmt: skip
        picture = draw(runs, smoothing=smoothing, logarithmic=logarithmic, width=width, height=height)
        folder = comfy.temp_directory()
        folder.mkdir(parents=True, exist_ok=True)
        name = f"loss_{uuid.uuid4().hex[:12]}.png"
        picture.save(folder / name)
        image = torch.from_numpy(numpy.asarray(picture).astype("float32") / 255)[None]
        return {"ui": {"images": [{"filename": name, "subfolder": "", "type": "temp"}]}, "result": (image,)}
