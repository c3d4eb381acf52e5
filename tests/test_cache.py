"""The cache: complete, atomic, shared, never stale; each value depends on what it should and nothing more."""

import os
import random
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from datasets import READERS, EditFamily, VideoFamily, family, look, picture, video
from diffusion_trainer.models.flux import Flux
from diffusion_trainer.utils.cache import Cache, View
from diffusion_trainer.utils.loader import Loader
from diffusion_trainer.utils.losses import weighted_mean
from diffusion_trainer.utils.preparation import _without
from diffusion_trainer.utils.sampler import Sampler
from diffusion_trainer.utils.store import Store, prune
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return Flux.write_miniature(tmp_path_factory.mktemp("flux"))


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and "uses" not in p.parts
    }


def assert_same(one: Path, other: Path) -> None:
    """The same keys; values alike, as the size of a batch decides their last bits."""
    assert set(files(one)) == set(files(other))
    for path in one.rglob("*.safetensors"):
        values, others = load_file(path), load_file(other / path.relative_to(one))
        for name, value in values.items():
            torch.testing.assert_close(value, others[name], rtol=1e-3, atol=1e-4)


def count(folder: Path, part: str) -> int:
    return len(list((folder / "flux" / part).rglob("*.safetensors")))


def filled(tmp_path, model, data="data", uncond=False, kind=Flux, cache="cache", **options):
    samples, _ = look(tmp_path / data, kind, **options)
    found = Cache(tmp_path / cache, family(model, kind), samples, uncond)
    assert found.fill(CPU, 2, READERS) == {}
    return found


@pytest.fixture
def data(tmp_path):
    for n in range(4):
        picture(tmp_path / f"data/{n}.png", (64, 64) if n % 2 else (96, 64), n, f"caption {n}")
    return tmp_path / "data"


def test_editing_a_caption_encodes_one_caption(tmp_path, model, data):
    filled(tmp_path, model)
    before = files(tmp_path / "cache")
    assert (count(tmp_path / "cache", "media"), count(tmp_path / "cache", "text-clip")) == (4, 4)
    (data / "2.txt").write_text("another caption")
    filled(tmp_path, model)
    after = files(tmp_path / "cache")
    assert {name.split("/")[1] for name in set(after) - set(before)} == {"text-clip", "text-t5"}
    assert len(set(after) - set(before)) == 2
    assert all(after[name] == value for name, value in before.items())


def test_touching_encodes_nothing_and_replacing_encodes_one(tmp_path, model, data):
    filled(tmp_path, model)
    before = set(files(tmp_path / "cache"))
    os.utime(data / "1.png", (5, 5))
    (data / "1.png").rename(data / "9.png")
    (data / "1.txt").rename(data / "9.txt")
    filled(tmp_path, model)
    assert set(files(tmp_path / "cache")) == before
    picture(data / "9.png", seed="new")
    filled(tmp_path, model)
    assert count(tmp_path / "cache", "media") == 5


def test_another_encoder_or_length_is_another_value(tmp_path, model, data):
    one, other = (Cache(tmp_path / "c", family({**model, "max_sequence_length": n}), []) for n in (32, 16))
    assert one.text_key("t5", "x") != other.text_key("t5", "x")
    assert one.text_key("clip", "x") == other.text_key("clip", "x")


def test_damaged_files_are_noticed_and_made_again_while_training(tmp_path, model, data):
    cache = filled(tmp_path, model)
    shutil.copytree(tmp_path / "cache", tmp_path / "whole")
    chance = random.Random(0)
    for path in (tmp_path / "cache").rglob("*.safetensors"):
        content = bytearray(path.read_bytes())
        how = chance.randrange(4)
        if how == 0:
            content[chance.randrange(200, len(content))] ^= 4
        path.write_bytes([content, content[: len(content) // 2], b"", b"\xff" * 100][how])
    loader = Loader(cache, family(model), 0, 1)
    plan = Sampler(cache.samples, 1, 0).epoch(0)
    assert len(list(loader.steps(0, plan))) == 4
    assert_same(tmp_path / "cache", tmp_path / "whole")


def test_what_cannot_be_made_again_is_named(tmp_path, model, data):
    cache = filled(tmp_path, model)
    for path in (tmp_path / "cache/flux/media").rglob("*.safetensors"):
        path.unlink()
    (data / "0.png").unlink()
    plan = Sampler(cache.samples, 1, 0).epoch(0)
    with pytest.raises(FileNotFoundError, match=r"0\.png"):
        list(Loader(cache, family(model), 0, 1).steps(0, plan))


def test_empty_files_are_missing_at_start(tmp_path, model, data):
    filled(tmp_path, model)
    whole = files(tmp_path / "cache")
    for path in (tmp_path / "cache").rglob("*.safetensors"):
        path.write_bytes(b"")
    filled(tmp_path, model)
    assert files(tmp_path / "cache") == whole


def test_undecodable_pictures_are_left_out_with_all_that_needs_them(tmp_path, model, data):
    broken = data / "0.png"
    broken.write_bytes(broken.read_bytes()[:500])
    samples, _ = look(data)
    cache = Cache(tmp_path / "cache", family(model), samples)
    failed = cache.fill(CPU, 2, READERS)
    assert list(failed) == [str(broken)]
    assert {s.name for s in _without(samples, failed, "dataset")} == {"1.png", "2.png", "3.png"}


def test_ranks_share_the_work_without_gaps(tmp_path, model, data):
    filled(tmp_path, model, cache="whole")
    samples, _ = look(data)
    for rank in (2, 0, 1):
        Cache(tmp_path / "shared", family(model), samples).fill(CPU, 1, READERS, rank=rank, world=3)
    assert_same(tmp_path / "shared", tmp_path / "whole")


def test_regenerating_and_pruning(tmp_path, model, data):
    cache = filled(tmp_path, model)
    whole = files(tmp_path / "cache")
    some = next((tmp_path / "cache/flux/media").rglob("*.safetensors"))
    Store(tmp_path / "cache/flux/media").put(some.stem, {"latents": torch.zeros(16, 8, 8)})
    cache.fill(CPU, 2, READERS, regenerate=True)
    assert files(tmp_path / "cache") == whole
    assert cache.note_use("a") == sum(map(len, whole.values()))
    Store(tmp_path / "cache/flux/media").put("ab" * 20, {"latents": torch.zeros(16, 8, 8)})
    assert prune(tmp_path / "cache", 30) == (0, 0)
    removed, size = prune(tmp_path / "cache", 30, min_age=0)
    assert removed == 1 and size > 4096
    assert files(tmp_path / "cache") == whole
    for path in (tmp_path / "cache/uses").iterdir():
        os.utime(path, (1, 1))
    assert prune(tmp_path / "cache", 30, min_age=0)[0] == len(whole)


def test_captions_in_turn_dropout_and_mirrors(tmp_path, model, data):
    (data / "captions.json").write_text('{"0.png": ["one", "two", "three"]}')
    cache = filled(tmp_path, model, uncond=True, horizontal_flip=True, caption_dropout=0.25)
    assert count(tmp_path / "cache", "media") == 8
    assert count(tmp_path / "cache", "text-t5") == 7
    first = cache.samples[0]
    kept = Loader(cache, family(model), 0, 1)
    views = [kept.view(epoch, first) for epoch in range(300)]
    assert {view.caption for view in views} == {"one", "two", "three", ""}
    assert 40 < sum(view.caption == "" for view in views) < 115
    assert 110 < sum(view.flip for view in views) < 190
    half = Loader(cache, family(model), 0, 1, uncond_fraction=0.5)
    assert 150 < sum(half.view(epoch, first).caption == "" for epoch in range(300)) < 230
    assert views == [Loader(cache, family(model), 0, 1, rank=1, num_ranks=2).view(e, first) for e in range(300)]
    for view in set(views):
        assert cache.load(first, view) is not None
    plain = filled(tmp_path, model)
    for turn in range(5):
        seen = {Loader(plain, family(model), 0, 1).view(3 * turn + n, plain.samples[0]).caption for n in range(3)}
        assert seen == {"one", "two", "three"}


def test_a_small_mask_trains_as_hard_as_a_large_one_and_only_what_is_white(tmp_path, model, data):
    for name, size in (("0", 48), ("1", 32)):
        mask = Image.new("L", (96, 64) if name == "0" else (64, 64), 0)
        mask.paste(255, (0, 0, size, size))
        (tmp_path / "masks").mkdir(exist_ok=True)
        mask.save(tmp_path / f"masks/{name}.png")
    cache = filled(tmp_path, model, mask_path=str(tmp_path / "masks"), enable_ar_bucket=False)
    flux = family(model)
    plan = [[draw] for step in Sampler(cache.samples, 1, 0).epoch(0) for draw in step]
    for draw, (batch,) in zip(plan, Loader(cache, flux, 0, 1).steps(0, plan), strict=True):
        label = batch.target, batch.weight
        error = torch.zeros_like(batch.target)
        assert squared_error(batch.target + 1, label).item() == pytest.approx(1.0, rel=1e-5)
        sample = cache.samples[draw[0].sample]
        if sample.name == "1.png":
            error[:, :4] = 1  # the first of four rows of patches, the mask covers half of two
            rows = squared_error(batch.target + error, label).item()
            assert rows == pytest.approx(0.5, abs=0.05)
            error[:] = 0
            error[:, 8:] = 1
            assert squared_error(batch.target + error, label).item() == pytest.approx(0.0, abs=0.02)


def squared_error(prediction, label):
    return weighted_mean(partial(F.mse_loss, reduction="none"), prediction, label)


def test_black_masks_leave_their_picture_out(tmp_path, model, data):
    picture(tmp_path / "mask.png").write_bytes(b"")
    Image.new("L", (64, 64)).save(tmp_path / "mask.png")
    samples, _ = look(data, default_mask_file=str(tmp_path / "mask.png"))
    failed = Cache(tmp_path / "cache", family(model), samples).fill(CPU, 1, READERS)
    assert "black all over" in failed[str(tmp_path / "mask.png")]


def test_controls_are_encoded_and_seen(tmp_path, model, data):
    for n in range(4):
        picture(tmp_path / f"controls/{n}.png", (100, 50), f"c{n}")
    EditFamily.seen.clear()
    cache = filled(tmp_path, model, kind=EditFamily, control_path=str(tmp_path / "controls"), uncond=True)
    assert count(tmp_path / "cache", "media") == 8
    assert count(tmp_path / "cache", "text-clip") == 5
    assert count(tmp_path / "cache", "text-t5") == 8
    assert {shape for _, shapes in EditFamily.seen for each in shapes for shape in each} == {(3, 50, 100)}
    value = cache.load(cache.samples[0], View("caption 0"))
    assert [c["latents"].shape for c in value.controls] == [value.media["latents"].shape]


def test_a_control_that_cannot_be_decoded_leaves_its_sample_out(tmp_path, model, data):
    for n in range(4):
        picture(tmp_path / f"controls/{n}.png", (64, 64), f"c{n}")
    broken = tmp_path / "controls/2.png"
    broken.write_bytes(broken.read_bytes()[:500])
    samples, _ = look(data, EditFamily, control_path=str(tmp_path / "controls"))
    failed = Cache(tmp_path / "cache", family(model, EditFamily), samples).fill(CPU, 2, READERS)
    assert list(failed) == [str(broken)]
    assert count(tmp_path / "cache", "text-t5") == 3


def test_tensors_of_any_type_and_shape_come_back(tmp_path):
    whole = torch.randn(32, 4, 4)
    values = {
        "ids": torch.arange(5), "some of them": torch.arange(5)[1:3], "yes": torch.tensor([True, False]),
        "number": torch.tensor(3), "eighth": torch.randn(4).to(torch.float8_e4m3fn), "nothing": torch.zeros(0, 5),
        "turned": torch.randn(3, 4).t(), "half": torch.randn(3).half(), "one view": whole[:16], "other": whole[8:],
    }  # fmt: skip
    store = Store(tmp_path)
    store.put("ab" * 20, values)
    found = store.get("ab" * 20)
    assert found is not None and found.keys() == values.keys()
    for name, value in values.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        assert torch.equal(found[name].float(), value.float())


def test_whatever_a_family_encodes_reaches_its_collate(tmp_path, model, data):
    class More(Flux):
        text_encoders = ("clip",)

        def encode_media(self, vae, pixels_NCFHW, generators):
            latents = super().encode_media(vae, pixels_NCFHW, generators)["latents"]
            return {"latents": latents, "first_frame": latents[:, :4], "seen": pixels_NCFHW.mean((2, 3, 4)) > 0}

        def load_text_encoder(self, name, device):
            return None

        def encode_text(self, name, encoder, captions):
            return {"tokens": torch.tensor([[len(caption), n] for n, caption in enumerate(captions)])}

    cache = filled(tmp_path, model, kind=More)
    value = cache.load(cache.samples[0], View("caption 0"))
    assert value.media.keys() == {"latents", "first_frame", "seen"}
    assert value.media["seen"].dtype == torch.bool and value.media["first_frame"].shape[0] == 4
    assert value.text["tokens"].dtype == torch.int64 and value.text["tokens"][0] == len("caption 0")


def test_clips_and_masks_of_videos(tmp_path, model):
    class Clips(VideoFamily):
        def encode_media(self, vae, pixels_NCFHW, generators):
            return {"latents": pixels_NCFHW[:, :, ::4, ::8, ::8].mean(1, keepdim=True)}

    video(tmp_path / "data/a.mp4", [n / 8 for n in range(20)], (64, 64))
    video(tmp_path / "masks/a.mp4", [n / 8 for n in range(20)], (32, 32))
    samples, _ = look(
        tmp_path / "data", Clips, "multiple_overlapping", frame_buckets=[9], mask_path=str(tmp_path / "masks")
    )
    cache = Cache(tmp_path / "cache", family(model, Clips), samples)
    assert cache.fill(CPU, 1, READERS) == {}
    assert len(samples) == 3
    for sample in samples:
        value = cache.load(sample, View(""))
        assert value.media["latents"].shape == (1, 3, 8, 8)
        assert value.mask.shape == (3, 8, 8)
        first = (sample.start or 0) * 8
        assert (value.mask[0].mean() * 255 / 8).item() == pytest.approx(first, abs=0.6)


FILLER = """
import os, random, signal, sys, time
sys.path.insert(0, {tests!r})
import conftest, torch
torch.set_num_threads(1)
from pathlib import Path
from datasets import READERS, family, look
from diffusion_trainer.utils.cache import Cache

root, kills = Path({root!r}), {kills}

def fill(cache):
    samples, _ = look(root / "data", horizontal_flip=True)
    Cache(root / cache, family({model!r}), samples).fill(torch.device("cpu"), 2, READERS)

def child(cache):
    pid = os.fork()
    if pid == 0:
        fill(cache)
        os._exit(0)
    return pid

begin, chance, hits, complete = time.monotonic(), random.Random(3), 0, 0
if kills:
    os.waitpid(child("undisturbed"), 0)
    duration = time.monotonic() - begin
    while hits < kills:
        pid = child("cache")
        time.sleep(chance.uniform(0, duration))
        os.kill(pid, signal.SIGKILL)
        if os.waitpid(pid, 0)[1] == signal.SIGKILL:
            hits += 1
        else:  # it was done before
            complete += 1
            (root / "cache").rename(root / f"complete{{complete}}")
fill("cache")
"""


def filler(tmp_path, model, kills):
    script = FILLER.format(tests=str(Path(__file__).parent), root=str(tmp_path), model=model, kills=kills)
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_any_instant_the_cache_ends_the_same(tmp_path, model, data, kills):
    for n in range(20):
        picture(data / f"more{n}.png", (96, 64), n, f"more {n}")
    assert filler(tmp_path, model, kills).wait(timeout=1500) == 0
    for found in (tmp_path / "cache", *tmp_path.glob("complete*")):
        assert_same(found, tmp_path / "undisturbed")


def test_two_trainings_at_once(tmp_path, model, data):
    filled(tmp_path, model, cache="whole", horizontal_flip=True)
    both = [filler(tmp_path, model, 0) for _ in range(2)]
    assert [process.wait(timeout=300) for process in both] == [0, 0]
    assert_same(tmp_path / "cache", tmp_path / "whole")
