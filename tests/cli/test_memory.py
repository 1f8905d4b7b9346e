"""`qzo memory`: how its report is shown; the report itself is tests/reports/test_memory.py."""

import json

import pytest

from qzo.cli import memory
from qzo.cli.main import main

REPORT = {"subject": "a config: 1 x 64 tokens", "predicted": {"total": 5}}


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    """The options that reports were made for, and what was plotted."""
    calls = []
    monkeypatch.setattr(memory, "make_report", lambda options: calls.append(options) or REPORT)
    monkeypatch.setattr(memory, "as_text", lambda report: f"text of {report['predicted']}")
    monkeypatch.setattr(memory, "plot", lambda report, path: calls.append((report, path)))
    return calls


def test_json_is_the_report_or_as_text(asked, capsys):
    assert main(["memory", "--config", "smollm2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == REPORT
    assert main(["memory", "--config", "smollm2"]) == 0
    assert capsys.readouterr().out == "a config: 1 x 64 tokens\ntext of {'total': 5}\n"
    assert len(asked) == 2, "nothing is plotted unasked"


def test_a_model_may_stand_alone(asked):
    assert main(["memory", "m.gguf"]) == main(["memory", "--model", "m.gguf"]) == 0
    assert [options.model for options in asked] == ["m.gguf"] * 2


def test_a_picture_goes_where_it_is_asked_for(asked, tmp_path):
    path = str(tmp_path / "a.png")
    assert main(["memory", "--config", "smollm2", "--plot", path]) == 0
    assert asked[1] == (REPORT, path)


@pytest.mark.parametrize("option", ["--plot", "--snapshot"])
def test_files_are_looked_at_before_anything_is_made(asked, tmp_path, capsys, option):
    (tmp_path / "a.png").write_text("mine")
    assert main(["memory", "--config", "smollm2", option, str(tmp_path / "a.png")]) == 2
    assert f"{option} {tmp_path / 'a.png'} exists already" in capsys.readouterr().err
    assert not asked
    assert main(["memory", "--config", "smollm2", option, str(tmp_path / "a.png"), "--overwrite"]) == 0
