"""TensorBoard as a process of its own, which ends when its parent does if it is told whose child it is.

Run as a script; nothing imports it. TensorBoard itself has no such option.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from tensorboard.main import run_main


def end_with(parent: int) -> None:
    """Ends this process about a second after process ``parent`` did."""
    import psutil

    while os.getppid() == parent and psutil.pid_exists(parent):
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    if sys.argv[1] == "--end-with":
        threading.Thread(target=end_with, args=(int(sys.argv[2]),), daemon=True).start()
        del sys.argv[1:3]
    run_main()
