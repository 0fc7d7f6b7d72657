"""Which ids a source is asked for besides its top k: those that the target itself finds most likely.

The target's top k says where the target will look. A source's own top k may not hold these tokens, and a divergence
that weighs by the target's probabilities (the reverse KL) then sees them only in the bucket for the rest.
"""

from dataclasses import dataclass

import numpy as np

from fusion_plugins.core.arrays import IntArray
from fusion_plugins.core.fusion.align import align_texts
from fusion_plugins.core.fusion.common_text import common_text
from fusion_plugins.core.fusion.types import Record
from fusion_plugins.core.fusion.vocabulary_map import map_vocabulary
from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.core.text.types import TokenizedText


@dataclass(frozen=True)
class AskedText(TokenizedText):
    """A text with the ids that the source is asked for.

    Attributes:
        asked: (U, J) int32 ids of the source, -1 for none; the row of a position is about its next token.
    """

    asked: IntArray


@dataclass(frozen=True)
class IdsOfTarget:
    """The target's tokens in the ids of a source.

    Attributes:
        own: the source's tokens.
        target: the target's.
        ids: (V,) int32 source token that is the target's token, by bytes or by role; -1 where there is none.
    """

    own: TokenTable
    target: TokenTable
    ids: IntArray

    @classmethod
    def of(cls, own: TokenTable, target: TokenTable) -> "IdsOfTarget":
        """Map the target's tokens one to one."""
        found = map_vocabulary(target, own, method="exact").target_ids.copy()
        # Two tokens of the target that mean one of the source are one to one with none.
        used, counts = np.unique(found[found >= 0], return_counts=True)
        found[np.isin(found, used[counts > 1])] = -1
        return cls(own, target, found)

    def asked(self, text: TokenizedText, record: Record) -> AskedText:
        """Return a text of the source with the ids that the target's record of it names.

        Args:
            text: U tokens of the source.
            record: what the target said about the same text.

        Raises:
            AlignmentError: the record is of another text.
        """
        known, own = common_text(record, text, self.target.packed, self.own.packed)
        position = align_texts(known.text, own).source_positions
        ids = record.topk.ids
        said = np.where((position[:, None] >= 0) & (ids[position] >= 0), self.ids[ids[position]], -1)
        return AskedText(text.input_ids, text.ends, text.spans, text.exact, said.astype(np.int32))
