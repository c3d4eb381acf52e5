"""The Train node: settings from the canvas become a run folder and a run, which it then watches."""

from __future__ import annotations

import asyncio
import difflib
import hashlib
import importlib.util
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..models import families
from ..utils import launch
from ..utils.config import SettingsError, read_toml, write_toml
from ..utils.dataset_settings import parse_dataset_settings
from ..utils.environment import Environment
from ..utils.failure import log_tail
from ..utils.machines import read_hostfile
from ..utils.processes import ProcessError
from ..utils.progress import amount
from ..utils.run_folder import ENDED, RunFolder, Status, duration
from ..utils.settings import TrainSettings, as_toml, family_of, parse_train_settings
from . import comfy, files
from .sample_sheet import sample_sheet
from .schema import widget

logger = logging.getLogger(__name__)

NEW_RUN, LATEST = "new run", "latest"
LISTED_RUNS = 50
POLL_SECONDS = 0.5
RUN_OPTIONS = ("reset_dataloader", "regenerate_cache", "cache_only", "trust_cache", "i_know_what_i_am_doing",
               "dump_dataset", "reset_optimizer_params")  # fmt: skip
"""Settings that are inputs here, because they concern one run and not the training as such."""
_RUN_NAME = re.compile(r"\d{8}_\d{2}-\d{2}-\d{2}(_\d+)?")


class Train:
    CATEGORY = "Diffusion-Pipe/Train"
    DESCRIPTION = (
        "Starts the training in a process of its own and shows how it goes. It goes on when ComfyUI is closed; "
        "queueing the same graph then shows it again. Cancel saves the LoRA and a checkpoint and ends it. "
        "Every queueing trains anew: bypass this node while you work on something else."
    )
    SEARCH_ALIASES = ("train lora", "start training", "fine-tune")
    FUNCTION = "execute"
    OUTPUT_NODE = True
    RETURN_TYPES = ("STRING", "STRING", "STRING", "STRING")
    RETURN_NAMES = ("status", "log_output", "run_dir", "lora_path")
    OUTPUT_TOOLTIPS = (
        "How the training ended, in one line.",
        "The last lines of the training's log.",
        "The run folder: settings, log, curves, exports and checkpoints.",
        "The finished LoRA in ComfyUI's output/loras, where LoRA loaders find it; empty if there is none.",
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:
        names = [run.path.name for run in RunFolder.all(comfy.runs_directory())][: -LISTED_RUNS - 1 : -1]
        return {
            "required": {
                "dataset_config": ("DATASET_CONFIG", {"tooltip": "From General Dataset Config."}),
                "train_config": ("TRAIN_CONFIG", {"tooltip": "From General Training Config."}),
                "config_path": ("config_path", {
                    "tooltip": "From General Training Config. The run keeps its own copy of all settings."}),
            },
            "optional": {
                "resume_from_checkpoint": ("STRING", {
                    "default": "", "tooltip": "Name of a run folder to go on with. Empty: what 'resume' says."}),
                **{key: widget(TrainSettings, key).declaration() for key in RUN_OPTIONS},
                "wait": ("BOOLEAN", {
                    "default": True, "tooltip": "Stay here until the training has ended. Off: go on once it runs; the "
                    "LoRA then stays in the run folder."}),
                "resume": ([NEW_RUN, LATEST, *names], {
                    "default": NEW_RUN, "tooltip": "Begin a new run, or go on from the last checkpoint of the newest "
                    "run or of the one chosen."}),
                "share_gpu": ("BOOLEAN", {
                    "default": False, "advanced": True, "tooltip": "Start although another training uses the same GPU. "
                    "Both then need memory for themselves."}),
                "environment": ("RUN_ENVIRONMENT", {
                    "tooltip": "GPUs, machines and variables, from Run Environment."}),
                "grace_seconds": ("INT", {
                    "default": 60, "min": 0, "max": 3600, "step": 1, "advanced": True, "tooltip": "After Cancel the "
                    "training has so many seconds to save; then it is ended by force."}),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }  # fmt: skip

    @classmethod
    def IS_CHANGED(cls, **_: Any) -> float:
        """Unlike anything, itself included: a training is never taken from ComfyUI's cache."""
        return float("nan")

    @classmethod
    def VALIDATE_INPUTS(cls, resume: str = NEW_RUN) -> bool | str:
        """Accepts runs that were listed once, or lie in another output folder, besides those listed now."""
        if resume in (None, NEW_RUN, LATEST) or _RUN_NAME.fullmatch(str(resume)):
            return True
        return f"resume: '{resume}' is not a run; choose '{NEW_RUN}', '{LATEST}' or a run folder's name"

    async def execute(
        self, dataset_config: Mapping[str, Any], train_config: Mapping[str, Any], config_path: str = "",
        resume_from_checkpoint: str = "", wait: bool = True, resume: str = NEW_RUN, share_gpu: bool = False,
        grace_seconds: int = 60, environment: Mapping[str, Any] | None = None, unique_id: str | None = None,
        **run_options: Any,
    ) -> tuple[str, str, str, str]:  # fmt: skip
        """Trains, or joins the run that already trains with these settings.

        Raises:
            SettingsError: A setting, the output folder or the run to resume cannot be used.
            ProcessError: The GPUs are in use, or the processes cannot be started.
            RuntimeError: The training failed; holds the cause and the end of its log.
        """
        given = {"environment": dict(environment)} if environment else {}
        train, dataset = checked_tables({**train_config, **_chosen(run_options), **given}, dataset_config)
        asked = _asked_run(resume_from_checkpoint, resume, train.pop("resume_from_checkpoint", False))
        identity = hashlib.sha256(json.dumps([train, dataset], sort_keys=True).encode()).hexdigest()
        run = launch.find(identity)
        if run:
            comfy.progress_text(f"joined the run {run.name}, which is already going on", unique_id)
        else:
            run = _start(train, dataset, identity, asked, share_gpu)
        try:
            outcome = await _watch(run, unique_id, until_it_runs=not wait)
        except GeneratorExit:  # the server is going away; the run is to go on
            raise
        except BaseException:  # Cancel, be it noticed here or by another node: ComfyUI then ends this task
            comfy.progress_text(f"stopping; it has {grace_seconds} s to save", unique_id)
            # All of it in the thread: the server may end this task a second time, but waits for its threads
            await asyncio.to_thread(_stop, run, grace_seconds, unique_id)
            raise
        return _result(run, outcome, unique_id)


def _stop(run: launch.Run, grace_seconds: int, unique_id: str | None) -> None:
    run.stop(grace_seconds)
    saved = _publish(run) or "nothing was exported"
    comfy.progress_text(f"stopped at step {run.status().step}; {saved}", unique_id)


def checked_tables(
    train_config: Mapping[str, Any], dataset_config: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The checked tables, with absolute paths: the trainer works in another folder than ComfyUI."""
    train = as_toml(parse_train_settings(train_config))
    dataset = as_toml(parse_dataset_settings(dataset_config))
    train["output_dir"] = files.output_folder(comfy.resolve(train["output_dir"]))
    for key in ("cache_dir", "dump_dataset"):
        if train.get(key):
            train[key] = str(files.folder(key, comfy.resolve(train[key])))
    train.pop("dataset", None)
    for directory in dataset["directory"]:
        for key in ("path", "control_path", "mask_path", "default_mask_file"):
            if directory.get(key):
                directory[key] = comfy.resolve(directory[key])
        directory["control_paths"] = [comfy.resolve(path) for path in directory.get("control_paths") or []]
    return train, dataset


def _chosen(run_options: Mapping[str, Any]) -> dict[str, Any]:
    """What is switched on or filled in, of the settings that are inputs of this node."""
    read = {key: widget(TrainSettings, key).read(value) for key, value in run_options.items()}
    return {key: value for key, value in read.items() if value}


def _asked_run(typed: str, chosen: str, configured: bool | str) -> str:
    """The name of the run to resume, "latest", or empty for a new one."""
    typed = (typed or "").strip()
    chosen = "" if chosen in (None, NEW_RUN) else chosen
    if typed and chosen and typed != chosen:
        raise SettingsError(f"resume_from_checkpoint: '{typed}' and resume: '{chosen}' contradict each other; "
                            f"empty the one or set the other to '{NEW_RUN}'")  # fmt: skip
    return typed or chosen or (LATEST if configured is True else configured or "")


def _run_to_resume(output_dir: Path, asked: str) -> RunFolder:
    runs = {run.path.name: run for run in RunFolder.all(output_dir) if run.checkpoints()}
    name = list(runs)[-1] if asked == LATEST and runs else asked
    if name in runs:
        return runs[name]
    if asked == LATEST or not runs:
        raise SettingsError(f"resume: no run in '{output_dir}' has a checkpoint; choose '{NEW_RUN}'")
    near = (difflib.get_close_matches(name, runs, 1) or list(runs)[-1:])[0]
    raise SettingsError(f"resume: '{output_dir}' has no run '{name}' with a checkpoint; did you mean '{near}'?")


def _start(train: dict[str, Any], dataset: dict[str, Any], identity: str, asked: str, share_gpu: bool) -> launch.Run:
    from ..utils.samples import check_images  # loads torch

    settings = parse_train_settings(train)
    environment, num_gpus = settings.environment, settings.number_of_gpus
    _check_deepspeed()
    machines = _machines(environment, num_gpus)
    if not machines:
        _check_gpus(num_gpus, environment.visible_gpus or [])
    family = family_of(settings)
    family.check_files()
    check_images(settings.sample, family)
    output_dir = Path(train["output_dir"])
    try:
        folder = _run_to_resume(output_dir, asked) if asked else RunFolder.create(output_dir)
        write_toml(folder.dataset_toml, dataset)
        write_toml(folder.train_toml, train | {"dataset": str(folder.dataset_toml.resolve())})
    except OSError as error:
        raise SettingsError(f"output_dir: '{output_dir}' cannot be written ({error.strerror}); "
                            "choose another folder") from error  # fmt: skip
    comfy.free_vram()
    resume = folder.path.name if asked else None
    try:
        return launch.start(
            folder, num_gpus=num_gpus, identity=identity, resume=resume, gpus=environment.visible_gpus,
            env=environment.as_variables(), master_port=environment.master_port, machines=machines,
            allow_shared=share_gpu)  # fmt: skip
    except ProcessError:
        if not asked:
            shutil.rmtree(folder.path)  # made a moment ago, for a run that is not to be
        raise


def _machines(environment: Environment, num_gpus: int) -> list[str]:
    """The trainer's arguments for several machines; none for this one alone."""
    if not environment.hostfile:
        return []
    hostfile = Path(environment.hostfile).expanduser().resolve()
    read_hostfile(hostfile, environment.num_nodes, num_gpus)
    given = {"hostfile": hostfile, "num_nodes": environment.num_nodes, "master_addr": environment.master_addr}
    return [f"--{name}={value}" for name, value in given.items() if value]


def _check_gpus(num_gpus: int, chosen: list[int]) -> None:
    import torch  # ComfyUI has long loaded it

    present = torch.cuda.device_count()
    if present and chosen and max(chosen) >= present:
        raise SettingsError(f"environment.visible_gpus: this machine has GPUs 0 to {present - 1}, got {chosen}")
    if present and num_gpus > present:
        raise SettingsError(f"number_of_gpus: must be at most {present} on this machine, got {num_gpus}")


def _check_deepspeed() -> None:
    if importlib.util.find_spec("deepspeed") is None:
        requirements = launch.TRAIN_SCRIPT.with_name("requirements.txt")
        raise RuntimeError(f"DeepSpeed is not installed in the Python that runs ComfyUI; install it with: "
                           f"{sys.executable} -m pip install -r {requirements}")  # fmt: skip


async def _watch(run: launch.Run, node_id: str | None, *, until_it_runs: bool) -> launch.Outcome | None:
    """Shows how the run goes until it ends, or until it is past its start; None in the latter case."""
    shown, drawn = None, list[str]()
    while True:
        outcome = await asyncio.to_thread(run.poll)
        if outcome is None:
            comfy.check_interrupted()
        status = run.status()  # after the end, too: its last step and samples are to be seen
        if (text := describe(status)) != shown:
            done, total = _progress(status)
            if total:
                picture = sample_sheet(status.samples) if status.samples != drawn else None
                comfy.progress(node_id, min(done, total), total, picture)
                drawn = status.samples
            comfy.progress_text(text, node_id)
            shown = text
        if outcome is not None or (until_it_runs and status.state in ("caching", "training")):
            return outcome
        await asyncio.sleep(POLL_SECONDS)


def _progress(status: Status) -> tuple[int, int]:
    if status.state == "training" or status.state in ENDED:
        return status.step, status.total_steps
    return status.phase_done, status.phase_total


def describe(status: Status) -> str:
    """One line for the node: ``step 120/1000 · loss 0.083 · 2.1 s/step · 14 min left``."""
    if status.state in ENDED:
        return status.state
    if status.state == "training":
        parts = [f"step {status.step}/{status.total_steps}", *filter(None, [_phase(status)])]
        if status.loss is not None:
            parts.append(f"loss {status.loss:.3g}")
        if status.seconds_per_step is not None:
            parts.append(f"{status.seconds_per_step:.2g} s/step")
        parts += [f"{name} {loss:.3g}" for name, loss in status.eval_losses.items()]
    else:
        parts = [_phase(status) or status.state]
    if status.eta is not None:
        parts.append(f"{duration(status.eta)} left")
    return " · ".join(parts)


def _phase(status: Status) -> str:
    """``encoding pictures 50/200``, ``loading the model 3.2/23.8 GB, 1.1 GB/s``; nothing between phases."""
    if not status.phase_total:
        return status.phase
    seconds_left = None if status.state == "training" else status.eta
    return f"{status.phase} {amount(status.phase_done, status.phase_total, status.phase_unit, seconds_left)}"


def _result(run: launch.Run, outcome: launch.Outcome | None, node_id: str | None) -> tuple[str, str, str, str]:
    if outcome in ("failed", "vanished"):
        raise RuntimeError(run.failure_text())
    status = run.status()
    lora = "" if outcome is None else _publish(run)
    text = f"{outcome or 'running'}: step {status.step} of {status.total_steps}"
    if outcome and status.first_loss is not None and status.loss is not None:
        text += f", loss {status.first_loss:.3g} → {status.loss:.3g}"
    comfy.progress_text(f"{text}\n{Path(lora or run.path).name}", node_id)  # a whole path does not fit the node
    return text, log_tail(run.folder.log, since=run.log_start), run.path, lora


def _publish(run: launch.Run) -> str:
    """Puts the last exported LoRA or model where ComfyUI's loaders look; returns its path, or nothing without one."""
    exports = run.status().exports
    export = run.folder.path / exports[-1] if exports else None
    if export is None:
        return ""
    folder, source = "loras", export / "adapter_model.safetensors"
    if (export / "model.safetensors").is_file():
        kind = read_toml(run.folder.train_toml)["model"]["type"]
        folder, source = families()[kind].model_folder, export / "model.safetensors"
    if not source.is_file():
        return ""
    target = comfy.output_directory() / folder / f"{run.name}.safetensors"
    beside = target.with_name(f".{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        beside.unlink(missing_ok=True)
        try:
            os.link(source, beside)
        except OSError:  # another disk, or one that knows no links
            shutil.copyfile(source, beside)
        os.replace(beside, target)
    except OSError as error:
        logger.error("%s: the export could not be put into '%s': %s", source, target.parent, error)
        return str(source)
    return str(target)
