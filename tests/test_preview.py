"""The preview shows what is trained, and says the rest."""

import numpy as np
import pytest
from datasets import EditFamily, VideoFamily, look, picture, video
from diffusion_trainer.diffusion_nodes import comfy
from diffusion_trainer.diffusion_nodes.dataset_preview import DatasetPreview
from diffusion_trainer.utils.preview import choose, contact_sheet, dump
from PIL import Image


def test_node(tmp_path, monkeypatch):
    monkeypatch.setattr(comfy, "_base", tmp_path)
    for n in range(5):
        picture(tmp_path / f"data/{n}.png", (64, 64) if n % 2 else (128, 64), n, f"text {n}")
    (tmp_path / "data/bad.png").write_bytes(b"")
    config = {"resolutions": [64], "directory": [{"path": str(tmp_path / "data")}]}
    sheet, report = DatasetPreview().preview(config, 4)
    assert sheet.ndim == 4 and sheet.shape[0] == 1 and sheet.shape[-1] == 3
    assert sheet.min() >= 0 and sheet.max() <= 1 and sheet.std() > 0.05
    assert "5 pictures" in report and "bad.png: not a readable picture: empty file" in report
    assert sorted(path.name for path in (tmp_path / "data").iterdir() if path.suffix == ".png") == [
        "0.png", "1.png", "2.png", "3.png", "4.png", "bad.png"]  # fmt: skip


def test_all_buckets_are_shown_and_another_selection_differs(tmp_path):
    for n in range(30):
        picture(tmp_path / f"data/{n}.png", (64, 64) if n else (128, 64), n)
    samples, _ = look(tmp_path / "data")
    assert len({s.bucket for s in choose(samples, 2, 0)}) == 2
    assert choose(samples, 6, 0) != choose(samples, 6, 1)
    assert len(choose(samples, 100, 0)) == 30


def test_samples_are_written_as_they_will_be_trained(tmp_path):
    for n in range(3):
        picture(tmp_path / f"data/{n}.png", (200, 100), n, f"text {n}")
    samples, _ = look(tmp_path / "data")
    assert dump(samples, tmp_path / "out", None) == 3
    bucket = samples[0].bucket
    first = tmp_path / f"out/000_{bucket.width}x{bucket.height}"
    assert Image.open(f"{first}_0.png").size == (bucket.width, bucket.height)
    assert first.with_suffix(".txt").read_text() == "text 0"


def test_masks_are_tinted_and_controls_lie_beside(tmp_path):
    Image.new("RGB", (64, 64), "blue").save(picture(tmp_path / "data/a.png"))
    Image.new("RGB", (64, 64), "lime").save(picture(tmp_path / "controls/a.png"))
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 32, 64))
    mask.save(tmp_path / "mask.png")
    samples, _ = look(tmp_path / "data", EditFamily, control_path=str(tmp_path / "controls"),
                      default_mask_file=str(tmp_path / "mask.png"))  # fmt: skip
    sheet = np.asarray(contact_sheet(samples, None))
    assert sheet[36, 4 + 10].tolist() == [0, 0, 255]
    assert sheet[36, 4 + 50].tolist() == pytest.approx([128, 0, 128], abs=2)
    assert sheet[36, 4 + 64 + 4 + 30].tolist() == [0, 255, 0]


def test_videos_show_three_frames(tmp_path):
    video(tmp_path / "data/a.mp4", [n / 8 for n in range(10)], (64, 64))
    samples, _ = look(tmp_path / "data", VideoFamily, frame_buckets=[9])
    assert contact_sheet(samples, 8.0).width == 3 * 64 + 4 * 4
