"""``fusion init``: the names of a target, sources and texts -> a folder with everything that a run needs.

``models`` and ``texts`` read what there is, ``choices`` decides what depends on it, ``findings`` says what cannot work,
``plan`` puts these together, ``write`` makes the files, and ``commands`` is the command.
"""
