"""Flags that do one thing with a run's settings and stop."""

from pathlib import Path

import pytest
from training import Bench


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


def test_sample_draws_and_stops(bench: Bench) -> None:
    result = bench.train(test_sample=True, sample={"prompts": ["a cat"], "width": 64, "height": 64, "steps": 1})
    status = result.folder.read_status()
    assert (status.state, status.step, status.exports) == ("finished", 0, [])
    assert [Path(file).name for file in status.samples] == ["step000000_00.png"]
    assert (result.folder.samples / "step000000_00.png").is_file()


def test_dataset_is_dumped_and_nothing_trained(bench: Bench, tmp_path: Path) -> None:
    result = bench.train(dump_dataset=str(tmp_path / "seen"))
    assert (result.folder.read_status().state, result.folder.read_status().step) == ("finished", 0)
    assert len(list((tmp_path / "seen").glob("*.png"))) == 6
