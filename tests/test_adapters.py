"""Adapters: which layers, what they compute, and files in every spelling."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusion_trainer.models import families
from diffusion_trainer.utils.adapted import Adapted, adapted_layers, frozen_weight, shapes_of
from diffusion_trainer.utils.adapter_files import fuse, layers_by_name, native_layers
from diffusion_trainer.utils.adapter_layers import Lokr, Lora, Shape
from diffusion_trainer.utils.adapters import export_tensors, inject, target_names
from diffusion_trainer.utils.config import SettingsError
from diffusion_trainer.utils.run_folder import RunFolder
from diffusion_trainer.utils.settings import family_of, parse_train_settings
from safetensors.torch import save_file
from torch import Tensor, nn
from training import Bench, StopsAfter

CPU = torch.device("cpu")
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"type": "lora", "rank": 4, "alpha": 2.0},
    "rslora": {"type": "lora", "rank": 4, "use_rslora": True},
    "dora": {"type": "lora", "rank": 4, "use_dora": True},
    "loha": {"type": "loha", "rank": 4},
    "lokr": {"type": "lokr", "rank": 2, "decompose_factor": 4},
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def untrained(bench: Bench) -> list[float]:
    """Losses of six epochs, the same noise and times, without learning."""
    return bench.train(optimizer={"lr": 0.0}, epochs=6).curve("epoch_loss")


def built(bench: Bench, **changes: Any) -> tuple[Any, nn.Module, Any]:
    """Family, denoiser and the adapter's settings."""
    settings = parse_train_settings(bench.settings(**changes))
    family = family_of(settings)
    return family, family.load_denoiser(CPU), settings.adapter


def merged(denoiser: nn.Module) -> dict[str, Tensor]:
    """The weight of each adapted layer with its adapter in it."""
    found = {}
    for name, layer in adapted_layers(denoiser).items():
        weight = frozen_weight(layer.base_layer) + layer.adapter.delta().reshape(layer.weight.shape)
        if layer.magnitude is not None:
            weight = weight / weight.norm(dim=1, keepdim=True) * layer.magnitude[:, None]
        found[name] = weight.detach()
    return found


# -- training ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns_and_goes_on_as_if_never_stopped(bench: Bench, untrained: list[float], kind: str) -> None:
    changes: dict[str, Any] = {"adapter": KINDS[kind], "optimizer": {"lr": 1e-2}, "epochs": 6}
    whole = bench.train(**changes)
    assert whole.curve("epoch_loss")[-1] < 0.995 * untrained[-1]
    folder = StopsAfter(RunFolder.create(bench.root / "out").path, 11)
    bench.train(folder, **changes)
    resumed = bench.train(RunFolder(folder.path), resume=True, **changes)
    assert resumed.curve("loss") == whole.curve("loss")
    assert all(torch.equal(value, whole.lora()[key]) for key, value in resumed.lora().items())


@pytest.mark.parametrize("kind", KINDS)
def test_file_starts_where_training_ended(bench: Bench, kind: str) -> None:
    first = bench.train(adapter=KINDS[kind], epochs=1, optimizer={"lr": 1e-2})
    family, denoiser, settings = built(
        bench, adapter={**KINDS[kind], "init_from_existing": first.status.exports[-1], "rank": 64}
    )
    inject(denoiser, family, settings, 0)
    again, fused, _ = built(bench)
    fuse(fused, again, [(Path(first.status.exports[-1]), 1.0)], "adapter.fuse_adapters")
    for name, weight in merged(denoiser).items():
        assert (weight - frozen_weight(denoiser.get_submodule(name).base_layer)).abs().max() > 1e-6
        torch.testing.assert_close(frozen_weight(fused.get_submodule(name)), weight, rtol=1e-5, atol=1e-6)
    second = bench.train(
        adapter={**KINDS[kind], "init_from_existing": first.status.exports[-1]}, epochs=1, optimizer={"lr": 0.0}
    )
    for key, value in first.lora().items():
        torch.testing.assert_close(second.lora()[key], value, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_a_dora_whose_rows_comfyui_has_in_another_order_is_read_back(bench: Bench, tmp_path: Path) -> None:
    """Flux's last modulation: ComfyUI takes its ``dora_scale`` in its own order, and the matrices in diffusers'."""
    dora = {**KINDS["dora"], "target_modules": ["norm_out.linear", "context_embedder"]}
    family, denoiser, settings = built(bench, adapter=dora)
    inject(denoiser, family, settings, 0)
    for layer in adapted_layers(denoiser).values():
        for parameter in (*layer.adapter.parameters(), layer.magnitude):
            parameter += torch.rand_like(parameter)
    save_file(export_tensors(adapted_layers(denoiser), family, torch.float32), tmp_path / "dora.safetensors")
    _, again, settings = built(bench, adapter={**dora, "init_from_existing": str(tmp_path)})
    _, fused, _ = built(bench)
    started = merged(inject(again, family, settings, 0))
    fuse(fused, family, [(tmp_path, 1.0)], "adapter.fuse_adapters")
    for name, weight in merged(denoiser).items():
        torch.testing.assert_close(started[name], weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(frozen_weight(fused.get_submodule(name)), weight, rtol=1e-4, atol=1e-5)


def test_keys_and_scales_are_those_that_comfyui_reads(bench: Bench) -> None:
    """ComfyUI scales by alpha / rank, and a DoRA by ``dora_scale`` over the frozen row's length."""
    for kind, endings in {
        "rslora": {"lora_A.weight", "lora_B.weight", "alpha"},
        "dora": {"lora_A.weight", "lora_B.weight", "alpha", "dora_scale"},
        "loha": {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"},
    }.items():
        family, denoiser, settings = built(bench, adapter=KINDS[kind])
        layer = inject(denoiser, family, settings, 0).get_submodule("transformer_blocks.0.attn.to_q")
        stem = "transformer.transformer_blocks.0.attn.to_q."
        stored = bench.train(adapter=KINDS[kind], epochs=1).lora()
        assert {key.removeprefix(stem) for key in stored if key.startswith(stem)} == endings
        if kind == "rslora":
            assert isinstance(layer, Adapted)
            assert layer.adapter.scale == pytest.approx(4 / 4**0.5)
            assert stored[f"{stem}alpha"] == pytest.approx(4 * 4**0.5)


# -- what they compute -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [nn.Linear(12, 8), nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv1d(4, 8, 3)])
@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "dora"])
def test_layer_computes_with_the_merged_weight(layer: Any, kind: str) -> None:
    shape = Shape.of(layer)
    assert shape is not None
    generator = torch.Generator().manual_seed(1)
    from diffusion_trainer.utils.adapters import KINDS as CLASSES

    adapter = CLASSES["lora" if kind == "dora" else kind].new(shape, 2, 1.0, generator)  # type: ignore[attr-defined]
    adapted = Adapted(layer, adapter, decomposed=kind == "dora")
    size = {2: (5, 12), 4: (2, 3, 9, 9), 3: (2, 4, 9)}[layer.weight.ndim]
    x = torch.randn(size, generator=generator)
    torch.testing.assert_close(adapted(x), layer(x))  # adds nothing yet
    for parameter in adapter.parameters():
        parameter.data.normal_(generator=generator)
    if adapted.magnitude is not None:
        adapted.magnitude.data.uniform_(0.5, 2, generator=generator)
    weight = layer.weight + adapter.delta().reshape(layer.weight.shape)
    if adapted.magnitude is not None:
        ones = [1] * (weight.ndim - 1)
        weight = weight / weight.flatten(1).norm(dim=1).view(-1, *ones) * adapted.magnitude.view(-1, *ones)
    expected = torch.func.functional_call(layer, {"weight": weight}, x)
    torch.testing.assert_close(adapted(x), expected, rtol=1e-4, atol=1e-5)
    if "dora_scale" in (stored := adapted.tensors()):
        length = layer.weight.flatten(1).norm(dim=1).view(-1, *[1] * (weight.ndim - 1))
        comfy = (layer.weight + adapter.delta().reshape(layer.weight.shape)) * stored["dora_scale"] / length
        torch.testing.assert_close(comfy, weight, rtol=1e-4, atol=1e-5)


def test_dropouts_drop_in_training_alone() -> None:
    layer = nn.Linear(64, 64, bias=False)
    shape = Shape(64, 64)
    adapter = Lokr.new(shape, 2, 2.0, torch.Generator().manual_seed(0))
    for parameter in adapter.parameters():
        parameter.data.fill_(1.0)
    adapted, x = Adapted(layer, adapter, rank_dropout=0.5), torch.ones(1, 64)
    whole = adapted.eval()(x) - layer(x)
    part = adapted.train()(x) - layer(x)
    dropped = (part.abs() < 1e-4).sum().item()
    assert (whole.abs() > 1e-4).all()
    assert 16 < dropped < 48
    lora = Lora.new(shape, 2, 2.0, torch.Generator().manual_seed(0))
    lora.up.data.fill_(1.0)
    dropping = Adapted(layer, lora, dropout=0.5)
    assert not torch.equal(dropping.train()(x), dropping(x))
    assert torch.equal(dropping.eval()(x), dropping(x))


# -- which layers ---------------------------------------------------------------------------------------


def test_targets_by_ending_and_by_regular_expression(bench: Bench) -> None:
    def names(**adapter: Any) -> list[str]:
        family, denoiser, settings = built(bench, adapter=adapter)
        return target_names(denoiser, family, settings)

    everything = names()
    assert names(target_modules=["to_q"]) == [name for name in everything if name.endswith(".to_q")]
    assert names(target_modules=[r"^transformer_blocks\.0\..*\.to_[qk]$"]) == [
        "transformer_blocks.0.attn.to_k", "transformer_blocks.0.attn.to_q"]  # fmt: skip
    assert names(exclude_modules="single_") == [name for name in everything if not name.startswith("single")]
    with pytest.raises(SettingsError, match=r"adapter.target_modules: 'to_x' is neither"):
        names(target_modules=["to_x"])
    with pytest.raises(SettingsError, match="no layer is left"):
        names(exclude_modules=["."])


def test_ranks_and_alphas_by_pattern(bench: Bench) -> None:
    result = bench.train(
        epochs=1, adapter={"rank": 4, "rank_pattern": {r"\.ff": 8}, "alpha_pattern": {r"\.to_q$": 1.0}}
    ).lora()
    assert result["transformer.transformer_blocks.0.ff.net.0.proj.lora_A.weight"].shape[0] == 8
    assert result["transformer.transformer_blocks.0.ff.net.0.proj.alpha"] == 8
    assert result["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"].shape[0] == 4
    assert result["transformer.transformer_blocks.0.attn.to_q.alpha"] == 1
    with pytest.raises(SettingsError, match=r"adapter.rank_pattern: '\(' is not a regular expression"):
        bench.train(adapter={"rank_pattern": {"(": 8}})


def test_learning_rates_by_pattern(bench: Bench) -> None:
    still, moving = (bench.train(epochs=1, learning_rates=rates).lora() for rates in ({r"\.up$": 0.0}, {}))
    assert all(not value.any() for key, value in still.items() if "lora_B" in key)
    assert any(value.any() for key, value in moving.items() if "lora_B" in key)


# -- files in every spelling --------------------------------------------------------------------------------


def native_lora(bench: Bench, rank: int = 3) -> tuple[dict[str, tuple[Tensor, Tensor]], nn.Module]:
    """Up and down for every layer as ComfyUI's model names it, and a denoiser that has them in its weights.

    The way to that denoiser is a model file, not the code that reads adapters.
    """
    family, denoiser, _ = built(bench)
    stored = {name: value.float() for name, value in family.comfyui_tensors(dict(denoiser.named_parameters())).items()}
    generator = torch.Generator().manual_seed(5)
    parts = {}
    for key in native_layers(family, denoiser):
        name = next(full for full in stored if full.removeprefix("model.diffusion_model.") == f"{key}.weight")
        rows, columns = stored[name].shape[0], stored[name][0].numel()
        up, down = (torch.randn(size, generator=generator) * 0.1 for size in ((rows, rank), (rank, columns)))
        stored[name] = stored[name] + (up @ down).reshape(stored[name].shape)
        parts[key] = (up, down)
    file = bench.root / "changed.safetensors"
    save_file({name: value.detach().contiguous() for name, value in stored.items()}, file)
    _, expected, _ = built(bench, model={"transformer_path": str(file)})
    return parts, expected


SPELLINGS = {
    "native": ("diffusion_model.{name}.lora_B.weight", "diffusion_model.{name}.lora_A.weight",
               "diffusion_model.{name}.alpha"),
    "kohya": ("lora_unet_{flat}.lora_up.weight", "lora_unet_{flat}.lora_down.weight", "lora_unet_{flat}.alpha"),
}  # fmt: skip


@pytest.mark.parametrize("alpha", [None, 1.5])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_fused_qkv_files_of_comfyui(bench: Bench, tmp_path: Path, spelling: str, alpha: float | None) -> None:
    parts, expected = native_lora(bench)
    file: dict[str, Tensor] = {}
    for name, (up, down) in parts.items():
        keys = [key.format(name=name, flat=name.replace(".", "_")) for key in SPELLINGS[spelling]]
        file[keys[0]] = up * (3 / alpha if alpha else 1.0)
        file[keys[1]] = down
        if alpha:
            file[keys[2]] = torch.tensor(alpha)
    save_file(file, tmp_path / "lora.safetensors")
    family, fused, _ = built(bench)
    fuse(fused, family, [(tmp_path, 1.0)], "adapter.fuse_adapters")
    family, started, settings = built(bench, adapter={"init_from_existing": str(tmp_path), "rank": 7})
    weights = merged(inject(started, family, settings, 0))
    for name in shapes_of(expected):
        value = frozen_weight(expected.get_submodule(name))
        torch.testing.assert_close(frozen_weight(fused.get_submodule(name)), value, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-6)
    assert {layer.adapter.rank for layer in adapted_layers(started).values()} == {3}


DIFFUSERS = [
    "transformer.{name}.lora_A.weight", "{name}.lora_A.default.weight", "base_model.model.{name}.lora_A.weight",
    "lora_unet_{flat}.lora_down.weight", "lora_transformer_{flat}.lora_down.weight",
    "transformer.{name}.lora.down.weight",
    "unet.{name}.lora_linear_layer.down.weight", "lycoris_{flat}.lora_down.weight",
]  # fmt: skip


@pytest.mark.parametrize("spelling", DIFFUSERS)
def test_diffusers_names_in_all_spellings(bench: Bench, tmp_path: Path, spelling: str) -> None:
    name = "single_transformer_blocks.1.attn.to_v"
    down, up = torch.randn(2, 32), torch.randn(32, 2)
    key = spelling.format(name=name, flat=name.replace(".", "_"))
    other = key.replace("lora_A", "lora_B").replace("down", "up")
    save_file({key: down, other: up, "lora_te1_text_model.alpha": torch.ones(())}, tmp_path / "lora.safetensors")
    family, denoiser, _ = built(bench)
    before = frozen_weight(denoiser.get_submodule(name)).clone()
    fuse(denoiser, family, [(tmp_path / "lora.safetensors", 0.5)], "adapter.fuse_adapters")
    torch.testing.assert_close(frozen_weight(denoiser.get_submodule(name)), before + 0.5 * up @ down)


def test_layers_are_also_named_as_in_the_exported_file(tmp_path: Path) -> None:
    """Files for Wan name layers as Wan's own code does; the layers here are diffusers'."""
    bench = Bench(tmp_path, "wan", variant="i2v")

    def names(**adapter: Any) -> set[str]:
        family, denoiser, settings = built(bench, adapter=adapter)
        return set(target_names(denoiser, family, settings))

    left_out = names() - names(exclude_modules=["k_img", "v_img"])
    assert left_out and left_out == {name for name in names() if name.endswith((".add_k_proj", ".add_v_proj"))}
    assert names(target_modules=[r"blocks\.0\.ffn\.2$"]) == {"blocks.0.ffn.net.2"}


@pytest.mark.parametrize("family", sorted(families()))
def test_every_layer_has_a_native_name_and_no_spelling_is_ambiguous(family: str, tmp_path: Path) -> None:
    bench = Bench(tmp_path, family)
    kind, denoiser, settings = built(bench)
    spelled = layers_by_name(kind, denoiser)
    for name in target_names(denoiser, kind, settings):
        assert spelled[kind.lora_keys(name)] == [(name, None)]
    rows: dict[str, int] = {}
    for parts in native_layers(kind, denoiser).values():
        for name, places in parts:
            rows[name] = rows.get(name, 0) + (shapes_of(denoiser)[name].outputs if places is None else len(places))
    for name in target_names(denoiser, kind, settings):
        if name.startswith("text_encoder"):  # ComfyUI calls their layers as transformers does
            continue
        assert rows[name] == shapes_of(denoiser)[name].outputs, name


@pytest.mark.parametrize(
    ("stored", "far"), [("float8", 0.1), ("int8", 0.02), ("nf4", 0.3)], ids=["float8", "int8", "nf4"]
)
def test_fused_into_stored_weights(bench: Bench, tmp_path: Path, stored: str, far: float) -> None:
    parts, expected = native_lora(bench)
    up = {f"diffusion_model.{name}.lora_B.weight": pair[0] for name, pair in parts.items()}
    down = {f"diffusion_model.{name}.lora_A.weight": pair[1] for name, pair in parts.items()}
    save_file({**up, **down}, tmp_path / "lora.safetensors")
    family, denoiser, _ = built(bench, model={"transformer_dtype": stored})
    name = "transformer_blocks.0.ff.net.2"
    layer = denoiser.get_submodule(name)
    kind, place = layer.weight.dtype, layer.weight.data_ptr()
    fuse(denoiser, family, [(tmp_path, 1.0)], "adapter.fuse_adapters")
    value, exact = frozen_weight(layer), frozen_weight(expected.get_submodule(name))
    assert (layer.weight.dtype, layer.weight.data_ptr()) == (kind, place)  # swapped blocks find it where it was
    assert kind != torch.float32
    assert (value - exact).abs().max() < far * exact.abs().max()


def test_fuse_and_merge_options_reach_the_training(bench: Bench) -> None:
    first = bench.train(epochs=1, optimizer={"lr": 1e-2})
    path = first.status.exports[-1]
    plain = bench.train(epochs=1, optimizer={"lr": 0.0}).curve("loss")
    started = bench.train(epochs=1, optimizer={"lr": 0.0}, adapter={"init_from_existing": path}).curve("loss")
    fused = bench.train(epochs=1, optimizer={"lr": 0.0}, adapter={"fuse_adapters": [{"path": path}]}).curve("loss")
    merged_in = bench.train(epochs=1, optimizer={"lr": 0.0}, model={"merge_adapters": [path]}).curve("loss")
    assert started != pytest.approx(plain, rel=1e-5)
    assert fused == pytest.approx(started, rel=1e-5)
    assert merged_in == fused


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"elsewhere.lora_A.weight": (2, 4), "elsewhere.lora_B.weight": (4, 2)}, "'elsewhere' is none of its layers"),
        ({"x_embedder.lora_A.weight": (2, 4), "x_embedder.lora_B.weight": (4, 2)}, "is for 4 inputs and 4 outputs"),
        ({"x_embedder.lora_A.weight": (2, 64)}, "lacks one of its matrices"),
        (
            {f"proj_out.hada_{part}": (2, 2) for part in ("w1_a", "w1_b", "w2_a", "w2_b")},
            "holds a LoHa for 'proj_out', and adapter.type is 'lora'",
        ),
        ({"proj_out.diff": (64, 32)}, "holds a whole difference"),
        ({}, "no key names one of its layers"),
    ],
)
def test_files_that_do_not_fit(bench: Bench, tmp_path: Path, tensors: dict[str, Any], message: str) -> None:
    save_file({key: torch.zeros(shape) for key, shape in tensors.items()}, tmp_path / "lora.safetensors")
    with pytest.raises(SettingsError, match=message):
        bench.train(adapter={"init_from_existing": str(tmp_path / "lora.safetensors")})
    with pytest.raises(SettingsError, match=r"must be a \.safetensors file"):
        bench.train(adapter={"init_from_existing": str(tmp_path / "missing.safetensors")})
