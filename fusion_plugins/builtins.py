"""The built-in rules, aligners, losses and scorers, registered through the hooks that other packages use.

Each hook imports its table only when it is asked, so that a run that needs no loss loads no torch.
"""

from collections.abc import Mapping
from typing import Any

from fusion_plugins.hookspecs import Register, hookimpl

__all__: list[str] = []


@hookimpl
def register_fusion_rules(register: Register) -> None:
    """Register :data:`fusion_plugins.core.fuse.RULES`."""
    from fusion_plugins.core.fuse import RULES

    _register_all(register, RULES)


@hookimpl
def register_aligners(register: Register) -> None:
    """Register :data:`fusion_plugins.core.align.ALIGNERS`."""
    from fusion_plugins.core.align import ALIGNERS

    _register_all(register, ALIGNERS)


@hookimpl
def register_losses(register: Register) -> None:
    """Register :data:`fusion_plugins.core.losses.LOSSES`."""
    from fusion_plugins.core.losses import LOSSES

    _register_all(register, LOSSES)


@hookimpl
def register_scorers(register: Register) -> None:
    """Register :data:`fusion_plugins.scoring.SCORERS`."""
    from fusion_plugins.scoring import SCORERS

    _register_all(register, SCORERS)


@hookimpl
def register_pair_rules(register: Register) -> None:
    """Register :data:`fusion_plugins.core.pairs.PAIR_RULES`."""
    from fusion_plugins.core.pairs import PAIR_RULES

    _register_all(register, PAIR_RULES)


def _register_all(register: Register, table: Mapping[str, Any]) -> None:
    for name, obj in table.items():
        register(name, obj)
