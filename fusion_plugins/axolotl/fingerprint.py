"""Makes axolotl's hash of a prepared dataset depend on the ``fusion:`` block and the content of the files.

axolotl hashes the keys of a dataset entry, but neither the content of its files nor a plugin's keys. So the hash of
everything that our rows depend on is put into a key of the entry that axolotl hashes and that our types do not use.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fusion_plugins
from fusion_plugins.axolotl.args import FusionBlock
from fusion_plugins.axolotl.guards import BEST, DPO, FUSED
from fusion_plugins.store import open_store

#: settings of the block that change the training but not the prepared rows
_NOT_IN_ROWS = {"loss", "lm_loss_weight", "lm_loss_schedule", "temperature"}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")


def stamp_datasets(cfg: Any, block: FusionBlock) -> None:
    """Put the content hash into every dataset entry of ours, before axolotl validates the configuration."""
    # The entries of the two kinds of runs have different schemas; neither key means anything to our types.
    key = "field_rejected" if cfg.get("rl") else "input_format"
    for name in ("datasets", "test_datasets"):
        for entry in cfg.get(name) or []:
            if entry.get("type") in (FUSED, BEST, DPO):
                entry[key] = f"fusion:{content_hash(cfg, block, entry)}"


def content_hash(cfg: Any, block: FusionBlock, entry: Any) -> str:
    """Return the sha256 (hex) of everything that one prepared dataset depends on.

    The package's version, the block, the content of the stores, of the data files and of the target's tokenizer.
    """
    digest = hashlib.sha256(fusion_plugins.__version__.encode())
    settings = block.model_dump(mode="json", exclude=_NOT_IN_ROWS)
    for source in settings["sources"]:
        manifest = open_store(source.pop("store")).manifest
        source["content"] = [manifest.identity(), [shard.sha256 for shard in manifest.shards]]
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for file in [*_data_files(entry), *_tokenizer_files(cfg)]:
        digest.update(file.name.encode())
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def _data_files(entry: Any) -> Iterator[Path]:
    listed = entry.get("data_files") or []
    for place in [entry.get("path"), *([listed] if isinstance(listed, str) else listed)]:
        path = Path(str(place))
        if path.is_file():
            yield path
        elif path.is_dir():
            yield from sorted(file for file in path.rglob("*") if file.is_file())


def _tokenizer_files(cfg: Any) -> Iterator[Path]:
    folder = Path(str(cfg.get("tokenizer_config") or cfg.get("base_model")))
    return (folder / name for name in _TOKENIZER_FILES if (folder / name).is_file())
