"""The options that commands share."""

import typer
from typer.testing import CliRunner

from fusion_plugins.command_options import Assignments, ConfigFile, DryRun, Limit, Out

app = typer.Typer()


@app.command()
def command(
    config: ConfigFile = None,
    out: Out = None,
    limit: Limit = None,
    dry_run: DryRun = False,
    assign: Assignments = None,
) -> None:
    typer.echo(f"{config} {out} {limit} {dry_run} {assign}")


def test_each_option_has_its_name_and_is_optional():
    assert CliRunner().invoke(app, []).output == "None None None False None\n"
    flags = ["-c", "a.yml", "--out", "b", "--limit", "3", "--dry-run", "--set", "x=1", "--set", "y.z=2"]
    assert CliRunner().invoke(app, flags).output == "a.yml b 3 True ['x=1', 'y.z=2']\n"
    assert CliRunner().invoke(app, ["--config", "a.yml"]).output == "a.yml None None False None\n"
