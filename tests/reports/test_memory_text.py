"""A report of `qzo memory` as lines of text, and as bars."""

import copy
from typing import Any

import pytest

from qzo.cli.main import main
from qzo.reports import memory, memory_text
from qzo.reports.memory_text import as_text, check_picture, plot

SIZES = dict(zip((*memory.PARTS, "total"), range(1, len(memory.PARTS) + 2), strict=True))
REPORT: dict[str, Any] = {
    "predicted": {name: size * 10**9 for name, size in SIZES.items()}
    | {"phases": {"forward": {"total": 7e9, "layer": "model.layers.3"}, "update": {"total": 5e9, "layer": ""}}},
    "measured": None,
    "rivals": {"MeZO, 16 bit": 2.5 * SIZES["total"] * 1e9},
    "fits": ["24 GB", "80 GB"],
    "free": None,
    "subject": "made up",
}


def changed(**parts):
    return copy.deepcopy(REPORT) | parts


def measured():
    return {name: 2 * size * 10**9 for name, size in SIZES.items()} | {"slack": -3}


def test_what_is_predicted_is_told_part_by_part():
    lines = as_text(REPORT).splitlines()
    assert lines[0].split() == ["predicted"]
    assert {line.split()[0]: line.split()[1:] for line in lines[1 : len(SIZES) + 1]} == {
        name: [f"{size}.000", "GB"] for name, size in SIZES.items()
    }
    assert [line.split() for line in lines if "7.000 GB" in line and "in " in line] == [
        ["forward", "7.000", "GB", "in", "model.layers.3"]
    ]
    assert ["update", "5.000", "GB"] in [line.split() for line in lines], "no layer is named where there is none"
    assert lines[-1] == "fits: 24 GB; 80 GB"
    [rival] = [line for line in lines if "MeZO" in line]
    assert rival.split()[-1] == "2.5x"
    assert "free here" not in as_text(REPORT)
    assert "slack" not in as_text(REPORT)


def test_what_is_measured_stands_beside_it():
    lines = as_text(changed(measured=measured())).splitlines()
    assert lines[0].split() == ["predicted", "measured"]
    for line, (name, size) in zip(lines[1:], SIZES.items(), strict=False):
        assert line.split() == [name, f"{size}.000", "GB", f"{2 * size}.000", "GB"]
    assert ["slack", "0.000", "GB"] in [line.split() for line in lines], "it may be less than nothing, and is none then"
    assert "measured is 2.000 of predicted" in lines


@pytest.mark.parametrize(("free", "short"), [(SIZES["total"] * 10**9, False), (SIZES["total"] * 10**9 - 1, True)])
def test_too_little_room_is_told(free, short):
    last = as_text(changed(free=free)).splitlines()[-1]
    assert last.startswith(f"free here: {free / 1e9:.3f} GB")
    assert last.endswith("; that is not enough") == short


def test_a_step_that_fits_no_card_says_so():
    assert as_text(changed(fits=[])).splitlines()[-1] == "fits: no card that is listed"


@pytest.mark.parametrize("name", ["a.png", "a.PDF", "folder.x/a.svg"])
def test_pictures_are_known_by_their_ending(name):
    check_picture(name)


@pytest.mark.parametrize("name", ["a", "a.txt", "png"])
def test_other_endings_are_refused(name):
    with pytest.raises(ValueError, match=rf"^--plot {name}: a picture's name ends in \.png, or in one of .*svg"):
        check_picture(name)


def test_a_part_is_drawn_for_each_number_that_is_not_nothing(monkeypatch, tmp_path):
    figures, figure = [], memory_text.Figure
    monkeypatch.setattr(memory_text, "Figure", lambda **given: figures.append(figure(**given)) or figures[-1])
    report = changed(measured=measured())
    nothing = memory.PARTS[1]
    report["predicted"][nothing], report["measured"][nothing] = 0, -5
    plot(report, tmp_path / "bars.png")
    parts, totals = figures[0].axes
    assert parts.get_legend_handles_labels()[1] == [part for part in memory.PARTS if part != nothing]
    highest = [0.0, 0.0]
    for stacked in parts.containers:
        highest = [max(top, bar.get_y() + bar.get_height()) for top, bar in zip(highest, stacked, strict=True)]
    wanted = sum(SIZES[part] for part in memory.PARTS if part != nothing)
    assert highest == pytest.approx([wanted, 2 * wanted]), "stacked, in GB"
    assert [bar.get_width() for bar in totals.containers[0]] == pytest.approx([SIZES["total"], 2.5 * SIZES["total"]])
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_and_the_picture(tmp_path, capsys):
    picture = tmp_path / "bars.png"
    assert main(["memory", "--config", "smollm2", "--plot", str(picture)]) == 0
    shown = capsys.readouterr().out
    for word in (*memory.PARTS, "total", "forward", "loss", "update", "MeZO", "QLoRA", "AdamW", "24 GB"):
        assert word in shown
    assert picture.read_bytes().startswith(b"\x89PNG")
