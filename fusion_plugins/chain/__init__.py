"""Chains of stock commands: ``fusion run`` and ``fusion rounds``.

A chain is a list of steps, each a command that also runs by itself. What one step writes and another reads is all that
they share, so any of them can be run by hand, on another machine or in another environment. The order comes from
:mod:`graphlib`; :mod:`.records` remembers what is done, :mod:`.process` starts and ends programs, :mod:`.run` puts the
three together, and :mod:`.rounds` writes chains.
"""
