"""Pictures of every kind come out right: upright, on white, scaled, cropped; masks fit them."""

import numpy as np
import pytest
import torch
from datasets import bomb, picture
from diffusion_trainer.utils.buckets import Bucket
from diffusion_trainer.utils.encoding import mask_on_grid
from diffusion_trainer.utils.media import (
    Source,
    UnreadableMedia,
    picture_properties,
    read_mask,
    read_picture,
    read_whole,
)
from PIL import Image

SQUARE = Bucket(64, 64)


def saved(path, image, **how):
    image.save(path, **how)
    return Source(str(path))


def colour(pixels_CFHW):
    return pixels_CFHW[:, 0, 32, 32].tolist()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path, orientation):
    image = Image.new("RGB", (64, 32), "blue")
    image.paste("red", (0, 0, 32, 32))
    exif = Image.Exif()
    exif[0x0112] = orientation
    source = saved(tmp_path / "a.png", image, exif=exif)
    found = picture_properties(source)
    assert (found.width, found.height) == ((64, 32) if orientation < 5 else (32, 64))
    pixels = read_picture(source, Bucket(found.width, found.height))
    corner = pixels[:, 0, 0, 0].tolist()
    assert corner == ([255, 0, 0] if orientation in (1, 4, 5, 6) else [0, 0, 255]) or orientation in (5, 6, 7, 8)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("RGBA", (64, 64), (255, 0, 0, 0)), [255, 255, 255]),
        (Image.new("RGBA", (64, 64), (255, 0, 0, 255)), [255, 0, 0]),
        (Image.new("LA", (64, 64), (0, 0)), [255, 255, 255]),
        (Image.new("L", (64, 64), 100), [100, 100, 100]),
        (Image.new("1", (64, 64), 1), [255, 255, 255]),
        (Image.new("RGB", (64, 64), (1, 2, 3)).convert("P"), None),
        (Image.fromarray(np.full((64, 64), 32768, np.uint16)), [128, 128, 128]),
    ],
    ids=["transparent", "opaque", "grey and alpha", "grey", "bits", "palette", "16 bit"],
)
def test_modes(tmp_path, image, expected):
    pixels = read_picture(saved(tmp_path / "a.png", image), SQUARE)
    assert pixels.shape == (3, 1, 64, 64)
    assert pixels.dtype == np.uint8
    if expected:
        assert np.allclose(colour(pixels), expected, atol=1)


def test_cmyk_and_animation(tmp_path):
    cmyk = saved(tmp_path / "a.jpg", Image.new("CMYK", (64, 64), (0, 255, 255, 0)), quality=100)
    assert np.allclose(colour(read_picture(cmyk, SQUARE)), [255, 0, 0], atol=4)
    frames = [Image.new("RGB", (64, 64), name) for name in ("red", "lime")]
    for suffix in ("gif", "webp"):
        animated = saved(tmp_path / f"b.{suffix}", frames[0], save_all=True, append_images=frames[1:])
        assert np.allclose(colour(read_picture(animated, SQUARE)), [255, 0, 0], atol=4)


def test_crop_is_the_centre_and_flip_mirrors(tmp_path):
    image = Image.new("RGB", (192, 64), "blue")
    image.paste("red", (64, 0, 96, 64))
    image.paste("lime", (96, 0, 128, 64))
    source = saved(tmp_path / "a.png", image)
    pixels = read_picture(source, SQUARE)
    assert pixels[:, 0, 32, 2].tolist() == [255, 0, 0]
    assert pixels[:, 0, 32, 61].tolist() == [0, 255, 0]
    assert np.array_equal(read_picture(source, SQUARE, flip=True), pixels[..., ::-1])


def test_whole_picture_keeps_its_shape(tmp_path):
    source = saved(tmp_path / "a.png", Image.new("RGB", (400, 100)))
    assert read_whole(source, 10**6).shape == (3, 100, 400)
    assert read_whole(source, 10_000).shape == (3, 50, 200)


def test_mask_follows_the_crop_of_its_picture_at_any_size(tmp_path):
    mask = Image.new("L", (96, 32), 0)  # half as large as a picture of 192 x 64
    mask.paste(255, (32, 0, 48, 32))
    source = saved(tmp_path / "a.png", mask)
    cropped = read_mask(source, SQUARE, (192, 64))
    assert cropped.shape == (1, 64, 64)
    assert cropped[0, :, 2:30].min() == 255
    assert cropped[0, :, 34:].max() == 0
    grid = mask_on_grid(torch.from_numpy(cropped), (1, 8, 8))
    assert grid.shape == (1, 8, 8)
    assert grid[0, 0].tolist() == pytest.approx([1, 1, 1, 1, 0, 0, 0, 0], abs=0.1)
    assert np.array_equal(read_mask(source, SQUARE, (192, 64), flip=True), cropped[..., ::-1])


def test_colours_of_a_mask_count_not_its_transparency(tmp_path):
    source = saved(tmp_path / "a.png", Image.new("RGBA", (64, 64), (0, 255, 255, 0)))
    assert read_mask(source, SQUARE, (64, 64)).max() == 0


def test_frames_of_masks_go_to_their_latents():
    mask = torch.zeros(9, 16, 16, dtype=torch.uint8)
    mask[0], mask[5:] = 255, 255
    assert mask_on_grid(mask, (3, 2, 2))[:, 0, 0].tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda path: path.write_bytes(b""), "empty file"),
        (lambda path: path.write_bytes(b"text"), "not a readable picture"),
        (lambda path: Image.new("RGB", (1, 1)).save(path), "only 1x1 pixels"),
        (lambda path: Image.new("RGB", (30000, 10)).save(path), "only 30000x10 pixels"),
        (bomb, "megapixels"),
    ],
    ids=["empty", "text", "tiny", "thin", "bomb"],
)
def test_unusable_pictures_say_why(tmp_path, write, reason):
    path = tmp_path / "a.png"
    write(path)
    with pytest.raises(UnreadableMedia, match=reason):
        picture_properties(Source(str(path)))


def test_truncated_picture(tmp_path):
    path = picture(tmp_path / "a.png")
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UnreadableMedia, match="cannot be decoded"):
        read_picture(Source(str(path)), SQUARE)
