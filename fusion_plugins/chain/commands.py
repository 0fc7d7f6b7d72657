"""The commands ``fusion run`` and ``fusion rounds``."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from fusion_plugins.terminal import console

if TYPE_CHECKING:
    from fusion_plugins.chain.settings import Chain

Jobs = Annotated[int, typer.Option("--jobs", "-j", min=1, help="Steps that may run at the same time.")]


def run(
    file: Annotated[Path, typer.Argument(help="YAML file with the steps.")] = Path("fusion.yml"),
    steps: Annotated[list[str] | None, typer.Argument(help="Only these steps, and what they need.")] = None,
    jobs: Jobs = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would run, and estimate what it will take; run no step.")
    ] = False,
) -> None:
    """Run a chain of commands, each in a process of its own; what is done is passed over.

    For example: `fusion run fusion.yml --jobs 2`. `fusion keys run` lists the keys of the file.
    """
    from fusion_plugins.chain.run import run_chain
    from fusion_plugins.chain.settings import load_chain

    chain = load_chain(file)
    if dry_run:
        show_plan(chain, steps or ())
    else:
        run_chain(chain, names=steps or (), jobs=jobs)


def show_plan(chain: "Chain", names: Iterable[str]) -> None:
    """Print what a run would do, then the estimates of the steps that can tell."""
    from fusion_plugins.chain.estimate import estimates
    from fusion_plugins.chain.run import plan_chain

    plan = plan_chain(chain, names)
    table = Table("step", "state", "command")
    for planned in plan:
        table.add_row(planned.step.name, planned.due or "is done", " ".join(planned.step.words))
    console().print(table)
    for name, text in estimates(chain, plan):
        console().print(f"{name}: {text}")
