"""The trainer's entry: arguments, settings, Trainer(settings).run().

Started by ``deepspeed --num_gpus=N train.py --deepspeed --config train.toml``, by torchrun, or alone.
``python train.py --config train.toml --plan`` says what a training will take;
``python train.py --config train.toml --prune_cache`` removes from the cache what is no longer used.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import logging
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .utils.dataset_settings import DatasetSettings
    from .utils.run_folder import RunFolder
    from .utils.settings import TrainSettings
    from .utils.world import World

ROOT = Path(__file__).resolve().parent
PACKAGE = "diffusion_trainer"

SWITCHES = {
    "regenerate_cache": "encode this dataset again",
    "trust_cache": "take the dataset as it was found last time",
    "cache_only": "fill the cache and stop",
    "test_sample": "draw the samples of [sample] with the model as it is, and stop",
    "reset_dataloader": "when resuming, begin the epoch again",
    "reset_optimizer": "when resuming, take the weights alone",
    "reset_optimizer_params": "when resuming, take weight_decay, betas and so on from --config",
    "i_know_what_i_am_doing": "when resuming, go on although the settings are those of another training",
}
"""Flags that switch on the setting of the same name."""

logger = logging.getLogger(f"{PACKAGE}.train")


def load_package() -> ModuleType:
    """This folder as a package of one fixed name, whatever the clone is called."""
    if PACKAGE not in sys.modules:
        # "import utils" must never find our folder, nor ours somebody else's.
        sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
        spec = importlib.util.spec_from_file_location(
            PACKAGE, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        assert spec and spec.loader
        package = importlib.util.module_from_spec(spec)
        sys.modules[PACKAGE] = package
        spec.loader.exec_module(package)
    return sys.modules[PACKAGE]


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; unknown flags are refused by name."""
    parser = argparse.ArgumentParser(description="Train a diffusion model as a TOML file says.")
    parser.add_argument("--config", required=True, type=Path, help="train.toml")
    parser.add_argument("--dataset", type=Path, help="dataset.toml, instead of the one that --config names")
    parser.add_argument("--check_config", action="store_true", help="say whether the settings are right, and stop")
    parser.add_argument(
        "--resume_from_checkpoint",
        nargs="?",
        const=True,
        default=None,
        metavar="FOLDER",
        help="go on from the newest run, or from the run folder of this name below output_dir",
    )
    for flag, text in SWITCHES.items():
        parser.add_argument(f"--{flag}", action="store_true", help=text)
    parser.add_argument("--dump_dataset", metavar="DIR", help="write samples as the model will see them, and stop")
    parser.add_argument("--plan", action="store_true", help="say what the training will take, and stop")
    parser.add_argument("--gpus", type=int, help="with --plan: number of GPUs; else number_of_gpus")
    parser.add_argument("--gpu_memory", type=float, metavar="GIB", help="with --plan: of each; else of those here")
    add_machine_arguments(parser)
    parser.add_argument(
        "--prune_cache",
        nargs="?",
        const=30.0,
        type=float,
        metavar="DAYS",
        help="remove from the cache what no dataset has used in so many days (30), and stop",
    )
    parser.add_argument("--run_dir", type=Path, help="use this run folder instead of a new one in output_dir")
    parser.add_argument("--local_rank", type=int, default=-1, help="given by the launcher")
    parser.add_argument("--deepspeed", action="store_true", help="accepted, as the launcher's examples pass it")
    parser.add_argument("--deepspeed_config", help="accepted; DeepSpeed's settings follow from --config")
    return parser.parse_args(argv)


def add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that say on which machines the training runs."""
    parser.add_argument("--hostfile", type=Path, help="train on all machines of DeepSpeed's list, 'name slots=GPUs'")
    parser.add_argument("--num_nodes", type=int, help="with --hostfile: use so many machines, from the first on")
    parser.add_argument("--num_gpus", type=int, help="with --hostfile: GPUs of each; else as the list says")
    parser.add_argument("--master_addr", help="with --hostfile: where the processes meet; else at the first machine")
    parser.add_argument("--master_port", type=int, help="port that the processes meet at")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0 good, 1 failed, 2 wrong settings."""
    arguments = parse_arguments(argv)
    load_package()
    config = _module("utils.config")
    try:
        settings, dataset = read_settings(arguments)
        if arguments.check_config:
            import tomli_w

            _check_model(settings)
            as_toml = _module("utils.settings").as_toml
            print(tomli_w.dumps(as_toml(settings)))
            if dataset is not None:
                print(f"# dataset\n{tomli_w.dumps(as_toml(dataset))}")
            return 0
        if arguments.prune_cache is not None:
            return prune_cache(settings, arguments.prune_cache)
        if dataset is None:
            raise config.SettingsError("dataset: name the dataset's TOML, or put dataset.toml beside the train.toml")
        if arguments.plan:
            return plan(arguments, settings, dataset)
        if arguments.hostfile:
            return train_on_machines(arguments, sys.argv[1:] if argv is None else argv, settings, dataset)
        return train(arguments, settings, dataset)
    except config.SettingsError as error:
        print(error, file=sys.stderr)
        return 2


def read_settings(arguments: argparse.Namespace) -> tuple[TrainSettings, DatasetSettings | None]:
    """Settings of the run; the dataset's are None with --check_config when its file is not there."""
    settings_module, config = _module("utils.settings"), _module("utils.config")
    flags: dict[str, Any] = {name: True for name in SWITCHES if getattr(arguments, name)}
    if arguments.dump_dataset:
        flags["dump_dataset"] = arguments.dump_dataset
    settings = settings_module.parse_train_settings(config.read_toml(arguments.config) | flags)
    named = arguments.dataset or settings.dataset
    path = Path(named).expanduser() if named else arguments.config.parent / "dataset.toml"
    if not path.is_file() and (arguments.check_config or not named):
        return settings, None
    try:
        return settings, _module("utils.dataset_settings").parse_dataset_settings(config.read_toml(path))
    except config.SettingsError as error:
        raise config.SettingsError("\n".join(f"dataset {path}: {line}" for line in str(error).split("\n"))) from None


def _check_model(settings: TrainSettings) -> None:
    """Says what the model lacks here: another machine may have its files, another version the family."""
    SettingsError = _module("utils.config").SettingsError
    try:
        family = _module("utils.settings").family_of(settings)
        family.check_files()
    except SettingsError as error:
        print(f"the settings are right, but cannot be trained with here: {error}", file=sys.stderr)
        return
    _module("utils.samples").check_images(settings.sample, family)


def prune_cache(settings: TrainSettings, days: float) -> int:
    """Removes from the cache folder of these settings what no dataset has used in ``days`` days."""
    folder = _module("utils.preparation").cache_folder(settings)
    count, size = _module("utils.store").prune(folder, days)
    print(f"{folder}: {count} files removed, {size / 2**20:.0f} MiB")
    return 0


def plan(arguments: argparse.Namespace, settings: TrainSettings, dataset: DatasetSettings) -> int:
    """Prints what the training will take; reads of the model's files the headers alone, and encodes nothing."""
    with contextlib.redirect_stdout(sys.stderr):  # what libraries print there is no part of the plan
        import_diffusers()
        memory, module = arguments.gpu_memory, _module("utils.planning")
        gpu_bytes = _module("utils.plan").smallest_gpu() if memory is None else memory * 2**30
        lines = module.plan_lines(settings, dataset, arguments.gpus or settings.number_of_gpus, gpu_bytes)
    print("\n".join(lines))
    return 0


def train_on_machines(
    arguments: argparse.Namespace, argv: list[str], settings: TrainSettings, dataset: DatasetSettings
) -> int:
    """Starts the same command, without the list of machines, on each of them."""
    machines, folders = _module("utils.machines"), {}
    paths = machines.paths_in([settings.model_dump(exclude={"environment"}), dataset.model_dump()])
    apart = argparse.ArgumentParser(add_help=False)
    add_machine_arguments(apart)
    if arguments.run_dir:
        folders["run folder"] = str(arguments.run_dir.resolve())
    _log_to_stderr(0)
    try:
        hosts = machines.read_hostfile(arguments.hostfile, arguments.num_nodes, arguments.num_gpus)
        return int(machines.run(
            hosts, Path(__file__).resolve(), apart.parse_known_args(argv)[1], folders=folders, paths=paths,
            master_addr=arguments.master_addr, master_port=arguments.master_port))  # fmt: skip
    except _module("utils.config").SettingsError as error:
        if arguments.run_dir:  # whoever watches the run looks there
            run_folder = _module("utils.run_folder")
            run_folder.RunFolder(arguments.run_dir).write_status(run_folder.Status(state="failed", error=str(error)))
        raise


def train(arguments: argparse.Namespace, settings: TrainSettings, dataset: DatasetSettings) -> int:
    """Joins the other processes and trains."""
    if arguments.deepspeed_config:
        logger.warning("--deepspeed_config: not used; DeepSpeed's settings follow from --config")
    for name, value in settings.environment.as_variables().items():  # before torch is imported, which reads some
        os.environ.setdefault(name, value)
    if arguments.master_port:
        os.environ["MASTER_PORT"] = str(arguments.master_port)
    import_diffusers()
    trainer = _module("utils.trainer")
    world: World = _module("utils.world").join_world()
    _log_to_stderr(world.rank)
    resume = (
        arguments.resume_from_checkpoint
        if arguments.resume_from_checkpoint is not None
        else settings.resume_from_checkpoint
    )
    found: Any = None
    if world.rank == 0:
        try:
            found = _run_folder(arguments.run_dir, settings, resume).path
            run_folder = _module("utils.run_folder").RunFolder(found)
            if arguments.run_dir is None:
                trainer.prepare_folder(settings, dataset, run_folder)
        except _module("utils.config").SettingsError as error:
            found = error
        except OSError as error:
            found = _module("utils.config").SettingsError(
                f"output_dir: '{settings.output_dir}' cannot be written ({error.strerror}); choose another folder"
            )
    folder = _module("utils.run_folder").RunFolder(world.share(found))
    world.all_see(folder.path)
    if world.rank == 0 and arguments.run_dir is None:
        _log_to_file(folder.log)
    logger.info("run folder %s", folder.path)
    try:
        trainer.Trainer(settings, dataset, world, folder, resume=bool(resume)).run()
    except _module("utils.config").SettingsError:
        raise
    except Exception:
        logger.exception("training failed")
        return 1
    world.leave()
    return 0


def import_diffusers() -> None:
    """Loads it without what it would bring along: two seconds of every start, for nothing that is used here."""
    with _module("utils.imports").hidden("peft", "bitsandbytes"):
        importlib.import_module("diffusers")


def _run_folder(run_dir: Path | None, settings: TrainSettings, resume: bool | str) -> RunFolder:
    """The run folder that was named, is resumed, or a new one."""
    RunFolder, SettingsError = _module("utils.run_folder").RunFolder, _module("utils.config").SettingsError
    output = Path(settings.output_dir).expanduser()
    if run_dir is not None:
        run_dir.mkdir(parents=True, exist_ok=True)
        return RunFolder(run_dir)
    if not resume:
        return RunFolder.create(output)
    runs = [run for run in RunFolder.all(output) if resume in (True, run.path.name) and run.checkpoints()]
    if not runs:
        what = "no run with a checkpoint" if resume is True else f"no run '{resume}' with a checkpoint"
        raise SettingsError(f"resume_from_checkpoint: {what} in '{output}'; start without it, or see output_dir")
    return runs[-1]


def _log_to_stderr(rank: int) -> None:
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        stream=sys.stderr,
        force=True,
        format=f"%(asctime)s [rank {rank}] %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
    )


def _log_to_file(path: Path) -> None:
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger().addHandler(handler)


def _module(name: str) -> Any:
    return importlib.import_module(f"{PACKAGE}.{name}")


if __name__ == "__main__":
    sys.exit(main())
