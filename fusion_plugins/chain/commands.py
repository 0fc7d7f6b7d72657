"""The commands ``fusion run`` and ``fusion rounds``."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from fusion_plugins.command_options import Assignments, ConfigFile
from fusion_plugins.terminal import console

if TYPE_CHECKING:
    from fusion_plugins.chain.round_configs import Rounds
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


def rounds(
    config: ConfigFile = None,
    number: Annotated[int | None, typer.Option("--rounds", help="How many rounds; more than before continues.")] = None,
    jobs: Jobs = 1,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Write the configurations of all rounds and show the steps; run none of them."),
    ] = False,
    assign: Assignments = None,
) -> None:
    """Train a target on its own answers, round after round, with the distributions of its sources.

    For example: `fusion rounds --config rounds.yml`. `fusion keys rounds` lists the keys of the file.
    """
    from fusion_plugins.chain.round_configs import load_rounds
    from fusion_plugins.chain.rounds import consistency, remove_broken_checkpoints, write_rounds
    from fusion_plugins.chain.run import run_chain
    from fusion_plugins.errors import ConfigError, FusionError

    if config is None:
        raise ConfigError("expected --config with the file of the rounds, got none")
    loaded = load_rounds(config, {"rounds": number}, assign)
    console(stderr=True).print(consistency(loaded))
    chain = write_rounds(loaded)
    if dry_run:
        show_plan(chain, ())
        return
    try:
        run_chain(chain, jobs=jobs, prepare=lambda: remove_broken_checkpoints(loaded))
    except (FusionError, KeyboardInterrupt, SystemExit):
        # Why the run failed is more than why its outcome cannot be shown.
        try:
            show_outcomes(loaded, chain)
        except (FusionError, OSError) as error:
            console(stderr=True).print(f"the outcome cannot be shown: {error}")
        raise
    show_outcomes(loaded, chain)


def show_outcomes(rounds: "Rounds", chain: "Chain") -> None:
    """Print and write what the rounds have come to so far."""
    from fusion_plugins.chain.outcome import outcomes, table_of, write_outcomes
    from fusion_plugins.chain.records import Records
    from fusion_plugins.install import missing_package

    records = Records(chain)
    found = outcomes(rounds, [name for name in chain.steps if (record := records.load(name)) and record.done])
    if not found:
        return
    messages = console()
    messages.print(table_of(found))
    try:
        messages.print(", ".join(map(str, write_outcomes(rounds, found))))
    except ModuleNotFoundError as error:
        messages.print(missing_package(error, "the plot") or str(error))


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
