"""What every group of settings of the ``fusion:`` block has in common."""

from collections.abc import Mapping
from types import NoneType
from typing import Any, get_args

from pydantic import model_validator

from fusion_plugins.config import Settings


class BlockSettings(Settings):
    """A group of settings of the block.

    The word ``none`` is the null of a command line. A truth value is no number: an option that lacks its value is true.
    """

    @model_validator(mode="before")
    @classmethod
    def _read_words(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        types = {name: {field.annotation, *get_args(field.annotation)} for name, field in cls.model_fields.items()}
        for key, value in values.items():
            if isinstance(value, bool) and types.get(key, set()) & {int, float}:
                raise ValueError(f"{key}: expected a number, got {str(value).lower()}")
        return {
            key: None if value == "none" and NoneType in types.get(key, ()) else value for key, value in values.items()
        }
