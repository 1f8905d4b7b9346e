"""A report of `qzo memory` as text and as a picture."""

import pytest

from qzo.reports import memory_text
from qzo.reports.memory import PARTS

GB = 10**9


def report(free=None, measured=None):
    parts = dict.fromkeys(PARTS, 0) | {"codes": 2 * GB, "scales": GB, "total": 3 * GB}
    phases = {"loss": {"total": 3 * GB, "layer": "lm_head"}, "update": {"total": GB, "layer": None}}
    return {
        "subject": "a model",
        "predicted": {**parts, "phases": phases},
        "measured": None if measured is None else {**parts, "total": measured, "slack": GB // 2},
        "rivals": {"AdamW": 30 * GB},
        "fits": ["a card (24 GB)"],
        "free": free,
    }


def test_the_text_of_a_prediction():
    lines = memory_text.as_text(report()).splitlines()
    assert [line.split() for line in lines[:3]] == [["predicted"], ["codes", "2.000", "GB"], ["scales", "1.000", "GB"]]
    assert lines[8].split() == ["total", "3.000", "GB"]
    assert [line.split() for line in lines[11:13]] == [
        ["loss", "3.000", "GB", "in", "lm_head"],
        ["update", "1.000", "GB"],
    ]
    assert lines[15].split() == ["AdamW", "30.000", "GB", "10.0x"]
    assert lines[-1] == "fits: a card (24 GB)"


def test_what_was_measured_stands_beside_it():
    lines = memory_text.as_text(report(measured=3.3 * GB)).splitlines()
    assert lines[8].split() == ["total", "3.000", "GB", "3.300", "GB"]
    assert lines[9].split() == ["slack", "0.500", "GB"]
    assert lines[10] == "measured is 1.100 of predicted"


@pytest.mark.parametrize(
    ("free", "said"),
    [(4 * GB, "free here: 4.000 GB"), (2 * GB, "free here: 2.000 GB; that is not enough"), (None, "fits: a card")],
)
def test_what_is_free(free, said):
    assert memory_text.as_text(report(free)).splitlines()[-1].startswith(said)


def test_a_picture(tmp_path):
    memory_text.plot(report(measured=3.3 * GB), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    memory_text.check_picture("a.PNG")
    for name in ("a.foo", "a", "png"):
        with pytest.raises(ValueError, match=f"--plot {name}: a picture's name ends in .png"):
            memory_text.check_picture(name)
