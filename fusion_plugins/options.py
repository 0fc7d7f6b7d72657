"""Options that several commands share. Imported when the command line starts, so typer is all that this loads."""

from typing import Annotated

import typer

__all__ = ["Assignments", "ConfigFile"]

ConfigFile = Annotated[
    str | None, typer.Option("--config", "-c", help="YAML file with the settings; flags override it.")
]
Assignments = Annotated[
    list[str] | None, typer.Option("--set", help="KEY=VALUE for any key of the YAML file, dots for nested ones.")
]
