"""Values read ahead by threads and copied to a GPU through pinned memory."""

import threading
import time

import pytest
import torch
from diffusion_trainer.utils import upload
from diffusion_trainer.utils.weights import fill
from torch import nn

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_values_arrive_as_they_are(monkeypatch, device):
    monkeypatch.setattr(upload, "PIECE", 4096)  # several pieces, the last one shorter
    torch.manual_seed(0)
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64)
    values = {
        f"{number}": (torch.randn(37, 129) * 9).to(dtype)
        for number, dtype in enumerate(dtypes * 5)
    } | {"scalar": torch.tensor(3.0), "empty": torch.zeros(0), "turned": torch.randn(100, 90).t(),
         "there": torch.randn(9, device=device)}  # fmt: skip
    values["3"].stored_scale = torch.tensor(0.5)
    threads = set()

    def read(name):
        threads.add(threading.get_ident())
        time.sleep(0.002)
        return values[name]

    sizes = {name: value.numel() * 8 for name, value in values.items()}
    for name, found in zip(values, upload.uploaded(read, sizes, torch.device(device)), strict=True):
        assert found.device.type == device and found.dtype == values[name].dtype and found.shape == values[name].shape
        assert torch.equal(found.cpu().float(), values[name].cpu().float()), name
        assert found.data_ptr() != values[name].data_ptr() or not found.numel()
        assert hasattr(found, "stored_scale") == hasattr(values[name], "stored_scale")
    assert threading.get_ident() not in threads and len(threads) > 1


@pytest.mark.parametrize("device", DEVICES)
def test_what_goes_wrong_in_a_thread_is_raised(device):
    def read(name):
        if name == "9":
            raise ValueError("nine")
        return torch.zeros(5)

    arrived = []
    with pytest.raises(ValueError, match="nine"):
        arrived.extend(upload.uploaded(read, {str(number): 20 for number in range(20)}, torch.device(device)))
    assert not any(thread.name.startswith("upload") for thread in threading.enumerate())


@pytest.mark.gpu
def test_a_module_is_filled_alike_on_both_devices():
    torch.manual_seed(0)
    source = nn.Sequential(nn.Linear(256, 512), nn.LayerNorm(512), nn.Linear(512, 256))
    values = dict(source.named_parameters())

    def filled(device):
        with torch.device("meta"):
            module = nn.Sequential(nn.Linear(256, 512), nn.LayerNorm(512), nn.Linear(512, 256))
        fill(module, values.__getitem__, torch.bfloat16, torch.device(device), ("1.",))
        return module

    on_cpu, on_gpu = ([value.cpu() for value in filled(device).state_dict().values()] for device in ("cpu", "cuda"))
    for one, other in zip(on_cpu, on_gpu, strict=True):
        assert one.dtype == other.dtype and torch.equal(one.float(), other.float())


@pytest.mark.parametrize("device", DEVICES)
def test_no_more_than_is_allowed_is_read_ahead(monkeypatch, device):
    monkeypatch.setattr(upload, "AHEAD", 100)
    started, taken = [], 0

    def read(name):
        started.append(name)
        return torch.zeros(10)

    for taken, _ in enumerate(upload.uploaded(read, {str(number): 40 for number in range(20)}, torch.device(device))):
        time.sleep(0.01)
        assert len(started) <= taken + 2
    assert taken == 19
