"""safetensors files written one tensor at a time, because a whole model may not fit into main memory twice."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Promise:
    """A tensor that is made when it is written."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]

    @classmethod
    def of(cls, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> Promise:
        """A tensor that exists, on any device; a copy on the CPU, as ``dtype``, is made when it is written."""
        return cls(tuple(tensor.shape), dtype or tensor.dtype, lambda: tensor.detach())


def write_tensors(path: Path | None, tensors: Mapping[str, Promise], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file; holds one tensor in memory at a time.

    Args:
        path: Left out: makes every tensor without writing any, for ranks that only take part in making them.

    Raises:
        OSError: No space, say.
    """
    if path is None:
        for promise in tensors.values():
            promise.make()
        return
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name, promise in tensors.items():
        start, end = end, end + torch.Size(promise.shape).numel() * promise.dtype.itemsize
        header[name] = {"dtype": NAMES[promise.dtype], "shape": list(promise.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, promise in tensors.items():
            value = promise.make().to("cpu", promise.dtype).contiguous()
            assert tuple(value.shape) == promise.shape, name
            if value.numel():
                file.write(value.reshape(-1).view(torch.uint8).numpy().data)


class TensorFiles:
    """The tensors of several safetensors files, read when they are asked for."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._where: dict[str, Any] = {}
        for file in files:
            opened = safetensors.safe_open(str(file), "pt", device="cpu")
            self._where |= dict.fromkeys(opened.keys(), opened)

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of tensor ``name``, from the header."""
        return tuple(self._where[name].get_slice(name).get_shape())

    def read(self, name: str) -> torch.Tensor:
        """Tensor ``name`` on the CPU; it may alias the mapped file."""
        return self._where[name].get_tensor(name)
