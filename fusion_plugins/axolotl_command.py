"""``axolotl fusion ...``: our command line inside axolotl's, through its entry-point group ``axolotl.cli_commands``.

axolotl imports this module when the command is used, and to list it in `axolotl --help`: nothing heavy is loaded here.
"""

import click

from fusion_plugins.cli import main


# Typer need not be built on the click that axolotl uses, so the words are passed on as they are.
@click.command("fusion", add_help_option=False, context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def fusion(arguments: tuple[str, ...]) -> None:
    """Capture, sample, score, fuse: the commands of `fusion`."""
    main(list(arguments))
