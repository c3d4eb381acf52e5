"""Captions, sizes, videos, control latents, masks: what the model is given."""

# mypy: ignore-errors

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import comfy_miniatures as mini
import torch
from diffusion_trainer.diffusion_nodes import lora_training
from diffusion_trainer.diffusion_nodes.lora_objective import loss
from diffusion_trainer.diffusion_nodes.lora_samples import Sample, batches

from .harness import calls_of, models, refusal, same, train


def check_each_picture_has_its_caption_and_one_place_in_the_batch() -> None:
    for family, model in models():
        latent = mini.latents(family, 4, 3)
        for index in range(4):
            latent["samples"][index] = index * 10.0
        captions = [[[torch.full((1, 12, mini.WIDTH), float(n)), mini.conditioning(family)[0][1]]] for n in range(4)]
        batch = [[torch.cat([c[0][0] for c in captions]), {"pooled_output": captions[0][0][1]["pooled_output"]}]]
        for given in (captions, [[c[0] for c in captions]], [batch]):
            with calls_of(model) as seen:
                train(model, family, [latent], given, batch_size=4, steps=3)
            assert len(seen) == 3, f"{family}: {len(seen)} calls for 3 steps"
            for x, t, kwargs in seen:
                assert x.shape[0] == 4 and sorted(kwargs["c_crossattn"][:, 0, 0].tolist()) == [0, 1, 2, 3]
                if family in ("flux", "wan", "qwen"):
                    inner = model.model.process_latent_in(latent["samples"] if x.ndim == 4
                                                          else latent["samples"].unsqueeze(2))  # fmt: skip
                    keep = (1 - t.reshape(-1, *[1] * (x.ndim - 1))) * inner[kwargs["c_crossattn"][:, 0, 0].long()]
                    assert (x - keep).flatten(1).std(1).le(1.5).all(), family
        for count in (2, 3):
            told = refusal(model, family, [latent], captions[:count])
            assert str(count) in told and "4" in told


def check_every_size_goes_through_the_latent_format() -> None:
    for family, model in models():
        sizes = [(8, 8), (8, 12), (8, 8), (4, 8)]
        latents = [mini.latents(family, 1, n, *size) for n, size in enumerate(sizes)]
        prepared: list[Any] = []
        usual = lora_training.prepare

        def noting(*args: Any, usual: Any = usual, prepared: Any = prepared) -> Any:
            prepared.append(usual(*args))
            return prepared[-1]

        lora_training.prepare = noting
        try:
            with calls_of(model) as seen:
                train(model, family, latents, [mini.conditioning(family)], steps=12, batch_size=2)
        finally:
            lora_training.prepare = usual
        assert {tuple(x.shape[-2:]) for x, *_ in seen} == {(8, 8), (8, 12), (4, 8)}
        for sample, latent in zip(prepared[0], latents, strict=True):
            raw = latent["samples"]
            raw = raw.unsqueeze(2) if sample.latent.ndim == 5 else raw
            wanted = model.model.process_latent_in(raw)
            assert (sample.latent - wanted).abs().max() < 1e-6
            assert (wanted - raw).abs().max() > 1e-3


def check_pictures_count_alike() -> None:
    samples = [Sample(torch.zeros(1, 4, 8, 8 if n < 5 else 16), {}, {}) for n in range(7)]
    drawn = Counter(index for batch in itertools.islice(batches(samples, 3, 0), 700) for index in batch)
    assert max(drawn.values()) - min(drawn.values()) <= 3, drawn


def check_videos_and_control_latents() -> None:
    for family, model in models():
        if family == "wan":
            with calls_of(model) as seen:
                train(model, family, [mini.latents(family, 2, frames=3)], batch_size=2)
            assert seen[0][0].shape == (2, 16, 3, 8, 8)
        if family in ("flux", "qwen"):
            reference = mini.latents(family, 1, 9, frames=int(family == "qwen"))["samples"]
            positive = mini.conditioning(family, 4, reference_latents=[reference])
            with calls_of(model) as seen:
                train(model, family, positive=[positive])
            carried = seen[0][2]["ref_latents"][0]
            wanted = model.model.process_latent_in(reference)
            assert torch.allclose(carried.float(), wanted.float(), atol=1e-5)


def check_the_first_picture_of_a_video_reaches_the_model() -> None:
    """Wan from picture to video: its conditioning carries the picture as a latent, and where it is given."""
    with torch.inference_mode():
        model = mini.make_model("wan_i2v", seed=1)
    given = mini.latents("wan", 1, 9, frames=3)["samples"]
    known = torch.ones(1, 1, 3, 8, 8)
    known[:, :, :1] = 0.0
    positive = [mini.conditioning("wan", 4, concat_latent_image=given, concat_mask=known)]
    with calls_of(model) as seen:
        train(model, "wan", [mini.latents("wan", 1, 3, frames=3)], positive, steps=2)
    for *_, kwargs in seen:
        carried = kwargs["c_concat"]
        assert carried.shape == (1, 20, 3, 8, 8)
        torch.testing.assert_close(carried[:, 4:].float(), model.model.process_latent_in(given).float())


def check_masks_decide_what_is_learned() -> None:
    family, model = next(models())
    mask = torch.zeros(1, 64, 64)
    mask[:, :32] = 1
    masked = train(model, family, masks=[mask])[1]
    assert not same(masked, train(model, family)[1])
    assert same(train(model, family, masks=[torch.ones(1, 64, 64)])[1], train(model, family)[1])
    sampling = model.model.model_sampling
    denoised = torch.randn(1, 4, 8, 8, requires_grad=True)
    half = torch.zeros(1, 1, 8, 8)
    half[..., :4, :] = 1
    loss(sampling, denoised, torch.zeros(1, 4, 8, 8), sampling.sigmas[[500]].clone(), half, "MSE").backward()
    assert denoised.grad[..., :4, :].abs().min() > 0 and denoised.grad[..., 4:, :].abs().max() == 0


def check_captions_of_unlike_lengths_keep_their_own() -> None:
    for family, model in models():
        captions = [mini.conditioning(family, 1, tokens=8), mini.conditioning(family, 2, tokens=12)]
        with calls_of(model) as seen:
            train(model, family, [mini.latents(family, 2)], captions, batch_size=2, steps=2)
        assert sum(x.shape[0] for x, *_ in seen) == 4
        assert {kwargs["c_crossattn"].shape[1] for *_, kwargs in seen} == {8, 12}
