"""`qzo inspect`: the ranges of its options, and how a report is shown; the report is tests/reports/test_inspect.py."""

import json

import pytest

from qzo.cli import inspect
from qzo.cli.main import main


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    """The options that reports were made for."""
    calls = []
    monkeypatch.setattr(inspect, "report", lambda options: calls.append(options) or {"layers": 3})
    monkeypatch.setattr(inspect, "as_text", lambda found: f"text of {found}")
    return calls


def test_json_is_the_report_or_as_text(asked, capsys):
    assert main(["inspect", "m.gguf", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"layers": 3}
    assert main(["inspect", "--model", "m.gguf"]) == 0
    assert capsys.readouterr().out == "text of {'layers': 3}\n"
    assert [options.model for options in asked] == ["m.gguf"] * 2


@pytest.mark.parametrize(
    ("option", "least", "below"),
    [("--batch-size", 1, 0), ("--seq-len", 2, 1), ("--directions", 1, 0), ("--signal-directions", 1, -3)],
)
def test_the_least_of_each_number(asked, capsys, option, least, below):
    assert main(["inspect", "m", option, str(least)]) == 0
    assert main(["inspect", "m", option, str(below)]) == 2
    assert capsys.readouterr().err == f"qzo inspect: {option} {below}: expected at least {least}\n"
    assert len(asked) == 1


@pytest.mark.parametrize("eps", ["0", "-0.1", "nan", "inf"])
def test_eps_is_a_number_above_zero(asked, capsys, eps):
    assert main(["inspect", "m", f"--eps={eps}"]) == 2
    assert f"--eps {float(eps):g}: expected a number above 0" in capsys.readouterr().err
    assert not asked


def test_a_missing_model_is_said(asked, capsys):
    assert main(["inspect"]) == 2
    assert "a model is missing: qzo inspect MODEL, a folder, a .gguf file or a Hub id" in capsys.readouterr().err
    assert not asked
