"""What the adapter tests share. Hosts read their environment when they are imported, so it is set here, first."""

import os
import signal
import sys

import axolotl_runs
import pytest

os.environ.update(axolotl_runs.ENVIRONMENT)


@pytest.fixture(scope="session")
def material(tmp_path_factory):
    """Checkpoints and stores for axolotl runs."""
    return axolotl_runs.make_material(tmp_path_factory.mktemp("material"))


@pytest.fixture(autouse=True)
def _own_interrupts():
    """axolotl leaves a handler of SIGINT behind that ends the process with status 0."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    """A folder to run axolotl in: its caches go into the current one, and it reads the command line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["axolotl"])
    return tmp_path
