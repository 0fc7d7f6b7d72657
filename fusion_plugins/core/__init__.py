"""The algorithms: pure functions on arrays and tensors, which know no host, no file format and no network.

The names below are the public ones; everything behind them is internal and may move. They are loaded on first use,
because some need torch and some compile kernels.

Reading order: :mod:`~fusion_plugins.core.text` (``types``, ``token_table``, ``tokenize``), then
:mod:`~fusion_plugins.core.fusion` (``types``, ``align``, ``vocabulary_map``, ``project``, ``fuse``, ``pipeline``,
``divergences``, ``one_pass``, ``losses``), then one of :mod:`~fusion_plugins.core.merging` and
:mod:`~fusion_plugins.core.preferences`.
"""

from typing import TYPE_CHECKING

from fusion_plugins._lazy import lazy_names

if TYPE_CHECKING:
    from fusion_plugins.core.fusion.align import Alignment, align_tokens
    from fusion_plugins.core.fusion.counts import AlignmentCounts
    from fusion_plugins.core.fusion.fuse import fuse, per_token
    from fusion_plugins.core.fusion.losses import chunked_fusion_loss, fusion_loss
    from fusion_plugins.core.fusion.project import ProjectionOptions, Projector, project_distributions
    from fusion_plugins.core.fusion.types import Record, SparseDistributions, TopK, VocabularyMap
    from fusion_plugins.core.fusion.vocabulary_map import map_vocabulary
    from fusion_plugins.core.merging.sce import sce_merge
    from fusion_plugins.core.merging.varm import varm_merge, varm_weights
    from fusion_plugins.core.preferences.best import best_of
    from fusion_plugins.core.preferences.candidates import Candidate, Pair
    from fusion_plugins.core.preferences.gaps import GapWindow
    from fusion_plugins.core.preferences.pairs import build_pairs
    from fusion_plugins.core.preferences.split import SplitRule, split_prompts
    from fusion_plugins.core.text.token_table import TokenTable
    from fusion_plugins.core.text.types import TokenizedText

__all__ = [
    "Alignment",
    "AlignmentCounts",
    "Candidate",
    "GapWindow",
    "Pair",
    "ProjectionOptions",
    "Projector",
    "Record",
    "SparseDistributions",
    "SplitRule",
    "TokenTable",
    "TokenizedText",
    "TopK",
    "VocabularyMap",
    "align_tokens",
    "best_of",
    "build_pairs",
    "chunked_fusion_loss",
    "fuse",
    "fusion_loss",
    "map_vocabulary",
    "per_token",
    "project_distributions",
    "sce_merge",
    "split_prompts",
    "varm_merge",
    "varm_weights",
]

__getattr__ = lazy_names(
    __name__,
    {
        "text.types": ("TokenizedText",),
        "text.token_table": ("TokenTable",),
        "fusion.types": ("Record", "SparseDistributions", "TopK", "VocabularyMap"),
        "fusion.align": ("Alignment", "align_tokens"),
        "fusion.counts": ("AlignmentCounts",),
        "fusion.vocabulary_map": ("map_vocabulary",),
        "fusion.project": ("ProjectionOptions", "Projector", "project_distributions"),
        "fusion.fuse": ("fuse", "per_token"),
        "fusion.losses": ("chunked_fusion_loss", "fusion_loss"),
        "merging.varm": ("varm_merge", "varm_weights"),
        "merging.sce": ("sce_merge",),
        "preferences.candidates": ("Candidate", "Pair"),
        "preferences.gaps": ("GapWindow",),
        "preferences.pairs": ("build_pairs",),
        "preferences.best": ("best_of",),
        "preferences.split": ("SplitRule", "split_prompts"),
    },
)
