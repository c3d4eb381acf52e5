"""The preview shows what is trained, and says the rest."""

import numpy as np
import pytest
from datasets import EditFamily, VideoFamily, look, picture, video
from diffusion_trainer.diffusion_nodes import comfy
from diffusion_trainer.diffusion_nodes.dataset_preview import DatasetPreview
from diffusion_trainer.utils import lettering
from diffusion_trainer.utils.preview import GAP, LINE, choose, contact_sheet, dump, legend
from hypothesis import given, settings
from hypothesis import strategies as st
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
    assert "text 1" in report
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
    row, left = GAP + 3 * LINE + 32, GAP  # below name, facts and titles
    assert sheet[row, left + 10].tolist() == [0, 0, 255]
    assert sheet[row, left + 50].tolist() == pytest.approx([142, 14, 14], abs=2)  # grey and red
    assert sheet[row, left + 64 + GAP + 30].tolist() == [0, 255, 0]
    assert "red is not trained" in legend(samples)[0]


def test_videos_show_three_frames(tmp_path):
    video(tmp_path / "data/a.mp4", [n / 8 for n in range(10)], (64, 64))
    samples, _ = look(tmp_path / "data", VideoFamily, frame_buckets=[9])
    sheet = np.asarray(contact_sheet(samples, 8.0))
    row = GAP + 3 * LINE + 32
    shown = [sheet[row, GAP + n * (64 + GAP) + 32].mean() / 8 for n in range(3)]
    assert shown == pytest.approx([0, 4, 8], abs=0.5)


def test_what_cannot_be_read_any_more_says_so_in_its_cell(tmp_path):
    picture(tmp_path / "data/a.png", caption="x")
    samples, _ = look(tmp_path / "data")
    (tmp_path / "data/a.png").unlink()
    assert (np.asarray(contact_sheet(samples, None)) == 128).mean() > 0.3


def test_captions_are_wrapped_whole_or_end_in_an_ellipsis():
    text = "a caption of many words " * 12
    lines = lettering.wrap(text, 14, 200, 99)
    assert " ".join(lines) == text.strip()
    assert all(lettering.width(line, 14) <= 200 for line in lines)
    short = lettering.wrap(text, 14, 200, 3)
    assert len(short) == 3 and short[:2] == lines[:2] and short[2].endswith("…")
    assert lettering.width(short[2], 14) <= 200
    assert len(lettering.wrap("汉" * 60, 14, 200, 99)) >= 3
    assert lettering.wrap("", 14, 200, 3) == []


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=60))
def test_any_text_can_be_drawn(text):
    sheet = Image.new("RGB", (400, 200), "white")
    for number, line in enumerate(lettering.wrap(text, 14, 300, 5)):
        lettering.write(sheet, (4, 20 * number), line, 14)
    assert (np.asarray(sheet)[:, 380:] == 255).all()


@pytest.mark.parametrize("character", ["é", "ж", "漢", "한", "ع"])
def test_scripts_are_drawn_where_a_font_has_them(character):
    if lettering.missing(character):
        pytest.skip("no font here has it")
    sheets = [Image.new("L", (40, 30), 255) for _ in range(2)]
    lettering.write(sheets[0], (4, 2), character, 14)
    lettering.write(sheets[1], (4, 2), "\U0010fffe", 14)
    assert sheets[0].getextrema()[0] < 128 and sheets[0].tobytes() != sheets[1].tobytes()
