"""The promises of docs/security.md are held by tests that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "security.md").read_text()


def test_every_promise_names_a_test_that_exists() -> None:
    tables = re.findall(r"^\| promise .*\n\| --- .*\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    rows = [row for table in tables for row in table.splitlines()]
    assert len(rows) >= 20
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert named, row
        for file, test in named:
            assert f"def {test}(" in (ROOT / file).read_text(), f"{file}::{test}"


def test_the_limits_on_the_page_are_those_of_the_code() -> None:
    from fusion_plugins.sources.backends.http import MOST_BYTES as ANSWER
    from fusion_plugins.store.manifest import MANIFEST_BYTES
    from fusion_plugins.store.reader import TABLE_BYTES
    from fusion_plugins.store.shards import MOST_BYTES, MOST_ROWS

    assert (ANSWER, MANIFEST_BYTES, TABLE_BYTES, MOST_ROWS, MOST_BYTES) == (
        16 << 20,
        64 << 20,
        1 << 28,
        1 << 20,
        4 << 30,
    )
    for limit in ("16 MiB", "64 MiB", "2^20 rows", "256 MiB", "4 GiB"):
        assert limit in PAGE
