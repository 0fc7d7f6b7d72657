"""The demonstration: the whole data flow on small models that it trains itself, on a CPU, without a network.

``problems``, ``texts`` and ``data`` make the texts, ``vocabularies`` and ``models`` describe the four models,
``pretrain`` trains them, ``evaluate`` measures, ``stages`` runs what ``plan`` lists, ``results`` prints.
"""
