"""Messages without credentials."""

import pytest

from fusion_plugins.redaction import without_credentials


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
