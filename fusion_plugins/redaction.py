"""Messages without the secrets that a value may hold. Keys that are known are removed where they are used."""

import re

#: everything up to the last ``@`` of what has a colon or a slash before it, with a scheme or without
_USER = re.compile(r"[^\s'\"]*[:/][^\s'\"]*@")
_QUERY = re.compile(r"(://[^\s'\"?#]*)[?#][^\s'\"]*")


def without_credentials(text: str) -> str:
    """Return a text in which no URL has a user name, a password or a query.

    Example:
        >>> without_credentials("ftp://me:pass/word@host/v1 me:key@host http://host/v1?key=k a@b")
        '***@host/v1 ***@host http://host/v1?*** a@b'
    """
    return _QUERY.sub(r"\1?***", _USER.sub("***@", text))
