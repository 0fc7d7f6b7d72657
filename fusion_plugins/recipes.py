"""The command ``fusion recipes``: the configurations that come with the package, listed or copied out."""

from pathlib import Path
from typing import Annotated

import typer

from fusion_plugins.errors import ConfigError
from fusion_plugins.terminal import say

#: folders of recipes; a wheel has them inside the package, a checkout beside it
FOLDERS = ("axolotl_configs", "mergekit_configs", "examples/fusechat3")
_PACKAGE = Path(__file__).parent


def recipe_files() -> dict[str, Path]:
    """Return the recipes: path as in the documentation -> file."""
    shipped = _PACKAGE / "shipped"
    root = shipped if shipped.is_dir() else _PACKAGE.parent
    files = (file for folder in FOLDERS for file in sorted((root / folder).rglob("*")) if file.is_file())
    return {file.relative_to(root).as_posix(): file for file in files}


def recipes(
    names: Annotated[
        list[str] | None, typer.Argument(help="Recipes to copy, as listed; all of them with --out alone.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to copy into, `.` for this one; without it the recipes are listed.")
    ] = None,
) -> None:
    """List the axolotl, mergekit and sampling configurations that come with the package, or copy them out.

    For example: `fusion recipes --out .` and then `axolotl train axolotl_configs/fusellm_llama2.yml`.
    """
    files = recipe_files()
    unknown = [name for name in names or [] if name not in files]
    if unknown:
        raise ConfigError(
            f"expected names of recipes as `fusion recipes` lists them, got {', '.join(map(repr, unknown))}"
        )
    chosen = {name: files[name] for name in names or files}
    if out is None:
        for name in chosen:
            typer.echo(name)
        return
    # A recipe that the user has changed is worth more than ours.
    changed = [
        name for name in chosen if (out / name).exists() and (out / name).read_bytes() != files[name].read_bytes()
    ]
    if changed:
        raise ConfigError(
            f"{', '.join(changed)} in {out} differ from the recipes of the package and are not overwritten. Move "
            "them away, or give another --out."
        )
    for name, file in chosen.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(file.read_bytes())
    say(f"{len(chosen)} recipes copied into {out}")
