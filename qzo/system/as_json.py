"""Values as JSON has them, and text of JSON that may come from anywhere."""

import json
import math
from typing import Any

DEEPEST = 64  # levels of what is read; a record or a config has five


def parsed(text: str | bytes) -> Any:
    """What a text of JSON holds. ValueError, too, for one that is nested more than DEEPEST levels: what walks through
    it has no stack for any number of them."""
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    inner = [content]
    for _ in range(DEEPEST):
        held = [list(one.values()) if isinstance(one, dict) else one for one in inner if isinstance(one, dict | list)]
        inner = [each for one in held for each in one]
    if inner:
        raise ValueError("it is nested too deeply")
    return content


def finite(value: Any) -> Any:
    """The same value for json.dumps: JSON has no NaN and no infinity, None stands for them."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
