"""A process that reads pictures and videos for `readers`: calls come through stdin, results leave through stdout.

Started as a script. It sets up the package's name by hand: importing the package itself brings the nodes, and
whatever holds torch would cost a second and hundreds of megabytes for each process.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import struct
import sys
import threading
import traceback
import types
from typing import IO, Any, BinaryIO


def main() -> None:
    """Answers calls until whoever asks is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):  # these reach all processes of a run; the trainer decides
        signal.signal(number, signal.SIG_IGN)
    _name_package(*sys.argv[1:])
    calls, results = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not end up between the results
    waiting: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(calls, waiting), daemon=True).start()
    send(results, None)
    while True:
        send(results, _answer(waiting.get()))


def _name_package(name: str, root: str) -> None:
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        package = types.ModuleType(".".join(parts[:depth]))
        package.__path__ = [root] if depth == len(parts) else []
        sys.modules[package.__name__] = package


def _receive(calls: BinaryIO, waiting: queue.SimpleQueue[bytes]) -> None:
    while len(head := calls.read(8)) == 8:
        waiting.put(calls.read(struct.unpack("<Q", head)[0]))
    os._exit(0)  # at once, in the middle of a video, too


def _answer(call: bytes) -> tuple[bool, Any]:
    """Whether it went well, and the value or the exception."""
    try:
        function, arguments = pickle.loads(call)
        return True, function(*arguments)
    except Exception as error:
        error.add_note("".join(traceback.format_exception(error)))
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # some exceptions cannot be sent
            error = RuntimeError(f"{type(error).__name__}: {error}")
        return False, error


def send(stream: BinaryIO, value: Any) -> None:
    """Writes a value; arrays in it go as they lie in memory."""
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    parts = [memoryview(data), *(buffer.raw() for buffer in buffers)]
    try:
        stream.write(struct.pack(f"<Q{len(parts)}Q", len(parts), *(part.nbytes for part in parts)))
        for part in parts:
            stream.write(part)
        stream.flush()
    except BrokenPipeError:
        os._exit(0)


def receive(stream: IO[bytes]) -> Any:
    """Reads what `send` wrote.

    Raises:
        EOFError: The other side is gone.
    """
    (count,) = struct.unpack("<Q", _read(stream, 8))
    sizes = struct.unpack(f"<{count}Q", _read(stream, 8 * count))
    data, *buffers = [_read(stream, size) for size in sizes]
    return pickle.loads(data, buffers=buffers)


def _read(stream: IO[bytes], size: int) -> bytearray:
    data, done = bytearray(size), 0
    while done < size:
        count = stream.readinto(memoryview(data)[done:])  # type: ignore[attr-defined]
        if not count:
            raise EOFError
        done += count
    return data


if __name__ == "__main__":
    main()
