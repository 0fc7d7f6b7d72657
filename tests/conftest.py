"""What all tests share. Hosts read their environment when they are imported, so it is set here, first."""

import os
import signal
import subprocess
import sys

import axolotl_runs
import pytest
import real_assets
import tiny
from hypothesis import settings

os.environ.update(axolotl_runs.ENVIRONMENT)
# A run in the background of a shell ignores Ctrl-C, and so would everything that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A shared machine is slow at times, which says nothing about an example. CI draws the same examples on every run.
settings.register_profile("project", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("project")


@pytest.fixture(scope="session")
def material(tmp_path_factory):
    """Checkpoints and stores for axolotl runs."""
    return axolotl_runs.make_material(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="session")
def wheel_file(tmp_path_factory):
    """The wheel of this package."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(out)]
    subprocess.run(command, cwd=axolotl_runs.ROOT, check=True, capture_output=True, text=True)
    (path,) = out.glob("*.whl")
    return path


def pytest_collection_modifyitems(items):
    """Files with slow tests first: where several processes share the files, none is left alone with a long one."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_runtest_setup(item):
    if item.get_closest_marker("real"):
        real_assets.require()


@pytest.fixture(autouse=True)
def _own_interrupts():
    """axolotl leaves a handler of SIGINT behind that ends the process with status 0."""
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _shared_tokenizers_stay_as_they_are():
    """A test that changes a shared tokenizer breaks others, which ones depends on their order: it copies it first."""
    yield
    assert not tiny.changed(), "this test changed a shared tokenizer of tiny.py: copy.deepcopy it first"


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    """A folder to run axolotl in: its caches go into the current one, and it reads the command line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["axolotl"])
    return tmp_path
