"""The plan against what really is: shapes of samples, bytes of weights, activations that autograd keeps."""

from types import SimpleNamespace

import pytest
import torch
from diffusion_trainer.diffusion_nodes.training_plan import TrainingPlan
from diffusion_trainer.models import families
from diffusion_trainer.utils.adapters import inject
from diffusion_trainer.utils.config import SettingsError
from diffusion_trainer.utils.plan import GIB, make_plan
from diffusion_trainer.utils.settings import family_of, parse_dataset_settings, parse_train_settings
from diffusion_trainer.utils.watch import Watch
from test_families import MINIATURES, examples, load
from training import write_pictures

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=MINIATURES, ids=lambda pair: "-".join([pair[0], *pair[1].values()]))
def table(request, tmp_path_factory):
    name, variant = request.param
    return families()[name].write_miniature(tmp_path_factory.mktemp(name), **variant)


def planned(table, tmp_path, num_gpus=1, **changes):
    values = {"output_dir": str(tmp_path), "model": table, "adapter": {"type": "lora", "rank": 4},
              "optimizer": {"type": "adamw"}, **changes}  # fmt: skip
    settings = parse_train_settings(values)
    dataset = parse_dataset_settings({"resolutions": [64], "directory": [{"path": str(tmp_path)}]})
    return settings, make_plan(settings, dataset, num_gpus)


def test_shapes_are_those_of_encoded_samples(table):
    family = load(table)
    real, blank = examples(family, 1)[0], family.blank_example(64, 32, 1 if family.takes_pictures else 5)
    assert {name: value.shape for name, value in real.media.items()} == {n: v.shape for n, v in blank.media.items()}
    assert {name: value.shape[1:] for name, value in real.text.items()} == {
        name: value.shape[1:] for name, value in blank.text.items()
    }
    assert real.noise.shape == blank.noise.shape
    assert [value.shape[0] for value in family.collate([blank] * 2).inputs] == [2] * len(family.collate([blank]).inputs)


@pytest.mark.parametrize("changes", [{}, {"transformer_dtype": "float8"}])
def test_weights_and_adapter_are_counted_to_the_byte(table, tmp_path, changes):
    settings, plan = planned({**table, **changes}, tmp_path)
    family = family_of(settings)
    denoiser = inject(family.load_denoiser(CPU), family, settings.adapter, 0)
    frozen = sum(p.nbytes for p in denoiser.parameters() if not p.requires_grad)
    frozen += sum(buffer.nbytes for name, buffer in denoiser.named_buffers() if name.endswith("weight_scale"))
    memory = plan.stages[0].memory
    assert memory.weights == pytest.approx(frozen, rel=1e-9)
    trained = sum(p.numel() for p in denoiser.parameters() if p.requires_grad)
    assert (plan.trained, memory.adapter, memory.gradients, memory.optimizer) == (
        trained, 4 * trained, 4 * trained, 8 * trained)  # fmt: skip


def test_activations_are_those_that_autograd_keeps(table, tmp_path):
    settings, plan = planned(table, tmp_path, activation_checkpointing=False)
    family = family_of(settings)
    denoiser = inject(family.load_denoiser(CPU), family, settings.adapter, 0)
    tensors = family.collate([family.blank_example(*plan.size)]).inputs
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage._cdata] = (tensor, storage.nbytes())
        return tensor

    weights = {p.untyped_storage()._cdata for p in denoiser.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for layer in family.layers(denoiser):
            tensors = layer.forward(SimpleNamespace(**layer.submodules), *tensors)
    real = sum(size for key, (_, size) in kept.items() if key not in weights)
    assert 0.6 * real < plan.stages[0].memory.activations < 1.7 * real


def test_checkpointing_and_swapping_take_less(table, tmp_path):
    modes = ["selective", True, "unsloth"]  # a miniature has so few blocks that without any it may take less
    held = [planned(table, tmp_path, activation_checkpointing=mode)[1].stages[0].memory.activations for mode in modes]
    assert held == sorted(held, reverse=True), held
    plain, swapped = (planned(table, tmp_path, blocks_to_swap=count)[1].stages[0] for count in (0, 100))
    assert swapped.num_swapped == swapped.num_blocks
    assert swapped.memory.main_memory > 0
    assert swapped.memory.weights <= plain.memory.weights


def test_stages(table, tmp_path):
    whole = planned(table, tmp_path)[1]
    plan = planned(table, tmp_path, num_gpus=4, pipeline_stages=2, gradient_accumulation_steps=3)[1]
    assert (plan.data_parallel, plan.effective_batch, plan.bubble) == (2, 6, 0.25)
    assert sum(stage.memory.weights for stage in plan.stages) == pytest.approx(whole.stages[0].memory.weights)
    text = "\n".join(plan.lines(1 * GIB))
    assert "bubble: 25%" in text
    assert "fits: " in text
    assert "does not fit: " in plan.lines(2**20)[-1]


def test_command_and_node(table, tmp_path):
    write_pictures(tmp_path / "pictures")
    if table["type"] != "flux":
        pytest.skip("one process is enough")
    values = {"output_dir": str(tmp_path), "model": table, "optimizer": {"type": "adamw"}, "adapter": {"type": "lora"}}
    (text,) = TrainingPlan().plan({"directory": [{"path": str(tmp_path / "pictures")}]}, values, 2.0)
    assert "largest batch: 1 of 512x512" in text
    assert "of 2.0 GiB" in text
    broken = {**values, "model": {**table, "diffusers_path": str(tmp_path / "none")}}
    with pytest.raises(SettingsError, match="does not exist"):
        TrainingPlan().plan({"directory": [{"path": str(tmp_path / "pictures")}]}, broken)


def test_steps_that_grow_longer_are_noticed(caplog):
    watch = Watch(CPU)
    for seconds in (9.0, 5.0, 4.0, *[1.0] * 40, *[1.2] * 40):
        watch.step(seconds)
    assert not caplog.records
    for _ in range(40):
        watch.step(2.0)
    assert [record.message for record in caplog.records] == [
        "steps take 1.60 s, at first 1.00: is something else using the GPU, is it hot, or has memory spilled?"
    ]


def test_memory_is_compared_with_the_plan_and_the_gpu(caplog, monkeypatch):
    class Properties:
        total_memory = 24 * GIB

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 20 * GIB)
    reserved = [21 * GIB] * 6 + [23.9 * GIB] * 6
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: reserved.pop(0))
    watch = Watch(torch.device("cuda"), lambda: 19.5 * GIB)
    with caplog.at_level("INFO"):
        for _ in range(13):
            watch.step(1.0)
    assert [record.message.split(";")[0] for record in caplog.records] == [
        "memory: 20.0 GiB, planned 19.5", "memory: 23.9 of 24.0 GiB are taken"]  # fmt: skip
