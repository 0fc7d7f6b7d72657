"""Options that several commands have: one name, one meaning and one help text each."""

from typing import Annotated

import typer

ConfigFile = Annotated[str | None, typer.Option("--config", "-c", help="YAML file with the settings.")]
Assignments = Annotated[
    list[str] | None, typer.Option("--set", help="KEY=VALUE for any key of the YAML file; dots for nested keys.")
]
Limit = Annotated[int | None, typer.Option(help="Take only this many rows, from the start.")]
Shard = Annotated[
    str | None, typer.Option(help="Do only part i of n, such as 2/3; `fusion store merge` joins the parts.")
]
Out = Annotated[str | None, typer.Option(help="Folder to write into; an unfinished one is resumed.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Run a small part, write nothing, and estimate what everything will take.")
]
