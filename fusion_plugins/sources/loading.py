"""Tokenizers, configurations and prompts: what local backends need before they load a model, and servers partly too."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusion_plugins.core.text.messages import as_messages
from fusion_plugins.core.text.model_rows import beyond_the_model
from fusion_plugins.core.text.reasoning import CHANNEL, CHANNEL_TAGS, CLOSE, OPEN, channels, with_reasoning
from fusion_plugins.core.text.round_trip import require_text
from fusion_plugins.errors import ConfigError, SourceError, TokenizerError
from fusion_plugins.model_names import reason_of, require_model
from fusion_plugins.sources.backends.base import Refusal, Response, SampleRequest, Sampling, SourceSettings

Content = str | list[dict[str, Any]]


def load_tokenizer(settings: SourceSettings) -> Any:
    """Load the tokenizer of a source, with the chat template that the settings name.

    ``revision`` is the model's: a tokenizer of another repository is loaded from its main branch.

    Raises:
        SourceError: it cannot be loaded.
        TokenizerError: it loses text.
        ConfigError: the file of the chat template cannot be read.
    """
    from transformers import AutoTokenizer

    name = settings.tokenizer or settings.model
    revision = settings.revision if name == settings.model else None
    try:
        require_model(name)
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=settings.trust_remote_code)
        tokenizer("a")
    except Exception as error:
        raise SourceError(
            f"source {settings.source_name!r}: cannot load the tokenizer {name!r}: {reason_of(error)}. Check the "
            "name, the network and `trust_remote_code`."
        ) from error
    try:
        require_text(tokenizer)
    except TokenizerError as error:
        raise TokenizerError(f"source {settings.source_name!r}: {error}") from error
    if settings.chat_template is not None:
        try:
            tokenizer.chat_template = Path(settings.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"source {settings.source_name!r}: cannot read chat_template {settings.chat_template!r}: "
                f"{getattr(error, 'strerror', None) or 'it is not text in UTF-8'}. Check the path."
            ) from error
    return tokenizer


def capture_tokenizer(settings: SourceSettings) -> Any:
    """Load the tokenizer that texts are captured with.

    Raises:
        SourceError, ConfigError: as :func:`load_tokenizer`; or the source is a server and no tokenizer is named.
    """
    if settings.backend == "openai" and settings.tokenizer is None:
        raise ConfigError(
            f"source {settings.source_name!r}: capture through a server needs `tokenizer`. Name the folder or hub name "
            "of the served model's tokenizer."
        )
    return load_tokenizer(settings)


def load_config(settings: SourceSettings) -> Any:
    """Load the text configuration of a source's model: sizes and dtype, without weights.

    Raises:
        SourceError: it cannot be loaded.
    """
    from transformers import AutoConfig

    try:
        require_model(settings.model)
        config = AutoConfig.from_pretrained(
            settings.model, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
    except Exception as error:
        raise SourceError(
            f"source {settings.source_name!r}: cannot load {settings.model!r}: {reason_of(error)}. Check the name, "
            "the network and `trust_remote_code`."
        ) from error
    text_config = config.get_text_config()
    text_config._commit_hash = getattr(config, "_commit_hash", None)
    return text_config


def chat_template_hash(tokenizer: Any, options: Mapping[str, Any] | None = None) -> str | None:
    """Return the sha256 (hex) of the chat template and the arguments that it gets, or None where there is none."""
    if tokenizer is None or not tokenizer.chat_template:
        return None
    given = json.dumps(options, sort_keys=True, default=str) if options else ""
    return hashlib.sha256(f"{tokenizer.chat_template}{given}".encode()).hexdigest()


def vocabulary_size(tokenizer: Any) -> int:
    """Return one more than the highest id that the tokenizer knows; the model's output may be wider."""
    return max(tokenizer.get_vocab().values()) + 1


def embedding_rows(settings: SourceSettings) -> int | None:
    """Return the number of ids that the model can read; the tokenizer may know more. None for a server."""
    return None if settings.backend == "openai" else int(load_config(settings).vocab_size)


def plain_text(content: Content) -> str:
    """Return the text of a prompt that is given to the model as it is.

    Raises:
        ConfigError: the prompt is a chat.
    """
    if not isinstance(content, str):
        raise ConfigError(
            "template 'plain' takes prompts with 'text', got one with 'messages'. Set `template: chat` or auto."
        )
    return content


def chat_messages(content: Content, system: str | None) -> list[dict[str, Any]]:
    """Return a prompt as messages, with the system prompt where the prompt has none of its own."""
    messages = as_messages(content)
    if system is not None and messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    return messages


def prompt_text(
    tokenizer: Any, content: Content, template: str, system: str | None, options: Mapping[str, Any] | None = None
) -> tuple[str, bool]:
    """Render a prompt for a model.

    Args:
        tokenizer: the source's tokenizer.
        content: a text (one message of the user, or the text itself with ``plain``) or messages.
        template: auto | chat | plain, see :class:`~fusion_plugins.sources.backends.base.Sampling`.
        system: system prompt for chats that have none.
        options: arguments of the chat template.

    Returns:
        The text, and whether the tokenizer still has to add its special tokens.

    Raises:
        ConfigError: a chat for a source without a chat template, or with ``plain``.
        SourceError: the template refuses the messages.
    """
    if template == "plain" or (template == "auto" and isinstance(content, str) and not tokenizer.chat_template):
        return plain_text(content), True
    if not tokenizer.chat_template:
        raise ConfigError(
            f"expected a chat template, because the prompt is a chat, but the tokenizer {tokenizer.name_or_path!r} has "
            "no chat template. Name a file with one in `chat_template`, or use prompts with 'text' and "
            "`template: plain`."
        )
    messages = chat_messages(content, system)
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **(options or {}))
        return text, False
    except Exception as error:  # templates raise errors of any type, not only Jinja's own
        raise SourceError(
            f"the chat template of {tokenizer.name_or_path!r} refuses a prompt: {error}. Use another chat_template, or "
            "drop the system message."
        ) from error


def response_text(tokenizer: Any, token_ids: Sequence[int], stop: tuple[str, ...]) -> tuple[str, bool]:
    """Return the text of generated tokens, cut before the first stop string, and whether there was one.

    Engines decode token by token, and write bytes that are not UTF-8 in different ways. With one function for all of
    them their responses can be compared.
    """
    text = _decoded(tokenizer, token_ids)
    cut = min((text.find(string) for string in stop if string in text), default=None)
    return text[:cut], cut is not None


def local_response(
    tokenizer: Any,
    prompt: Sequence[int],
    tokens: Sequence[int],
    stop: tuple[str, ...],
    *,
    ended: bool,
    generated: Sequence[int],
    logprobs: Sequence[float],
) -> Response | Refusal:
    """Return the response that generated tokens are.

    Reasoning gets the form of :mod:`fusion_plugins.core.text.reasoning`.

    Args:
        tokenizer: the source's tokenizer.
        prompt: ids of the prompt.
        tokens: generated ids, without the one that ended the response.
        stop: strings that end a response; it is cut before the first.
        ended: the model ended the response itself.
        generated: all generated ids, the one that ended the response included.
        logprobs: log-probability of each of them.
    """
    text, stopped = response_text(tokenizer, tokens, stop)
    said = channels(text)
    if said is not None and said.calls:
        return Refusal(f"expected an answer in text, got a call of a tool: {text!r:.80}")
    if said is not None:
        text = with_reasoning(said.reasoning, said.answer)
    elif tokenizer.decode(list(prompt[-8:])).rstrip().endswith(OPEN):
        text = f"{OPEN}\n{text.lstrip()}"
    kept: dict[str, Any] = {}
    if said is None and not stopped:
        kept = {"token_ids": tuple(map(int, generated)), "token_logprobs": tuple(map(float, logprobs))}
    return Response(text, "stop" if ended or stopped else "length", len(generated), len(prompt), **kept)


def _decoded(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Return the text of tokens, without special ones except those that tell reasoning from the answer."""
    special = {id for id, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special}
    if not special & {tokenizer.convert_tokens_to_ids(tag) for tag in (OPEN, CLOSE, CHANNEL)} & set(tokens):
        text: str = tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text
    marks = {tokenizer.convert_tokens_to_ids(tag) for tag in (OPEN, CLOSE, *CHANNEL_TAGS)}
    return str(tokenizer.decode([token for token in tokens if token not in special or token in marks]))


def prompt_ids(tokenizer: Any, content: Content, sampling: Sampling, max_length: int | None) -> list[int]:
    """Render and tokenize a prompt so that a model continues it.

    Raises:
        SourceError: prompt and response together exceed ``max_length`` tokens.
    """
    options = sampling.template_options
    text, special = prompt_text(tokenizer, content, sampling.template, sampling.system, options)
    ids: list[int] = tokenizer(text, add_special_tokens=special)["input_ids"]
    # Some tokenizers put EOS after every text; a model would not continue after it.
    while special and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    if max_length is not None and len(ids) + sampling.max_tokens > max_length:
        raise SourceError(
            f"a prompt of {len(ids)} tokens and max_tokens {sampling.max_tokens} exceed the model's {max_length} "
            f"tokens; lower max_tokens or drop the prompt: {text!r:.80}"
        )
    return ids


def split_prompts(
    tokenizer: Any, requests: Sequence[SampleRequest], max_length: int | None, rows: int | None = None
) -> tuple[dict[int, list[int]], dict[int, Refusal]]:
    """Tokenize prompts.

    Args:
        tokenizer: the source's tokenizer.
        requests: the prompts.
        max_length: longest sequence in tokens, prompt and response together; None for no limit.
        rows: embedding rows of the model; None where the engine itself refuses ids beyond them.

    Returns:
        Index -> ids of the prompts that the model can answer, and index -> why for the others.
    """
    prompts: dict[int, list[int]] = {}
    refused: dict[int, Refusal] = {}
    for index, request in enumerate(requests):
        try:
            ids = prompt_ids(tokenizer, request.content, request.sampling, max_length)
        except SourceError as error:
            refused[index] = Refusal(str(error))
            continue
        if problem := beyond_the_model(tokenizer, ids, rows):
            refused[index] = Refusal(problem)
        else:
            prompts[index] = ids
    return prompts, refused
