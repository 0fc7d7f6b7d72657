"""What can go wrong with a merge, found before it starts: the checks behind ``fusion merge-check``.

Nothing is loaded or merged. Of a model that is only on the hub, the headers are fetched.
"""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.merge_methods.registry import registered_methods
from mergekit.options import MergeOptions

from fusion_plugins.errors import ConfigError, FusionError, MergeError
from fusion_plugins.mergekit.checkpoints import Checkpoint, read_checkpoint, sample_bytes
from fusion_plugins.mergekit.ignored_keys import parameter_problems, unknown_keys

#: Keys of a model's configuration that say what its weights mean.
SHAPE_KEYS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "hidden_act", "rope_theta", "rope_scaling", "rope_parameters", "sliding_window", "max_position_embeddings",
)  # fmt: skip
SPECIALS = ("bos_token", "eos_token", "pad_token", "unk_token")
#: Parts of the names of tensors that have a row per token.
VOCABULARY_PARTS = ("embed", "lm_head", "wte", "output.weight")
#: Names that mergekit takes as `dtype` and `out_dtype` -> bytes per element.
WIDTHS = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Finding:
    """One problem, or something worth knowing.

    Attributes:
        level: an error makes the merge fail or its result wrong; a warning is for the user to judge.
        text: what was found.
        cure: what to do about it.
    """

    level: Literal["error", "warning"]
    text: str
    cure: str


@dataclass
class MergeCheck:
    """The outcome of a check.

    Attributes:
        findings: what was found, in the order of the checks.
        facts: what the merge reads, writes and needs, as (name, text).
    """

    findings: list[Finding] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether there is no error."""
        return not any(finding.level == "error" for finding in self.findings)

    def error(self, text: str, cure: str) -> None:
        """Add an error."""
        self.findings.append(Finding("error", text, cure))

    def warning(self, text: str, cure: str) -> None:
        """Add a warning."""
        self.findings.append(Finding("warning", text, cure))


def check_merge(path: Path, *, out: Path | None = None, options: MergeOptions | None = None) -> MergeCheck:
    """Check a configuration of ``mergekit-yaml``, or every document of one of ``mergekit-multi``.

    Args:
        path: the YAML file.
        out: where the merged model will be written; the current folder by default.
        options: mergekit's own flags, as far as they matter here.

    Raises:
        ConfigError: the file is missing or is no YAML mapping.
    """
    check, options = MergeCheck(), options or MergeOptions()
    documents = _documents(path)
    # With several documents, mergekit-multi writes the named ones first, and others may merge them by that name. For
    # mergekit-yaml, which reads one document, a name is a key that it ignores.
    made_here = {document["name"] for document in documents if "name" in document}
    for document in documents:
        raw = {key: value for key, value in document.items() if key != "name" or len(documents) == 1}
        config = _parse(raw, check)
        if config is None:
            continue
        references = [reference for reference in _references(config) if reference.model.path not in made_here]
        checkpoints = _read(references, options, check)
        base = checkpoints.get(str(config.base_model)) or next(iter(checkpoints.values()), None)
        if base is not None:
            _compare(config, base, checkpoints, options, check)
            _resources(config, base, len(_references(config)), out or Path(), options, check)
        if len(checkpoints) == len(_references(config)):
            _plan(config, base, options, check)
    return check


def _documents(path: Path) -> list[dict[str, Any]]:
    try:
        documents = [document for document in yaml.safe_load_all(path.read_text(encoding="utf-8")) if document]
    except OSError as error:
        raise ConfigError(f"{path}: expected a merge configuration, but cannot read it: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: expected a merge configuration, got a file that is not YAML: {error}") from error
    wrong = [type(document).__name__ for document in documents if not isinstance(document, dict)]
    if not documents or wrong:
        raise ConfigError(
            f"{path}: expected a merge configuration (a mapping), got {wrong[0] if wrong else 'an empty file'}. Start "
            "from a file in mergekit_configs."
        )
    return documents


def _parse(raw: dict[str, Any], check: MergeCheck) -> MergeConfiguration | None:
    """Read one configuration and look for what mergekit would ignore."""
    for problem in unknown_keys(raw, MergeConfiguration):
        check.error(problem, "correct or remove it; mergekit ignores it silently")
    try:
        config = MergeConfiguration.model_validate(raw)
    except Exception as error:
        check.error(f"mergekit cannot read the configuration: {_short(error)}", "correct what the message names")
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


def _references(config: MergeConfiguration) -> list[ModelReference]:
    return sorted(config.referenced_models(), key=str)


def _read(references: Sequence[ModelReference], options: MergeOptions, check: MergeCheck) -> dict[str, Checkpoint]:
    checkpoints = {}
    for reference in references:
        try:
            checkpoint = read_checkpoint(reference, trust_remote_code=options.trust_remote_code)
        except MergeError as error:
            cure = "correct the path or the name; check network and access token; download or save the model again"
            check.error(str(error), cure)
            continue
        checkpoints[checkpoint.name] = checkpoint
        elements = sum(info.elements for info in checkpoint.tensors.values())
        dtypes = "/".join(sorted({info.dtype for info in checkpoint.tensors.values()}))
        text = f"{_architecture(checkpoint)}, {elements:,} parameters, {dtypes}"
        check.facts.append((checkpoint.name, text))
        for part in filter(None, (reference.model.path, reference.lora and reference.lora.path)):
            # For its model card mergekit asks the hub about every name of the form "word" or "word/word".
            if Path(part).exists() and part[0] not in "/~." and part.count("/") < 2:
                check.warning(
                    f"{part} is a folder, but mergekit asks the hub about such a name when it writes the model card",
                    f"write ./{part}: without network the merge would fail at its end",
                )
        if checkpoint.adapter and not options.lora_merge_cache:
            check.error(f"{checkpoint.name}: the adapter must be merged first", "run with --lora-merge-cache FOLDER")
    return checkpoints


def _compare(
    config: MergeConfiguration,
    base: Checkpoint,
    checkpoints: Mapping[str, Checkpoint],
    options: MergeOptions,
    check: MergeCheck,
) -> None:
    others = [checkpoint for checkpoint in checkpoints.values() if checkpoint is not base]
    aligned = config.tokenizer is not None or config.tokenizer_source is not None
    for other in others:
        if _architecture(other) != _architecture(base):
            check.error(
                f"{other.name} is a {_architecture(other)}, {base.name} a {_architecture(base)}",
                "merge models of one architecture; fuse other models by training",
            )
            continue
        for text, cure, level in _differences(base, other, aligned, sliced=bool(config.slices or config.modules)):
            check.findings.append(Finding(level, text, cure))
        _compare_tokenizers(base, other, aligned, bool(config.chat_template), check)
    _find_identical([base, *others], check)
    dtypes = {info.dtype for one in checkpoints.values() for info in one.tensors.values()}
    if config.dtype == "float16" and "bfloat16" in dtypes:
        check.warning("dtype float16 narrows the range of bfloat16 weights", "set dtype: float32, out_dtype: bfloat16")
    if config.dtype in ("bfloat16", "float16") and "float32" in dtypes:
        check.warning(f"dtype {config.dtype} rounds float32 weights before merging", "set dtype: float32 and out_dtype")


def _differences(
    base: Checkpoint, other: Checkpoint, aligned: bool, *, sliced: bool
) -> Iterator[tuple[str, str, Literal["error", "warning"]]]:
    """Yield (what differs, cure, level) for configurations, tied weights and tensors."""
    for key in SHAPE_KEYS:
        ours, theirs = getattr(base.config, key, None), getattr(other.config, key, None)
        if ours != theirs and not (sliced and key == "num_hidden_layers"):
            text = f"{key} is {theirs!r} in {other.name} and {ours!r} in {base.name}, whose value the merged model gets"
            yield text, "if the tuned models use another value, set it in the merged model's config.json", "warning"
    tied = [bool(getattr(one.config, "tie_word_embeddings", False)) for one in (base, other)]
    if tied[0] != tied[1]:
        text = f"tie_word_embeddings is {tied[1]} in {other.name} and {tied[0]} in {base.name}"
        yield text, "tie or untie both before merging", "error"
    vocabulary: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
    shapes: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
    for name in sorted(set(base.tensors) & set(other.tensors)):
        ours, theirs = base.tensors[name].shape, other.tensors[name].shape
        if ours != theirs:
            of_tokens = ours[1:] == theirs[1:] and any(part in name for part in VOCABULARY_PARTS)
            (vocabulary if of_tokens else shapes).append((name, ours, theirs))
    if vocabulary and not aligned:
        name, ours, theirs = vocabulary[0]
        text = f"vocabularies differ: {name} is {list(theirs)} in {other.name} and {list(ours)} in {base.name}"
        yield text, "add tokenizer: {source: base} (or union) to the configuration", "error"
    for name, ours, theirs in shapes[:3]:
        text = f"{name} is {list(theirs)} in {other.name} and {list(ours)} in {base.name}"
        yield text, "give tuned models of one base; fuse other models by training", "error"
    odd = sorted(set(base.tensors) ^ set(other.tensors))
    if odd and tied[0] == tied[1] and not sliced:
        text = f"{len(odd)} tensor(s) are only in one of {base.name} and {other.name}, such as {odd[0]}"
        yield text, "mergekit stops if a tensor that is not optional is missing; save both the same way", "warning"


def _compare_tokenizers(base: Checkpoint, other: Checkpoint, aligned: bool, templated: bool, check: MergeCheck) -> None:
    if base.tokenizer is None or other.tokenizer is None:
        absent = [one.name for one in (base, other) if one.tokenizer is None]
        check.warning(f"no tokenizer in {', '.join(absent)}", "make sure that all models use the same one")
        return
    ours, theirs = base.tokenizer.get_vocab(), other.tokenizer.get_vocab()
    moved = sum(1 for token, index in ours.items() if theirs.get(token, index) != index)
    extra = len(set(theirs) ^ set(ours))
    if moved and not aligned:
        check.error(
            f"{moved} tokens have another id in {other.name} than in {base.name}",
            "add tokenizer: {source: base} (or union), which permutes the embeddings",
        )
    elif extra and not aligned:
        check.warning(
            f"{extra} tokens are only in one of {base.name} and {other.name}", "add tokenizer: {source: union}"
        )
    for name in SPECIALS:
        mine, its = getattr(base.tokenizer, name, None), getattr(other.tokenizer, name, None)
        if mine != its:
            check.warning(
                f"{name} is {its!r} in {other.name} and {mine!r} in {base.name}, whose value the merged model gets",
                "if the tuned models use another value, set it in the merged model's tokenizer",
            )
    if base.tokenizer.chat_template != other.tokenizer.chat_template and not templated:
        check.warning(
            f"{other.name} has another chat template than {base.name}, whose template the merged model gets",
            "if the tuned models use another one, set it as chat_template in the merge configuration",
        )


def _find_identical(checkpoints: Sequence[Checkpoint], check: MergeCheck) -> None:
    samples = [(checkpoint.name, sample_bytes(checkpoint)) for checkpoint in checkpoints if not checkpoint.adapter]
    for index, (name, sample) in enumerate(samples):
        for earlier, other in samples[:index]:
            if sample and sample == other:
                check.warning(
                    f"{name} seems to hold the same weights as {earlier}",
                    "check the paths: a copy of the base gets no weight, a copy of another model counts twice",
                )


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


def _plan(config: MergeConfiguration, base: Checkpoint | None, options: MergeOptions, check: MergeCheck) -> None:
    """Let mergekit plan the merge: this finds wrong values, missing parameters and slices that do not fit."""
    from mergekit.architecture import get_architecture_info
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import _model_out_config
    from mergekit.plan import MergePlanner

    if not all(Path(reference.model.path).is_dir() for reference in _references(config)):
        return
    if any(reference.lora for reference in _references(config)):
        return
    try:
        LoaderCache().setup(options)
        architecture = get_architecture_info(config, options)
        out_config = _model_out_config(config, architecture, trust_remote_code=options.trust_remote_code)
        # A copy, since planning rewrites the configuration.
        planner = MergePlanner(config.model_copy(deep=True), architecture, options=options, out_model_config=out_config)
        planner.plan_to_disk(out_path=os.devnull)  # nothing is written before the plan runs
    except FusionError as error:
        check.error(str(error), "correct the value")
    except Exception as error:
        check.error(f"mergekit cannot plan this merge: {_short(error)}", "correct what the message names")
    else:
        _find_unknown_tensors(architecture, base, check)


def _find_unknown_tensors(architecture: Any, base: Checkpoint | None, check: MergeCheck) -> None:
    """Find what mergekit will leave out: it writes the tensors that it knows of the architecture, and no others."""
    if base is None:
        return
    weights = architecture.all_weights(base.config)
    known = {name for weight in weights for name in (weight.name, *(weight.aliases or ()), *(weight.tied_names or ()))}
    unknown = sorted(name for name in base.tensors if name not in known and not name.endswith("inv_freq"))
    if unknown:
        check.warning(
            f"mergekit does not know {len(unknown)} tensor(s) of {base.name}, such as {unknown[0]}",
            "they will be missing from the merged model: merge the files with mergekit-pytorch instead",
        )


def _architecture(checkpoint: Checkpoint) -> str:
    return ", ".join(getattr(checkpoint.config, "architectures", None) or [checkpoint.config.model_type])


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.resolve().parents) if folder.exists())


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _bytes(count: int) -> str:
    for suffix, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {suffix}"
    return f"{count / 1e3:.1f} kB"


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
