"""What json.dumps writes is JSON: a NaN or an infinity, however deep, is null. What is read is not too deep."""

import json
import math

import pytest

from qzo.system.as_json import DEEPEST, finite, parsed


def test_numbers_that_json_does_not_have():
    given = {"a": math.nan, "b": [1.5, -math.inf, {"c": (math.inf, "x", None, True, 3)}]}
    assert finite(given) == {"a": None, "b": [1.5, None, {"c": [None, "x", None, True, 3]}]}
    assert json.dumps(finite(given), allow_nan=False)


@pytest.mark.parametrize(("opened", "closed"), [("[", "]"), ('{"a":', "}")])
def test_text_that_is_nested_too_deeply_is_refused(opened, closed):
    inner = "1" if closed == "}" else ""

    def text(levels):
        return opened * levels + inner + closed * levels

    assert parsed(text(DEEPEST - 1)) is not None
    for levels in (DEEPEST + 1, 500, 900, 100_000):  # the last are more than json itself has a stack for
        with pytest.raises(ValueError, match="it is nested too deeply"):
            parsed(text(levels))


def test_text_is_what_json_has():
    assert parsed(b'{"a": [1, {"b": null}]}') == {"a": [1, {"b": None}]}
    assert parsed("5") == 5
    with pytest.raises(ValueError, match="Expecting value"):
        parsed("")
