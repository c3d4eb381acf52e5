"""Values on their way to a GPU: several threads read them ahead and copy them through pinned memory.

A copy out of a mapped file takes one thread's time twice, to read the pages and to copy them to where the driver can
send them from; that is far less than disks of today and the bus give.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import torch
from torch import Tensor

THREADS = 4
AHEAD = 6
"""Values that are read before they are asked for."""
PIECE = 2**23
"""Bytes copied at a time; each thread has two such places."""


def uploaded(
    read: Callable[[str], Tensor], names: Iterable[str], device: torch.device
) -> Generator[Tensor, None, None]:
    """What ``read`` gives for each name, in their order, as tensors of their own on ``device``.

    Args:
        read: Is called in several threads.
        device: A GPU.
    """
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    lane = _Lane(device)

    def value(name: str) -> Tensor:
        found = read(name)
        result = lane.upload(found)
        if (scale := getattr(found, "stored_scale", None)) is not None:
            result.stored_scale = scale  # type: ignore[attr-defined]
        return result

    waiting = iter(names)
    under_way: deque[Future[Tensor]] = deque()
    pool = ThreadPoolExecutor(THREADS, "upload", torch.cuda.set_device, (device,))
    try:
        under_way.extend(pool.submit(value, name) for name in islice(waiting, AHEAD))
        while under_way:
            found = under_way.popleft().result()
            under_way.extend(pool.submit(value, name) for name in islice(waiting, 1))
            yield found
    finally:
        pool.shutdown(cancel_futures=True)


class _Lane(threading.local):
    """Each thread's own stream and pinned memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._places = [torch.empty(PIECE, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._done: list[torch.cuda.Event | None] = [None, None]

    def upload(self, value: Tensor) -> Tensor:
        """A copy on the device; done when this returns."""
        value = value.detach()
        if value.is_cuda:
            return value.to(self._device, copy=True)
        result = torch.empty(value.shape, dtype=value.dtype, device=self._device)
        source, target = (tensor.reshape(-1).view(torch.uint8) for tensor in (value.contiguous(), result))
        # what had this memory before may still be read by what was issued there
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        for turn, start in enumerate(range(0, len(source), PIECE)):
            piece = source[start : start + PIECE]
            place = self._places[turn % 2][: len(piece)]
            if (done := self._done[turn % 2]) is not None:
                done.synchronize()
            place.copy_(piece)
            with torch.cuda.stream(self._stream):
                target[start : start + PIECE].copy_(place, non_blocking=True)
            self._done[turn % 2] = self._stream.record_event()
        self._stream.synchronize()
        return result
