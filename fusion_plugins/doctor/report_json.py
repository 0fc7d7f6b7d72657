"""The reports of ``fusion doctor`` as JSON, which has no NaN."""

import json
import math
from typing import Any


def report_json(fields: Any) -> str:
    """Return everything as JSON; null for what cannot be measured."""
    return json.dumps(_finite(fields), indent=1, ensure_ascii=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
