"""What several tests of the store start from."""

from pathlib import Path

import pytest
from store_contents import write_records
from store_samples import record


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    """A complete store of records 0 to 3 in two shards."""
    write_records(tmp_path / "store", [record(number) for number in range(4)], flush_records=2)
    return tmp_path / "store"
