"""Runs all checks: ruff, mypy, tests on up to four cores. Makes its environment first.

python3 scripts/check.py [pytest arguments]
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from environment import ROOT, prepare

TYPED = [
    *(part for name in ("utils", "models", "diffusion_nodes") for part in ("-p", f"diffusion_trainer.{name}")),
    *(part for name in ("nodes", "train") for part in ("-m", f"diffusion_trainer.{name}")),
]


def main() -> int:
    """Runs every check even after one failed; returns how many failed."""
    python = str(prepare(dev=True))
    failed = []
    workers = ["-n", str(min(4, os.cpu_count() or 1)), "--dist", "loadfile"]  # files share what they set up
    with tempfile.TemporaryDirectory() as folder:
        # mypy wants the package under an importable name, whatever the clone is called.
        (Path(folder) / "diffusion_trainer").symlink_to(ROOT, target_is_directory=True)
        checks = {
            "ruff": [python, "-m", "ruff", "check", "."],
            "ruff format": [python, "-m", "ruff", "format", "--check", "."],
            "mypy": [python, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), *TYPED],
            "pytest": [python, "-m", "pytest", *workers, *sys.argv[1:]],
        }
        for name, command in checks.items():
            started = time.monotonic()
            print(f"== {name}", flush=True)
            if subprocess.run(command, cwd=folder if name == "mypy" else ROOT, check=False).returncode:
                failed.append(name)
            print(
                f"== {name}: {'FAILED' if name in failed else 'good'}, {time.monotonic() - started:.0f} s", flush=True
            )
    print("failed: " + ", ".join(failed) if failed else "all checks are good")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
