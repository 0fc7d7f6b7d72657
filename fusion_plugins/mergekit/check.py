"""What can go wrong with a merge, found before it starts: the checks behind ``fusion merge-check``.

Nothing is loaded or merged. Of a model that is only on the hub, the headers are fetched.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.merge_methods.registry import registered_methods
from mergekit.options import MergeOptions
from pydantic import ValidationError

from fusion_plugins.core.merging.deltas import DEQUANTIZE
from fusion_plugins.errors import ConfigError, MergeError
from fusion_plugins.mergekit.adapters import adapter_problems
from fusion_plugins.mergekit.check_plan import references_of, rehearse_plan
from fusion_plugins.mergekit.checkpoints import Checkpoint, read_checkpoint
from fusion_plugins.mergekit.compare import compare
from fusion_plugins.mergekit.findings import WIDTHS, MergeCheck, Say, architecture_of, short
from fusion_plugins.mergekit.ignored_keys import parameter_problems, unknown_keys
from fusion_plugins.mergekit.quantized import quantization_of, unmergeable
from fusion_plugins.mergekit.record import WEIGHT_FILES, require_writable

#: Values of a configuration: more come from aliases that repeat each other.
MOST_NODES = 1_000_000


def check_merge(
    path: Path, *, out: Path | None = None, options: MergeOptions | None = None, say: Say | None = None
) -> MergeCheck:
    """Check a configuration of ``mergekit-yaml``, or every document of one of ``mergekit-multi``.

    Args:
        path: the YAML file.
        out: where the merged model will be written; the current folder by default.
        options: mergekit's own flags, as far as they matter here.
        say: is called with the name of each step before it starts.

    Raises:
        ConfigError: the file is missing or is no YAML mapping.
    """
    check, options, say = MergeCheck(), options or MergeOptions(), say or (lambda _: None)
    documents = _documents(path)
    # With several documents, mergekit-multi writes the named ones first, and others may merge them by that name. For
    # mergekit-yaml, which reads one document, a name is a key that it ignores.
    made_here = {document["name"] for document in documents if isinstance(document.get("name"), str)}
    if out is not None:
        _check_folder(out, check)
    for document in documents:
        raw = {key: value for key, value in document.items() if key != "name" or len(documents) == 1}
        config = _parse(raw, check)
        if config is None:
            continue
        references = [reference for reference in references_of(config) if reference.model.path not in made_here]
        checkpoints = _read(references, options, check, say)
        base = checkpoints.get(str(config.base_model)) or next(iter(checkpoints.values()), None)
        if base is None:
            continue
        say("comparing the models")
        mergeable = _find_unmergeable(checkpoints, check)
        compare(config, base, checkpoints, check)
        _resources(config, base, len(references_of(config)), out or Path(), options, check)
        if mergeable and len(checkpoints) == len(references_of(config)):
            rehearse_plan(config, base, checkpoints, options, check, say)
    return check


def _documents(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: expected a merge configuration, but cannot read it: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected a merge configuration in UTF-8, got {error}. Save it as UTF-8.") from error
    try:
        documents = [document for document in yaml.safe_load_all(text) if document]
    except Exception as error:  # PyYAML fails on a value of another type than its tag in many ways
        raise ConfigError(
            f"{path}: expected a merge configuration, got a file that is not YAML: {short(error)}"
        ) from error
    if _nodes(documents) > MOST_NODES:
        raise ConfigError(
            f"{path}: expected a merge configuration of at most {MOST_NODES} values, got more: its aliases repeat each "
            "other. Write it without aliases."
        )
    wrong = [type(document).__name__ for document in documents if not isinstance(document, dict)]
    if not documents or wrong:
        raise ConfigError(
            f"{path}: expected a merge configuration (a mapping), got {wrong[0] if wrong else 'an empty file'}. Start "
            "from a file in mergekit_configs."
        )
    return documents


def _nodes(value: Any) -> int:
    """Count values as often as aliases repeat them, up to the limit."""
    waiting, count = [value], 0
    while waiting and count <= MOST_NODES:
        value = waiting.pop()
        count += 1
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return count


def _check_folder(out: Path, check: MergeCheck) -> None:
    """Look at the folder that the merged model will be written to."""
    try:
        require_writable(out)
    except MergeError as error:
        check.error(str(error), "name another folder")
        return
    found = sorted(file.name for pattern in WEIGHT_FILES for file in out.glob(pattern))
    if found:
        check.warning(
            f"{out} holds weights already, such as {found[0]}; old files may stay beside the new ones",
            "merge into a new folder",
        )


def _parse(raw: dict[str, Any], check: MergeCheck) -> MergeConfiguration | None:
    """Read one configuration and look for what mergekit would ignore."""
    for problem in unknown_keys(raw, MergeConfiguration):
        check.error(problem, "correct or remove it; mergekit ignores it silently")
    try:
        config = MergeConfiguration.model_validate(raw)
    except ValidationError as error:  # without the values, among which a key may be
        problems = error.errors(include_input=False, include_url=False)
        text = "; ".join(f"{'.'.join(map(str, one['loc'])) or 'the file'}: {one['msg']}" for one in problems)
        check.error(f"mergekit cannot read the configuration: {text[:300]}", "correct what the message names")
        return None
    except Exception as error:
        check.error(f"mergekit cannot read the configuration: {short(error)}", "correct what the message names")
        return None
    for key, dtype in (("dtype", config.dtype), ("out_dtype", config.out_dtype)):
        if dtype is not None and dtype.removeprefix("torch.") not in WIDTHS:
            check.error(f"{key}: expected a dtype of mergekit, got {dtype!r}", f"use one of {', '.join(WIDTHS)}")
    methods = {method.spec.name: method.spec for method in registered_methods()}
    spec = methods.get(config.merge_method)
    if spec is None:
        close = get_close_matches(config.merge_method, methods)
        check.error(
            f"no merge method {config.merge_method!r}",
            f"did you mean {' or '.join(close)}?" if close else f"use one of {', '.join(sorted(methods))}",
        )
        return None
    for problem in parameter_problems(config.model_dump(mode="json", exclude_defaults=True), spec):
        check.error(problem, "correct, move or remove it; mergekit ignores it silently")
    return config


def _read(
    references: Sequence[ModelReference], options: MergeOptions, check: MergeCheck, say: Say
) -> dict[str, Checkpoint]:
    checkpoints = {}
    for number, reference in enumerate(references, start=1):
        say(f"reading model {number} of {len(references)}: {reference}")
        try:
            checkpoint = read_checkpoint(reference, trust_remote_code=options.trust_remote_code)
        except MergeError as error:
            text, _, cure = str(error).rpartition(". ")
            check.error(text, cure.rstrip("."))
            continue
        checkpoints[checkpoint.name] = checkpoint
        elements = sum(info.elements for info in checkpoint.tensors.values())
        dtypes = "/".join(sorted({info.dtype for info in checkpoint.tensors.values()}))
        text = f"{architecture_of(checkpoint.config)}, {elements:,} parameters, {dtypes}"
        check.facts.append((checkpoint.name, text))
        for part in filter(None, (reference.model.path, reference.lora and reference.lora.path)):
            # For its model card mergekit asks the hub about every name of the form "word" or "word/word".
            if Path(part).exists() and part[0] not in "/~." and part.count("/") < 2:
                check.warning(
                    f"{part} is a folder, but mergekit asks the hub about such a name when it writes the model card",
                    f"write ./{part}: without network the merge would fail at its end",
                )
        if reference.lora is not None:
            for text, cure in adapter_problems(reference, checkpoint.config, options.lora_merge_cache):
                check.error(text, cure)
    return checkpoints


def _find_unmergeable(checkpoints: Mapping[str, Checkpoint], check: MergeCheck) -> bool:
    """Find quantized models, and return whether there are none."""
    stored = {name: one.stored for name, one in checkpoints.items() if one.stored is not None}
    found = list(unmergeable(stored))
    for name, one in checkpoints.items():
        if name not in stored and (reason := quantization_of(one.config.to_dict(), one.tensors)):
            found.append((f"{name} is quantized ({reason}), and codes cannot be averaged", DEQUANTIZE))
    for text, cure in found:
        check.error(text, cure)
    return not found


def _resources(
    config: MergeConfiguration, base: Checkpoint, models: int, out: Path, options: MergeOptions, check: MergeCheck
) -> None:
    """Estimate what the merge takes; the merged model is assumed to be as large as the base."""
    tensors = list(base.tensors.values())
    width = WIDTHS.get(config.out_dtype or config.dtype or "", 0)
    size = sum(info.elements * width if width else info.size for info in tensors)
    largest = max(tensors, key=lambda info: info.elements)
    working = largest.elements * WIDTHS[config.dtype] if config.dtype in WIDTHS else largest.size
    # The largest tensor of every model as stored, as converted and once as merged, and the shard that is being filled.
    memory = working * (models + 1) + min(size, options.out_shard_size) + largest.size * models
    free = shutil.disk_usage(_existing(out)).free
    check.facts += [
        ("merged model", f"{_bytes(size)} in {config.out_dtype or config.dtype or 'the dtype of the inputs'}"),
        ("disk", f"{_bytes(free)} free at {_existing(out).resolve()}"),
        ("memory", f"about {_bytes(memory)} besides the program; {_bytes(_memory())} on this machine"),
    ]
    if size > free:
        check.error(
            f"the merged model takes {_bytes(size)}, {_bytes(free)} are free", "free space, or write to another disk"
        )
    if memory > _memory():
        check.warning(
            f"about {_bytes(memory)} of memory are needed, the machine has {_bytes(_memory())}",
            "write smaller shards (--out-shard-size 1B) or leave out dtype: float32",
        )


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.resolve().parents) if folder.exists())


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _bytes(count: int) -> str:
    for suffix, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {suffix}"
    return f"{count / 1e3:.1f} kB"
