"""Pages about the folders of a run: what was captured, who taught what, what the training and the merge made of it.

``kinds`` decides what a folder is. One module per kind reads it and returns sections (``blocks``), which ``chain`` puts
together for a whole run. Nothing here trains, and no store is read as a whole.
"""
