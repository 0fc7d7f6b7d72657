"""Settings that are given beside the block: ``--fusion.KEY VALUE`` on the command line, ``fusion.KEY`` in a sweep.

axolotl ignores options and keys that it does not know. Here they are put into the block, or refused.
"""

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from fusion_plugins.axolotl.args import FusionBlock
from fusion_plugins.config import parse_yaml
from fusion_plugins.errors import ConfigError

BLOCK = "fusion"


def apply_overrides(cfg: Any, arguments: Sequence[str]) -> None:
    """Put the settings that are given beside the ``fusion:`` block into it.

    Args:
        cfg: the raw configuration, which is changed.
        arguments: the command line, without the name of the command.

    Raises:
        ConfigError: an option or a key looks like one of the block and cannot be put there.
    """
    problems = [*_misplaced_keys(cfg), *_misspelt_options(arguments)]
    if problems:
        raise ConfigError("; ".join(problems))
    beside = {key: cfg.pop(key) for key in list(cfg) if str(key).startswith(f"{BLOCK}.")}
    for name, value in [*beside.items(), *_options(arguments)]:
        _put(cfg, name.split("."), value)


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Names and values of the options ``--fusion.KEY=VALUE``, ``--fusion.KEY VALUE`` and ``--fusion.KEY`` (true)."""
    for index, argument in enumerate(arguments):
        if not argument.startswith(f"--{BLOCK}."):
            continue
        name, equals, value = argument[2:].partition("=")
        if not equals:
            value = arguments[index + 1] if index + 1 < len(arguments) else "--"
        name = name.replace("-", "_")
        if not value.strip():
            raise ConfigError(f"--{name}: expected a value, got none; the null of a key is the word none.")
        try:
            yield name, True if not equals and value.startswith("--") else parse_yaml(value)
        except ValueError as error:
            raise ConfigError(f"--{name}: expected a YAML value, got {value!r}: {error}. Quote it.") from None


def _put(cfg: Any, path: Sequence[str], value: Any) -> None:
    group = cfg
    for depth, key in enumerate(path[:-1]):
        if group.get(key) is None:
            group[key] = {}
        group = group[key]
        if not isinstance(group, dict):
            raise ConfigError(
                f"--{'.'.join(path)}: expected a group of settings in {'.'.join(path[: depth + 1])}, got {group!r}. "
                "Give the whole list or value in the configuration file."
            )
    group[path[-1]] = value


def _misplaced_keys(cfg: Mapping[str, Any]) -> Iterator[str]:
    block = cfg.get(BLOCK)
    for key, value in cfg.items():
        # The same value in both places is a YAML anchor.
        taken = isinstance(block, Mapping) and key in block and block[key] == value
        group = str(key).partition(".")[0]
        if group in FusionBlock.model_fields and not taken and group not in _keys_of_axolotl():
            yield f"{key}: axolotl ignores this key beside the block; write it under `{BLOCK}:`"


def _misspelt_options(arguments: Sequence[str]) -> Iterator[str]:
    for argument in arguments:
        name = argument.removeprefix("--").partition("=")[0].replace("-", "_")
        group, dot, _ = name.partition(".")
        if not argument.startswith("--") or (group == BLOCK and dot):
            continue
        meant = group.startswith((BLOCK, f"no_{BLOCK}")) or bool(dot and get_close_matches(group, [BLOCK]))
        if (meant or group in FusionBlock.model_fields) and not {name, group} & _keys_of_axolotl():
            yield (
                f"{argument}: axolotl ignores this option; a setting of the block is given as --{BLOCK}.KEY VALUE, for "
                f"example --{BLOCK}.lm_loss_weight 0.5"
            )


def _keys_of_axolotl() -> set[str]:
    """The keys that axolotl and its other plugins know."""
    from axolotl.integrations.config import merge_input_args

    return set(merge_input_args()[1].model_fields) - {BLOCK}
