"""The command ``fusion merge-check``."""

from pathlib import Path
from typing import Annotated

import typer

from fusion_plugins.errors import ConfigError

__all__ = ["merge_check"]


def merge_check(
    config: Annotated[Path, typer.Argument(help="Merge configuration, as for mergekit-yaml or mergekit-multi.")],
    out: Annotated[Path | None, typer.Option(help="Where the merged model will be written.")] = None,
    lora_merge_cache: Annotated[str | None, typer.Option(help="As for mergekit-yaml.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="As for mergekit-yaml.")] = False,
) -> None:
    """Say what is wrong with a merge before it starts, and what it will take; status 1 if it cannot work."""
    from rich.console import Console

    try:
        from mergekit.options import MergeOptions

        from fusion_plugins.mergekit.check import check_merge
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"fusion merge-check needs {error.name}, which is not installed: pip install 'fusion-plugins[mergekit]'"
        ) from error
    options = MergeOptions(lora_merge_cache=lora_merge_cache, trust_remote_code=trust_remote_code)
    result = check_merge(config, out=out, options=options)
    console = Console(soft_wrap=True, highlight=False)
    for name, text in result.facts:
        console.print(f"{name}: {text}", markup=False)
    for finding in result.findings:
        console.print(f"{finding.level.upper()}: {finding.text}\n  -> {finding.cure}", markup=False)
    if not result.ok:
        raise typer.Exit(1)
    console.print("nothing stands in the way of this merge", markup=False)
