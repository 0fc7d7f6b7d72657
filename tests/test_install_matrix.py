"""The table of environments in docs/install.md, and the script that makes it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import install_matrix  # noqa: E402
import install_smoke  # noqa: E402
from install_matrix import ENVIRONMENTS, LEFT_OUT, NOT_RUN, PASSES, Row  # noqa: E402

PAGE = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
NAMES = {(environment.name, environment.python): environment for environment in ENVIRONMENTS}


def test_the_page_has_a_row_for_every_environment_and_none_says_fails():
    rows = install_matrix.read_rows(PAGE)
    assert rows.keys() == NAMES.keys()
    for name, (_, _, what, *outcomes) in rows.items():
        wanted = ("imports", "commands", *NAMES[name].checks)
        ran = not what.startswith(NOT_RUN)
        expected = [PASSES if ran and check in wanted else LEFT_OUT for check in install_matrix.COLUMNS]
        assert outcomes == expected, name


def test_a_row_that_was_not_run_says_why():
    for cells in install_matrix.read_rows(PAGE).values():
        if cells[2].startswith(NOT_RUN):
            assert len(cells[2]) > len(f"{NOT_RUN}: ") + 10


def test_a_new_row_replaces_its_old_one_and_the_page_stays_as_it_is():
    rows = install_matrix.read_rows(PAGE)
    failed = Row(ENVIRONMENTS[0], {"imports": "fails: a | b", "commands": PASSES}, {"torch": "1"})
    page = install_matrix.with_table(PAGE, [*rows.values(), failed.cells])
    assert "fails: a / b" in page
    again = install_matrix.read_rows(page)
    assert again.keys() == rows.keys()
    assert again[ENVIRONMENTS[0].name, "3.11"][2:5] == ["torch 1", "fails: a / b", PASSES]
    assert install_matrix.with_table(page, rows.values()) == PAGE


def test_every_check_has_a_column_and_every_environment_names_checks_that_exist():
    assert install_smoke.CHECKS.keys() == install_matrix.COLUMNS.keys()
    assert all(set(environment.checks) <= set(install_smoke.CHECKS) for environment in ENVIRONMENTS)


def test_an_interpreter_is_of_the_version_that_is_asked_for():
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    found = install_matrix.find_python(version)
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    assert subprocess.run([found, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == version
    assert install_matrix.find_python("2.99") is None
    absent = install_matrix.Environment("x", "2.99")
    assert (
        install_matrix.try_environment(absent, Path("none.whl"), Path("none")).cells[2].startswith(f"{NOT_RUN}: no P")
    )


@pytest.mark.parametrize(
    ("said", "absent"),
    [
        ("Because torch==2.13.0+cpu has no wheels with a matching Python ABI tag", True),
        ("Because there is no version of torch==2.13.0+cpu and you require it", True),
        ("Because axolotl depends on torch<2.13 and you require torch==2.13.0+cpu, they are incompatible", False),
    ],
)
def test_only_a_build_that_is_not_there_excuses_a_row(said, absent, monkeypatch, tmp_path):
    def uv(*words):
        if "install" in words:
            raise subprocess.CalledProcessError(1, words, stderr=said)

    monkeypatch.setattr(install_matrix, "_uv", uv)
    monkeypatch.setattr(install_matrix, "find_links", list)
    if absent:
        assert "no CPU build" in install_matrix._install(ENVIRONMENTS[1], "python", Path("x.whl"), tmp_path)
    else:
        with pytest.raises(RuntimeError, match="depends on torch"):
            install_matrix._install(ENVIRONMENTS[1], "python", Path("x.whl"), tmp_path)


def test_a_check_that_fails_is_an_outcome_and_not_the_end(tmp_path, monkeypatch, capsys):
    def breaks():
        raise RuntimeError("broken")

    monkeypatch.setattr(install_smoke, "CHECKS", {"one": breaks, "two": lambda: None})
    monkeypatch.setattr(sys, "argv", ["smoke", str(tmp_path), "one", "two"])
    monkeypatch.chdir(tmp_path)
    install_smoke.main()
    assert '{"one": "fails: RuntimeError: broken", "two": "passes"}' in capsys.readouterr().out


@pytest.mark.parametrize("name", ["PYTHONPATH", "VIRTUAL_ENV"])
def test_nothing_of_this_environment_leaks_into_the_new_ones(name, monkeypatch):
    monkeypatch.setenv(name, "x")
    assert name not in install_matrix._clean()
