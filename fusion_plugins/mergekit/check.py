"""What can go wrong with a merge, found before it starts: the checks behind ``fusion merge-check``.

Nothing is loaded or merged. Of a model that is only on the hub, the headers are fetched.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
import yaml
from mergekit.architecture import get_architecture_info
from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.io import LazyTensorLoader
from mergekit.io.tasks import LoaderCache
from mergekit.merge import MergePlanner, _model_out_config, _set_chat_template
from mergekit.merge_methods.registry import get as get_method
from mergekit.merge_methods.registry import registered_methods
from mergekit.options import MergeOptions

from fusion_plugins.core.merging.deltas import DEQUANTIZE
from fusion_plugins.errors import ConfigError, FusionError, MergeError
from fusion_plugins.mergekit.adapters import SAVE_AGAIN, adapter_problems, meta_model
from fusion_plugins.mergekit.checkpoints import Checkpoint, read_checkpoint, read_tensor, sample_bytes, stale_copies
from fusion_plugins.mergekit.ignored_keys import parameter_problems, unknown_keys
from fusion_plugins.mergekit.methods import METHODS
from fusion_plugins.mergekit.quantized import BUFFERS, quantization_of, unmergeable
from fusion_plugins.mergekit.record import WEIGHT_FILES, require_writable
from fusion_plugins.mergekit.rehearsal import ALIGN, ONE_BASE, Rehearsal
from fusion_plugins.progress import meter

Say = Callable[[str], None]

#: Keys of a model's configuration that say what its weights mean.
SHAPE_KEYS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "hidden_act", "rope_theta", "rope_scaling", "rope_parameters", "sliding_window", "max_position_embeddings",
)  # fmt: skip
SPECIALS = ("bos_token", "eos_token", "pad_token", "unk_token")
#: Parts of the names of tensors that have a row per token.
VOCABULARY_PARTS = ("embed", "lm_head", "wte", "output.weight")
#: Names that mergekit takes as `dtype` and `out_dtype` -> bytes per element.
#: Problems of one kind that are listed.
LISTED = 3
#: Values of a configuration: more come from aliases that repeat each other.
MOST_NODES = 1_000_000
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
        references = [reference for reference in _references(config) if reference.model.path not in made_here]
        checkpoints = _read(references, options, check, say)
        base = checkpoints.get(str(config.base_model)) or next(iter(checkpoints.values()), None)
        if base is None:
            continue
        say("comparing the models")
        mergeable = _find_unmergeable(checkpoints, check)
        _compare(config, base, checkpoints, options, check)
        _resources(config, base, len(_references(config)), out or Path(), options, check)
        if mergeable and len(checkpoints) == len(_references(config)):
            _rehearse(config, base, checkpoints, options, check, say)
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
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(
            f"{path}: expected a merge configuration, got a file that is not YAML: {_short(error)}"
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
    found = [file.name for pattern in WEIGHT_FILES for file in [*out.glob(pattern), *out.glob(f"{pattern}.index.json")]]
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
        text = f"{_architecture(checkpoint)}, {elements:,} parameters, {dtypes}"
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
        for text, cure, level in _differences(base, other, sliced=bool(config.slices or config.modules)):
            check.findings.append(Finding(level, text, cure))
        if not _all_here(config):  # else the rehearsal compares them
            for text, cure in _shape_differences(base, other, aligned):
                check.error(text, cure)
        _compare_tokenizers(base, other, aligned, bool(config.chat_template), check)
    _find_identical([base, *others], check)
    dtypes = {info.dtype for one in checkpoints.values() for info in one.tensors.values()}
    if config.dtype == "float16" and "bfloat16" in dtypes:
        check.warning("dtype float16 narrows the range of bfloat16 weights", "set dtype: float32, out_dtype: bfloat16")
    if config.dtype in ("bfloat16", "float16") and "float32" in dtypes:
        check.warning(f"dtype {config.dtype} rounds float32 weights before merging", "set dtype: float32 and out_dtype")


def _differences(
    base: Checkpoint, other: Checkpoint, *, sliced: bool
) -> Iterator[tuple[str, str, Literal["error", "warning"]]]:
    """Yield (what differs, cure, level) for configurations and tied weights."""
    for key in SHAPE_KEYS:
        ours, theirs = getattr(base.config, key, None), getattr(other.config, key, None)
        if ours != theirs and not (sliced and key == "num_hidden_layers"):
            text = f"{key} is {theirs!r} in {other.name} and {ours!r} in {base.name}, whose value the merged model gets"
            yield text, "if the tuned models use another value, set it in the merged model's config.json", "warning"
    tied = [bool(getattr(one.config, "tie_word_embeddings", False)) for one in (base, other)]
    if tied[0] != tied[1]:
        text = f"tie_word_embeddings is {tied[1]} in {other.name} and {tied[0]} in {base.name}"
        if tied[0]:  # the merged model would have a head that its configuration, the base's, says it has not
            yield text, "untie the base before merging, or tie the others", "error"
        else:
            yield text, "nothing, if a merged model with a head of its own is wanted", "warning"


def _shape_differences(base: Checkpoint, other: Checkpoint, aligned: bool) -> Iterator[tuple[str, str]]:
    """Yield (what differs, cure) for tensors of models whose plan cannot be made."""
    differ = [name for name in base.tensors if name in other.tensors]
    differ = [name for name in differ if base.tensors[name].shape != other.tensors[name].shape]
    for name in sorted(differ)[:LISTED]:
        ours, theirs = base.tensors[name].shape, other.tensors[name].shape
        text = f"{name} is {list(theirs)} in {other.name} and {list(ours)} in {base.name}"
        if ours[1:] != theirs[1:] or not any(part in name for part in VOCABULARY_PARTS):
            yield text, ONE_BASE
        elif not aligned:
            yield f"vocabularies differ: {text}", ALIGN


def _compare_tokenizers(base: Checkpoint, other: Checkpoint, aligned: bool, templated: bool, check: MergeCheck) -> None:
    broken = [one for one in (base, other) if one.tokenizer_error is not None]
    for one in broken:
        check.warning(
            f"the tokenizer of {one.name} cannot be read ({one.tokenizer_error})", "save or download it again"
        )
    if broken:
        return
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


def _all_here(config: MergeConfiguration) -> bool:
    """Return whether all models and adapters are folders on this machine."""
    parts = [part for reference in _references(config) for part in (reference.model, reference.lora)]
    return all(Path(part.path).is_dir() for part in parts if part is not None)


def _rehearse(
    config: MergeConfiguration,
    base: Checkpoint,
    checkpoints: Mapping[str, Checkpoint],
    options: MergeOptions,
    check: MergeCheck,
    say: Say,
) -> None:
    """Let mergekit plan the merge, and go through its plan with the shapes of the tensors."""
    if not _all_here(config):
        check.facts.append(("plan", "not checked, since a model is only on the hub; download all models to check it"))
        return
    models = {reference: checkpoints[str(reference)] for reference in _references(config)}
    say("planning the merge")
    try:
        with _loaders(models, options):
            architecture = get_architecture_info(config, options)
            out_config = _model_out_config(config, architecture, trust_remote_code=options.trust_remote_code)
            # A copy, since planning rewrites the configuration.
            planner = MergePlanner(config.model_copy(deep=True), architecture, options, out_config)
            tasks = planner.plan_to_disk(out_path=os.devnull)  # nothing is written before the plan runs
        _set_chat_template(SimpleNamespace(), config)
    except FusionError as error:
        check.error(str(error), "correct the value")
        return
    except Exception as error:
        if any(reference.lora for reference in models) and isinstance(error, AssertionError):
            check.error(f"mergekit cannot merge adapters of a {_architecture(base)}", SAVE_AGAIN)
        else:
            check.error(f"mergekit cannot plan this merge: {_short(error)}", "correct what the message names")
        return
    say(f"following {len(tasks)} steps of the plan")
    rehearsal = Rehearsal(get_method(config.merge_method), models)
    with meter("merge-check", len(tasks)) as progress:
        found = []
        for problem in rehearsal.problems(tasks):
            progress.advance()
            found += [problem] if problem is not None else []
    for text, cure in found[:LISTED]:
        check.error(text, cure)
    if len(found) > LISTED:
        check.error(f"{len(found) - LISTED} more tensor(s) of the merged model have such problems", "see above")
    if not found:
        _find_dropped(architecture, rehearsal, base, check)
    _find_two_layouts(rehearsal, check)
    _find_stale(config, rehearsal, check)
    _find_rounded(config, rehearsal, check)


@contextmanager
def _loaders(models: Mapping[ModelReference, Checkpoint], options: MergeOptions) -> Iterator[None]:
    """Give mergekit's planner what it asks about stored tensors, and forget it afterwards: files may change.

    A model with an adapter is taken as the model: merging an adapter changes no name and no shape.
    """
    cache = LoaderCache()
    cache.setup(options)
    kept = dict(cache.loaders)
    for reference, checkpoint in models.items():
        assert checkpoint.stored is not None
        cache.loaders[reference] = LazyTensorLoader(checkpoint.stored.index, options.lazy_unpickle)
    try:
        yield
    finally:
        cache.loaders.clear()
        cache.loaders.update(kept)


def _find_dropped(architecture: Any, rehearsal: Rehearsal, base: Checkpoint, check: MergeCheck) -> None:
    """Find what mergekit will leave out: it writes the tensors that it knows of the architecture, and no others."""
    weights = architecture.all_weights(base.config)
    known = {name for weight in weights for name in (weight.name, *(weight.aliases or ()), *(weight.tied_names or ()))}
    left: set[str] = set()
    for reference, checkpoint in rehearsal.models.items():
        unread = set(checkpoint.tensors) - rehearsal.read[reference] - known
        dropped = sorted(name for name in unread if not name.endswith("inv_freq"))
        if checkpoint is base:
            left = set(dropped)
            parameters = _parameters(base.config) if dropped else set()
            needed = [name for name in dropped if name in parameters]
            if needed:
                check.error(
                    f"mergekit does not know {len(needed)} tensor(s) of {base.name}, such as {needed[0]}: they would "
                    "be missing from the merged model",
                    "merge the files with mergekit-pytorch instead",
                )
                dropped = [name for name in dropped if name not in needed]
        else:
            dropped = [name for name in dropped if name not in left]
        if dropped:
            check.warning(
                f"mergekit leaves out {len(dropped)} tensor(s) of {checkpoint.name}, such as {dropped[0]}",
                "if the merged model needs them, merge the files with mergekit-pytorch instead",
            )


def _parameters(config: Any) -> set[str]:
    """Return the names of what transformers would load; none if it cannot build the model."""
    try:
        return set(meta_model(config).state_dict())
    except Exception:
        return set()


def _find_two_layouts(rehearsal: Rehearsal, check: MergeCheck) -> None:
    """Find folders with an index beside a single file that it does not name."""
    for checkpoint in rehearsal.models.values():
        index = checkpoint.stored.index if checkpoint.stored is not None else None
        for name in ("model.safetensors", "pytorch_model.bin"):
            folder = Path(index.base_path) if index is not None else Path(os.devnull)
            if (folder / name).is_file() and (folder / f"{name}.index.json").is_file():
                check.warning(
                    f"{folder} holds {name} and an index of shards: mergekit reads the shards, transformers the file",
                    "remove the one that is out of date",
                )


def _find_stale(config: MergeConfiguration, rehearsal: Rehearsal, check: MergeCheck) -> None:
    """Find copies of tensors that mergekit may read in place of those that the index means; our methods do not."""
    if any(method.spec.name == config.merge_method for method in METHODS):
        return
    for checkpoint in rehearsal.models.values():
        for name, file in stale_copies(checkpoint.stored) if checkpoint.stored is not None else ():
            check.error(
                f"{file} holds another copy of {name} than the file that the index names, and mergekit may merge it",
                "save or download the model again",
            )
            break


def _find_rounded(config: MergeConfiguration, rehearsal: Rehearsal, check: MergeCheck) -> None:
    """Find integers that mergekit would round by casting them to a dtype of floats; our methods do not."""
    dtypes = [dtype_from_name(name) for name in (config.dtype, config.out_dtype) if name in WIDTHS]
    if any(method.spec.name == config.merge_method for method in METHODS):
        return
    for reference, checkpoint in rehearsal.models.items():
        for name in sorted(rehearsal.read[reference]):
            if checkpoint.tensors[name].dtype not in BUFFERS or checkpoint.stored is None:
                continue
            tensor = read_tensor(checkpoint.stored, name)
            if any(not torch.equal(tensor.to(dtype).to(tensor.dtype), tensor) for dtype in dtypes):
                check.error(
                    f"{name} of {checkpoint.name} holds integers that dtype {config.dtype} or out_dtype rounds",
                    "leave out dtype and out_dtype, or merge with varm, which copies integers",
                )
                return


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
