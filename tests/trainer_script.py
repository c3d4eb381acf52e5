"""Stands where train.py will: a real process that keeps the run folder's contract and misbehaves on request.

What to do comes from ``behaviour.json`` in the run folder, so that it runs through any launcher. It uses
nothing but the standard library, because it starts often.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int, default=0)
parser.add_argument("--deepspeed", action="store_true")
parser.add_argument("--config", type=Path)
parser.add_argument("--run_dir", type=Path)
parser.add_argument("--resume_from_checkpoint")
arguments = parser.parse_args()
run: Path = arguments.run_dir
todo = json.loads((run / "behaviour.json").read_text())
rank = int(os.environ.get("RANK", "0"))
(run / f"pid{rank}").write_text(str(os.getpid()))
(run / f"environment{rank}.json").write_text(json.dumps(dict(os.environ)))


def status(state: str, **values: object) -> None:
    """Only the first rank speaks."""
    if rank == 0:
        beside = run / "status.tmp"
        beside.write_text(json.dumps({"state": state, "updated": time.time(), **values}))
        beside.replace(run / "status.json")


def export() -> list[str]:
    folder = run / "epoch1"
    folder.mkdir(exist_ok=True)
    (folder / todo.get("export", "adapter_model.safetensors")).write_bytes(b"weights of " + run.name.encode())
    return [str(folder)]


def save_and_exit(*_: object) -> None:
    status("stopped", step=step, total_steps=todo["steps"], exports=export() if rank == 0 else [])
    sys.exit(0)


step = 0
if todo.get("stubborn"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    again = "import signal,time\nsignal.signal(15, signal.SIG_IGN)\ntime.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", again])
    apart = subprocess.Popen([sys.executable, "-c", again], start_new_session=True)
    (run / "grandchildren").write_text(f"{child.pid} {apart.pid}")
else:
    signal.signal(signal.SIGTERM, save_and_exit)
if size := todo.get("stderr_bytes", 0):
    block = bytes(range(256)) * 256
    for _ in range(size // len(block)):
        os.write(2, block)
    os.write(2, b"\n")
for text in todo.get("log", []):
    print(text, flush=True)
print(f"resume={arguments.resume_from_checkpoint} rank={rank}", flush=True)
status("caching", phase="encoding pictures", phase_done=1, phase_total=2)
for step in range(1, todo["steps"] + 1):
    time.sleep(todo.get("seconds", 0.02))
    status(
        "training",
        step=step,
        total_steps=todo["steps"],
        loss=1 / step,
        first_loss=1.0,
        seconds_per_step=todo.get("seconds", 0.02),
        eta=(todo["steps"] - step) * todo.get("seconds", 0.02),
    )
    if step == todo.get("raise_at"):
        raise FileNotFoundError(2, "No such file or directory", "/models/missing.safetensors")
    if step == todo.get("fail_at"):
        status("failed", step=step, error=todo["error"])
        sys.exit(1)
    if step == todo.get("kill_rank_at", {}).get(str(rank)):
        os.kill(os.getpid(), signal.SIGKILL)
    if rank and (run / "status.json").exists() and '"stopped"' in (run / "status.json").read_text():
        sys.exit(0)
    if rank == 0 and (run / "save_quit").exists() and not todo.get("stubborn"):
        (run / "save_quit").unlink()
        save_and_exit()
status(
    "finished",
    step=todo["steps"],
    total_steps=todo["steps"],
    loss=1 / todo["steps"],
    first_loss=1.0,
    exports=export() if rank == 0 else [],
)
