"""``fusion init``: the names of a target, sources and texts -> a folder with everything that a run needs.

``settings`` is what the user says. ``models`` and ``texts`` read what there is, ``choices`` decides what depends on it,
``findings`` says what cannot work, ``plan`` puts these together, ``steps`` lists the commands, ``write`` makes the
files, and ``commands`` is the command.
"""
