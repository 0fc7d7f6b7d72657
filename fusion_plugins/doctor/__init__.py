"""Reports: one self-contained HTML page per kind of folder."""
