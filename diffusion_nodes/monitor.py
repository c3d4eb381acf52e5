"""Nodes that watch: TensorBoard on a run's curves, and the pass-through that orders it after others."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..utils import launch, tensorboard
from ..utils.config import SettingsError
from ..utils.run_folder import ENDED, RunFolder
from . import comfy

NEW_RUN_SECONDS = 30.0
"""How long a run that this prompt starts may take to appear and to write its first curve."""
JUST_ENDED_SECONDS = 600.0
"""A run that ended so recently is the one that this prompt trained."""


class TensorBoardMonitor:
    CATEGORY = "Diffusion-Pipe/Monitor"
    DESCRIPTION = "Opens TensorBoard on the newest run of the output folder and gives its address."
    FUNCTION = "execute"
    OUTPUT_NODE = True
    RETURN_TYPES = ("STRING", "STRING")
    RETURN_NAMES = ("url", "status")
    OUTPUT_TOOLTIPS = ("Open this address in a browser.", "What was done, and what TensorBoard shows.")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:
        return {
            "required": {
                "output_dir": ("STRING", {
                    "forceInput": True, "tooltip": "The output folder, whose newest run is shown, or a run's folder."}),
                "port": ("INT", {
                    "default": 6006, "min": 1024, "max": 65535, "step": 1,
                    "tooltip": "Port to serve on; the next free one if another program has it."}),
                "host": ("STRING", {
                    "default": "localhost", "tooltip": "Address to serve on. localhost: only this machine can open it; "
                    "0.0.0.0: everyone in the network."}),
                "is_new_training": ("BOOLEAN", {
                    "default": True, "tooltip": "Wait for the first curve of the training that this graph starts, at "
                    "most half a minute. Off: show what is there."}),
            },
            "optional": {
                "action": (["start", "stop", "status", "kill_port"], {
                    "default": "start", "tooltip": "start: open it, or find the open one. stop: end it. status: only "
                    "look. kill_port: end the TensorBoard on this port if this package started it."}),
                "survive_restart": ("BOOLEAN", {
                    "default": True, "tooltip": "Keep it open when ComfyUI ends; the next ComfyUI finds it again."}),
            },
            "hidden": {"prompt": "PROMPT", "unique_id": "UNIQUE_ID"},
        }  # fmt: skip

    @classmethod
    def IS_CHANGED(cls, **_: Any) -> float:
        """Unlike anything: what runs changes without the inputs."""
        return float("nan")

    async def execute(
        self, output_dir: str, port: int = 6006, host: str = "localhost", is_new_training: bool = True,
        action: str = "start", survive_restart: bool = True, prompt: Mapping[str, Any] | None = None,
        unique_id: str | None = None,
    ) -> tuple[str, str]:  # fmt: skip
        """The address and what was done.

        Raises:
            SettingsError: ``output_dir`` does not exist.
            ProcessError: TensorBoard does not start, or cannot be ended.
        """
        folder = Path(comfy.resolve(output_dir))
        if action == "kill_port":
            return "", await asyncio.to_thread(_stop_port, port)
        if action == "stop":
            return "", await asyncio.to_thread(_stop_below, folder)
        if action == "status":
            return _status(folder)
        if is_new_training:
            comfy.progress_text("looking for the training's first curve", unique_id)
        logdir = await _log_folder(folder, expect=is_new_training and _trains(prompt), wait=is_new_training)
        if logdir != folder:
            await asyncio.to_thread(_stop_older, logdir)
        server = await asyncio.to_thread(tensorboard.start, logdir, host=host, port=port, survive=survive_restart)
        text = f"TensorBoard shows {logdir.name} at {server.url}"
        comfy.progress_text(text, unique_id)
        return server.url, text


class OutputDirPassthrough:
    CATEGORY = "Diffusion-Pipe/Utils"
    DESCRIPTION = "Hands the output folder on unchanged."
    FUNCTION = "passthrough"
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("output_dir",)
    OUTPUT_TOOLTIPS = ("The same folder.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:
        return {"required": {"output_dir": ("STRING", {
            "forceInput": True, "tooltip": "From General Training Config."})}}  # fmt: skip

    def passthrough(self, output_dir: str) -> tuple[str]:
        """``output_dir`` itself."""
        return (output_dir,)


async def _log_folder(folder: Path, *, expect: bool, wait: bool) -> Path:
    """The live or newest run in ``folder``, or itself.

    Args:
        expect: A run is about to appear there.
        wait: Whether to wait until a live run has written a curve.
    """
    deadline = time.monotonic() + NEW_RUN_SECONDS
    while True:
        found, settled = _look(folder, expect)
        if time.monotonic() > deadline or (settled and not (wait and _awaits_curve(found))):
            break
        comfy.check_interrupted()
        await asyncio.sleep(0.2)
    if not found.is_dir():
        raise SettingsError(f"output_dir: '{folder}' does not exist; connect the output folder of the training")
    return found


def _look(folder: Path, expect: bool) -> tuple[Path, bool]:
    """What to show as of now, and whether that is the run that was expected."""
    live = [run.folder.path for run in launch.running()
            if folder.resolve() in (run.folder.path, run.folder.path.parent)]  # fmt: skip
    if live:
        return live[-1], True
    runs = RunFolder.all(folder)
    if not runs:
        return folder, not expect or RunFolder(folder).train_toml.exists()
    status = runs[-1].read_status()
    just_ended = status.state in ENDED and time.time() - status.updated < JUST_ENDED_SECONDS
    return runs[-1].path, not expect or just_ended


def _awaits_curve(path: Path) -> bool:
    """Whether a live run has no curve yet."""
    alive = any(run.folder.path == path for run in launch.running())
    return alive and next(path.rglob("events.out.tfevents*"), None) is None


def _trains(prompt: Mapping[str, Any] | None) -> bool:
    """Whether the prompt that this node is part of also trains."""
    return any(node.get("class_type") == "Train" for node in (prompt or {}).values())


def _servers_below(folder: Path) -> list[tensorboard.Server]:
    """Ours on ``folder`` or on a run in it."""
    path = folder.resolve()
    return [server for server in tensorboard.running() if path in (Path(server.logdir), Path(server.logdir).parent)]


def _stop_older(logdir: Path) -> None:
    """Ends ours on other runs of the same output folder, so that the newest keeps the port."""
    for server in _servers_below(logdir.parent):
        if Path(server.logdir) != logdir.resolve():
            tensorboard.stop(server)


def _stop_below(folder: Path) -> str:
    servers = _servers_below(folder)
    for server in servers:
        tensorboard.stop(server)
    return "; ".join(f"stopped {server.url}" for server in servers) or f"no TensorBoard of ours shows {folder}"


def _stop_port(port: int) -> str:
    server = tensorboard.on_port(port)
    if server is None:
        return f"no TensorBoard of ours serves on port {port}; nothing was ended"
    tensorboard.stop(server)
    return f"stopped {server.url}"


def _status(folder: Path) -> tuple[str, str]:
    servers = _servers_below(folder)
    if not servers:
        return "", f"no TensorBoard of ours shows {folder}"
    lines = [f"{server.url} shows {server.logdir}{'' if server.answers() else ' (does not answer)'}"
             for server in servers]  # fmt: skip
    return servers[-1].url, "\n".join(lines)
