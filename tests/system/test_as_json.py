"""What json.dumps writes is JSON: a NaN or an infinity, however deep, is null."""

import json
import math

from qzo.system.as_json import finite


def test_numbers_that_json_does_not_have():
    given = {"a": math.nan, "b": [1.5, -math.inf, {"c": (math.inf, "x", None, True, 3)}]}
    assert finite(given) == {"a": None, "b": [1.5, None, {"c": [None, "x", None, True, 3]}]}
    assert json.dumps(finite(given), allow_nan=False)
