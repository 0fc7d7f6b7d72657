"""Several source distributions over one text -> one fused distribution per position, and the losses on it.

Reading order: ``types``, ``align`` (source position per target position), ``vocabulary_map`` (source token -> target
token), ``project`` (a distribution over the target's vocabulary), ``fuse`` (several distributions -> one), ``pipeline``
(all of it for one text), ``losses``. For the target's own answers: ``chunks``, ``chunk_losses``. The rest is behind
these: ``record``, ``common_text``, ``answer_starts``, ``prefixed_tables``, ``counts``, ``nearest``, ``dtw``,
``accounting``, ``teachers``, ``routing`` and ``chunk_routing`` (which sources teach which text), ``flat`` (many texts
in one array), and the compiled ``dtw_kernels`` and ``projection_kernel``.
"""
