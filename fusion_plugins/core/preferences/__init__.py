"""Scored responses of many sources -> best answers and preference pairs.

Reading order: ``verdict`` (what counts as one), ``candidates`` (the types, cleaning, ties), ``choosing`` (rules
that hold for both), ``pairs`` with ``gaps``, ``best``, ``split`` (which prompt trains which stage). Apart from these:
``worth`` (are the answers worth training on?) with ``worth_types``, ``intervals`` and ``conclusions``, and ``losses``.
"""
