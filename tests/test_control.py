"""Control files and signals: what a running training is asked to do, it does, and trains on as if nothing was asked."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from diffusion_trainer.diffusion_nodes.train import describe
from diffusion_trainer.utils.control import Control
from diffusion_trainer.utils.loop import Loop
from diffusion_trainer.utils.run_folder import Command, RunFolder, Status
from training import Bench, Result, free_port, world


class Scripted(RunFolder):
    """A run folder in which someone does something each time that the training looks: after every step, and while it
    waits."""

    def __init__(self, path: Path, script: dict[int, Callable[["Scripted"], None]]) -> None:
        super().__init__(path)
        self.looks, self.states = 0, list[str]()
        self._script = script

    def take_requests(self) -> Iterator[Command]:
        self.looks += self.read_status().state in ("training", "paused")
        if act := self._script.pop(self.looks, None):
            act(self)
        yield from super().take_requests()

    def write_status(self, status: Status) -> None:
        self.states.append(status.state)
        super().write_status(status)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def plain(bench: Bench) -> Result:
    return bench.train(epochs=2)


def train(bench: Bench, script: dict, **changes) -> tuple[Result, Scripted]:
    """Trains two epochs; ``script`` counts from the first look after a step."""
    scripted = Scripted(RunFolder.create(bench.root / "out").path, script)
    return bench.train(scripted, epochs=2, **changes), scripted


def test_pause_waits_serves_and_goes_on(bench: Bench, plain: Result) -> None:
    script = {
        3: lambda folder: folder.pause(),
        5: lambda folder: folder.request("save"),
        6: lambda folder: folder.request("resume"),
    }
    result, scripted = train(bench, script)
    assert "paused" in scripted.states
    assert scripted.states[-1] == result.status.state == "finished"
    assert [Path(export).name for export in result.status.exports] == ["step3", "epoch2"]
    assert [folder.name for folder in result.folder.checkpoints()] == ["global_step3", "global_step8"]
    assert not (result.folder.path / "pause").exists()
    assert result.curve("loss") == plain.curve("loss")
    assert all(torch.equal(value, result.lora()[key]) for key, value in plain.lora().items())
    assert max(result.curve("step_seconds")[3:]) < 60, "waiting is no step"


def test_removing_the_file_ends_the_pause_and_stop_does(bench: Bench, plain: Result) -> None:
    script = {2: lambda folder: folder.pause(), 4: lambda folder: folder.unpause(), 6: lambda folder: folder.pause(),
              8: lambda folder: folder.request("save_quit")}  # fmt: skip
    result, scripted = train(bench, script)
    assert scripted.states.count("paused") >= 2
    assert result.status.state == "stopped"
    assert result.status.step == 4
    result.folder.pause()  # left over; a run that is resumed goes on
    resumed = bench.train(RunFolder(result.folder.path), resume=True, epochs=2)
    assert resumed.status.state == "finished"
    assert all(torch.equal(value, resumed.lora()[key]) for key, value in plain.lora().items())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_paused_stops_with_everything_on_disk(bench: Bench, number: int) -> None:
    script = {2: lambda folder: folder.pause(), 4: lambda folder: signal.raise_signal(number)}
    result, _ = train(bench, script)
    assert result.status.state == "stopped"
    assert Path(result.status.exports[-1]).name == "step2"
    assert result.status.checkpoint == str(result.folder.path / "global_step2")


def test_a_second_interrupt_is_at_once(tmp_path: Path) -> None:
    with Control(world(), RunFolder(tmp_path), Status()):
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_asking_to_save_just_after_a_save_writes_nothing_twice(bench: Bench) -> None:
    result, _ = train(bench, {4: lambda folder: folder.request("save")}, save_every_n_epochs=1,
                      checkpoint_every_n_steps=4)  # fmt: skip
    assert [Path(export).name for export in result.status.exports] == ["epoch1", "epoch2"]
    assert [folder.name for folder in result.folder.checkpoints()] == ["global_step4", "global_step8"]


def test_every_phase_has_a_bar_and_the_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    folder = RunFolder(tmp_path)
    control = Control(world(), folder, Status())
    with caplog.at_level("INFO", "diffusion_trainer"):
        control.progress("loading the picture encoder")
        assert folder.read_status().phase == "loading the picture encoder"
        for done in range(6):
            now[0] += 6
            control.progress("encoding pictures", done, 5)
            status = folder.read_status()
            assert (status.phase, status.phase_done, status.phase_total) == ("encoding pictures", done, 5)
            assert status.eta == (pytest.approx((now[0] - 1006) / done * (5 - done)) if done else None)
    assert [record.getMessage() for record in caplog.records] == [
        "loading the picture encoder",
        "encoding pictures [--------------------] 0/5",
        "encoding pictures [########------------] 2/5, 18 s left",
        "encoding pictures [################----] 4/5, 6 s left",
        "encoding pictures [####################] 5/5",
    ]


def test_bytes_have_a_unit_and_a_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    folder = RunFolder(tmp_path)
    control = Control(world(), folder, Status(state="caching"))
    with caplog.at_level("INFO", "diffusion_trainer"):
        control.progress("loading the model")
        now[0] += 30  # libraries are loaded
        control.progress("loading the model", 1_000_000, 24_000_000_000, "bytes")
        assert caplog.records[-1].getMessage() == "loading the model [--------------------] 0.0/24.0 GB"
        now[0] += 12
        control.progress("loading the model", 6_000_000_000, 24_000_000_000, "bytes")
    bar = "[#####---------------]"
    assert caplog.records[-1].getMessage() == f"loading the model {bar} 6.0/24.0 GB, 0.5 GB/s, 36 s left"
    assert describe(folder.read_status()) == "loading the model 6.0/24.0 GB, 0.5 GB/s · 36 s left"


class Recorded(RunFolder):
    """A run folder that keeps what is said of the phases."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.said = list[tuple[str, int, int]]()

    def write_status(self, status: Status) -> None:
        self.said.append((status.phase, status.phase_done, status.phase_total))
        super().write_status(status)


def test_weights_are_counted_as_they_are_read(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Recorded(RunFolder.create(bench.root / "out").path)
    monkeypatch.setattr(Control, "say", said_at_once)
    bench.train(folder, max_steps=1, regenerate_cache=True, sample={"prompts": ["a cat", "a dog"]},
                blocks_to_swap=1, model={"transformer_dtype": "nf4"})  # fmt: skip
    for phase in ("loading the picture encoder", "loading text encoder clip", "loading text encoder t5",
                  "loading the model", "drawing samples"):  # fmt: skip
        counts = [(done, total) for name, done, total in folder.said if name == phase and total]
        assert len({total for _, total in counts}) == 1, phase
        assert [done for done, _ in counts] == sorted(done for done, _ in counts)
        assert counts[-1][0] == counts[-1][1] > 0, phase
        assert len(counts) > 2, phase


def said_at_once(control: Control, now: bool = False, **changes: object) -> None:
    SAY(control, True, **changes)


SAY = Control.say


def test_loading_the_model_can_be_cancelled(bench: Bench) -> None:
    class Cancelled(RunFolder):
        def take_requests(self) -> Iterator[Command]:
            if self.read_status().phase == "loading the model":
                yield "save_quit"

    result = bench.train(Cancelled(RunFolder.create(bench.root / "out").path))
    assert (result.status.state, result.status.step, result.status.exports) == ("stopped", 0, [])


RANK = """
import sys, time
sys.path.insert(0, {tests!r})
import conftest
from pathlib import Path
from diffusion_trainer.diffusion_nodes.train import describe
from diffusion_trainer.utils.control import Control
from diffusion_trainer.utils.progress import Stopped
from diffusion_trainer.utils.run_folder import RunFolder, Status
from diffusion_trainer.utils.world import join_world

world, folder = join_world(), RunFolder(Path({folder!r}))
with Control(world, folder, Status()) as control:
    done = 0
    try:
        for done in range(0 if world.rank == 2 else 600):  # rank 2 has nothing to do and waits for the others
            if done == 5 and world.rank == 0:
                folder.request("save_quit")
            time.sleep(0.1)
            control.progress("encoding", done, 600)
    except Stopped:
        pass
    try:
        control.meet()
    except Stopped:
        print("stopped", done)
world.leave()
"""


def test_all_ranks_stop_while_caching_when_one_is_asked(tmp_path: Path) -> None:
    script = RANK.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    port = str(free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            stdout=subprocess.PIPE,
            env={**os.environ, "RANK": str(n), "LOCAL_RANK": str(n), "WORLD_SIZE": "3", "MASTER_PORT": port},
        )
        for n in range(3)
    ]
    said = [rank.communicate(timeout=240)[0].decode().splitlines()[-1].split() for rank in ranks]
    assert [words[0] for words in said] == ["stopped"] * 3
    assert int(said[1][1]) < 300


def test_the_first_step_is_told_when_it_is_done_and_later_ones_a_step_later(bench: Bench, monkeypatch) -> None:
    told, usual = [], Loop._step

    def step(loop: Loop, *arguments) -> None:
        told.append(loop.control.status.step)
        usual(loop, *arguments)

    monkeypatch.setattr(Loop, "_step", step)
    bench.train(max_steps=4)
    assert told == [0, 1, 1, 2]
