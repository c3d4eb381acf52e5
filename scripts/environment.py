"""Makes ``.venv`` with everything the trainer needs; uses nothing but the standard library.

python3 scripts/environment.py          what training needs
python3 scripts/environment.py --dev    and what the tests need
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
TORCH = "2.13.0"


def prepare(dev: bool = False) -> Path:
    """The Python of an environment that is complete; makes or completes it first.

    Raises:
        SystemExit: An installation failed; says what to do.
    """
    python = VENV / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    lists = [ROOT / "requirements.txt", *([ROOT / "requirements-dev.txt"] if dev else [])]
    stamp = VENV / ("complete-dev" if dev else "complete")
    wanted = hashlib.sha256(b"".join(path.read_bytes() for path in lists) + TORCH.encode()).hexdigest()
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    if not python.exists():
        _run([sys.executable, "-m", "venv", str(VENV)], "on Debian and Ubuntu: apt install python3-venv")
    if _installed_torch(python) != TORCH:
        _install_torch(python)
    constraint = VENV / "constraints.txt"
    constraint.write_text(f"torch=={TORCH}\n")  # another torch would bring gigabytes of CUDA
    arguments = [argument for path in lists for argument in ("-r", str(path))]
    _run([str(python), "-m", "pip", "install", "-q", "-c", str(constraint), *arguments], "see the message above")
    stamp.write_text(wanted)
    return python


def _install_torch(python: Path) -> None:
    """The CUDA build where there is an NVIDIA GPU, else the CPU build, which is a tenth of its size."""
    pip = [str(python), "-m", "pip", "install", "-q"]
    if _has_nvidia_gpu():
        _run([*pip, f"torch=={TORCH}"], "see the message above")
        return
    found = subprocess.run([*pip, f"torch=={TORCH}+cpu"], capture_output=True, check=False)
    if found.returncode:  # the default index has no CPU builds; uv knows where PyTorch keeps them
        _run([*pip, "uv"], "see the message above")
        _run(
            [
                str(python),
                "-m",
                "uv",
                "pip",
                "install",
                "--python",
                str(python),
                "--torch-backend",
                "cpu",
                f"torch=={TORCH}",
            ],
            "see the message above",
        )


def _has_nvidia_gpu() -> bool:
    if shutil.which("nvidia-smi") is None:
        return False
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False).stdout.startswith(b"GPU")


def _installed_torch(python: Path) -> str | None:
    code = "import importlib.metadata as m; print(m.version('torch').split('+')[0])"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _run(command: list[str], remedy: str) -> None:
    print(f"$ {' '.join(command)}", flush=True)
    if subprocess.run(command, check=False).returncode:
        raise SystemExit(f"failed: {' '.join(command)}\n{remedy}")


if __name__ == "__main__":
    print(prepare(dev="--dev" in sys.argv))
