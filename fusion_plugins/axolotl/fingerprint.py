"""Makes axolotl's hash of a prepared dataset depend on everything that changes its rows.

axolotl hashes some keys of a dataset entry, but neither the content of files nor a plugin's keys. So the hash of all
that our rows depend on is put into keys of the entry that axolotl hashes and that our types do not use.
"""

import hashlib
import inspect
import json
import os
from collections.abc import Collection, Iterator
from glob import glob
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fusion_plugins
from fusion_plugins.axolotl.args import FusionBlock
from fusion_plugins.axolotl.fusion_losses import cuts_chunks
from fusion_plugins.axolotl.guards import TYPES, registered_names
from fusion_plugins.axolotl.prepared import remembered_store
from fusion_plugins.axolotl.source_args import SourceArgs
from fusion_plugins.errors import FusionError
from fusion_plugins.plugins import get_registry
from fusion_plugins.store import open_rows, open_store

#: settings of the block that change the training but not the prepared rows
_NOT_IN_ROWS = {"loss", "loss_options", "lm_loss_weight", "lm_loss_schedule", "loss_chunk", "temperature", "wrpo"}
#: settings that change only distributions, so not the rows that `prepared: stores` makes
_NOT_IN_REFERENCES = {"rule", "rule_options", "rule_by_domain", "metric", "top_k", "projection", "alignment"}
#: the same of a source
_NOT_IN_REFERENCES_OF_A_SOURCE = {"weight", "weight_by_domain"}
#: Keys of the dataset entry for the stamp. Each kind of run keeps one of them (rl: dpo the second, others the first).
_STAMPED = ("input_format", "field_rejected")
#: axolotl's own settings that change rows: their tokens, their order, or which of them are kept
_ROW_KEYS = {
    # The name of the target: its own answers are told by it, and read in another way.
    *("base_model", "base_model_config", "revision_of_model", "model_revision", "trust_remote_code"),
    *("special_tokens", "tokens", "added_tokens_overrides", "eot_tokens"),
    *("chat_template", "chat_template_jinja", "chat_template_kwargs"),
    *("default_system_message", "train_on_inputs", "seed", "curriculum_sampling", "shuffle_merged_datasets"),
    *("shuffle_before_merging_datasets", "sequence_len", "eval_sequence_len", "min_sample_len"),
    *("excess_length_strategy", "dataset_exact_deduplication", "rl", "trainer_cls"),
}
_ROW_PREFIXES = ("tokenizer_", "use_pose", "pose_")
#: files of a model's folder that a tokenizer or its template can be read from; weights are not
_TOKENIZER_SUFFIXES = {".json", ".jinja", ".model", ".txt", ".py", ".tiktoken"}
_NO_TOKENIZER = {"trainer_state.json", "generation_config.json"}
_HUB_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja", "config.json")
_PACKAGES = ("axolotl", "transformers", "tokenizers")


def stamp_datasets(cfg: Any, block: FusionBlock) -> None:
    """Put the content hash into every dataset entry of ours, before axolotl validates the configuration."""
    for name in ("datasets", "test_datasets"):
        for place, entry in enumerate(cfg.get(name) or []):
            if entry.get("type") in TYPES:
                stamp = f"fusion:{content_hash(cfg, block, entry, place=f'{name}/{place}')}"
                for key in _STAMPED:
                    entry[key] = stamp


def stamp_of(entry: Any) -> str | None:
    """Return the stamp of a dataset entry, raw or validated; None where it has none."""
    found = (entry.get(key) for key in _STAMPED)
    return next((str(value) for value in found if value), None)


def content_hash(cfg: Any, block: FusionBlock, entry: Any, *, place: str = "") -> str:
    """Return the sha256 (hex) of everything that one prepared dataset depends on.

    The versions of the packages, the block and the code that it names, axolotl's settings that change rows, the
    content of the stores, of the data files, and of the target's tokenizer and template.

    Args:
        cfg: the raw configuration.
        block: its ``fusion:`` block.
        entry: the entry of the dataset.
        place: where the entry is; rows for training and evaluation are prepared apart.
    """
    own = {key: value for key, value in entry.items() if key not in _STAMPED}
    settings = {key: cfg[key] for key in cfg if key in _ROW_KEYS or str(key).startswith(_ROW_PREFIXES)}
    unused = (
        _NOT_IN_ROWS | {"sources"} | (_NOT_IN_REFERENCES | {"weights_from"} if block.prepared == "stores" else set())
    )
    parts: dict[str, Any] = {
        "versions": [fusion_plugins.__version__, *map(version, _PACKAGES)],
        "place": place,
        "entry": own,
        "settings": settings,
        "block": block.model_dump(mode="json", exclude=unused | {"reference"}),
        "sources": [
            _source(cfg, source, _NOT_IN_REFERENCES_OF_A_SOURCE if block.prepared == "stores" else set())
            for source in block.sources
        ],
    }
    if cuts_chunks(block):
        parts["chunks"] = True
    if block.prepared == "stores" and _may_share_texts(block):
        # Rules are not in such rows, but whether one suits the texts is looked at when they are made.
        kinds = {key: _kind(rule) for key, (rule, _) in block.rules.items()}
        parts["rules"] = {key: kind for key, kind in kinds.items() if key == "rule" or kind != kinds["rule"]}
    if block.weights_from is not None and block.prepared == "rows":
        parts["weights_from"] = rows_content(block.weights_from)
    if block.reference is not None:
        parts["reference"] = block.reference.model_dump(exclude={"sources"}) | {
            "sources": [_source(cfg, source) for source in block.reference.sources]
        }
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
    code = [] if block.prepared == "stores" else _registered_code(block)
    named = [value for value in [*settings.values(), *own.values()] if isinstance(value, str)]
    for file in [*_data_files(own), *_tokenizer_files(cfg), *code, *_existing(named)]:
        digest.update(file.name.encode())
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def _may_share_texts(block: FusionBlock) -> bool:
    """Whether several sources may teach one text; not where each has domains of its own."""
    named = [domain for source in block.sources for domain in set(source.domains or ())]
    apart = all(source.domains is not None for source in block.sources) and len(named) == len(set(named))
    return len(block.sources) > 1 and not apart


def _kind(rule: str) -> list[bool]:
    found = get_registry("fusion_rules").get(rule)
    return [bool(getattr(found, mark, False)) for mark in ("by_cross_entropy", "weighted")]


def _source(cfg: Any, source: SourceArgs, unused: Collection[str] = ()) -> dict[str, Any]:
    return source.model_dump(exclude={"store", *unused}) | {"content": store_content(cfg, source.store)}


def rows_content(folder: str) -> str | None:
    """Return the sha256 (hex) of what a folder of rows holds; None where it is gone."""
    try:
        return open_rows(folder).manifest.fingerprint
    except FusionError:
        return None


def store_content(cfg: Any, store: str) -> str | None:
    """Return the sha256 (hex) of what a store holds.

    Where the store is gone, that of the rows that were prepared from it; None if there are none.
    """
    try:
        manifest = open_store(store).manifest
    except FusionError:
        return remembered_store(cfg, store)
    content = [manifest.identity(), [shard.sha256 for shard in manifest.shards]]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _data_files(entry: Any) -> Iterator[Path]:
    listed = entry.get("data_files") or []
    for place in [entry.get("path"), *([listed] if isinstance(listed, str) else listed)]:
        path = Path(str(place))
        if path.is_dir():
            for folder, folders, files in os.walk(path, followlinks=True):
                folders.sort()
                yield from (Path(folder, file) for file in sorted(files))
        else:
            yield from _existing([str(place), *sorted(glob(str(place), recursive=True))])


def _existing(names: list[str]) -> Iterator[Path]:
    return (Path(name) for name in names if len(name) < 4096 and "\n" not in name and os.path.isfile(name))


def _tokenizer_files(cfg: Any) -> Iterator[Path]:
    name = str(cfg.get("tokenizer_config") or cfg.get("base_model_config") or cfg.get("base_model"))
    if Path(name).is_dir():
        for file in sorted([*Path(name).iterdir(), *Path(name, "additional_chat_templates").glob("*")]):
            if file.suffix in _TOKENIZER_SUFFIXES and file.name not in _NO_TOKENIZER and file.is_file():
                yield file
        return
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    revision = cfg.get("revision_of_model") or cfg.get("model_revision")
    for file_name in _HUB_FILES:
        try:
            cached = try_to_load_from_cache(name, file_name, revision=revision)
        except HFValidationError:
            return
        if isinstance(cached, str):
            yield Path(cached)


def _registered_code(block: FusionBlock) -> Iterator[Path]:
    """The modules of the rules that other packages register; those of this package have its version."""
    for key, (kind, name) in registered_names(block).items():
        found = get_registry(kind).get(name)
        module = inspect.getmodule(getattr(found, "func", found))
        if key != "loss" and module is not None and not module.__name__.startswith("fusion_plugins."):
            yield from _existing([str(module.__file__)])
