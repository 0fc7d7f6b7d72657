"""Losses of example texts under the model before and after a training; the only part of a page that runs a model."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion_plugins.model_names import reason_of

#: bytes of the weights of a model that is run without being asked for
SMALL = 2 << 30


@dataclass(frozen=True)
class Losses:
    """Losses of the tokens of texts.

    Attributes:
        before, after: per text, the loss of each token in nats; that of the first one is NaN.
    """

    before: Sequence[Sequence[float]]
    after: Sequence[Sequence[float]]


def losses_of(
    record: Mapping[str, Any], folder: Path, examples: Sequence[Mapping[str, Any]], *, wanted: bool | None
) -> Losses | str:
    """Return the losses of examples under the base model and the trained one, or why there are none.

    Args:
        record: content of ``fusion_training.json``.
        folder: of the trained model.
        examples: its example texts.
        wanted: True to load models of any size, False for none, None for those in folders of up to :data:`SMALL` bytes.
    """
    base, adapter = str(record.get("base_model") or ""), bool(record.get("adapter"))
    if wanted is False:
        return "Losses before and after the training were not asked for."
    weights = folder / "adapter_config.json" if adapter else folder / "config.json"
    if not weights.is_file() or not _size(folder):
        return "There is no loss after the training: the folder holds no finished model."
    if wanted is None and not (0 < _size(Path(base)) <= SMALL and _size(folder) <= SMALL):
        return (
            f"Losses before and after the training are computed by themselves for models in folders of up to "
            f"{SMALL >> 30} GiB. `fusion report --losses` loads {base}, then the trained model, whatever their size."
        )
    texts = [[int(token) for token in each["ids"]] for each in examples]
    try:
        # One after the other, so that only one is in memory.
        before = token_losses(base, texts)
        after = token_losses(base, texts, adapter=folder) if adapter else token_losses(str(folder), texts)
    except Exception as error:  # whatever a library says of the files of a model, the rest of the page stands
        return f"There are no losses before and after the training: a model could not be run: {reason_of(error)}."
    return Losses(before, after)


def token_losses(model: str, texts: Sequence[Sequence[int]], adapter: Path | None = None) -> list[list[float]]:
    """Return the negative log-probability of each token after the tokens before it, in nats; NaN for the first.

    Args:
        model: folder or hub name.
        texts: token ids.
        adapter: folder of an adapter to put on it.

    Raises:
        ValueError: a text has a token that the model does not have.
    """
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        model, dtype="auto", use_safetensors=True, trust_remote_code=False
    )
    width, highest = loaded.get_input_embeddings().weight.shape[0], max(max(text) for text in texts)
    if highest >= width:
        raise ValueError(f"{model} has {width} tokens, and the texts have token {highest}, added for the training")
    if adapter is not None:
        from peft import PeftModel

        loaded = PeftModel.from_pretrained(loaded, str(adapter), trust_remote_code=False)
    loaded = loaded.to(device).eval()
    found = []
    with torch.inference_mode():
        for text in texts:
            ids = torch.tensor([list(text)], device=device)
            logprobs = loaded(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
            losses = -logprobs.gather(-1, ids[0, 1:, None])[:, 0]
            found.append([math.nan, *losses.tolist()])
    return found


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.is_dir() else 0
