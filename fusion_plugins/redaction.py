"""Messages without the secrets that a value may hold. Keys that are known are removed where they are used."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

_WORD = re.compile(r"[^\s'\"]+")
_AFTER_PATH = re.compile(r"[?#]")


def without_credentials(text: str) -> str:
    """Return a text in which no URL has a user name, a password or a query.

    Everything up to the last ``@`` of a word goes if a colon or a slash stands before it, with a scheme or without.

    Example:
        >>> without_credentials("ftp://me:pass/word@host/v1 me:key@host http://host/v1?key=k a@b")
        '***@host/v1 ***@host http://host/v1?*** a@b'
    """
    return _WORD.sub(lambda found: _word_without_credentials(found[0]), text)


def _word_without_credentials(word: str) -> str:
    user, at, rest = word.rpartition("@")
    if at and (":" in user or "/" in user):
        word = f"***@{rest}"
    scheme = word.find("://")
    query = _AFTER_PATH.search(word, scheme) if scheme >= 0 else None
    return f"{word[: query.start()]}?***" if query else word


#: names of settings and variables whose values are secrets; a pad token is none
_SECRET = re.compile(r"token$|secret|passw(or)?d|key$|credential|^authorization$|webhook", re.IGNORECASE)
_NO_SECRET = re.compile(r"(pad|bos|eos|unk|cls|sep|mask|eot|image|audio|video)_token$", re.IGNORECASE)
HIDDEN = "***"
#: ends of such names inside a text, and what can be their value there
_ENDS = r"(?:token|secret[\w-]{0,50}|passw(?:or)?d|key|credentials?)"
#: what stands before such an end; bounded, so that a long word costs no more than its length
_START = r"[\w.-]{0,200}"
_VALUE = r"""(?:"[^"]*"|'[^']*'|[^\s"',;}\]]+)"""
_PAIR = re.compile(rf"""(?<![\w.-])(?P<name>{_START}{_ENDS})(?P<mark>["']?[ \t]*[:=][ \t]*){_VALUE}""", re.IGNORECASE)
_OPTION = re.compile(rf"(?<!\S)(?P<name>--?{_START}{_ENDS})(?P<mark>[ \t]+)(?!-){_VALUE}", re.IGNORECASE)
_BEARER = re.compile(rf"(\bBearer[ \t]+){_VALUE}", re.IGNORECASE)


def is_secret(name: str) -> bool:
    """Return whether the value of a setting, an option or a variable of this name is a secret.

    Example:
        >>> [is_secret(name) for name in ("HF_TOKEN", "--api-key", "wandb.password", "pad_token", "max_tokens")]
        [True, True, True, False, False]
    """
    return _SECRET.search(name) is not None and _NO_SECRET.search(name) is None


def without_secret_parts(text: str) -> str:
    """Return a text, such as a command or a group of settings in one line, without the secrets that it names.

    Example:
        >>> without_secret_parts("x --api-key k --set 'options={api_key: k, pad_token: p}' 'Authorization: Bearer k'")
        "x --api-key *** --set 'options={api_key: ***, pad_token: p}' 'Authorization: Bearer ***'"
    """
    for form in (_PAIR, _OPTION):
        text = form.sub(_hidden, text)
    return without_credentials(_BEARER.sub(rf"\1{HIDDEN}", text))


def _hidden(found: re.Match[str]) -> str:
    return f"{found['name']}{found['mark']}{HIDDEN}" if is_secret(found["name"]) else found[0]


def without_secrets(value: Any, name: str = "") -> Any:
    """Return settings without the values of secrets, those that texts among them name included.

    Example:
        >>> without_secrets({"hub_token": "hf_x", "pad_token": "<pad>", "urls": ["http://me:pw@host/"], "top_k": 3})
        {'hub_token': '***', 'pad_token': '<pad>', 'urls': ['***@host/'], 'top_k': 3}
    """
    if isinstance(value, Mapping):
        return {key: without_secrets(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(item, name) for item in value]
    if not isinstance(value, str):
        return value
    return HIDDEN if value and is_secret(name) else without_secret_parts(value)


def without_secret_words(words: Sequence[str]) -> list[str]:
    """Return the words of a command without the values of secrets.

    Example:
        >>> " ".join(without_secret_words("x --api-key k --set a.token=t --top-k 3 HF_TOKEN=h".split()))
        'x --api-key *** --set a.token=*** --top-k 3 HF_TOKEN=***'
    """
    found, before = [], ""
    for word in words:
        name, equals, value = word.partition("=")
        if equals and value and is_secret(name):
            word = f"{name}={HIDDEN}"
        elif before.startswith("-") and "=" not in before and is_secret(before) and not word.startswith("-"):
            word = HIDDEN
        found.append(without_secret_parts(word))
        before = word
    return found
