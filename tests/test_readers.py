"""Processes that read: what they answer, and what happens when they or whoever started them die."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from datasets import READERS, look, picture
from diffusion_trainer.utils import index
from diffusion_trainer.utils.buckets import Bucket
from diffusion_trainer.utils.index import Index, stamp_of
from diffusion_trainer.utils.media import Source, UnreadableMedia, read_picture
from diffusion_trainer.utils.readers import ReaderDied, Readers


def test_pixels_and_reasons_come_back_and_torch_is_not_there(tmp_path):
    source = Source(str(picture(tmp_path / "a.png", (300, 200))))
    found = READERS.submit(read_picture, source, Bucket(64, 48), True).result()
    assert np.array_equal(found, read_picture(source, Bucket(64, 48), True)) and found.flags.writeable
    (tmp_path / "b.png").write_bytes(b"")
    with pytest.raises(UnreadableMedia, match="empty file"):
        READERS.submit(read_picture, Source(str(tmp_path / "b.png")), Bucket(64, 48)).result()
    with pytest.raises(FileNotFoundError):
        READERS.submit(read_picture, Source(str(tmp_path / "c.png")), Bucket(64, 48)).result()
    assert READERS.submit(eval, "'torch' in __import__('sys').modules").result() is False


def test_output_of_libraries_does_not_disturb():
    assert READERS.submit(os.system, "echo something").result() == 0
    assert READERS.submit(print, "something").result() is None
    assert READERS.submit(abs, -1).result() == 1


def test_a_killed_process_is_replaced_and_one_that_dies_again_is_reported():
    with Readers(1) as readers:
        first = readers.submit(os.getpid).result()
        os.kill(first, signal.SIGKILL)
        assert readers.submit(os.getpid).result() != first
        with pytest.raises(ReaderDied, match="by signal 9"):
            readers.submit(signal.raise_signal, signal.SIGKILL).result()
        with pytest.raises(ReaderDied, match="with status 3"):
            readers.submit(os._exit, 3).result()
        last = readers.submit(os.getpid).result()
    assert not psutil.pid_exists(last)


def test_a_process_that_cannot_start_is_no_fault_of_the_files(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with Readers(1) as readers, pytest.raises(RuntimeError, match="could not start; it ended with status 1"):
        readers.submit(abs, 1).result()


def test_leaving_does_not_wait_for_what_is_being_read():
    began = time.monotonic()
    with Readers(2) as readers:
        pids = [readers.submit(os.getpid).result() for _ in range(2)]
        futures = [readers.submit(time.sleep, 60) for _ in range(5)]
        time.sleep(0.2)
    assert time.monotonic() - began < 20
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert all(future.done() for future in futures)


def test_what_a_decoder_never_comes_back_from_is_given_up(tmp_path, monkeypatch, caplog):
    os.mkfifo(tmp_path / "a.png")  # nobody ever writes to it
    monkeypatch.setattr("diffusion_trainer.utils.readers.LONG", 0.5)
    with Readers(1, longest=1.5) as readers:
        first = readers.submit(os.getpid).result()
        with pytest.raises(ReaderDied, match="took more than 2 s; is the file damaged, or its disk away"):
            readers.submit(read_picture, Source(str(tmp_path / "a.png")), Bucket(64, 48)).result()
        source = Source(str(picture(tmp_path / "b.png")))
        assert readers.submit(read_picture, source, Bucket(64, 48)).result().shape == (3, 1, 48, 64)
        assert not psutil.pid_exists(first)
    assert caplog.messages == [f"reading takes long, and is given up after 2 s: {tmp_path / 'a.png'}"]


def test_files_beside_one_that_hangs_are_found(tmp_path):
    for name in "ac":
        picture(tmp_path / f"{name}.png", seed=name)
    os.mkfifo(tmp_path / "b.png")
    entries = [(Source(str(path)), stamp_of(path.stat())) for path in sorted(tmp_path.iterdir())]
    with Readers(1, longest=2) as readers:
        found = Index(tmp_path / "cache" / "index.sqlite", readers).media(str(tmp_path), entries)
    assert [isinstance(found[source], str) for source, _ in entries] == [False, True, False]
    assert "cannot be read: reading it took more than 2 s" in str(found[entries[1][0]])


PARENT = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
sys.path.insert(0, {tests!r})
import conftest, os
from diffusion_trainer.utils.readers import Readers
readers = Readers(1)
print(readers.submit(os.getpid).result(), flush=True)
with readers:
    readers.submit(time.sleep, 60).result()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_processes_end_with_whoever_started_them(number):
    script = PARENT.format(tests=str(Path(__file__).parent))
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    )
    assert parent.stdout
    reader = int(parent.stdout.readline())
    time.sleep(0.2)
    os.killpg(parent.pid, number) if number != signal.SIGKILL else os.kill(parent.pid, number)
    parent.wait(timeout=30)
    for _ in range(100):
        if not psutil.pid_exists(reader):
            break
        time.sleep(0.1)
    assert not psutil.pid_exists(reader)


def test_a_file_that_kills_its_reader_is_named_alone_and_tried_again_next_time(tmp_path, monkeypatch):
    for name in "abc":
        picture(tmp_path / f"data/{name}.png", seed=name)
        os.utime(tmp_path / f"data/{name}.png", (1, 1))
    monkeypatch.setattr(index, "_settled", lambda stamp: True)

    class Deadly(Readers):
        def submit(self, function, /, *arguments, **named):
            if any("b.png" in str(source) for source in arguments[0]):
                return super().submit(signal.raise_signal, signal.SIGSEGV)
            return super().submit(function, *arguments)

    paths = sorted((tmp_path / "data").iterdir())
    entries = [(Source(str(path)), stamp_of(path.stat())) for path in paths]
    with Deadly(1) as readers:
        found = Index(tmp_path / "index.sqlite", readers).media(str(tmp_path / "data"), entries)
    assert [isinstance(found[source], str) for source, _ in entries] == [False, True, False]
    assert "by signal 11" in str(found[entries[1][0]])
    assert len(look(tmp_path / "data")[0]) == 3
