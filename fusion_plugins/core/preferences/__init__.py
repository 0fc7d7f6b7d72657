"""Scored responses of many sources -> best answers and preference pairs.

Reading order: ``verdict`` (what counts as one), ``candidates`` (the types, cleaning, ties), ``pairs`` (the rules),
``split`` (which prompt trains which stage).
"""
