"""The real tokenizers with their tables, read once: together they take half a minute."""

import pytest
import real_assets

from fusion_plugins.core.text.token_table import TokenTable


@pytest.fixture(scope="session")
def sides():
    """Name -> tokenizer and table of every real tokenizer."""
    tokenizers = {name: real_assets.tokenizer(name) for name in real_assets.TOKENIZERS}
    return {name: (tokenizer, TokenTable.from_tokenizer(tokenizer)) for name, tokenizer in tokenizers.items()}
