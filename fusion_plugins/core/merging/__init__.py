"""Fine-tuned copies of one base model -> one model.

Read :mod:`~fusion_plugins.core.merging.deltas` first, then :mod:`~fusion_plugins.core.merging.varm` and
:mod:`~fusion_plugins.core.merging.sce`, which use it.
"""
