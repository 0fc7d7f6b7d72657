"""Finds what is wrong with ``model+adapter`` before mergekit merges the adapter into its model.

mergekit loads both, merges them and saves the result into ``--lora-merge-cache``; a result that is there is used again.
Here the model is built without weights, and PEFT loads the adapter into it as it would load it then.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mergekit.common import ModelReference, get_auto_cls
from transformers.initialization import no_init_weights

from fusion_plugins.mergekit.checkpoints import first_line

SAVE_AGAIN = "merge the adapter into the model that it was trained on (PEFT: merge_and_unload), and name the result"


def adapter_problems(reference: ModelReference, config: Any, cache: str | None) -> Iterator[tuple[str, str]]:
    """Yield (problem, cure) for a model with an adapter.

    Args:
        reference: the model and its adapter.
        config: transformers' configuration of the model.
        cache: mergekit's ``lora_merge_cache``, None if it is not set.
    """
    assert reference.lora is not None
    if cache is None:
        yield f"{reference}: the adapter must be merged first", "run with --lora-merge-cache FOLDER"
    elif (merged := cached(reference, cache)) is not None:
        newest = max((file.stat().st_mtime for file in Path(reference.lora.path).glob("adapter_*")), default=0.0)
        weights = [*merged.glob("*.safetensors"), *merged.glob("*.bin")]
        if not weights or min(file.stat().st_mtime for file in weights) < newest:
            what = "older than the adapter" if weights else "without weights"
            yield f"{merged}: the merged copy of {reference} is {what}, and mergekit would use it", "delete that folder"
    if Path(reference.lora.path).is_dir():
        yield from ((problem, SAVE_AGAIN) for problem in _load(reference, config))


def cached(reference: ModelReference, cache: str) -> Path | None:
    """Return the folder of the merged copy that mergekit would use again, or None if there is none."""
    assert reference.lora is not None
    # mergekit's own name of it.
    folder = Path(cache) / f"{reference.model._unique_id()}_{reference.lora._unique_id()}"
    return folder if folder.exists() else None


def meta_model(config: Any, *, trust_remote_code: bool = False) -> Any:
    """Return transformers' model of a configuration, without memory for its weights."""
    with torch.device("meta"), no_init_weights():
        return get_auto_cls(config.architectures[0]).from_config(config, trust_remote_code=trust_remote_code)


def _load(reference: ModelReference, config: Any) -> Iterator[str]:
    from peft import PeftConfig, get_peft_model
    from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict

    assert reference.lora is not None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of another name of the base, of what it does without memory
            settings = PeftConfig.from_pretrained(reference.lora.path)
            with torch.device("meta"):
                model = get_peft_model(meta_model(config), settings)
            weights = load_peft_weights(reference.lora.path, device="cpu")
            loaded: Any = set_peft_model_state_dict(model, weights, low_cpu_mem_usage=True)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
        reason = lines[0] if lines else first_line(error)
        yield f"{reference.lora} does not fit {reference.model} ({reason[:300]})"
        return
    if loaded.unexpected_keys:
        yield (
            f"{reference.lora} has {len(loaded.unexpected_keys)} tensor(s) for which {reference.model} has no place, "
            f"such as {loaded.unexpected_keys[0]}; they would be left out"
        )
    absent = [name for name in loaded.missing_keys if settings.peft_type.lower() in name.lower()]
    if absent:
        yield f"{reference.lora} has no tensor for {len(absent)} place(s) of {reference.model}, such as {absent[0]}"
