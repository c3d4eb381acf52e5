"""The speed features of a GPU change no result."""

import pytest
from training import Bench, Result

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=["flux", "wan"])
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("gpu"), request.param)


@pytest.fixture(scope="module")
def plain(bench: Bench) -> Result:
    return bench.train(cuda_graphs=False)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"compile": True},
        {"compile": True, "cuda_graphs": False},
        {"micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2},
        {"blocks_to_swap": 100},
        {"blocks_to_swap": 100, "cuda_graphs": False},
        {"blocks_to_swap": 100, "compile": True},
        {"blocks_to_swap": 100, "activation_checkpointing": "unsloth"},
        {"activation_checkpointing": "selective"},
        {"activation_checkpointing": "unsloth", "compile": True},
    ],
    ids=[
        "graphs",
        "compiled graphs",
        "compiled",
        "accumulated graphs",
        "swapped graphs",
        "swapped",
        "compiled swapped graphs",
        "everything in main memory",
        "selective",
        "compiled, inputs in main memory",
    ],
)
def test_speed_and_memory_change_nothing(bench: Bench, plain: Result, changes: dict) -> None:
    result = bench.train(**changes)
    assert result.curve("loss") == pytest.approx(plain.curve("loss"), rel=2e-3)
    assert result.curve("grad_norm") == pytest.approx(plain.curve("grad_norm"), rel=2e-2)


def test_resumes_to_the_bit(bench: Bench, plain: Result) -> None:
    from diffusion_trainer.utils.run_folder import RunFolder

    first = bench.train(max_steps=7)
    resumed = bench.train(RunFolder(first.folder.path), resume=True, cuda_graphs=False)
    assert resumed.curve("loss") == pytest.approx(plain.curve("loss"), rel=1e-5)


@pytest.mark.parametrize("name", ["float8", "int8", "nf4"])
def test_stored_weights_swapped_and_compiled(bench: Bench, name: str) -> None:
    model = {"transformer_dtype": name, "dtype": "bfloat16"}
    exact, stored = bench.train(model={"dtype": "bfloat16"}).curve("loss"), bench.train(model=model).curve("loss")
    assert stored == pytest.approx(exact, rel=0.15)
    fast = bench.train(model=model, compile=True, blocks_to_swap=100)
    assert fast.curve("loss") == pytest.approx(stored, rel=2e-2)
