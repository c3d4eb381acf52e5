"""Full fine-tuning, ZeRO, adapters and optimizers on a GPU: the same losses as without its speed features."""

from typing import Any

import pytest
from training import Bench, Result

pytestmark = pytest.mark.gpu
FULL: dict[str, Any] = {"adapter": None, "epochs": 2, "model": {"dtype": "bfloat16"}, "gradient_clipping": 0.0}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("gpu_weights"))


@pytest.fixture(scope="module")
def plain(bench: Bench) -> Result:
    return bench.train(**FULL, optimizer={"lr": 1e-3}, cuda_graphs=False)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"compile": True},
        {"micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2},
        {"zero_stage": 1},
        {"zero_stage": 2},
        {"zero_stage": 3},
        {"zero_stage": 3, "compile": True},
        {"optimizer": {"lr": 1e-3, "gradient_release": True}},
        {"optimizer": {"lr": 1e-3, "offload": True}},
        {"blocks_to_swap": 2},
    ],
    ids=str,
)
def test_ways_of_full_fine_tuning(bench: Bench, plain: Result, changes: dict[str, Any]) -> None:
    result = bench.train(**{**FULL, "optimizer": {"lr": 1e-3}, **changes})
    assert result.curve("loss") == pytest.approx(plain.curve("loss"), rel=1e-2)
    assert result.curve("grad_norm") == pytest.approx(plain.curve("grad_norm"), rel=5e-2)


@pytest.mark.parametrize("kind", ["adamw8bit", "AdamW8bitKahan", "adamw_optimi", "automagic", "genericoptim", "Muon"])
def test_optimizers_train_all_weights(bench: Bench, kind: str) -> None:
    lr = {} if kind == "automagic" else {"lr": 1e-3}
    still = bench.train(**FULL, optimizer={"type": "sgd", "lr": 0.0})
    result = bench.train(**FULL, optimizer={"type": kind, **lr})
    assert result.curve("epoch_loss")[-1] < 1.02 * still.curve("epoch_loss")[-1]


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
@pytest.mark.parametrize(
    "adapter",
    [{"type": "lora", "use_dora": True}, {"type": "loha"}, {"type": "lokr"}, {"type": "lora", "use_rslora": True}],
    ids=["dora", "loha", "lokr", "rslora"],
)
def test_adapters_compiled_or_not(bench: Bench, adapter: dict[str, Any], graphs: bool) -> None:
    changes: dict[str, Any] = {"adapter": {**adapter, "rank": 4}, "epochs": 2}
    plain = bench.train(**changes, cuda_graphs=False)
    result = bench.train(**changes, compile=True, cuda_graphs=graphs)
    assert result.curve("loss") == pytest.approx(plain.curve("loss"), rel=2e-3)
