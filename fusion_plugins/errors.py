"""The errors of the package.

Every error that a user can cause is a :class:`FusionError`. Its message says what was expected, what it got, where, and
how to fix it::

    FusionError
    ├── ConfigError          a setting, a flag or a combination of settings
    ├── DataError            a row of texts, prompts, responses or pairs
    ├── TokenizerError       a tokenizer whose tokens cannot be turned into bytes
    ├── AlignmentError       two tokenizations that are not of the same text
    ├── StoreError           a store, its manifest or a shard
    │   └── MismatchError    two parts that were not made for each other
    ├── SourceError          a source model, engine or server
    ├── ScoringError         a scorer or the sandbox
    ├── MergeError           checkpoints that cannot be merged
    ├── ChainError           a step of a chain failed, or the chain is already being run
    └── PluginError          a plugin or a name that it registers

None derives from ``ImportError``: axolotl logs that one and then trains without the plugin.
"""

__all__ = [
    "AlignmentError",
    "ChainError",
    "ConfigError",
    "DataError",
    "FusionError",
    "MergeError",
    "MismatchError",
    "PluginError",
    "ScoringError",
    "SourceError",
    "StoreError",
    "TokenizerError",
]


class FusionError(Exception):
    """Base of all errors of this package."""


class ConfigError(FusionError):
    """A setting, a flag or a combination of settings is wrong."""


class DataError(FusionError):
    """A row of texts, prompts, responses or pairs is wrong."""


class TokenizerError(FusionError):
    """A tokenizer's tokens cannot be turned into bytes."""


class AlignmentError(FusionError):
    """Two tokenizations are not of the same text."""


class StoreError(FusionError):
    """A store, its manifest or one of its shards is unusable."""


class MismatchError(StoreError):
    """Two parts were not made for each other (text, tokenizer, template, top-k, ...)."""


class SourceError(FusionError):
    """A source model, its engine or its server failed."""


class ScoringError(FusionError):
    """A scorer failed, or the sandbox cannot isolate."""


class MergeError(FusionError):
    """Checkpoints cannot be merged as asked."""


class ChainError(FusionError):
    """A step of a chain failed, or the chain is already being run."""


class PluginError(FusionError):
    """A plugin, or a name that a plugin registers, is wrong."""
