"""The loss of fused distributions or chunks that ``fusion.loss`` names, with its options, and what it needs."""

import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from fusion_plugins.axolotl.args import FusionBlock
from fusion_plugins.axolotl.source_args import AlignmentArgs, ProjectionArgs
from fusion_plugins.core.fusion.chunk_losses import ChunkLoss, Chunks, is_per_chunk
from fusion_plugins.core.fusion.divergences import Divergence
from fusion_plugins.errors import ConfigError
from fusion_plugins.plugins import get_registry, lookup


def bound_loss(block: FusionBlock) -> Divergence | ChunkLoss:
    """Return the loss with its options; raises PluginError if nothing is registered under its name."""
    loss: Divergence | ChunkLoss = lookup("losses", block.loss)
    return partial(loss, **block.loss_options) if block.loss_options else loss


def cuts_chunks(block: FusionBlock) -> bool:
    """Whether the loss is one of chunks, whose rows hold chunks in the place of distributions."""
    return is_per_chunk(get_registry("losses").get(block.loss))


def problems_of_fusion_loss(block: FusionBlock) -> Iterator[str]:
    """Yield what is wrong with the options of the loss, and what it cannot be combined with.

    Where the loss is unknown, that is said elsewhere.
    """
    loss = get_registry("losses").get(block.loss)
    if loss is None:
        return
    unknown = list(_unknown_options(block, loss))
    yield from unknown
    if not unknown and block.loss_options and (problem := _problem_of_values(block)):
        yield f"fusion.loss_options: {problem}"
    if is_per_chunk(loss):
        yield from _problems_of_chunks(block)


def _unknown_options(block: FusionBlock, loss: Any) -> Iterator[str]:
    known = inspect.signature(loss).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known):
        return
    takes = [parameter.name for parameter in known if parameter.kind is parameter.KEYWORD_ONLY]
    for option in block.loss_options:
        if option not in takes:
            yield f"fusion.loss_options: {block.loss} takes {', '.join(takes) or 'no options'}, got {option!r}"


def _problem_of_values(block: FusionBlock) -> str | None:
    """Return what the loss says of its options, tried on one position."""
    loss, said = bound_loss(block), torch.full((1,), -1.0)
    try:
        if is_per_chunk(loss):
            loss(said, Chunks(torch.ones(1, dtype=torch.long), said, said, longest=1))
        else:
            loss(said.view(1, 1), said.view(1, 1), torch.ones(1, 1, dtype=torch.bool))
    except ConfigError as error:
        return str(error)
    except (TypeError, ValueError) as error:
        return f"{block.loss} cannot take {block.loss_options}: {error}"
    return None


def _problems_of_chunks(block: FusionBlock) -> Iterator[str]:
    what = f"fusion.loss: {block.loss} compares chunks of the text"
    if block.alignment != AlignmentArgs():
        yield f"{what}, which both tokenizers end at the same bytes; remove fusion.alignment"
    idle = [
        key
        for key, given in (
            ("projection", block.projection != ProjectionArgs()),
            ("top_k", block.top_k is not None),
            ("temperature", block.temperature != 1),
            ("metric", block.metric != "byte"),
        )
        if given
    ]
    if idle:
        yield f"{what}, not distributions: fusion.{', fusion.'.join(idle)} would do nothing; remove it"
    routed = any(source.conditions for source in block.sources)
    if len(block.sources) > 1 and not routed and (problem := problem_of_rule(block.rule, block.loss)):
        yield f"fusion.rule: {problem}"


def problem_of_rule(rule: str, loss: str) -> str | None:
    """Return why several sources cannot be fused by a rule for a loss of chunks; None where they can."""
    if getattr(get_registry("fusion_rules").get(rule), "weighted", False):
        return None
    return (
        f"{rule} cannot be combined with fusion.loss: {loss} where several sources teach one text. A rule by "
        "cross-entropy prefers, on the target's own answers, the source that shares the target's mistakes, and others "
        "work on distributions. Set rule: fixed_weights, or give each text one source (domains or where)"
    )
