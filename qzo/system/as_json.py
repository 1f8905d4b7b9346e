"""Values as JSON has them."""

import math
from typing import Any


def finite(value: Any) -> Any:
    """The same value for json.dumps: JSON has no NaN and no infinity, None stands for them."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
