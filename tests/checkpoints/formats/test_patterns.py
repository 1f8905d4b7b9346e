"""Patterns of a config: what they fit, and those that are made to take for ever."""

import re

import pytest

import qzo
from qzo.checkpoints.formats import patterns
from qzo.checkpoints.formats.patterns import Patterns
from tests.support.gptq_checkpoints import write_gptq

LAYERS = [f"model.layers.{i}.{name}" for i in (1, 11) for name in ("mlp.up_proj", "self_attn.q_proj")]
SLOW = r".*(a|l|la|ay|y)+[!?]"  # tries every way to cut a name into pieces
USUAL = [
    ".*mlp.*",
    r".*\.1\..*",
    r"(?!.*q_proj).*",
    "model.layers.1",
    r".*layers\.(?:1|2)\.(up|mlp\.up)_proj$",
    "up_proj",
]


def test_those_that_fit_the_beginning_come_in_their_order_as_re_has_it():
    written = {f"re:{expression}": expression for expression in USUAL}
    found = Patterns(written, "targets")
    for layer in LAYERS:
        assert list(found.fitting(layer)) == [name for name in written if re.match(written[name], layer)]
    assert [*found.fitting(LAYERS[0])] != [*found.fitting(LAYERS[3])]
    assert found.left > 0.9 * patterns.SECONDS


@pytest.mark.parametrize("wrong", ["(", "a**", r"\p", "(" * 5000, "(?R)", "a{e<={"])
def test_what_is_no_regular_expression_is_named(wrong):
    with pytest.raises(ValueError, match=r"^x: dynamic '\+:.* is no regular expression: "):
        Patterns({".*": ".*", f"+:{wrong}": wrong}, "x: dynamic")


@pytest.mark.parametrize(
    "many", ["((a{1000}){1000}){1000}", "(a{ 150 }){0,150}", "a{" + 5000 * "9" + "}", "a{00010001}"]
)
def test_repetitions_that_would_be_written_out_are_refused_before_that(many):
    """re counts them; regex, which can give up on a match, makes a copy of what is repeated for each."""
    with pytest.raises(ValueError, match=r"^x: target '.* repeats too much: 10000 counted repetitions"):
        Patterns({"re:a": "a", "re:many": many}, "x: target")
    assert list(Patterns({"re:few": r"(a{99}){0,9}\d{1,3}?|layer"}, "x").fitting("layer")) == ["re:few"]


def test_the_patterns_of_a_checkpoint_repeat_together():
    some = {f"re:{i}": f"a{{{1000 + i}}}" for i in range(9)}
    assert len(Patterns(some, "x").compiled) == 9
    with pytest.raises(ValueError, match="'re:9' repeats too much"):
        Patterns(some | {"re:9": "a{1000}"}, "x")


def test_one_that_takes_for_ever_ends(monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.05)
    found = Patterns({"re:.*": ".*", "re:slow": SLOW}, "x: target")
    name = "layer" + "layla" * 20
    fitting = found.fitting(name)
    assert next(fitting) == "re:.*"
    with pytest.raises(ValueError, match=r"x: target 're:slow' is matched too slowly: 0.05 s of the processor"):
        next(fitting)
    with pytest.raises(ValueError, match=r"x: target 're:.\*' is matched too slowly"):
        list(found.fitting("a"))  # nothing is left for another layer


def test_a_checkpoint_with_such_a_pattern_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.05)
    slow = r"(.|..)+[!?]"
    folder = write_gptq(tmp_path / "gptq", 4, 32, dynamic={slow: {"bits": 8}})
    with pytest.raises(ValueError, match=r"dynamic '\(.\|..\).*' is matched too slowly"):
        qzo.from_pretrained(folder, device="cpu")
