"""The command ``fusion merge-check``."""

from pathlib import Path
from typing import Annotated

import typer

from fusion_plugins.install import missing_package_error
from fusion_plugins.terminal import say


def merge_check(
    config: Annotated[Path, typer.Argument(help="Merge configuration, as for mergekit-yaml or mergekit-multi.")],
    out: Annotated[Path | None, typer.Option(help="Where the merged model will be written.")] = None,
    lora_merge_cache: Annotated[str | None, typer.Option(help="As for mergekit-yaml.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="As for mergekit-yaml.")] = False,
) -> None:
    """Report what is wrong with a merge before it starts, and what it will take; status 1 if it cannot work.

    For example: `fusion merge-check mergekit_configs/varm.yml`.
    """
    try:
        from mergekit.options import MergeOptions

        from fusion_plugins.mergekit.check import check_merge
    except ModuleNotFoundError as error:
        raise missing_package_error(error, "fusion merge-check") from error
    options = MergeOptions(lora_merge_cache=lora_merge_cache, trust_remote_code=trust_remote_code)
    result = check_merge(config, out=out, options=options, say=lambda step: say(f"{step} ...", stderr=True))
    for name, text in result.facts:
        say(f"{name}: {text}")
    for finding in result.findings:
        say(f"{finding.level.upper()}: {finding.text}\n  -> {finding.cure}")
    if not result.ok:
        raise typer.Exit(1)
    say("no problems found" if not result.findings else "no errors found")
