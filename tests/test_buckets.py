"""Buckets: known sizes, and what holds for any picture and any setting."""

import math

import pytest
from diffusion_trainer.utils.buckets import Bucket, Buckets, Grid, aspect_ratios
from diffusion_trainer.utils.dataset_settings import parse_dataset_settings
from diffusion_trainer.utils.media import crop_box
from hypothesis import given
from hypothesis import strategies as st


def options(**values):
    return parse_dataset_settings({"directory": [{"path": "/d"}], **values}).directory[0]


@pytest.mark.parametrize(
    ("resolution", "count", "sizes"),
    [
        (512, 7, "368x720 400x640 464x576 512x512 576x464 640x400 720x368"),
        (1024, 9, "720x1456 784x1328 864x1216 944x1120 1024x1024 1120x944 1216x864 1328x784 1456x720"),
    ],
)
def test_known_sizes(resolution, count, sizes):
    folder = options(resolutions=[resolution], num_ar_buckets=count)
    buckets = Buckets(folder, Grid())
    found = [buckets.choose(round(1e6 * ratio), 10**6)[0] for ratio in aspect_ratios(folder)]
    assert [str(bucket) for bucket in found] == sizes.split()


@given(
    st.integers(16, 20000), st.integers(16, 20000), st.integers(64, 2048), st.floats(0.1, 1.0), st.floats(1.0, 10.0),
    st.integers(1, 20), st.sampled_from([8, 16, 32, 64]),
)  # fmt: skip
def test_any_picture_gets_the_nearest_shape(width, height, resolution, low, high, count, multiple):
    folder = options(resolutions=[resolution], min_ar=low, max_ar=high, num_ar_buckets=count)
    (bucket,) = Buckets(folder, Grid(multiple)).choose(width, height)
    assert bucket.width % multiple == bucket.height % multiple == 0
    ratios = aspect_ratios(folder)
    chosen = min(ratios, key=lambda r: abs(math.log(r * height / width)))
    assert abs(bucket.width - resolution * math.sqrt(chosen)) <= max(multiple / 2 + 1e-6, multiple)
    left, top, right, bottom = crop_box(width, height, bucket)
    assert left >= 0 and top >= 0 and right <= width and bottom <= height
    assert (right - left) / (bottom - top) == pytest.approx(bucket.width / bucket.height, rel=1e-6)
    assert left == pytest.approx(width - right) and top == pytest.approx(height - bottom)
    assert right - left == pytest.approx(width) or bottom - top == pytest.approx(height)


@given(
    st.integers(2, 500),
    st.lists(st.integers(1, 200), min_size=1, max_size=6),
    st.sampled_from([(4, 1), (8, 1), (17, 0)]),
)
def test_a_video_gets_the_longest_length_that_it_fills(frames, lengths, rule):
    grid = Grid(16, 24.0, *rule)
    found = Buckets(options(frame_buckets=lengths), grid).choose(100, 100, frames)
    possible = {grid.length(n) for n in lengths if n > 1 and 1 < grid.length(n) <= frames}
    assert [b.frames for b in found] == ([max(possible)] if possible else [])
    assert all(b.frames % rule[0] == rule[1] for b in found)


def test_each_resolution_once_and_top_level_is_inherited():
    settings = parse_dataset_settings(
        {"resolutions": [[1280, 720], 512, 513], "directory": [{"path": "/a"}, {"path": "/b", "resolutions": [256]}]}
    )
    one, other = (Buckets(directory, Grid()).choose(100, 100) for directory in settings.directory)
    assert [str(b) for b in one] == ["960x960", "512x512"]
    assert [str(b) for b in other] == ["256x256"]


def test_size_buckets_by_shape_then_by_length():
    buckets = Buckets(options(size_buckets=[[512, 512, 33], [512, 512, 1], [768, 512, 17], [640, 480]]), Grid(16, 16.0))
    assert buckets.choose(100, 100) == [Bucket(512, 512, 1)]
    assert buckets.choose(100, 100, 40) == [Bucket(512, 512, 33)]
    assert buckets.choose(100, 100, 20) == [Bucket(768, 512, 17)]
    assert buckets.choose(100, 100, 10) == []
    assert buckets.choose(640, 480) == [Bucket(640, 480)]


def test_squares_ratios_and_pairs():
    assert aspect_ratios(options(enable_ar_bucket=False)) == [1.0]
    assert aspect_ratios(options(ar_buckets=[1.5, [512, 512], 0.5])) == [0.5, 1.0, 1.5]
