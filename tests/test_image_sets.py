"""Sets of pictures: sizes, order, captions; and the drawing of losses."""

import numpy
import pytest
from diffusion_trainer.diffusion_nodes import comfy
from diffusion_trainer.diffusion_nodes.image_set_nodes import resized
from diffusion_trainer.diffusion_nodes.loss_plot import draw, smoothed, ticks
from diffusion_trainer.nodes import NODE_CLASS_MAPPINGS as NODES
from diffusion_trainer.utils.config import SettingsError
from PIL import Image


@pytest.fixture(autouse=True)
def base(tmp_path):
    before = comfy.base_directory()
    folder = tmp_path / "input/set"
    folder.mkdir(parents=True)
    for name, size in (("b.png", (64, 32)), ("a.png", (32, 32)), ("c.jpg", (64, 32))):
        Image.new("RGB", size, "red").save(folder / name)
    (folder / "a.txt").write_text("one a", "utf-8")
    (folder / "b.txt").write_text("two b\n", "utf-8")
    comfy.set_base_directory(tmp_path)
    yield tmp_path
    comfy.set_base_directory(before)


def load(**values):
    return NODES["LoadCaptionedImageSetNode"]().load("set", **values)


def test_pictures_and_captions_keep_their_order_and_sizes():
    images, captions = load(default_caption="none", caption_prefix="sks, ")
    assert [tuple(image.shape) for image in images] == [(1, 32, 32, 3), (1, 32, 64, 3), (1, 32, 64, 3)]
    assert captions == ["sks, one a", "sks, two b", "sks, none"]


def test_a_caption_belongs_to_the_whole_name_but_its_ending(base):
    folder = base / "input/set"
    Image.new("RGB", (32, 32)).save(folder / "a.png.jpg")
    (folder / "a.png.txt").write_text("of a.png.jpg", "utf-8")
    assert load(default_caption="none")[1] == ["one a", "of a.png.jpg", "two b", "none"]


def test_by_size_puts_equal_sizes_together_with_their_captions():
    images, captions = load(arrange="by size", default_caption="c")
    assert [tuple(image.shape) for image in images] == [(1, 32, 32, 3), (2, 32, 64, 3)]
    assert captions == ["one a", "two b", "c"]


def test_resized_to_the_first_unless_a_size_is_given():
    assert {tuple(image.shape) for image in load(resize_method="Crop")[0]} == {(1, 32, 32, 3)}
    assert {tuple(image.shape) for image in load(resize_method="Pad", width=16, height=48)[0]} == {(1, 48, 16, 3)}


def test_ways_to_resize_mean_what_they_say():
    pixels = numpy.zeros((10, 20, 3), "uint8")
    pixels[:, 5:15] = 255  # the middle square is white, both sides black
    picture = Image.fromarray(pixels)
    assert resized(picture, "None", (10, 10)).size == (20, 10)
    assert numpy.asarray(resized(picture, "Crop", (10, 10))).min() == 255
    stretched = numpy.asarray(resized(picture, "Stretch", (20, 20)))
    assert stretched.shape == (20, 20, 3) and stretched[:, 10].min() == 255 and stretched[:, 0].max() == 0
    white = Image.new("RGB", (20, 10), "white")
    padded = numpy.asarray(resized(white, "Pad", (20, 20)))
    assert padded[:4].max() == 0 and padded[7:13].min() == 255 and padded[-4:].max() == 0


def test_places_outside_the_input_folder_are_refused(base):
    (base / "secret").mkdir()
    Image.new("RGB", (8, 8)).save(base / "secret/x.png")
    with pytest.raises(SettingsError, match="folder: "):
        NODES["LoadImageSetFromFolderNode"]().load("../secret")
    with pytest.raises(SettingsError, match="images: "):
        NODES["LoadImageSetNode"]().load(["../secret/x.png"])
    assert "images: " in NODES["LoadImageSetNode"].VALIDATE_INPUTS(["gone.png"])
    assert NODES["LoadImageSetNode"].VALIDATE_INPUTS({"__value__": ["set/a.png"]}) is True


def test_what_changes_a_folder_changes_its_fingerprint(base):
    node = NODES["LoadCaptionedImageSetNode"]
    before = node.IS_CHANGED(folder="set")
    (base / "input/set/c.txt").write_text("new", "utf-8")
    assert node.IS_CHANGED(folder="set") != before


@pytest.mark.parametrize("losses", [[], [1.0], [0.5, 0.5, 0.5], [0.0, 0.0], [float("nan"), 1.0], [1e-9, 1e3]])
@pytest.mark.parametrize("logarithmic", [False, True])
def test_any_losses_can_be_drawn(losses, logarithmic):
    picture = draw([("a", losses, 0), ("b", losses[::-1], 100)], logarithmic=logarithmic, width=300, height=200)
    assert picture.size == (300, 200)


def test_a_falling_loss_falls_in_the_picture():
    pixels = numpy.asarray(draw([("a", [4.0, 3.0, 2.0, 1.0], 0)], smoothing=0.0, width=300, height=200)).astype(int)
    blue = (abs(pixels - (31, 119, 180)).sum(2) < 10).nonzero()
    rows = {column: blue[0][blue[1] == column].mean() for column in set(blue[1].tolist())}
    columns = sorted(rows)
    assert rows[columns[0]] < rows[columns[-1]] - 100


def test_smoothing_has_no_pull_of_its_start():
    assert smoothed([2.0] * 5, 0.9) == pytest.approx([2.0] * 5)
    assert smoothed([1.0, 3.0], 0.0) == [1.0, 3.0]


def test_ticks_are_round():
    assert ticks(0.0, 1.0) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(0.013, 0.029) == pytest.approx([0.015, 0.02, 0.025])


def test_the_plot_goes_to_the_canvas_and_onward(base):
    result = NODES["PlotTrainingLossNode"]().plot({"loss": [1.0, 0.5]}, loss_2={"loss": [0.7]})
    image = result["ui"]["images"][0]
    assert (base / "temp" / image["filename"]).is_file() and image["type"] == "temp"
    assert tuple(result["result"][0].shape) == (1, 520, 840, 3)
