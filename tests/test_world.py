"""Several machines: what they must share, and what NCCL is told about their GPUs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from diffusion_trainer.utils.config import SettingsError, write_toml
from diffusion_trainer.utils.run_folder import RunFolder
from diffusion_trainer.utils.world import needed_switches
from training import ROOT, Bench, Result, free_port, world


def test_a_folder_that_a_machine_cannot_see_is_named(tmp_path: Path) -> None:
    world().all_see(tmp_path)
    with pytest.raises(SettingsError, match=r"output_dir: .* cannot see .*missing"):
        world().all_see(tmp_path / "missing")


@pytest.mark.parametrize(
    ("names", "reach_each_other", "switches"),
    [
        (["NVIDIA GeForce RTX 4090"], False, ["NCCL_P2P_DISABLE", "NCCL_IB_DISABLE"]),
        (["NVIDIA GeForce RTX 4090"], True, []),
        (["NVIDIA H200"], True, []),
        (["NVIDIA GeForce RTX 5090", "NVIDIA GeForce RTX 3090"], False, []),
    ],
)
def test_switches_only_where_gpus_need_them(names: list[str], reach_each_other: bool, switches: list[str]) -> None:
    assert needed_switches(names, reach_each_other) == switches


def test_processes_that_never_meet_end_and_say_why() -> None:
    """One of two, as when the launcher cannot reach the other's machine."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import conftest\n"
    code += "from diffusion_trainer.utils import world; world.JOIN_SECONDS = 2; world.join_world()"
    port = str(free_port())
    alone = {**os.environ, "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / "tests")], env=alone, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert f"rank 0: the 2 processes did not meet at 127.0.0.1:{port} within 2 s" in done.stderr


def test_two_machines_through_torchrun(tmp_path: Path) -> None:
    """Two launchers that know each other by address and port alone, as on two machines."""
    bench = Bench(tmp_path)
    changes = {"epochs": 1, "pipeline_stages": 2, "micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2}
    plain = bench.train(epochs=1)
    folder = RunFolder.create(tmp_path / "out")
    write_toml(folder.train_toml, bench.settings(**changes))
    write_toml(folder.dataset_toml, bench.dataset())
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    launcher += ["--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    command = [str(ROOT / "train.py"), "--config", str(folder.train_toml), "--run_dir", str(folder.path)]
    machines = [
        subprocess.Popen([*launcher, f"--node_rank={rank}", *command], env={**os.environ}, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    for machine in machines:
        _, said = machine.communicate(timeout=200)
        assert machine.returncode == 0, said.decode("utf-8", "replace")[-3000:]
    assert Result(folder).curve("loss") == pytest.approx(plain.curve("loss"), rel=1e-5)
