"""Records and projections for tests, from plain arrays and token tables."""

from fusion_plugins.core.fusion.project import Projector
from fusion_plugins.core.fusion.record import build_record
from fusion_plugins.core.fusion.types import TopK

__all__ = ["project_record", "record_of"]


def record_of(id, text, topk_ids, topk_logprobs, token_logprobs):
    """The record of a source that gives these top-k distributions."""
    return build_record(id, text, TopK(topk_ids, topk_logprobs, token_logprobs))


def project_record(record, alignment, vocabulary, target, *, source_table, target_table, **options):
    """One record projected by a projector of its own; ``options``: as for `Projector.of`."""
    return Projector.of(source_table, target_table, vocabulary, **options)(record, alignment, target)
