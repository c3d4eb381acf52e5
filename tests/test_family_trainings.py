"""Trainings of families whose other tests look at single steps: they learn, and nothing that saves memory or time
changes what."""

import shutil

import pytest
import torch
from training import Bench, Result

PREFIXES = {
    "anima": "diffusion_model.",
    "chroma": "transformer.",
    "cosmos_predict2": "diffusion_model.blocks.",
    "flux2": "transformer.",
    "hunyuan-video": "transformer.",
    "ltx-video": "diffusion_model.",
    "lumina_2": "diffusion_model.",
    "qwen_image": "diffusion_model.",
    "sd3": "transformer.",
    "z_image": "diffusion_model.",
}
"""Of the LoRA's keys."""


@pytest.fixture(scope="module", params=PREFIXES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def bench(family: str, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp(family), family)


@pytest.fixture(scope="module")
def plain(bench: Bench) -> Result:
    return bench.train()


def test_a_lora_learns(bench: Bench, family: str, plain: Result) -> None:
    learned, none = (bench.train(epochs=8, optimizer={"lr": rate}).curve("loss")[12:] for rate in (0.02, 1e-9))
    assert sum(learned) < 0.97 * sum(none)
    keys = plain.lora()
    assert keys
    assert all(key.startswith(PREFIXES[family]) and "distilled_guidance_layer" not in key for key in keys)


@pytest.mark.parametrize("changes", [{"pipeline_stages": 2}, {"micro_batch_size_per_gpu": 1}], ids=["stages", "ranks"])
def test_two_processes_equal_one(bench: Bench, plain: Result, changes: dict) -> None:
    result = bench.launch(2, **changes)
    assert result.curve("loss") == pytest.approx(plain.curve("loss"), rel=1e-5)
    assert result.curve("grad_norm") == pytest.approx(plain.curve("grad_norm"), rel=1e-4)


@pytest.mark.parametrize("changes", [{"blocks_to_swap": 100}, {"activation_checkpointing": False}], ids=str)
def test_saving_memory_changes_nothing(bench: Bench, plain: Result, changes: dict) -> None:
    assert bench.train(**changes).curve("loss") == pytest.approx(plain.curve("loss"), rel=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here")
def test_compiled_blocks_give_the_same(bench: Bench, plain: Result) -> None:
    assert bench.train(compile=True).curve("loss") == pytest.approx(plain.curve("loss"), rel=1e-5)
    torch._dynamo.reset()
