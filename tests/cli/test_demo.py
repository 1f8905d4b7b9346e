"""`qzo demo`: where it writes, and its results as text and as JSON; the demo itself is tests/training/test_demo.py."""

import json

import pytest

from qzo.cli import demo
from qzo.cli.main import main

RESULTS = {
    "zero_shot": {"accuracy": 0.5, "loss": 1.5},
    "control": {"accuracy": 0.625, "loss": 1.25},
    "linear_probe": {"accuracy": 0.875, "loss": 0.625},
    "tuned": {"accuracy": 0.75, "loss": 0.5},
    "steps": 96,
    "seconds": 12.4,
    "seed": 3,
    "device": "cpu",
}


@pytest.fixture(autouse=True)
def ran(monkeypatch, tmp_path):
    """What the demo was called with, in an empty folder."""
    calls = []
    monkeypatch.setattr(demo, "run", lambda *a, **k: calls.append((a, k)) or RESULTS)
    monkeypatch.chdir(tmp_path)
    return calls


def test_json_is_what_the_demo_returns(ran, capsys):
    assert main(["demo", "--seed", "3", "--output-dir", "out", "--no-cuda-graph", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == RESULTS
    [((seed, out), options)] = ran
    assert (seed, out, options["resume"], options["cuda_graph"]) == (3, "out", False, False)


def test_text_names_all_four_and_where_things_are(ran, capsys):
    assert main(["demo", "--output-dir", "out"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    names = [line.split("  ")[0].strip() for line in table[1:]]
    assert names == ["zero-shot", "control: label biases only", "control: linear probe", "tuned"]
    assert last == "300 held-out headlines, 96 steps, seed 3, 12 s on cpu; everything is in out"
    assert ran[0][1]["cuda_graph"] is None


def test_without_a_folder_it_makes_a_new_one_each_time(ran, tmp_path):
    for wanted in ("qzo-demo", "qzo-demo-2", "qzo-demo-3"):
        assert main(["demo"]) == 0
        assert ran[-1][0][1] == wanted
        (tmp_path / wanted).mkdir()


def test_what_goes_on_has_to_be_named(ran, capsys):
    assert main(["demo", "--resume"]) == 2
    assert capsys.readouterr().err == "qzo demo: --resume needs the --output-dir of the demo that was stopped\n"
    assert main(["demo", "--resume", "--output-dir", "out"]) == 2
    assert "there is no out/journal.qzo to go on with" in capsys.readouterr().err
    assert not ran
