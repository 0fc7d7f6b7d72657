"""The hook that registers our methods: silent, cheap, gone after uninstall, without effect on other methods."""

import json
import os
import re
import statistics
import subprocess
import sys
import sysconfig
import warnings
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import merging
import pytest
from merging import config_of

from fusion_plugins.mergekit import _autoload

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
#: mergekit's own methods with settings that make the result depend on every model, and on the seed where there is one.
THEIRS = {
    "linear": {"weight": 0.3},
    "slerp": {"t": 0.3},
    "nuslerp": {"weight": 0.5},
    "task_arithmetic": {"weight": 0.5},
    "ties": {"weight": 0.5, "density": 0.5},
    "dare_ties": {"weight": 0.5, "density": 0.5},
    "dare_linear": {"weight": 0.5, "density": 0.5},
    "breadcrumbs": {"weight": 0.5, "density": 0.9, "gamma": 0.01},
    "della": {"weight": 0.5, "density": 0.5, "epsilon": 0.1},
    "model_stock": {},
    "sce": {"select_topk": 0.2},
    "karcher": {},
}
MERGE_ALL = """
import json, sys
from pathlib import Path
if sys.argv[1] == "without":
    sys.meta_path[:] = [finder for finder in sys.meta_path if "fusion_plugins" not in type(finder).__module__]
from click.testing import CliRunner
from mergekit.merge_methods import registered_methods
from mergekit.scripts.run_yaml import main
folder = Path(sys.argv[2])
for config in sorted(folder.glob("*.yml")):
    out = folder / sys.argv[1] / config.stem / "merged"
    result = CliRunner().invoke(main, [str(config), str(out), "--random-seed", "1"])
    if result.exception: raise result.exception
print(json.dumps([method.spec.name for method in registered_methods()]))
"""


@pytest.mark.slow
def test_mergekits_own_methods_give_the_same_files_with_and_without_us(tmp_path):
    import yaml

    models = merging.make_models(tmp_path / "models")
    for method, parameters in THEIRS.items():
        tuned = ("one",) if method == "slerp" else ("one", "two")
        config = config_of(models, *tuned, method=method, dtype="float32", parameters=parameters)
        if method in ("linear", "nuslerp", "karcher"):
            del config["base_model"]
        (tmp_path / f"{method}.yml").write_text(yaml.safe_dump(config))
    known = {}
    for case in ("with", "without"):
        command = [sys.executable, "-c", MERGE_ALL, case, tmp_path]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        known[case] = json.loads(done.stdout.splitlines()[-1])
    assert set(known["with"]) - set(known["without"]) == {"varm", "fusechat_sce"}
    assert [name for name in known["with"] if name in known["without"]] == known["without"]
    files = sorted(path.relative_to(tmp_path / "with") for path in (tmp_path / "with").rglob("*") if path.is_file())
    assert len([path for path in files if path.suffix == ".safetensors"]) == len(THEIRS)
    others = sorted(
        path.relative_to(tmp_path / "without") for path in (tmp_path / "without").rglob("*") if path.is_file()
    )
    assert files == others
    for path in files:
        ours, theirs = ((tmp_path / case / path).read_bytes() for case in ("with", "without"))
        if path.name == "README.md":  # lists the models in the order of a set, which differs from run to run
            ours, theirs = sorted(ours.splitlines()), sorted(theirs.splitlines())
        assert ours == theirs, path


def test_the_hook_costs_an_interpreter_at_most_a_millisecond():
    """Best of many starts: the machine may be busy with other things, but is not always."""
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); line = open(sys.argv[2]).read();"
        "start = time.perf_counter(); exec(line); end = time.perf_counter();"
        "assert any('fusion_plugins' in type(finder).__module__ for finder in sys.meta_path);"
        "print((end - start) * 1e3, 'typing' in sys.modules, 'importlib.util' in sys.modules)"
    )
    python = Path(sysconfig.get_config_var("BINDIR")) / f"python{sysconfig.get_config_var('VERSION')}"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    runs = [
        subprocess.run(
            [python, "-S", "-c", code, ROOT, ROOT / "fusion_plugins_mergekit.pth"],
            capture_output=True, text=True, check=True, env=environment,
        ).stdout.split()
        for _ in range(15)
    ]  # fmt: skip
    assert {tuple(run[1:]) for run in runs} == {("False", "False")}
    assert min(float(run[0]) for run in runs) < 1.0, statistics.median(float(run[0]) for run in runs)


def test_starting_python_imports_nothing_heavy():
    code = "import sys; print([name for name in ('torch', 'numpy', 'mergekit', 'pydantic') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_hook_line_stays_silent_when_the_package_is_broken_or_gone(tmp_path):
    line = (ROOT / "fusion_plugins_mergekit.pth").read_text()
    (tmp_path / "fusion_plugins").mkdir()
    (tmp_path / "fusion_plugins" / "__init__.py").write_text("raise RuntimeError('broken')")
    for path in (str(tmp_path), str(tmp_path / "nothing")):
        code = f"import sys; sys.path[:] = [p for p in sys.path if 'site' not in p] + [{path!r}]\n{line}\nprint('fine')"
        done = subprocess.run(
            [sys.executable, "-S", "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "fine\n", "")


def test_a_hook_that_raises_is_a_warning_and_the_module_is_imported(tmp_path, monkeypatch):
    (tmp_path / "some_host.py").write_text("VALUE = 1\n")
    (tmp_path / "bad_hook.py").write_text("def act(module):\n    raise ValueError('no such thing')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    finder = _autoload._Finder({"some_host": ("bad_hook", "act")})
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    with pytest.warns(RuntimeWarning, match="could not extend some_host: ValueError: no such thing") as warned:
        import some_host
    (expected,) = re.findall(r"Expected mergekit (\S+): ", str(warned[0].message))
    assert f'"mergekit{expected}"' in (ROOT / "pyproject.toml").read_text()
    assert some_host.VALUE == 1
    assert finder not in sys.meta_path


def test_the_finder_leaves_other_modules_and_missing_ones_alone(monkeypatch):
    finder = _autoload._Finder({"no_such_host": ("fusion_plugins", "nothing")})
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    assert finder.find_spec("json") is None
    with pytest.raises(ModuleNotFoundError, match="no_such_host"):
        __import__("no_such_host")
    assert finder not in sys.meta_path


def test_a_host_that_was_imported_before_is_extended_at_once(monkeypatch):
    called = []
    hook = ModuleType("late_hook")
    hook.act = called.append
    host = ModuleType("early_host")
    host.__spec__ = ModuleSpec("early_host", None)
    monkeypatch.setitem(sys.modules, "late_hook", hook)
    monkeypatch.setitem(sys.modules, "early_host", host)
    monkeypatch.setattr(_autoload, "HOOKS", {"early_host": ("late_hook", "act")})
    before = list(sys.meta_path)
    _autoload.install()
    assert called == [host]
    assert sys.meta_path == before


def test_installing_twice_adds_one_finder(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if not isinstance(f, _autoload._Finder)])
    monkeypatch.setattr(_autoload, "HOOKS", {"a_host_that_nobody_has": ("fusion_plugins", "nothing")})
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            _autoload.install()
    assert sum(isinstance(finder, _autoload._Finder) for finder in sys.meta_path) == 1


@pytest.mark.parametrize("tool", ["pip", "uv"])
@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_installing_adds_the_hook_and_uninstalling_leaves_nothing(tool, kind, wheel_file, tmp_path):
    """A throw-away environment that sees this one's packages, but not this one's hooks."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    site = venv / "lib" / f"python{sysconfig.get_config_var('py_version_short')}" / "site-packages"
    (site / "zz_host.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = venv / "bin" / "python"
    before = {path.relative_to(venv) for path in venv.rglob("*")}
    target = [str(wheel_file)] if kind == "wheel" else ["-e", str(ROOT)]
    quiet = ["--no-deps", "--no-build-isolation"]
    if tool == "pip":
        install = [sys.executable, "-m", "pip", "--python", python, "install", *quiet, "--ignore-installed", *target]
        uninstall = [sys.executable, "-m", "pip", "--python", python, "uninstall", "-y", "fusion-plugins"]
    else:
        install = [BIN / "uv", "pip", "install", "--python", python, "--offline", *quiet, "--reinstall", *target]
        uninstall = [BIN / "uv", "pip", "uninstall", "--python", python, "fusion-plugins"]

    def run(command):
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    finders = "import sys; print([type(f).__module__ for f in sys.meta_path if 'fusion' in type(f).__module__])"
    assert run([python, "-c", finders]).strip() == "[]"
    run(install)
    assert run([python, "-c", finders]).strip() == "['fusion_plugins.mergekit._autoload']"
    if (tool, kind) == ("uv", "wheel"):
        code = (
            "import mergekit.merge_methods as m; print(m.get('varm').spec.pretty_name, m.get('fusechat_sce').spec.name)"
        )
        assert run([python, "-c", code]).strip() == "VaRM fusechat_sce"
    run(uninstall)
    assert run([python, "-c", finders]).strip() == "[]"
    left = {path.relative_to(venv) for path in venv.rglob("*") if "__pycache__" not in path.parts}
    assert left - {Path(".lock")} == before  # uv's own


def test_the_file_name_of_the_hook_sorts_after_the_editable_install():
    assert "_editable_impl_fusion_plugins.pth" < "fusion_plugins_mergekit.pth"


@pytest.mark.parametrize("first", ["fusion_plugins.mergekit.methods", "mergekit.merge_methods.registry"])
def test_the_order_of_imports_does_not_matter(first):
    code = f"import {first}\nfrom mergekit.merge_methods import registry\nimport fusion_plugins.mergekit.methods\n"
    code += "print(*(registry.get(name).spec.name for name in ('varm', 'fusechat_sce')))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "varm fusechat_sce\n"), done.stderr
