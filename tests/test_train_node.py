"""The Train and TensorBoard nodes, driven as ComfyUI drives them, over real processes."""

import asyncio
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from diffusion_trainer.diffusion_nodes import comfy, files, monitor
from diffusion_trainer.diffusion_nodes import train as node
from diffusion_trainer.diffusion_nodes.monitor import OutputDirPassthrough, TensorBoardMonitor
from diffusion_trainer.diffusion_nodes.train import Train, describe
from diffusion_trainer.models import families
from diffusion_trainer.nodes import NODE_CLASS_MAPPINGS
from diffusion_trainer.utils import launch, tensorboard
from diffusion_trainer.utils.config import SettingsError, read_toml
from diffusion_trainer.utils.processes import ProcessError, free_port, members
from diffusion_trainer.utils.run_folder import RunFolder, Status

SCRIPT = Path(__file__).with_name("trainer_script.py")
MODEL: dict[str, Any] = {}
"""The [model] table of a miniature; written when the first test wants it."""


@pytest.fixture(scope="module", autouse=True)
def model(tmp_path_factory: pytest.TempPathFactory) -> None:
    MODEL.update(families()["flux"].write_miniature(tmp_path_factory.mktemp("models") / "it's flux"))


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A base directory without ComfyUI, and a registry of this test's own."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(node, "POLL_SECONDS", 0.05)
    folder = tmp_path / "it's ComfyUI"
    folder.mkdir()
    before = comfy.base_directory()
    comfy.set_base_directory(folder)
    yield folder
    comfy.set_base_directory(before)
    comfy._interrupt.clear()
    for run in launch.running():
        run.stop(0)
    for server in tensorboard.running():
        tensorboard.stop(server)


@pytest.fixture
def behave(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Says what the process does that stands for train.py."""
    real = launch.start

    def set_behaviour(**behaviour: Any) -> None:
        def start(folder: RunFolder, **options: Any) -> launch.Run:
            (folder.path / "behaviour.json").write_text(json.dumps({"steps": 5, **behaviour}))
            return real(folder, **options, script=SCRIPT, launcher=())

        monkeypatch.setattr(launch, "start", start)

    set_behaviour()
    return set_behaviour


def train_config(**values: Any) -> dict[str, Any]:
    return {"output_dir": "output/training", "model": MODEL,
            "adapter": {"type": "lora", "rank": 4}, "optimizer": {"type": "adamw", "lr": 1e-3}} | values  # fmt: skip


DATASET = {"resolutions": [64], "directory": [{"path": "input/pics", "num_repeats": 1}]}


def train(**inputs: Any) -> tuple[str, str, str, str]:
    """One queueing of the node."""
    config = inputs.pop("config", train_config())
    return asyncio.run(Train().execute(inputs.pop("dataset", DATASET), config, "", **inputs))


def until(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


def test_trains_and_publishes(base: Path, behave: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    behave(seconds=0.2)
    status, log, run_dir, lora = train(unique_id="7")
    assert status == "finished: step 5 of 5, loss 1 → 0.2"
    assert "resume=None" in log
    run = RunFolder(Path(run_dir))
    assert run.path.parent == base / "output" / "training"
    written = read_toml(run.train_toml)
    assert written["dataset"] == str(run.dataset_toml)
    assert written["output_dir"] == str(run.path.parent)
    assert written["model"]["diffusers_path"] == MODEL["diffusers_path"]
    assert read_toml(run.dataset_toml)["directory"][0]["path"] == str(base / "input" / "pics")
    assert lora == str(base / "output" / "loras" / f"{run.path.name}.safetensors")
    assert Path(lora).read_bytes() == b"weights of " + run.path.name.encode()
    assert "loss" in caplog.text
    assert "s/step" in caplog.text


def test_the_environment_reaches_the_processes_and_is_recorded(base: Path, behave: Callable[..., None]) -> None:
    behave(seconds=0.01)
    (environment,) = NODE_CLASS_MAPPINGS["RunEnvironmentNode"]().environment(
        cuda_allocator="expandable_segments:True",
        nccl_p2p_disable=True,
        variables="NCCL_DEBUG=INFO\nOMP_NUM_THREADS=3",
    )
    run = Path(train(environment=environment)[2])
    seen = json.loads((run / "environment0.json").read_text())
    wanted = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "NCCL_P2P_DISABLE": "1", "NCCL_DEBUG": "INFO",
              "OMP_NUM_THREADS": "3"}  # fmt: skip
    assert {name: seen.get(name) for name in wanted} == wanted
    assert "NCCL_IB_DISABLE" not in seen
    recorded = read_toml(run / "train.toml")["environment"]
    assert recorded["variables"] == ["NCCL_DEBUG=INFO", "OMP_NUM_THREADS=3"]
    assert recorded["nccl_p2p_disable"] is True


@pytest.mark.parametrize(
    ("values", "message"),
    [({"variables": "LD_PRELOAD=/tmp/x.so"}, "environment.variables: 'LD_PRELOAD=/tmp/x.so' cannot be set here"),
     ({"visible_gpus": "1, 1"}, "environment.visible_gpus: must be different numbers"),
     ({"hostfile": "/nowhere"}, "environment.hostfile: '/nowhere' is not a file"),
     ({"num_nodes": 2}, "environment.num_nodes: needs a hostfile"),
     ({"cuda_allocator": "expandable"}, "environment.cuda_allocator: must be name:value pairs")],
)  # fmt: skip
def test_an_environment_that_cannot_be(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        NODE_CLASS_MAPPINGS["RunEnvironmentNode"]().environment(**values)
    assert message in str(caught.value)


def test_gpus_and_machines_go_to_the_launcher(base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[dict[str, Any]] = []

    def start(folder: RunFolder, **options: Any) -> launch.Run:
        started.append(options)
        raise ProcessError("enough")

    monkeypatch.setattr(launch, "start", start)
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=2\nb slots=2\n")
    for environment in ({"visible_gpus": [1], "master_port": 29600}, {"hostfile": str(hosts), "num_nodes": 2}):
        with pytest.raises(ProcessError, match="enough"):
            train(environment=environment)
    assert (started[0]["gpus"], started[0]["master_port"], started[0]["machines"]) == ([1], 29600, [])
    assert started[1]["machines"] == [f"--hostfile={hosts}", "--num_nodes=2"]
    assert not list((base / "output/training").iterdir())


def test_writing_follows_one_rule(base: Path, behave: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt may hand Train tables that no node of ours made."""
    behave(seconds=0.01)
    monkeypatch.setattr(files, "_only_this_machine", lambda: False)
    for key in ("output_dir", "cache_dir", "dump_dataset"):
        with pytest.raises(SettingsError, match=f"{key}: '/somewhere' is outside ComfyUI's"):
            train(config=train_config(**{key: "/somewhere"}))


def test_a_whole_model_goes_to_its_own_folder(base: Path, behave: Callable[..., None]) -> None:
    behave(seconds=0.01, export="model.safetensors")
    _, _, run_dir, model = train()
    assert model == str(base / "output" / "diffusion_models" / f"{Path(run_dir).name}.safetensors")
    assert Path(model).read_bytes() == b"weights of " + Path(run_dir).name.encode()


def test_other_nodes_run_meanwhile(base: Path, behave: Callable[..., None]) -> None:
    behave(seconds=0.1)

    async def prompt() -> int:
        training = asyncio.ensure_future(Train().execute(DATASET, train_config()))
        turns = 0
        while not training.done():
            await asyncio.sleep(0.02)
            turns += 1
        assert training.result()[0].startswith("finished")
        return turns

    assert asyncio.run(prompt()) > 10


def test_cancel_saves_and_publishes(base: Path, behave: Callable[..., None]) -> None:
    behave(steps=100000)

    async def prompt() -> None:
        training = asyncio.ensure_future(Train().execute(DATASET, train_config()))
        while not any(run.status().state == "training" for run in launch.running()):
            await asyncio.sleep(0.05)
        comfy.interrupt()
        await training

    with pytest.raises(comfy.Interrupted):
        asyncio.run(prompt())
    (run,) = RunFolder.all(base / "output" / "training")
    assert run.read_status().state == "stopped"
    assert (base / "output" / "loras" / f"{run.path.name}.safetensors").exists()
    assert not members(str(run.path))


def test_prompt_that_ends_stops_the_run(base: Path, behave: Callable[..., None]) -> None:
    """Another node took the Cancel: ComfyUI's event loop ends and cancels this task."""
    behave(steps=100000, stubborn=True)

    async def prompt() -> None:
        training = asyncio.ensure_future(Train().execute(DATASET, train_config(), grace_seconds=0))
        while not any(run.status().state == "training" for run in launch.running()):
            await asyncio.sleep(0.05)
        assert not training.done()

    asyncio.run(prompt())
    (run,) = RunFolder.all(base / "output" / "training")
    assert not members(str(run.path))


def test_same_settings_join_the_live_run(base: Path, behave: Callable[..., None]) -> None:
    behave(steps=60, seconds=0.05)
    status, _, run_dir, lora = train(wait=False)
    assert status.startswith("running")
    assert lora == ""
    with pytest.raises(ProcessError, match="share_gpu"):
        train(config=train_config(epochs=3))
    assert len(RunFolder.all(base / "output" / "training")) == 1, "the refused run left its folder"
    status, _, joined, lora = train()
    assert joined == run_dir
    assert status.startswith("finished")
    assert Path(lora).exists()
    status, _, again, _ = train()
    assert again != run_dir, "a finished training is trained anew"


def test_shared_gpu(base: Path, behave: Callable[..., None]) -> None:
    behave(steps=100000)
    _, _, first, _ = train(wait=False)
    behave()
    assert train(config=train_config(epochs=3), share_gpu=True)[0].startswith("finished")
    for run in launch.running():
        assert run.path == first
        run.stop(10)


def test_failure_raises_with_cause(base: Path, behave: Callable[..., None]) -> None:
    behave(raise_at=2)
    with pytest.raises(RuntimeError, match=r"file is missing: '/models/missing.safetensors'[\s\S]*Traceback"):
        train()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"config": train_config(optimizer={"type": "adamw", "lr": -1})}, "optimizer.lr: must be at least 0"),
        ({"config": train_config(epocs=3)}, "epocs: unknown option; did you mean 'epochs'"),
        ({"dataset": {"directory": [{"path": "x", "num_repeats": 0}]}}, "num_repeats: must be more than 0"),
        ({"config": train_config(output_dir="/proc/nowhere")}, "output_dir: '/proc/nowhere' cannot be written"),
        (
            {"config": train_config(model={"type": "flux", "diffusers_path": "/no/flux"})},
            "model.diffusers_path: '/no/flux' does not exist",
        ),
        ({"resume": "latest"}, "resume: no run in .* has a checkpoint; choose 'new run'"),
        ({"resume": "latest", "resume_from_checkpoint": "20260101_00-00-00"}, "contradict each other"),
    ],
)
def test_bad_input_leaves_nothing(base: Path, behave: Callable[..., None], inputs: dict, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        train(**inputs)
    assert not RunFolder.all(base / "output" / "training")
    assert not launch.running()


def test_a_picture_for_a_model_that_draws_without_leaves_nothing(
    base: Path, behave: Callable[..., None], tmp_path: Path
) -> None:
    sample = {"prompts": ["a ball"], "images": ["/first.png"], "every_n_epochs": 1}
    config = train_config(model=families()["sdxl"].write_miniature(tmp_path / "sdxl"), sample=sample)
    with pytest.raises(SettingsError, match=r"sample\.images: this SDXL model .* leave images out"):
        train(config=config)
    assert not RunFolder.all(base / "output" / "training")


def test_missing_deepspeed(base: Path, behave: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"DeepSpeed is not installed.*-m pip install -r .*requirements.txt"):
        train()


def test_resume(base: Path, behave: Callable[..., None]) -> None:
    _, _, first, _ = train()
    (Path(first) / "global_step5").mkdir()
    _, _, without, _ = train()
    name = Path(first).name
    assert f"resume={name}" in train(resume="latest")[1]
    _, log, run_dir, _ = train(resume=name, config=train_config(epochs=7))
    assert (run_dir, f"resume={name}" in log) == (first, True)
    assert read_toml(Path(first) / "train.toml")["epochs"] == 7
    assert f"resume={name}" in train(resume_from_checkpoint=f" {name} ")[1]
    assert f"resume={name}" in train(config=train_config(resume_from_checkpoint=True))[1]
    with pytest.raises(SettingsError, match=f"did you mean '{name}'"):
        train(resume=Path(without).name)
    assert Train.INPUT_TYPES()["optional"]["resume"][0][:2] == ["new run", "latest"]
    assert set(Train.INPUT_TYPES()["optional"]["resume"][0][2:]) == {name, Path(without).name}


def test_declaration() -> None:
    inputs = Train.INPUT_TYPES()
    assert list(inputs["required"]) == ["dataset_config", "train_config", "config_path"]
    optional = list(inputs["optional"])
    assert optional[0] == "resume_from_checkpoint"
    assert {"wait", "resume", "share_gpu", "grace_seconds"} <= set(optional)  # test_contract has the whole order
    assert list(TensorBoardMonitor.INPUT_TYPES()["required"]) == ["output_dir", "port", "host", "is_new_training"]
    assert list(TensorBoardMonitor.INPUT_TYPES()["optional"]) == ["action", "survive_restart"]
    for cls in (Train, TensorBoardMonitor, OutputDirPassthrough):
        assert cls.DESCRIPTION
        assert len(cls.RETURN_TYPES) == len(cls.RETURN_NAMES) == len(cls.OUTPUT_TOOLTIPS)
        for section in ("required", "optional"):
            for _, options in cls.INPUT_TYPES().get(section, {}).values():
                assert options["tooltip"]
    assert math.isnan(Train.IS_CHANGED(resume="x"))
    assert Train.VALIDATE_INPUTS() is True
    assert Train.VALIDATE_INPUTS(resume="20200101_00-00-00_2") is True
    assert "not a run" in str(Train.VALIDATE_INPUTS(resume="../x"))


def test_describe() -> None:
    status = Status(state="training", step=120, total_steps=1000, loss=0.0831, seconds_per_step=2.11, eta=840)
    assert describe(status) == "step 120/1000 · loss 0.0831 · 2.1 s/step · 14 min left"
    status = Status(state="caching", phase="encoding pictures", phase_done=2, phase_total=9, eta=200)
    assert describe(status) == "encoding pictures 2/9 · 3 min left"
    assert describe(Status(state="caching", phase="loading the picture encoder")) == "loading the picture encoder"
    assert describe(Status()) == "starting"


# -- TensorBoard -----------------------------------------------------------------------------------------


def watch(output_dir: Path | str, **inputs: Any) -> tuple[str, str]:
    inputs = {"is_new_training": False, "survive_restart": False} | inputs
    return asyncio.run(TensorBoardMonitor().execute(str(output_dir), **inputs))


def test_tensorboard_follows_the_newest_run(base: Path) -> None:
    output = base / "output" / "training"
    port = free_port()
    first = RunFolder.create(output)
    url, status = watch("output/training", port=port)
    assert url == f"http://localhost:{port}/"
    assert first.path.name in status
    assert watch(output, action="status") == (url, f"{url} shows {first.path}")
    second = RunFolder.create(output)
    url, status = watch(output, port=port)
    assert (url, second.path.name in status) == (f"http://localhost:{port}/", True)
    assert len(tensorboard.running()) == 1
    assert watch(output, port=port, action="kill_port") == ("", f"stopped {url}")
    assert "nothing was ended" in watch(output, port=port, action="kill_port")[1]
    assert "no TensorBoard of ours" in watch(output, action="stop")[1]
    with pytest.raises(SettingsError, match=r"output_dir: .*missing' does not exist"):
        watch(output / "missing", port=port)


def test_tensorboard_waits_for_the_run_of_its_prompt(base: Path, monkeypatch: pytest.MonkeyPatch,
                                                     behave: Callable[..., None]) -> None:  # fmt: skip
    behave(steps=100000)
    old = RunFolder.create(base / "output" / "training")

    async def prompt() -> tuple[str, str]:
        watching = asyncio.ensure_future(TensorBoardMonitor().execute(
            str(base / "output" / "training"), port=free_port(), survive_restart=False,
            prompt={"1": {"class_type": "Train"}}))  # fmt: skip
        await asyncio.sleep(0.3)
        assert not watching.done()
        _, _, run_dir, _ = await Train().execute(DATASET, train_config(), wait=False)
        await asyncio.sleep(0.5)
        assert not watching.done(), "there is no curve yet"
        (Path(run_dir) / "events.out.tfevents.1").touch()
        return run_dir, (await watching)[1]

    run_dir, status = asyncio.run(prompt())
    assert Path(run_dir).name in status
    assert old.path.name != Path(run_dir).name
    monkeypatch.setattr(monitor, "NEW_RUN_SECONDS", 0.5)
    (Path(run_dir) / "events.out.tfevents.1").unlink()
    assert watch(run_dir, is_new_training=True)[1] == status
    launch.running()[0].stop(10)


def test_passthrough() -> None:
    assert OutputDirPassthrough().passthrough("/a b") == ("/a b",)


# -- ComfyUI's folders -------------------------------------------------------------------------------------


def test_resolve(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (base / "input" / "pics").mkdir(parents=True)
    (base / "models" / "vae").mkdir(parents=True)
    (base / "models" / "vae" / "ae.safetensors").touch()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert comfy.resolve("pics") == comfy.resolve("input/pics") == str(base / "input" / "pics")
    assert comfy.resolve(r'"input\pics"') == str(base / "input" / "pics")
    assert comfy.resolve("ae.safetensors") == str(base / "models" / "vae" / "ae.safetensors")
    assert comfy.resolve("here") == str(tmp_path / "here")
    assert comfy.resolve("output/new") == str(base / "output" / "new")
    assert comfy.resolve("nowhere") == str(base / "nowhere")
    assert comfy.resolve(r"C:\pics") == "/mnt/c/pics"
    assert comfy.model_files("vae") == ["ae.safetensors"]
    assert comfy.model_path("vae", "ae.safetensors") == base / "models" / "vae" / "ae.safetensors"
    assert comfy.model_path("vae", "../../secret") is None
