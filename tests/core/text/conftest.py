import pytest
from tokenizer_cases import REAL, TINY, table_of


@pytest.fixture(scope="session")
def tables():
    """Name -> tokenizer and its table."""
    return {name: (make(), table_of(make())) for name, make in (TINY | REAL).items()}
