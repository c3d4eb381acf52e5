"""Imports the package under its fixed name, whatever the clone is called."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import setuptools  # noqa: F401  torch.compile imports it, which fails once something has imported distutils

os.environ.setdefault("OMP_NUM_THREADS", "1")  # miniatures; threads that wait for each other crawl on a busy machine

os.environ["XDG_CONFIG_HOME"] = os.devnull  # the settings of who runs the tests are not to count

ROOT = Path(__file__).resolve().parent.parent
if "diffusion_trainer" not in sys.modules:
    spec = importlib.util.spec_from_file_location(
        "diffusion_trainer", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    package = importlib.util.module_from_spec(spec)
    sys.modules["diffusion_trainer"] = package
    spec.loader.exec_module(package)


class RootIsAFolder:
    """Keeps pytest from importing the root's ``__init__.py`` again, as a module without a package.

    A plugin, because pytest asks a conftest.py only about folders below its own.
    """

    def pytest_collect_directory(self, path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        return pytest.Dir.from_parent(parent, path=path) if path == ROOT else None


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(RootIsAFolder())
