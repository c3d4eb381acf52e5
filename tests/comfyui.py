"""A real ComfyUI, driven as its own page drives it: over HTTP and the websocket."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from diffusion_trainer.scripts import headless
from diffusion_trainer.scripts.workflow import to_prompt
from training import free_port

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "example_workflows" / "flux_lora.json"
PACK = "diffusion-trainer"
PREVIEW, TEXT, PREVIEW_OF_NODE = 1, 3, 4
"""Binary events of the websocket: a picture, a node's text, and a picture with what it is of."""


def example(**values: Any) -> dict[str, Any]:
    """The shipped example as ComfyUI's page sends it, with values set by ``<class>__<input>``."""
    prompt = to_prompt(json.loads(EXAMPLE.read_text("utf-8")), headless.node_classes())
    for place, value in values.items():
        kind, _, name = place.partition("__")
        (node,) = [node for node in prompt.values() if node["class_type"] == kind]
        assert name in node["inputs"], f"{kind} has no input {name}"
        node["inputs"][name] = value
    return prompt


def write_inputs(base: Path) -> None:
    """The demo's miniature model and pictures, where the example looks for them."""
    sys.path.append(str(ROOT / "scripts"))
    try:
        from diffusion_trainer.scripts import demo

        demo.write_inputs(base)
    finally:
        sys.path.remove(str(ROOT / "scripts"))


class ComfyUI:
    """One server with all its files, and its registry of runs, below ``base``."""

    def __init__(self, base: Path) -> None:
        self.base, self.port = base, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        for name in ("custom_nodes", "models", "input", "output", "temp", "user"):
            (base / name).mkdir(parents=True, exist_ok=True)
        link = base / "custom_nodes" / PACK
        if not link.is_symlink():
            link.symlink_to(ROOT, target_is_directory=True)
        self.log = base / "comfyui.log"
        self.events: list[tuple[str, dict[str, Any]]] = []
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the server and listens to it."""
        environment = os.environ | {"XDG_STATE_HOME": str(self.base / "state"), "PYTHONDONTWRITEBYTECODE": "1"}
        environment["OMP_NUM_THREADS"] = "1"  # threads that wait for each other crawl on a busy machine
        command = [
            os.environ["COMFYUI_PYTHON"], "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(self.port),
            "--disable-api-nodes", "--base-directory", str(self.base),
            "--database-url", f"sqlite:///{self.base}/user/comfyui.db",
        ]  # fmt: skip
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, cwd=os.environ["COMFYUI_DIR"], env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        until(self._is_up, 180, self.describe)
        self.events.clear()
        listening = threading.Event()
        threading.Thread(target=lambda: asyncio.run(self._listen(listening)), daemon=True).start()
        assert listening.wait(30)

    def end(self, number: int = signal.SIGINT) -> None:
        """Sends the server a signal and waits for its end."""
        assert self._process is not None
        self._process.send_signal(number)
        self._process.wait(60)

    def describe(self) -> str:
        """The end of the server's log, for a failing test."""
        return self.log.read_text("utf-8", "replace")[-3000:]

    # -- HTTP ------------------------------------------------------------------------------------------

    def get(self, path: str) -> Any:
        """What GET answers, decoded if it is JSON."""
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            body = answer.read().decode()
        return json.loads(body) if body[:1] in "[{" else body

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        """Status and decoded answer of a POST."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                status, text = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read()
        return status, json.loads(text) if text else None

    def queue(self, prompt: dict[str, Any]) -> "Job":
        """Queues a prompt that the server must accept."""
        begin = len(self.events)
        status, answer = self.post("/prompt", {"prompt": prompt, "client_id": PACK})
        assert status == 200 and not answer["node_errors"], answer
        return Job(self, answer["prompt_id"], begin)

    def run_folders(self) -> list[Path]:
        """The trainings so far."""
        return sorted((self.base / "output" / "training").glob("2*_*"))

    def trainers(self) -> list[psutil.Process]:
        """Processes of trainings below ``base``, launchers included."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            line = process.info["cmdline"] or []
            if any("train.py" in word for word in line) and any(str(self.base) in word for word in line):
                found.append(process)
        return found

    def _is_up(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.describe()
        try:
            return bool(self.get("/system_stats"))
        except OSError:
            return False

    async def _listen(self, listening: threading.Event) -> None:
        address = f"{self.url}/ws?clientId={PACK}"
        async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as socket:
            listening.set()
            async for message in socket:
                if message.type == aiohttp.WSMsgType.TEXT:
                    event = json.loads(message.data)
                    self.events.append((event["type"], event["data"]))
                elif message.type == aiohttp.WSMsgType.BINARY:
                    self._note_binary(int.from_bytes(message.data[:4]), message.data[4:])

    def _note_binary(self, kind: int, data: bytes) -> None:
        length = int.from_bytes(data[:4])
        if kind == TEXT:
            self.events.append(("text", {"node": data[4 : 4 + length].decode(), "text": data[4 + length :].decode()}))
        elif kind in (PREVIEW, PREVIEW_OF_NODE):
            start = 4 if kind == PREVIEW else 4 + length
            self.events.append(("preview", {"picture": data[start:]}))


class Job:
    """One queued prompt."""

    def __init__(self, server: ComfyUI, prompt_id: str, begin: int) -> None:
        self._server, self.id, self._begin = server, prompt_id, begin

    def events(self, kind: str) -> list[dict[str, Any]]:
        """What the websocket said, of one kind; texts carry no prompt, so others' while this one waits count."""
        return [data for name, data in self._server.events[self._begin :]
                if name == kind and data.get("prompt_id", self.id) == self.id]  # fmt: skip

    def until(self, condition: Callable[[], Any], seconds: float = 180) -> None:
        """Waits; an end that comes first fails the test."""

        def met() -> bool:
            assert condition() or not self.ended(), f"it ended before: {self.events('execution_error')}"
            return bool(condition())

        until(met, seconds, self._server.describe)

    def ended(self) -> str | None:
        """``success``, ``error`` or ``interrupted``; None while it runs."""
        return next((kind for kind in ("success", "error", "interrupted") if self.events(f"execution_{kind}")), None)

    def wait(self, seconds: float = 240) -> str:
        """How it ended."""
        until(self.ended, seconds, self._server.describe)
        return str(self.ended())

    def texts(self, node: str) -> list[str]:
        """What was written on a node, in order."""
        return [event["text"] for event in self.events("text") if event["node"] == node]

    def shown(self, node: str) -> str:
        """What a PreviewAny node shows."""
        (event,) = [event for event in self.events("executed") if event["node"] == node]
        return str(event["output"]["text"][0])

    def error(self) -> str:
        """The message of the node that failed."""
        (event,) = self.events("execution_error")
        return str(event["exception_message"])


def until(condition: Callable[[], Any], seconds: float, describe: Callable[[], str]) -> None:
    """Waits until ``condition`` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"did not happen in {seconds} s\n{describe()}"
        time.sleep(0.1)
