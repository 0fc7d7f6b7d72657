"""Our commands in axolotl's own command line."""

import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

ROOT = Path(__file__).parents[2]


@pytest.fixture
def axolotl(tmp_path, monkeypatch):
    """axolotl's command line, with the entry points of pyproject.toml, whatever was installed before they changed."""
    from axolotl.cli.main import cli

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    metadata = tmp_path / "fusion_plugins-99.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.4\nName: fusion-plugins\nVersion: 99\n")
    points = [f"[{group}]\n" + "\n".join(f"{k} = {v}" for k, v in named.items()) for group, named in _points(project)]
    (metadata / "entry_points.txt").write_text("\n".join(points))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(cli, "_plugin_commands", None)

    def called(*arguments):
        return CliRunner().invoke(cli, ["fusion", *arguments] if arguments != ("--help",) else ["--help"])

    yield called
    cli._plugin_commands = None


def _points(project):
    return [("console_scripts", project["scripts"]), *project["entry-points"].items()]


def test_axolotl_lists_the_command_and_passes_everything_on(axolotl, tmp_path):
    listed = axolotl("--help")
    assert listed.exit_code == 0
    assert "fusion" in [
        line.split()[0] for line in listed.output.splitlines() if line.startswith("  ") and line.strip()
    ]
    assert "Capture, sample, score" in listed.output

    for arguments in (["-h"], ["capture", "--help"], ["store", "info", "--help"]):
        shown = axolotl(*arguments)
        assert shown.exit_code == 0
        assert "Usage" in shown.output
    assert "min_ce" in axolotl("plugins").output

    refused = axolotl("store", "info", str(tmp_path / "none"))
    assert refused.exit_code == 1
    assert "Error: " in refused.output
    assert axolotl("capture", "--no-such-flag").exit_code == 1
