"""Messages without credentials."""

import pytest

from fusion_plugins.redaction import without_credentials, without_secret_parts, without_secret_words, without_secrets


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:secret@h/v1", "***@h/v1"),
        ("['http://me:secret@h', 5]", "['***@h', 5]"),
        ("ask s3://secret@h/a or ftp://me:sec/ret@h", "ask ***@h/a or ***@h"),
        ("http://h/v1?key=secret#secret", "http://h/v1?***"),
        ("me:secret@h", "***@h"),
        ("a@b, c:d", "a@b, c:d"),
        ("", ""),
    ],
)
def test_urls_lose_their_user_password_and_query(text, shown):
    assert without_credentials(text) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("options={api_key: secret, base_url: x}", "options={api_key: ***, base_url: x}"),
        ('{"api_key": "a secret", "n": 1}', '{"api_key": ***, "n": 1}'),
        ("--set=options.api-key=secret", "--set=options.api-key=***"),
        ("python m.py --api-key secret {model}", "python m.py --api-key *** {model}"),
        ("bash -c 'export HF_TOKEN=secret; run'", "bash -c 'export HF_TOKEN=***; run'"),
        ("-H 'Authorization: Bearer secret'", "-H 'Authorization: Bearer ***'"),
        ("--tokenizer x --max-tokens 5 pad_token: <pad>", "--tokenizer x --max-tokens 5 pad_token: <pad>"),
        ("token-by-token, keys: a", "token-by-token, keys: a"),
    ],
)
def test_secrets_inside_texts_are_hidden(text, shown):
    assert without_secret_parts(text) == shown
    assert without_secrets({"held_out": {"command": [text]}}) == {"held_out": {"command": [shown]}}
    assert "secret" not in " ".join(without_secret_words(["say", text]))


@pytest.mark.parametrize("piece", ["a", "/", "://", "secret", "token.", 'key="', "a/b:"])
def test_a_long_word_is_read_once(piece):
    text = piece * 200_000  # what reads it anew from every letter on takes minutes
    assert without_secret_parts(text).startswith(piece[:4])


def test_settings_that_hold_secrets_in_other_words_are_hidden():
    settings = {"headers": {"Authorization": "Basic x"}, "swanlab_lark_webhook_url": "https://host/hook/x"}
    assert without_secrets(settings) == {"headers": {"Authorization": "***"}, "swanlab_lark_webhook_url": "***"}
