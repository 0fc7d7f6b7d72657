"""Folders of scored responses, as `fusion score` writes them."""

from fusion_plugins.store import RowManifest, RowWriter

COLUMNS = {
    "prompt_id": "string",
    "source": "string",
    "index": "int64",
    "prompt": "json",
    "response": "string",
    "domain": "string",
    "reference": "string",
    "reward": "float64",
    "correct": "bool",
    "scores": "json",
}


def write(folder, rows, columns=COLUMNS, stage="scored"):
    """Write those columns of rows that the folder has; return the folder."""
    manifest = RowManifest(stage=stage, columns=columns, key=("prompt_id", "source", "index"))
    with RowWriter(folder, manifest) as writer:
        for row in rows:
            writer.write({name: value for name, value in row.items() if name in columns})
        writer.finish()
    return folder
