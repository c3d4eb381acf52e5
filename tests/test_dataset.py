"""What a folder holds becomes samples; what cannot be trained is named with its reason."""

import builtins
import io
import json
import os
import tarfile
import time
from pathlib import Path

import pytest
from datasets import READERS, EditFamily, VideoFamily, hostile, look, picture
from diffusion_trainer.models import families
from diffusion_trainer.utils.config import SettingsError
from diffusion_trainer.utils.dataset import recall, remember
from diffusion_trainer.utils.dataset_settings import parse_dataset_settings
from diffusion_trainer.utils.settings import as_toml


def test_captions_from_all_places(tmp_path):
    folder = tmp_path / "data"
    for name in "abcd":
        picture(folder / f"{name}.png", seed=name, caption=f"text {name}")
    (folder / "captions.json").write_text(json.dumps({"a.png": ["one", "two"], "b.png": "three"}))
    (folder / "metadata.jsonl").write_text('{"file_name": "c.png", "text": "four"}\n\n')
    samples, _ = look(folder)
    assert {s.name: s.captions for s in samples} == {
        "a.png": ("one", "two"), "b.png": ("three",), "c.png": ("four",), "d.png": ("text d",)}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("captions.json", "{", "captions.json: not valid JSON"),
        ("captions.json", "[]", "captions.json: must be a table"),
        ("captions.json", '{"a.png": 3}', "captions.json: 'a.png': the caption must be a text"),
        ("metadata.jsonl", '{"text": "x"}', "metadata.jsonl: line 1 names no file"),
    ],
)
def test_broken_lists_of_captions_are_refused(tmp_path, name, text, message):
    picture(tmp_path / "data/a.png")
    (tmp_path / "data" / name).write_text(text)
    with pytest.raises(SettingsError, match=message.replace("[", r"\[")):
        look(tmp_path / "data")


def test_captions_of_what_is_not_there_are_named(tmp_path):
    picture(tmp_path / "data/a.png")
    (tmp_path / "data/captions.json").write_text(json.dumps({"a.png": "one", "b.png": "two"}))
    assert look(tmp_path / "data")[1].left_out == {
        str(tmp_path / "data/b.png"): "has a caption in a list, but is not there"
    }


def test_archives(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    with tarfile.open(folder / "pack.tar", "w") as archive:
        for name in "ab":
            archive.add(picture(tmp_path / f"{name}.png", (80, 64), name), f"./sub/{name}.png")
        info = tarfile.TarInfo("sub/a.txt")
        info.size = 5
        archive.addfile(info, io.BytesIO(b"hello"))
    (folder / "broken.tar").write_bytes(b"no archive" * 100)
    samples, report = look(folder)
    assert [(s.name, s.captions) for s in samples] == [
        ("pack.tar/sub/a.png", ("hello",)),
        ("pack.tar/sub/b.png", ("",)),
    ]
    assert "not a readable .tar" in next(iter(report.left_out.values()))
    loose, _ = look(tmp_path, recursive=False)
    assert {s.media.digest for s in loose} == {s.media.digest for s in samples}


def test_recursion_ends_and_leaves_masks_alone(tmp_path):
    folder = tmp_path / "data"
    for name in ("a.png", "x/b.png", "x/y/c.png", "masks/a.png", ".hidden/d.png", "._a.png"):
        picture(folder / name, seed=name)
    (folder / "x" / "loop").symlink_to(folder)
    (folder / "self.png").symlink_to("self.png")
    samples, report = look(folder, recursive=True, mask_path=str(folder / "masks"))
    assert [s.name for s in samples] == ["a.png", "x/b.png", "x/y/c.png"]
    assert [bool(s.mask) for s in samples] == [True, False, False]
    assert [Path(path).name for path in report.left_out] == ["self.png"]
    assert [s.name for s in look(folder)[0]] == ["a.png"]


def test_controls_and_masks_by_stem(tmp_path):
    for name in "abc":
        picture(tmp_path / f"targets/{name}.png", seed=name, caption=f"do {name}")
        picture(tmp_path / f"first/{name}.webp", seed=name + "1")
    picture(tmp_path / "second/a.jpg", seed=5)
    picture(tmp_path / "second/b.jpg", seed=6)
    picture(tmp_path / "second/other.jpg", seed=7)
    picture(tmp_path / "masks/a.png", seed=8)
    picture(tmp_path / "masks/lost.png", seed=9)
    default = picture(tmp_path / "default.png", seed=10)
    samples, report = look(
        tmp_path / "targets", EditFamily, control_paths=[str(tmp_path / "first"), str(tmp_path / "second")],
        mask_path=str(tmp_path / "masks"), default_mask_file=str(default))  # fmt: skip
    assert [[c.source.name for c in s.controls] for s in samples] == [["a.webp", "a.jpg"], ["b.webp", "b.jpg"]]
    assert [s.mask.source.name for s in samples] == ["a.png", "default.png"]
    assert "no control picture of its name" in next(iter(report.left_out.values()))
    assert sorted(Path(path).name for path in report.orphans) == ["lost.png", "other.jpg"]


def test_bad_masks_and_controls_are_named(tmp_path):
    picture(tmp_path / "targets/a.png")
    picture(tmp_path / "targets/b.png", seed=1)
    picture(tmp_path / "controls/b.png", seed=2)
    (tmp_path / "controls/a.png").write_bytes(b"")
    _, report = look(tmp_path / "targets", EditFamily, control_path=str(tmp_path / "controls"))
    assert list(report.left_out.values()) == ["a.png: not a readable picture: empty file"]


def test_edit_instructions(tmp_path):
    folder = tmp_path / "data"
    picture(folder / "target_images/t.png", seed=1)
    picture(folder / "source_images/s1.png", seed=2)
    picture(folder / "source_images/s2.png", seed=3)
    os.mkfifo(tmp_path / "pipe.png")
    elsewhere = picture(tmp_path / "elsewhere.png", seed=4)
    lines = [
        {"source_image": "s1.png", "target_image": "t.png", "instruction": "make it blue"},
        {"source_images": ["s1.png", "source_images/s2.png"], "target_image": "target_images/t.png", "prompt": "mix"},
        {"source_image": "gone.png", "target_image": "t.png", "instruction": "x"},
        {"source_image": str(tmp_path / "pipe.png"), "target_image": "t.png", "instruction": "x"},
        {"source": ["s1.png"], "target_images": ["t.png", str(elsewhere)], "instruction": ["both", "two of them"]},
    ]
    (folder / "edit_instructions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    samples, report = look(folder, EditFamily)
    assert [(s.captions, [c.source.name for c in s.controls]) for s in samples] == [
        (("make it blue",), ["s1.png"]), (("mix",), ["s1.png", "s2.png"]),
        (("both", "two of them"), ["s1.png"]), (("both", "two of them"), ["s1.png"])]  # fmt: skip
    assert samples[-1].name == str(elsewhere)
    assert len({s.key for s in samples}) == 4
    gone, pipe, *_ = report.left_out.values()
    assert "gone.png' is not there" in gone
    assert "pipe.png': a pipe or device, not a file" in pipe
    for title in ("SDXL", "Wan"):
        with pytest.raises(SettingsError, match=f"{title} takes no control pictures"):
            look(folder, families()[title.lower()])
    report = look(folder)[1]
    assert "names 2 control pictures; Flux takes 1" in report.left_out.values()


def test_documented_product_file():
    settings = parse_dataset_settings(
        {"image_text": [{"dataset_paths": ["/a", "/b"], "num_repeats": 2, "default_caption_prefix": "x, ",
                         "resolutions": [[1024, 1024]], "enable_ar_bucket": True, "min_ar": 0.5}]})  # fmt: skip
    assert [(d.path, d.num_repeats, d.caption_prefix) for d in settings.directory] == [
        ("/a", 2, "x, "),
        ("/b", 2, "x, "),
    ]
    assert parse_dataset_settings(as_toml(settings)) == settings


def test_own_options_before_those_of_the_top():
    settings = parse_dataset_settings(
        {"num_repeats": 3, "caption_prefix": "p", "directory": [{"path": "/a"}, {"path": "/b", "num_repeats": 1}]}
    )
    assert [(d.num_repeats, d.caption_prefix) for d in settings.directory] == [(3, "p"), (1, "p")]
    again = parse_dataset_settings(as_toml(settings))
    assert again.directory == settings.directory


def test_subsample_takes_the_same_share_of_each_bucket(tmp_path):
    for n in range(20):
        picture(tmp_path / f"data/{n}.png", (64, 64) if n % 2 else (128, 64), n)
    few, _ = look(tmp_path / "data", top={"subsample_ratio": 0.3})
    assert len(few) == 6 and len({s.bucket for s in few}) == 2
    picture(tmp_path / "data/new.png", seed="new")
    assert len({s.name for s in few} & {s.name for s in look(tmp_path / "data", top={"subsample_ratio": 0.3})[0]}) >= 5


def test_duplicates_are_reported_and_told_apart(tmp_path):
    picture(tmp_path / "data/a.png")
    picture(tmp_path / "data/b.png")
    folders = {"directory": [{"path": str(tmp_path / "data")}] * 2}
    samples, report = look(tmp_path / "data", top=folders)
    assert len({s.key for s in samples}) == 4
    assert len(report.duplicates) == 1


def test_empty_captions(tmp_path):
    picture(tmp_path / "data/a.png", caption="")
    picture(tmp_path / "data/b.png", seed=1, caption="x")
    assert len(look(tmp_path / "data")[0]) == 2
    samples, report = look(tmp_path / "data", skip_empty_caption=True)
    assert len(samples) == 1 and len(report.without_caption) == 1 and len(report.left_out) == 1


@pytest.mark.parametrize("recursive", [False, True])
def test_hostile_folder(tmp_path, recursive):
    folder = tmp_path / "data"
    hostile(folder)
    before = sorted(os.listdir(folder))
    samples, report = look(folder, recursive=recursive)
    assert {os.fsencode(s.name) for s in samples} == {
        b"good.png", "it's \"so\"\nnamed 😀.png".encode(), b"caf\xe9.png"}  # fmt: skip
    reasons = {os.path.basename(path): reason for path, reason in report.left_out.items()}
    assert set(reasons) == {
        "truncated.png", "zero.jpg", "text.mp4", "text.webp", "dot.png", "line.png", "bomb.png", "unknown.xyz",
        "loop.png", "loop2.png", "pipe.png", "latin.png", "long.png", "clip.mp4", "wrong.jpg", "audio.mp4",
        "still.mp4"}  # fmt: skip
    assert all(reasons.values())
    json.dumps(report.as_dict(), ensure_ascii=False).encode("utf-8")
    assert not any("\n" in line for line in report.lines())
    assert sorted(os.listdir(folder)) == before


def test_hostile_videos_say_why(tmp_path):
    hostile(tmp_path / "data")
    _, report = look(tmp_path / "data", VideoFamily, frame_buckets=[1, 9])
    reasons = {os.path.basename(path): reason for path, reason in report.left_out.items()}
    assert reasons["audio.mp4"] == "holds no video"
    assert reasons["still.mp4"] == "a picture that is named like a video; rename it"
    assert reasons["text.mp4"].startswith("not a readable video")
    assert "too short: 1 frames at 8 a second" in reasons["clip.mp4"]


def test_known_files_are_not_opened_and_touched_ones_are_the_same(tmp_path, monkeypatch):
    folder = tmp_path / "data"
    for n in range(5):
        picture(folder / f"{n}.png", seed=n, caption=f"c{n}")
    now = time.time_ns()
    monkeypatch.setattr("time.time_ns", lambda: now + 10**10)
    first, _ = look(folder)
    opened, read = [], []
    real, submit = builtins.open, READERS.submit
    monkeypatch.setattr(builtins, "open", lambda path, *a, **k: (opened.append(str(path)), real(path, *a, **k))[1])
    monkeypatch.setattr(READERS, "submit", lambda call, sources: (read.extend(sources), submit(call, sources))[1])
    assert look(folder)[0] == first
    os.utime(folder / "3.png", (1, 1))
    assert [path for path in opened if str(folder) in path] == [] == read
    assert look(folder)[0] == first
    assert [path for path in opened if str(folder) in path] == []
    assert [source.name for source in read] == ["3.png"]


def test_a_file_replaced_under_its_name_is_another(tmp_path):
    path = picture(tmp_path / "data/a.png", seed=1)
    before, stat = look(tmp_path / "data")[0], path.stat()
    other = picture(tmp_path / "b.png", seed=2).read_bytes()
    path.write_bytes(other)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert look(tmp_path / "data")[0][0].media.digest != before[0].media.digest


def test_a_damaged_index_is_made_again(tmp_path):
    picture(tmp_path / "data/a.png")
    first, _ = look(tmp_path / "data")
    for name in ("index.sqlite-wal", "index.sqlite-shm"):
        (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / "index.sqlite").write_bytes(b"garbage" * 1000)
    assert look(tmp_path / "data")[0] == first


def test_samples_survive_being_written(tmp_path):
    hostile(tmp_path / "data")
    samples, _ = look(tmp_path / "data", horizontal_flip=True, default_mask_file=str(tmp_path / "data/good.png"))
    remember(tmp_path / "scan", samples)
    assert recall(tmp_path / "scan") == samples
    assert recall(tmp_path / "nothing") is None
