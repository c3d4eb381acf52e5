"""Values on their way to a GPU: several threads read them ahead and copy them through pinned memory.

One thread that copies out of a mapped file to a GPU does in turns what can go on at once: the pages are read, the
driver copies them to memory that it can send from, and sends them.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

THREADS = 4
AHEAD = 2**30
"""Bytes of values that are read before they are asked for, if it is not one alone that has more: they stand beside
the weights on the GPU."""
PIECE = 2**23
"""Bytes copied at a time; each thread has two such places."""


def uploaded(
    read: Callable[[str], Tensor], sizes: Mapping[str, int], device: torch.device
) -> Generator[Tensor, None, None]:
    """What ``read`` gives for each name, in their order, as tensors of their own on ``device``.

    Args:
        read: Is called in several threads.
        sizes: By name, how many bytes to reckon with.
        device: A GPU; on the CPU it is a matter of threads alone.
    """
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    enter = partial(torch.cuda.set_device, device) if device.type == "cuda" else None  # each thread has one of its own
    lane = _Lane(device)

    def value(name: str) -> Tensor:
        found = read(name)
        result = lane.upload(found)
        if (scale := getattr(found, "stored_scale", None)) is not None:
            result.stored_scale = scale  # type: ignore[attr-defined]
        return result

    waiting = deque(sizes.items())
    under_way: deque[tuple[int, Future[Tensor]]] = deque()
    num_bytes = 0
    pool = ThreadPoolExecutor(THREADS, "upload", enter)
    try:
        while waiting or under_way:
            while waiting and (not under_way or num_bytes + waiting[0][1] <= AHEAD):
                name, size = waiting.popleft()
                under_way.append((size, pool.submit(value, name)))
                num_bytes += size
            size, future = under_way.popleft()
            found = future.result()
            num_bytes -= size
            yield found
    finally:
        pool.shutdown(cancel_futures=True)


class _Lane(threading.local):
    """Each thread's own stream and pinned memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type != "cuda":
            return
        self._stream = torch.cuda.Stream(device)
        self._places = [torch.empty(PIECE, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._done: list[torch.cuda.Event | None] = [None, None]

    def upload(self, value: Tensor) -> Tensor:
        """A copy on the device; done when this returns."""
        value = value.detach()
        if value.device.type == self._device.type:
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
