"""Compares the models of a merge: configurations, tied weights, tokenizers, and whether two are the same."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from mergekit.config import MergeConfiguration

from fusion_plugins.mergekit.check_plan import all_here
from fusion_plugins.mergekit.checkpoints import Checkpoint, sample_weights
from fusion_plugins.mergekit.findings import Finding, MergeCheck, architecture_of
from fusion_plugins.mergekit.methods import METHODS
from fusion_plugins.mergekit.rehearsal import ALIGN, ONE_BASE

#: Keys of a model's configuration that say what its weights mean.
SHAPE_KEYS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "hidden_act", "rope_theta", "rope_scaling", "rope_parameters", "sliding_window", "max_position_embeddings",
)  # fmt: skip
SPECIALS = ("bos_token", "eos_token", "pad_token", "unk_token")
#: Parts of the names of tensors that have a row per token.
VOCABULARY_PARTS = ("embed", "lm_head", "wte", "output.weight")
#: Problems of one kind that are listed.
LISTED = 3
#: How many times nearer to each other than to the base two tuned models are at least where that looks mistaken.
MUCH_NEARER = 10
Sample = Mapping[str, torch.Tensor]


def compare(
    config: MergeConfiguration,
    base: Checkpoint,
    checkpoints: Mapping[str, Checkpoint],
    check: MergeCheck,
) -> None:
    """Add what differs between the base and the other models, and copies.

    Args:
        config: the merge configuration.
        base: the model that the others are compared with.
        checkpoints: all models by name.
        check: gets the findings.
    """
    others = [checkpoint for checkpoint in checkpoints.values() if checkpoint is not base]
    aligned = config.tokenizer is not None or config.tokenizer_source is not None
    for other in others:
        if architecture_of(other.config) != architecture_of(base.config):
            check.error(
                f"{other.name} is a {architecture_of(other.config)}, {base.name} a {architecture_of(base.config)}",
                "merge models of one architecture; fuse other models by training",
            )
            continue
        for text, cure, level in _differences(base, other, sliced=bool(config.slices or config.modules)):
            check.findings.append(Finding(level, text, cure))
        if not all_here(config):  # else the rehearsal compares them
            for text, cure in _shape_differences(base, other, aligned):
                check.error(text, cure)
        _compare_tokenizers(base, other, aligned, bool(config.chat_template), check)
    _compare_weights([base, *others], config.base_model is not None, check)
    _compare_selection(config, others, check)
    dtypes = {info.dtype for one in checkpoints.values() for info in one.tensors.values()}
    if any(method.spec.name == config.merge_method for method in METHODS):
        return  # they round nothing but the result
    if config.dtype == "float16" and "bfloat16" in dtypes:
        check.warning("dtype float16 narrows the range of bfloat16 weights", "set dtype: float32, out_dtype: bfloat16")
    if config.dtype in ("bfloat16", "float16") and "float32" in dtypes:
        check.warning(f"dtype {config.dtype} rounds float32 weights before merging", "set dtype: float32 and out_dtype")


def _compare_selection(config: MergeConfiguration, others: Sequence[Checkpoint], check: MergeCheck) -> None:
    """Warn of SCE's selection where one tuned model is all that there is to select among."""
    groups = [config.parameters, *(each.parameters for each in config.slices or ())]
    shares, variants = ([*_values(groups, name)] for name in ("select_topk", "variant"))
    # The variant fusechat merges the elements that are not selected, too.
    selects = config.merge_method in ("sce", "fusechat_sce") and "fusechat" not in variants
    if selects and len(others) == 1 and any(share < 1 for share in shares):
        check.warning(
            f"{config.merge_method} selects elements on which the tuned models differ, and {others[0].name} is the "
            "only one, so that the merged model is the base where select_topk is below 1",
            "name more models, or leave out select_topk",
        )


def _values(groups: Iterable[Mapping[str, Any] | None], name: str) -> Iterator[Any]:
    """Yield the values of a parameter, whether it is one, a gradient or a list of filters."""
    for group in groups:
        found = (group or {}).get(name)
        for each in found if isinstance(found, list) else [found]:
            value = getattr(each, "value", each)
            yield from value if isinstance(value, list) else [] if value is None else [value]


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


def _compare_weights(checkpoints: Sequence[Checkpoint], based: bool, check: MergeCheck) -> None:
    """Find copies and, where the first model is their base, tuned models that did not begin there."""
    samples = [(checkpoint.name, sample_weights(checkpoint)) for checkpoint in checkpoints if not checkpoint.adapter]
    base = samples[0] if based and samples and samples[0][0] == checkpoints[0].name else None
    content = [_bytes(sample) for _, sample in samples]
    for index, (name, sample) in enumerate(samples):
        for before, (earlier, other) in enumerate(samples[:index]):
            if sample and content[index] == content[before]:
                check.warning(
                    f"{name} seems to hold the same weights as {earlier}",
                    "check the paths: a copy of the base gets no weight, a copy of another model counts twice",
                )
            elif base and earlier != base[0] and _far_from(base[1], sample, other):
                check.warning(
                    f"{earlier} and {name} are more than {MUCH_NEARER} times nearer to each other than to {base[0]}",
                    "check base_model: it must be the model that they were trained from",
                )


def _far_from(base: Sample, one: Sample, other: Sample) -> bool:
    return 0 < MUCH_NEARER * _distance(one, other) < min(_distance(one, base), _distance(other, base))


def _distance(left: Sample, right: Sample) -> float:
    """Return the root of the sum of squared differences; the samples of a tensor may be of unequal length."""
    total = 0.0
    for name in left.keys() & right.keys():
        if not all(one[name].is_floating_point() and one[name].element_size() > 1 for one in (left, right)):
            continue
        size = min(len(left[name]), len(right[name]))
        total += float((left[name][:size].double() - right[name][:size].double()).square().sum())
    return math.sqrt(total)


def _bytes(sample: Sample) -> dict[str, bytes]:
    # Bytes, since NaN is not equal to itself; numpy has no bfloat16.
    return {name: values.view(torch.uint8).numpy().tobytes() for name, values in sample.items()}
