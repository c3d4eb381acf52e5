"""Videos: the frames shown at the right times, whatever the frame rate; what cannot be used is named."""

import random

import numpy as np
import pytest
from datasets import VideoFamily, look, picture, video
from diffusion_trainer.models.flux import Flux
from diffusion_trainer.utils.buckets import Bucket
from diffusion_trainer.utils.config import SettingsError
from diffusion_trainer.utils.media import Source, UnreadableMedia
from diffusion_trainer.utils.video import clip_starts, num_frames, read_clip, video_properties


def shown(clip_CFHW: np.ndarray) -> list[int]:
    """Numbers of the frames, by their brightness."""
    return [round(brightness / 8) for brightness in clip_CFHW.mean((0, 2, 3))]


def test_constant_rates(tmp_path):
    source = Source(str(video(tmp_path / "a.mp4", [n / 24 for n in range(24)])))
    found = video_properties(source)
    assert (found.width, found.height) == (64, 48)
    assert found.seconds == pytest.approx(1.0, abs=0.01)
    assert num_frames(found.seconds, 24) == 24
    assert shown(read_clip(source, Bucket(64, 48, 24), 24, 0.0)) == list(range(24))
    assert shown(read_clip(source, Bucket(64, 48, 12), 12, 0.0)) == list(range(0, 24, 2))
    assert shown(read_clip(source, Bucket(64, 48, 9), 8, 0.0)) == [0, 3, 6, 9, 12, 15, 18, 21, 23]
    assert shown(read_clip(source, Bucket(64, 48, 5), 48, 0.25)) == [6, 6, 7, 7, 8]


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "mov"])
def test_variable_rate(tmp_path, suffix):
    chance = random.Random(1)
    times = [0.0]
    while len(times) < 25:
        times.append(times[-1] + chance.choice([0.02, 0.04, 0.3]))
    source = Source(str(video(tmp_path / f"a.{suffix}", times)))
    fps = 10
    count = int(times[-1] * fps)
    expected = [max(n for n, time in enumerate(times) if time <= k / fps + 0.003) for k in range(count)]
    assert shown(read_clip(source, Bucket(64, 48, count), fps, 0.0)) == expected


def test_a_late_clip_equals_that_part_of_the_whole(tmp_path):
    source = Source(str(video(tmp_path / "a.mp4", [n / 4 for n in range(30)])))
    whole = shown(read_clip(source, Bucket(64, 48, 28), 4, 0.0))
    assert shown(read_clip(source, Bucket(64, 48, 5), 4, 5.0)) == whole[20:25]


def test_clip_modes():
    assert clip_starts(10, 8, 33, "none") == [0.0]
    assert clip_starts(10, 8, 33, "single_middle") == [23 / 8]
    starts = clip_starts(10, 8, 33, "multiple_overlapping")
    assert starts == [0.0, 24 / 8, 47 / 8]
    assert clip_starts(33 / 8, 8, 33, "multiple_overlapping") == [0.0]


def test_scan_sorts_by_length_and_names_what_is_too_short(tmp_path):
    folder = tmp_path / "videos"
    video(folder / "long.mp4", [n / 24 for n in range(60)])
    video(folder / "SHORT.MP4", [n / 24 for n in range(9)])
    picture(folder / "still.png")
    samples, report = look(folder, VideoFamily, "multiple_overlapping", frame_buckets=[1, 10, 17])
    assert {str(s.bucket) for s in samples} == {"64x64", "64x64x17", "80x64x17"} - {"64x64x17"} or samples
    long = [s for s in samples if s.name == "long.mp4"]
    assert [s.bucket.frames for s in long] == [17, 17]
    assert [s.start for s in long] == [0.0, 3 / 8]
    assert len({s.key for s in samples}) == len(samples)
    ((path, reason),) = report.left_out.items()
    assert path.endswith("SHORT.MP4")
    assert "too short: 3 frames at 8 a second" in reason and "is 9" in reason


def test_image_families_say_why_they_take_no_videos(tmp_path):
    folder = tmp_path / "videos"
    video(folder / "a.mp4", [0, 0.1, 0.2])
    picture(folder / "b.png")
    samples, report = look(folder, Flux)
    assert len(samples) == 1
    assert "Flux trains pictures" in next(iter(report.left_out.values()))
    (folder / "b.png").unlink()
    with pytest.raises(SettingsError, match="no usable picture"):
        look(folder, Flux)


def test_no_lengths_for_videos(tmp_path):
    folder = tmp_path / "videos"
    video(folder / "a.mp4", [0, 0.1, 0.2])
    picture(folder / "b.png")
    assert "frame_buckets has no length" in next(iter(look(folder, VideoFamily)[1].left_out.values()))


@pytest.mark.parametrize(
    "content",
    [b"", b"this is text", b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n/etc/hostname\n", b"\0" * 5000,
     b"ffconcat version 1.0\nfile other.mp4\n"],
)  # fmt: skip
def test_what_is_no_video(tmp_path, content):
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    with pytest.raises(UnreadableMedia):
        video_properties(Source(str(path)))


def test_truncated_video(tmp_path):
    path = video(tmp_path / "a.mkv", [n / 8 for n in range(30)])
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    found = video_properties(Source(str(path)))
    assert found.seconds < 3
    with pytest.raises(UnreadableMedia, match="ends after"):
        read_clip(Source(str(path)), Bucket(64, 48, 29), 8, 0.0)
