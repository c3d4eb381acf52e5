"""The plan against what really is: shapes of samples, bytes of weights and state, memory while a step runs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusion_trainer.diffusion_nodes.training_plan import TrainingPlan
from diffusion_trainer.models import families
from diffusion_trainer.utils.activations import Meter
from diffusion_trainer.utils.config import SettingsError
from diffusion_trainer.utils.dataset_settings import parse_dataset_settings
from diffusion_trainer.utils.plan import GIB, verdict
from diffusion_trainer.utils.planning import find_samples, make_plan, plan_lines, step_lines
from diffusion_trainer.utils.settings import family_of, parse_train_settings
from diffusion_trainer.utils.sharding import local
from diffusion_trainer.utils.trainer import Trainer
from diffusion_trainer.utils.watch import Watch
from test_families import MINIATURES, examples, load
from training import Bench, write_pictures

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=MINIATURES, ids=lambda pair: "-".join([pair[0], *pair[1].values()]))
def table(request, tmp_path_factory):
    name, variant = request.param
    return families()[name].write_miniature(tmp_path_factory.mktemp(name), **variant)


@pytest.fixture(scope="module", params=["flux", "sdxl", "wan"])
def bench(request, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("plan"), request.param)


def parsed(table, tmp_path, **changes):
    values = {"output_dir": str(tmp_path), "model": table, "adapter": {"type": "lora", "rank": 4},
              "optimizer": {"type": "adamw"}, **changes}  # fmt: skip
    settings = parse_train_settings({key: value for key, value in values.items() if value is not None})
    return settings, parse_dataset_settings({"resolutions": [64], "directory": [{"path": str(tmp_path)}]})


def planned(table, tmp_path, num_gpus=1, **changes):
    return make_plan(*parsed(table, tmp_path, **changes), num_gpus)


def test_shapes_are_those_of_encoded_samples(table):
    family = load(table)
    real, blank = examples(family, 1)[0], family.blank_example(64, 32, 1 if family.takes_pictures else 5)
    assert {name: value.shape for name, value in real.media.items()} == {n: v.shape for n, v in blank.media.items()}
    assert {name: value.shape[1:] for name, value in real.text.items()} == {
        name: value.shape[1:] for name, value in blank.text.items()
    }
    assert real.noise.shape == blank.noise.shape
    assert [value.shape[0] for value in family.collate([blank] * 2).inputs] == [2] * len(family.collate([blank]).inputs)


# -- against a real step --------------------------------------------------------------------------------------


class Seen:
    """A training of this process, with what it took."""

    def __init__(self) -> None:
        self.held = self.peak = 0.0

    def watch(self, trainer: Trainer, data: Any, model: Any) -> None:
        self.trainer, self.samples, self.engine, self.trained = trainer, data.train.samples, model.engine, model.trained
        engine, run = model.engine, model.engine._micro_step

        def micro_step(inputs: Any, labels: Any) -> Any:
            given = sum(tensor.nbytes for tensor in (*inputs, *labels))
            with Meter() as meter:
                loss = run(inputs, labels)
            self.peak = max(self.peak, meter.peak + given)
            return loss

        engine._micro_step = micro_step

    @property
    def plan(self) -> Any:
        trainer = self.trainer
        return make_plan(trainer.settings, trainer.dataset, 1, trainer.family, self.samples)

    @property
    def weights(self) -> int:
        """Bytes of all tensors of the network on the device, the pool in the place of what is swapped."""
        swap = self.engine.module.swap
        tensors = [*self.engine.module.parameters(), *self.engine.module.buffers(), *([swap._pool] if swap else [])]
        return sum({(s := tensor.untyped_storage()).data_ptr(): s.nbytes() for tensor in tensors}.values())

    @property
    def state(self) -> int:
        return sum(
            value.nbytes
            for optimizer in self.trained.optimizers
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        )

    @property
    def masters(self) -> int:
        return sum(p.nbytes for name, p in self.trained.stepped.items() if p is not self.trained.parameters[name])

    @property
    def gradients(self) -> int:
        return sum(flat.nbytes for flat in self.trained.gradients._flat)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    found, build = Seen(), Trainer._build

    def watched(self: Trainer, data: Any) -> Any:
        model = build(self, data)
        found.watch(self, data, model)
        return model

    monkeypatch.setattr(Trainer, "_build", watched)
    return found


FULL: dict[str, Any] = {"adapter": None, "model": {"dtype": "bfloat16"}, "save_dtype": "bfloat16"}


CASES: dict[str, dict[str, Any]] = {
    "average": {"activation_checkpointing": False, "ema_decay": 0.9},
    "swapped float8": {"blocks_to_swap": 3, "model": {"transformer_dtype": "float8"}},
    "transposed": {"transposed_weights": True, "model": {"transformer_dtype": "float8", "quantized_matmul": True}},
    "offloaded": {"activation_checkpointing": "selective", "optimizer": {"type": "adamw8bit", "offload": True},
                  "ema_decay": 0.9},
    "all weights": FULL,
    "Kahan sums, some swapped": {**FULL, "optimizer": {"type": "adamw_optimi"}, "blocks_to_swap": 100,
                                 "train_only": ["norm", "bias"]},
}  # fmt: skip
OF_EACH = ("average", "swapped float8")
"""The rest depends little on the family."""


@pytest.mark.parametrize(
    ("bench", "changes"),
    [
        pytest.param(family, changes, id=f"{family}, {name}")
        for family in ("flux", "sdxl", "wan")
        for name, changes in CASES.items()
        if family == "flux" or name in OF_EACH
    ],
    indirect=["bench"],
)
def test_what_a_training_takes_is_what_was_planned(bench: Bench, seen: Seen, changes: dict[str, Any]) -> None:
    bench.train(max_steps=4, epochs=2, **changes)
    memory, stays = seen.plan.stages[0].memory, seen.plan.stages[0].memory.stays
    swap, average = seen.engine.module.swap, seen.trained.ema
    offload = bool(seen.trainer.settings.optimizer.offload)
    assert stays.weights + stays.adapter == seen.weights
    assert stays.gradients == seen.gradients
    in_average = sum(value.nbytes for value in average.values.values()) if average else 0
    main = {"swapped blocks": swap.main_bytes if swap else 0,
            "optimizer": (2 * seen.masters + seen.state) * offload, "average": in_average * offload}  # fmt: skip
    assert memory.main == pytest.approx({what: size for what, size in main.items() if size}, rel=1e-3)
    assert stays.optimizer == pytest.approx((seen.masters + seen.state) * (not offload), rel=1e-3)
    assert stays.average == in_average * (not offload)
    assert memory.activations == pytest.approx(
        seen.peak, rel=0.06 if bench.model["type"] == "sdxl" else 0.01
    )  # its attention differs on CPUs


@pytest.mark.parametrize("stage", [2, 3])
def test_shares_of_zero_are_what_was_planned(tmp_path: Path, seen: Seen, stage: int) -> None:
    Bench(tmp_path).train(max_steps=2, **FULL, zero_stage=stage)
    stays = seen.plan.stages[0].memory.stays
    assert stays.weights == sum(local(p).nbytes for p in seen.engine.module.parameters())
    assert stays.gradients == 4 * sum(p.numel() for p in seen.trained.stepped.values())
    assert stays.optimizer == pytest.approx(seen.state, rel=1e-3)
    assert stays.gathered > 0


@pytest.mark.parametrize("bench", ["flux", "wan"], indirect=True)
def test_checkpointing_and_swapping_take_less(bench, tmp_path):
    table = bench.model
    modes = ["selective", True, "unsloth"]  # a miniature has so few blocks that without any it may take less
    held = [planned(table, tmp_path, activation_checkpointing=mode).stages[0].memory.activations for mode in modes]
    assert held == sorted(held, reverse=True), held
    plain, swapped = (planned(table, tmp_path, blocks_to_swap=count).stages[0] for count in (0, 100))
    assert swapped.memory.stays.num_swapped == swapped.num_blocks
    assert swapped.memory.main["swapped blocks"] > 0
    assert swapped.memory.stays.weights < 1.02 * plain.memory.stays.weights  # two blocks of a miniature are the pool


def test_stages(bench, tmp_path):
    table = bench.model
    whole = planned(table, tmp_path)
    plan = planned(table, tmp_path, num_gpus=4, pipeline_stages=2, gradient_accumulation_steps=3)
    assert (plan.data_parallel, plan.effective_batch, plan.bubble) == (2, 6, 0.25)
    assert sum(stage.memory.stays.weights for stage in plan.stages) == whole.stages[0].memory.stays.weights
    assert [stage.memory.messages > 0 for stage in plan.stages] == [True, True]
    assert "bubble: 25%" in "\n".join(plan.lines())
    assert verdict(plan, {}, 1 * GIB)[0].startswith("fits: training")
    assert verdict(plan, {}, 2**20)[0].startswith("does not fit: training")


def test_recorded_stages_have_memory_for_each_micro_batch_under_way(bench, tmp_path):
    def activations(**changes):
        settings = {"num_gpus": 2, "pipeline_stages": 2, "gradient_accumulation_steps": 4, **changes}
        return [stage.memory.activations for stage in planned(bench.model, tmp_path, **settings).stages]

    recorded, usual = activations(), activations(cuda_graphs=False)
    assert recorded[0] > usual[0]  # two are under way on the first stage, one on the last
    assert recorded[1] == usual[1]
    assert activations(activation_checkpointing="unsloth") == activations(
        activation_checkpointing="unsloth", cuda_graphs=False
    )


def test_drawing_and_encoding_are_planned(bench, tmp_path):
    table = bench.model
    sample = {"prompts": ["a ball"], "width": 64, "height": 64, "frames": 5}
    lines = plan_lines(*parsed(table, tmp_path, sample=sample), 1, 2 * GIB)
    family = load(table)
    names = [f"encoding captions with {name}" for name in family.text_encoders]
    assert [line.split(",")[0] for line in lines[-len(names) - 2 :]] == [
        f"fits: {what}" for what in ("training", "drawing samples", *names)
    ]
    assert any(line.startswith("steps: not known (dataset: no usable picture in") for line in lines)


def test_steps_are_those_of_the_training(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    options: dict[str, Any] = {"epochs": 3, "micro_batch_size_per_gpu": 2, "max_steps": 100}
    settings, dataset = parse_train_settings(bench.settings(**options)), bench.parsed_dataset()
    samples = find_samples(settings, dataset, family_of(settings))
    assert step_lines(samples, settings, 1)[0] == "dataset: 6 samples of 2 sizes"
    assert step_lines(samples, settings, 2)[1] == "steps: 2 in the first epoch, 6 in all"
    result = bench.train(**options)
    assert step_lines(samples, settings, 1)[1] == f"steps: 4 in the first epoch, {result.status.total_steps} in all"


def test_counting_ends_when_it_takes_too_long(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    settings, dataset = parse_train_settings(bench.settings()), bench.parsed_dataset()
    found = find_samples(settings, dataset, family_of(settings), patience=-1.0)
    assert step_lines(found, settings, 1) == [
        "steps: not known (6 files that nobody has looked at yet would take too long; the training does)"]  # fmt: skip
    assert len(find_samples(settings, dataset, family_of(settings))) == 6


def test_command_and_node(tmp_path):
    table = families()["flux"].write_miniature(tmp_path / "model")
    write_pictures(tmp_path / "pictures")
    values = {"output_dir": str(tmp_path), "model": table, "optimizer": {"type": "adamw"}, "adapter": {"type": "lora"}}
    (text,) = TrainingPlan().plan({"directory": [{"path": str(tmp_path / "pictures")}]}, values, 2.0)
    assert "largest batch: 1 of 512x512" in text
    assert "steps: 6 in the first epoch, 300 in all" in text
    assert "fits: training" in text
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


def test_a_run_tells_its_watch_of_every_step_and_of_the_plan(tmp_path, seen, monkeypatch, caplog):
    steps = []

    class OnGpu(Watch):
        def __init__(self, device, planned):
            super().__init__(device, planned)
            self._total = 24 * GIB

        def step(self, seconds):
            steps.append(seconds)
            super().step(seconds)

    monkeypatch.setattr("diffusion_trainer.utils.trainer.Watch", OnGpu)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 20 * GIB)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 23.9 * GIB)
    with caplog.at_level("INFO"):
        Bench(tmp_path).train(epochs=2, max_steps=6)
    assert len(steps) == 6
    assert min(steps) > 0
    said = [record.message.split(";")[0] for record in caplog.records if record.name.endswith("watch")]
    planned = seen.plan.stages[0].memory.total / GIB
    assert said == [f"memory: 20.0 GiB, planned {planned:.1f}", "memory: 23.9 of 24.0 GiB are taken"]
