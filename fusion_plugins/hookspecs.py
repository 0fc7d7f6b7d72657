"""The whole extension surface: five hooks, each handing over a ``register(name, obj)`` callback.

A package takes part by an entry point in the group ``fusion_plugins`` that names a module or object with functions
decorated with :data:`hookimpl`. Built-ins come in through the same hooks (:mod:`fusion_plugins.plugins`). A name that
is registered twice is a :class:`~fusion_plugins.errors.PluginError`.
"""

from collections.abc import Callable
from typing import Any

import pluggy

__all__ = ["PROJECT", "Register", "hookimpl", "hookspec"]

PROJECT = "fusion_plugins"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

Register = Callable[[str, Any], None]


@hookspec
def register_fusion_rules(register: Register) -> None:
    """Register rules that fuse several distributions per position into one.

    A rule is called as ``rule(distributions, cross_entropies, **options)`` like the ones in
    :mod:`fusion_plugins.core.fusion.fuse` and returns :class:`~fusion_plugins.core.fusion.types.SparseDistributions`.
    """


@hookspec
def register_aligners(register: Register) -> None:
    """Register methods that align two tokenizations of one text.

    An aligner is called as ``aligner(source_tokens, target_tokens, tie_order=...)`` and returns a
    :class:`~fusion_plugins.core.fusion.align.Alignment`.
    """


@hookspec
def register_losses(register: Register) -> None:
    """Register divergences between the target model and the fused rows.

    A loss is called as ``loss(student_logprobs, target_logprobs, target_mask)``, all (..., K), float32, nats, and
    returns one value per position (...).
    """


@hookspec
def register_scorers(register: Register) -> None:
    """Register scorers of responses; see :class:`fusion_plugins.scoring.Scorer`."""


@hookspec
def register_pair_rules(register: Register) -> None:
    """Register rules that turn the scored candidates of one prompt into preference pairs.

    A rule is called as ``rule(candidates, **options)`` and returns a list of
    :class:`~fusion_plugins.core.preferences.candidates.Pair`.
    """
