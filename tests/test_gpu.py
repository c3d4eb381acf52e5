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
    ],
    ids=["graphs", "compiled graphs", "compiled", "accumulated graphs"],
)
def test_graphs_and_compilation_change_nothing(bench: Bench, plain: Result, changes: dict) -> None:
    result = bench.train(**changes)
    assert result.curve("loss") == pytest.approx(plain.curve("loss"), rel=2e-3)
    assert result.curve("grad_norm") == pytest.approx(plain.curve("grad_norm"), rel=2e-2)


def test_resumes_to_the_bit(bench: Bench, plain: Result) -> None:
    from diffusion_trainer.utils.run_folder import RunFolder

    first = bench.train(max_steps=7)
    resumed = bench.train(RunFolder(first.folder.path), resume=True, cuda_graphs=False)
    assert resumed.curve("loss") == pytest.approx(plain.curve("loss"), rel=1e-5)
