"""The extension points: five hooks, each of which gets a ``register(name, obj)`` callback.

A package takes part by an entry point in the group ``fusion_plugins`` that names a module or object with functions
decorated with :data:`hookimpl`. Built-ins use the same hooks (:mod:`fusion_plugins.plugins`). A name that
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

    A rule is called as ``rule(distributions, cross_entropies, **options)`` with S distributions of one shape (T, K),
    and returns :class:`~fusion_plugins.core.fusion.types.SparseDistributions`. The cross-entropies are (S,) per text. A
    rule marked with :func:`~fusion_plugins.core.fusion.fuse.per_token` gets (S, T), those of the target's next tokens.
    """


@hookspec
def register_aligners(register: Register) -> None:
    """Register methods that align two tokenizations of one text.

    An aligner is called as ``aligner(source_tokens, target_tokens)`` with two lists of bytes, and returns an
    :class:`~fusion_plugins.core.fusion.align.Alignment`.
    """


@hookspec
def register_losses(register: Register) -> None:
    """Register divergences between the trained model and the fused distributions.

    A loss is called as ``loss(student_logprobs, fused_logprobs, fused_mask)``, all (..., K), float32, nats, and
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
