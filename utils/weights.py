"""Weights on disk: files read one tensor at a time into modules that were built without memory.

Users have a diffusers folder (perhaps in shards) or single files as ComfyUI keeps them: bf16, fp16,
fp8 that was merely cast, or fp8 with a scale beside each weight ("fp8_scaled"). Looking at names and
shapes of safetensors reads the header alone and needs no torch. PyTorch's own files (.pth) are mapped,
not read, and nothing in them is run.
"""

from __future__ import annotations

import json
import math
import struct
import zipfile
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import SettingsError
from .imports import lazy

if TYPE_CHECKING:
    import accelerate
    import safetensors
    import torch
    from torch import nn

    from . import storage as stored
    from . import upload
    from .storage import Storage
else:
    accelerate, safetensors, torch, nn = (lazy(name) for name in ("accelerate", "safetensors", "torch", "torch.nn"))
    stored, upload = (lazy(__name__.rpartition(".")[0] + name) for name in (".storage", ".upload"))

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
SCALES = (".scale_weight", ".weight_scale")
"""What ComfyUI's older and newer fp8_scaled files call the factor of ``<module>.weight``."""
LONGEST_HEADER = 100_000_000
"""Bytes; the safetensors format's own limit."""
PICKLES = (".pth", ".pt", ".ckpt", ".bin")


@dataclass(frozen=True)
class _Entry:
    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]


class Weights:
    """The tensors of a safetensors or PyTorch file, or of the shards in a diffusers or transformers folder.

    Args:
        path: The file or the folder.
        option: Dotted name of the setting that named it; opens every message.
        prefixes: Files that hold a whole pipeline put each part's tensors below a prefix. The first of
            these under which there is a tensor called ``marker`` is taken off every name, and what
            lies elsewhere in the file is left out.

    Raises:
        SettingsError: It holds no such file, or one that is cut off or something else.
    """

    def __init__(self, path: Path, option: str, prefixes: Iterable[str] = (), marker: str = "") -> None:
        self.path, self.option = path, option
        self._open: dict[Path, Any] = {}
        entries = {entry.name: entry for file in self._files() for entry in self._header(file)}
        prefix = next((prefix for prefix in prefixes if prefix + marker in entries), "")
        self._entries = {name.removeprefix(prefix): entry for name, entry in entries.items() if name.startswith(prefix)}

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of tensor ``name``; raises SettingsError when there is none."""
        return self._entry(name).shape

    def count(self, prefix: str) -> int:
        """How many numbered entries (``<prefix>0.``, ``<prefix>1.`` ...) there are."""
        found = {name.removeprefix(prefix).split(".")[0] for name in self if name.startswith(prefix)}
        return len([number for number in found if number.isdecimal()])

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """Tensor ``name``, or some rows of it, on the CPU, in the file's precision.

        A float8 (e4m3) tensor with a scale comes dequantised in float32, with the scale as attribute
        ``stored_scale``. The result may alias the mapped file.

        Raises:
            SettingsError: There is no such tensor, or it is quantised in a way that is not read here.
        """
        entry = self._entry(name)
        scale_name = next((name.removesuffix(".weight") + s for s in SCALES if self._is_scale(name, s)), None)
        if entry.dtype not in FLOATS or (scale_name and not self._is_plain(self._entry(scale_name), entry)):
            raise SettingsError(
                f"{self.option}: '{self.path}' is quantised in a way that cannot be trained on ('{name}' is "
                f"{entry.dtype}); give a bf16, fp16, fp8 or fp8_scaled file"
            )
        tensor = self._get(entry, rows)
        if scale_name is None:
            return tensor
        scale = self._get(self._entry(scale_name), None).float()
        if scale.numel() > 1:  # one factor per row
            scale = (scale if rows is None else scale[rows]).reshape(-1, *[1] * (tensor.ndim - 1))
        value: Any = tensor.float() * scale
        if entry.dtype == "F8_E4M3":
            value.stored_scale = scale
        return value

    def raw(self, name: str) -> bytes:
        """What lies in the file under ``name``, as bytes: a tokenizer, say."""
        return self._get(self._entry(name), None).numpy().tobytes()

    @staticmethod
    def _is_plain(scale: _Entry, scaled: _Entry) -> bool:
        """One float for all of the tensor, or one for each row."""
        return scale.dtype in ("F32", "F16", "BF16") and math.prod(scale.shape) in (1, scaled.shape[0])

    def _is_scale(self, name: str, suffix: str) -> bool:
        return name.endswith(".weight") and name.removesuffix(".weight") + suffix in self

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise SettingsError(f"{self.option}: '{self.path}' lacks the tensor '{name}'; the file is incomplete")
        return self._entries[name]

    def _get(self, entry: _Entry, rows: slice | None) -> torch.Tensor:
        if entry.file not in self._open:
            self._open[entry.file] = safetensors.safe_open(str(entry.file), "pt", device="cpu")
        if rows is None:
            return self._open[entry.file].get_tensor(entry.name)
        return self._open[entry.file].get_slice(entry.name)[rows]

    def _files(self) -> list[Path]:
        """The file itself; or a folder's shards, its file of the usual name, or the only one it has."""
        if not self.path.is_dir():
            return [self.path]
        for stem in ("diffusion_pytorch_model", "model"):
            index = self.path / f"{stem}.safetensors.index.json"
            if index.is_file():
                shards = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
                return [self.path / shard for shard in sorted(shards)]
            if (self.path / f"{stem}.safetensors").is_file():
                return [self.path / f"{stem}.safetensors"]
        files = sorted(self.path.glob("*.safetensors"))
        if len(files) != 1:
            found = f"{len(files)} of unknown names" if files else "none"
            raise SettingsError(
                f"{self.option}: '{self.path}' should hold one model in safetensors files; it has {found}"
            )
        return files

    def _header(self, file: Path) -> Iterator[_Entry]:
        if file.suffix in PICKLES:
            self._open[file] = _Pickle(file, self.option)
            yield from self._open[file].entries()
            return
        try:
            with file.open("rb") as stream:
                length = struct.unpack("<Q", stream.read(8))[0]
                header: Any = json.loads(stream.read(length)) if length <= LONGEST_HEADER else None
            header.pop("__metadata__", None)
            end = 8 + length + max((value["data_offsets"][1] for value in header.values()), default=0)
        except OSError as error:
            raise SettingsError(f"{self.option}: '{file}' cannot be read ({error.strerror})") from None
        except (struct.error, ValueError, AttributeError, TypeError, KeyError):
            raise SettingsError(f"{self.option}: '{file}' is not a safetensors file") from None
        if file.stat().st_size < end:
            raise SettingsError(
                f"{self.option}: '{file}' is cut off ({file.stat().st_size} of {end} bytes); download it again"
            )
        for name, value in header.items():
            yield _Entry(file, name, value["dtype"], tuple(value["shape"]))


class _Pickle:
    """A PyTorch file with the interface of an open safetensors file."""

    def __init__(self, file: Path, option: str) -> None:
        self._file = file
        try:
            # files of before 2020 are no zip archives and cannot be mapped
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        except OSError as error:
            raise SettingsError(f"{option}: '{file}' cannot be read ({error.strerror})") from None
        except Exception as error:  # torch's reader raises anything on what is no file of its own
            raise SettingsError(
                f"{option}: '{file}' is not a PyTorch file of tensors alone ({str(error).splitlines()[0]}); "
                "give a safetensors file, or download it again"
            ) from None
        found = found if isinstance(found, dict) else {}
        for wrapping in ("state_dict", "module"):  # Lightning's, DeepSpeed's
            found = found.get(wrapping, found)
        self._tensors = {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}

    def entries(self) -> Iterator[_Entry]:
        names = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
                 torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}  # fmt: skip
        for name, value in self._tensors.items():
            yield _Entry(self._file, name, names.get(value.dtype, str(value.dtype)), tuple(value.shape))

    def get_tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def get_slice(self, name: str) -> torch.Tensor:
        return self._tensors[name]


def build(make: Callable[[], Any]) -> Any:
    """The module that ``make`` makes, its parameters on the meta device: shapes without memory."""
    with accelerate.init_empty_weights(include_buffers=False):
        return make()


@dataclass
class _Counted:
    """Bytes of weights that have been read."""

    tell: Callable[[int, int], None]
    total: int
    is_open: bool
    """Whether each call of `fill` adds to ``total``."""
    done: int = 0

    def add(self, size: int) -> None:
        self.done += size
        self.tell(self.done, self.total)


_counted: ContextVar[_Counted | None] = ContextVar("_counted", default=None)


@contextmanager
def counted(tell: Callable[[int, int], None], total: int | None = None) -> Iterator[None]:
    """Within it `fill` says after each parameter how many bytes of weights are there, and of how many.

    Args:
        total: Bytes of all that will be filled (see `held_bytes`); left out: of what the calls so far come to.
    """
    token = _counted.set(_Counted(tell, total or 0, total is None))
    try:
        yield
    finally:
        _counted.reset(token)


@dataclass(frozen=True)
class _Held:
    """In which precision a module's parameters are held."""

    module: nn.Module
    dtype: torch.dtype
    float32: tuple[str, ...]
    storage: Storage | None

    def __post_init__(self) -> None:
        if self.storage:
            stored.use_storage(self.module, self.storage)

    def is_stored(self, name: str) -> bool:
        """Whether parameter ``name`` is the weight of a layer with a storage of its own."""
        layer = self.module.get_submodule(name.rpartition(".")[0])
        return bool(self.storage) and isinstance(layer, stored.StoredLinear) and name.endswith(".weight")

    def precision(self, name: str) -> torch.dtype:
        """Of parameter ``name``, if it is not stored."""
        return torch.float32 if any(part in name for part in self.float32) else self.dtype

    def num_bytes(self, name: str, parameter: nn.Parameter) -> int:
        """What parameter ``name`` takes."""
        if self.storage and self.is_stored(name):
            return parameter.numel() * self.storage.dtype.itemsize // (2 if self.storage.dtype == torch.uint8 else 1)
        return parameter.numel() * self.precision(name).itemsize


def held_bytes(
    module: nn.Module,
    dtype: torch.dtype,
    float32: tuple[str, ...] = (),
    storage: Storage | None = None,
    only: Container[nn.Parameter] | None = None,
) -> int:
    """What the parameters take once `fill`, called with the same, has given them values."""
    held = _Held(module, dtype, float32, storage)
    return sum(held.num_bytes(name, p) for name, p in module.named_parameters() if only is None or p in only)


def fill(
    module: nn.Module,
    read: Callable[[str], torch.Tensor],
    dtype: torch.dtype,
    device: torch.device,
    float32: tuple[str, ...] = (),
    storage: Storage | None = None,
    only: Container[nn.Parameter] | None = None,
) -> None:
    """Gives each parameter of a module from `build` its value, one tensor at a time.

    Parameters that are one object under several names stay one.

    Args:
        read: The value of a parameter, by its name in ``module``; for a GPU it is called in several threads.
        device: The meta device: dtypes and storage alone, nothing is read.
        float32: Parameters with one of these in their name are kept in float32.
        storage: How linear layers are stored; left out: in ``dtype``.
        only: Parameters to read; the others stay on the meta device. Left out: all.

    Raises:
        SettingsError: From ``read``.
        ValueError: A value has another shape than its parameter.
    """
    held = _Held(module, dtype, float32, storage)
    if (count := _counted.get()) and count.is_open:
        count.total += held_bytes(module, dtype, float32, storage, only)
    wanted = [(name, p) for name, p in module.named_parameters(remove_duplicate=False) if only is None or p in only]
    firsts: dict[nn.Parameter, str] = {}
    for name, parameter in wanted:
        firsts.setdefault(parameter, name)
    filled: dict[nn.Parameter, nn.Parameter] = {}
    with closing(_values(read, firsts, device)) as values:
        for name, parameter in wanted:
            if parameter not in filled:
                value = parameter.detach() if device.type == "meta" else next(values)
                filled[parameter] = _filled(held, name, parameter, value, device)
                if count:
                    count.add(held.num_bytes(name, parameter))
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, filled[parameter])
    for name, buffer in list(module.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        if leaf == "weight_scale":  # is where its weight is
            continue
        setattr(module.get_submodule(owner), leaf, buffer.to(device))
    if storage:
        stored.hide_weights(module)


def _values(
    read: Callable[[str], torch.Tensor], parameters: Mapping[nn.Parameter, str], device: torch.device
) -> Generator[torch.Tensor, None, None]:
    if device.type == "cuda":
        widest = torch.float32.itemsize  # what quantised files are read as; float64 is rare, and merely takes more
        sizes = {name: parameter.numel() * widest for parameter, name in parameters.items()}
        yield from upload.uploaded(read, sizes, device)
    else:
        yield from map(read, parameters.values())


def _filled(held: _Held, name: str, parameter: nn.Parameter, value: torch.Tensor, device: torch.device) -> nn.Parameter:
    if value.shape != parameter.shape:
        raise ValueError(f"'{name}' should have shape {tuple(parameter.shape)}, got {tuple(value.shape)}")
    if held.storage and held.is_stored(name):
        layer: Any = held.module.get_submodule(name.rpartition(".")[0])
        return layer.store(value.to(device), held.storage.dtype, getattr(value, "stored_scale", None))
    # A copy even where nothing changes, unless it is one already: the value may be a view of the mapped file.
    return nn.Parameter(value.to(device, held.precision(name), copy=device.type != "cuda").contiguous())
