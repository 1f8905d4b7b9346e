"""A long run ends in the bits of its replay, in flat memory; a hundred steps here, more by hand."""

import json

from qzo.bench import replay
from tests.support.paths import ROOT

RESULTS = ROOT / "bench/results/replay-2026-11-30.jsonl"


def test_a_run_and_its_replay(tmp_path, capsys):
    assert replay.main(["--steps", "100", "--scales", "64", "--directions", "2", "--out", str(tmp_path / "r")]) == 0
    line = capsys.readouterr().out
    assert (tmp_path / "r").read_text() == line
    row = json.loads(line)
    assert (row["steps"], row["scales"], row["same_bits"], row["more_open_files"]) == (100, 64, True, 0)


def test_what_the_committed_file_tells_of_twenty_thousand_steps():
    """Bits, memory and files; many steps in a pass are faster where scales are few, and the page says what was seen."""
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    page = (ROOT / "docs" / "journal.md").read_text()
    assert [(row["steps"], row["scales"]) for row in rows] == [(20_000, 4096), (200, 1 << 20)]
    assert rows[0]["replay_steps_per_s"] > 10 * rows[0]["one_by_one_steps_per_s"]
    for row in rows:
        assert (row["same_bits"], row["more_open_files"]) == (True, 0)
        assert abs(row["memory_growth"]) < 0.01
        seen = (row["scales"], row["replay_steps_per_s"], row["one_by_one_steps_per_s"])
        assert "| {:,} | {:,.0f} | {:,.0f} |".format(*seen) in page


def test_a_replay_that_ends_otherwise_is_seen(monkeypatch, capsys):
    """One step is left out."""
    real = replay.replay
    monkeypatch.setattr(replay, "replay", lambda base, path: real(base, path, 9) + 1)
    assert replay.main(["--steps", "10", "--scales", "64"]) == 1
    assert json.loads(capsys.readouterr().out)["same_bits"] is False
