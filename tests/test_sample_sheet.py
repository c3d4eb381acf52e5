"""The newest samples on the Train node."""

import asyncio
from pathlib import Path

import pytest
from diffusion_trainer.diffusion_nodes import comfy, train
from diffusion_trainer.diffusion_nodes.sample_sheet import sample_sheet
from diffusion_trainer.utils.run_folder import Status
from diffusion_trainer.utils.samples import save
from PIL import Image


def colour(picture: Image.Image, x: int, y: int) -> tuple[int, ...]:
    pixel = picture.getpixel((x, y))
    assert isinstance(pixel, tuple)
    return pixel


def test_pictures_and_clips_side_by_side(tmp_path: Path) -> None:
    clip = [Image.new("RGB", (64, 32), (0, 0, 60 * n)) for n in range(5)]
    files = save([[Image.new("RGB", (64, 32), "red")], clip, [Image.new("RGB", (32, 64), "lime")]], tmp_path, "s", 8.0)
    sheet = sample_sheet([*map(str, files), str(tmp_path / "gone.png")])
    assert sheet.size == (128, 32 + 64)
    assert colour(sheet, 10, 10) == (255, 0, 0)
    assert colour(sheet, 70, 10) == pytest.approx((0, 0, 120), abs=8)
    assert colour(sheet, 10, 60) == (0, 255, 0)
    assert sample_sheet([]) is None
    assert sample_sheet([str(tmp_path / "gone.png")]) is None


class Watched:
    """A run whose status is another at each look and that ends with the last."""

    def __init__(self, *statuses: Status) -> None:
        self._left = list(statuses)

    def poll(self) -> str | None:
        return "finished" if len(self._left) == 1 else None

    def status(self) -> Status:
        return self._left.pop(0)


def test_each_drawing_is_shown_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (first,) = save([[Image.new("RGB", (64, 32), "red")]], tmp_path, "step000001", None)
    (second,) = save([[Image.new("RGB", (64, 32), "lime")]], tmp_path, "step000002", None)
    shown = []
    monkeypatch.setattr(comfy, "progress", lambda node, done, total, picture=None: shown.append((done, picture)))
    monkeypatch.setattr(train, "POLL_SECONDS", 0)
    statuses = [
        Status(state="training", step=step, total_steps=4, samples=[str(file)] if file else [])
        for step, file in ((1, None), (2, first), (3, first), (4, second))
    ]
    watching = train._watch(Watched(*statuses), "1", until_it_runs=False)  # type: ignore[arg-type]
    assert asyncio.run(watching) == "finished"
    assert [(done, picture and colour(picture, 5, 5)) for done, picture in shown] == [
        (1, None), (2, (255, 0, 0)), (3, None), (4, (0, 255, 0)),
    ]  # fmt: skip


def test_the_live_line_names_eval_losses_and_phases() -> None:
    status = Status(
        state="training", step=5, total_steps=9, loss=0.5, phase="drawing samples", eval_losses={"held": 0.25}
    )
    assert train.describe(status) == "step 5/9 · drawing samples · loss 0.5 · held 0.25"
    assert train.describe(Status(state="paused", step=5)) == "paused"
