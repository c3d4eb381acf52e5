"""A real TensorBoard is started, found again, and ended only if it is ours."""

import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from diffusion_trainer.utils import tensorboard
from diffusion_trainer.utils.processes import ProcessError, free_port

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # a proxy must not stand between
    yield
    for server in tensorboard.running():
        tensorboard.stop(server)


@pytest.fixture
def logdir(tmp_path: Path) -> Path:
    folder = tmp_path / "it's a log 图"
    folder.mkdir()
    return folder


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def until_dead(pid: int) -> None:
    deadline = time.monotonic() + 20
    while alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def in_new_python(code: str, *arguments: str) -> subprocess.Popen[str]:
    prelude = f"import os, sys, time\nsys.path.insert(0, {str(ROOT / 'tests')!r})\nimport conftest\n"
    prelude += "from pathlib import Path\nfrom diffusion_trainer.utils import tensorboard\n"
    return subprocess.Popen([sys.executable, "-c", prelude + code, *arguments], stdout=subprocess.PIPE, text=True)


def test_starts_answers_and_is_reused(logdir: Path) -> None:
    wanted = free_port()
    server = tensorboard.start(logdir, port=wanted)
    assert (server.port, server.url) == (wanted, f"http://localhost:{wanted}/")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{wanted}/data/environment") as answer:
        assert str(logdir).encode("ascii", "backslashreplace") in answer.read()
    assert tensorboard.start(logdir, port=free_port()) == server
    assert tensorboard.on_port(wanted) == server
    tensorboard.stop(server)
    assert not server.answers()
    assert not alive(server.pid)
    assert tensorboard.running() == []


def test_port_of_another_program_is_left_alone(logdir: Path) -> None:
    other = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=other.serve_forever, daemon=True).start()
    taken = other.server_address[1]
    server = tensorboard.start(logdir, port=taken)
    assert taken < server.port <= taken + 100
    assert tensorboard.on_port(taken) is None
    tensorboard.stop(server)
    with socket.create_connection(("127.0.0.1", taken), timeout=5):
        pass
    other.shutdown()
    other.server_close()


def test_survivor_is_found_after_restart(logdir: Path) -> None:
    child = in_new_python(
        "print(tensorboard.start(Path(sys.argv[1]), port=int(sys.argv[2])).pid, 'torch' in sys.modules)",
        str(logdir),
        str(free_port()),
    )
    pid, torch = child.communicate(timeout=60)[0].split()
    assert torch == "False"
    found = tensorboard.find(logdir)
    assert found is not None
    assert found.pid == int(pid)
    assert found.answers()
    assert tensorboard.start(logdir) == found
    tensorboard.stop(found)
    until_dead(int(pid))


@pytest.mark.parametrize("way", ["exit", "kill"])
def test_mortal_ends_with_its_parent(logdir: Path, way: str) -> None:
    child = in_new_python(
        "print(tensorboard.start(Path(sys.argv[1]), port=int(sys.argv[2]), survive=False).pid, flush=True)\n"
        "sys.stdin.readline() if sys.argv[3] == 'exit' else time.sleep(600)",
        str(logdir),
        str(free_port()),
        way,
    )
    assert child.stdout is not None
    pid = int(child.stdout.readline())
    if way == "kill":
        assert alive(pid)
        os.kill(child.pid, signal.SIGKILL)
    child.wait(60)
    until_dead(pid)
    assert tensorboard.running() == []


def test_changes_its_mind_about_surviving(logdir: Path) -> None:
    port = free_port()
    first = tensorboard.start(logdir, port=port)
    second = tensorboard.start(logdir, port=port, survive=False)
    assert not alive(first.pid)
    assert second.port == port
    assert tensorboard.running() == [second]


def test_early_exit_raises_with_the_log(logdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken" / "tensorboard"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise RuntimeError('this one is broken')")
    monkeypatch.setenv("PYTHONPATH", str(broken.parent))
    with pytest.raises(ProcessError, match="this one is broken"):
        tensorboard.start(logdir, port=free_port())
    assert tensorboard.running() == []


def test_foreign_address_is_refused(logdir: Path) -> None:
    with pytest.raises(ProcessError, match=r"host: TensorBoard cannot listen on '203.0.113.7'.*use localhost"):
        tensorboard.start(logdir, host="203.0.113.7")
