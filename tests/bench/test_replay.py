"""A long run ends in the bits of its replay, in flat memory; a hundred steps here, more by hand."""

import json

from qzo.bench import replay


def test_a_run_and_its_replay(tmp_path, capsys):
    assert replay.main(["--steps", "100", "--scales", "64", "--directions", "2", "--out", str(tmp_path / "r")]) == 0
    line = capsys.readouterr().out
    assert (tmp_path / "r").read_text() == line
    row = json.loads(line)
    assert (row["steps"], row["scales"], row["same_bits"], row["more_open_files"]) == (100, 64, True, 0)


def test_a_replay_that_ends_otherwise_is_seen(monkeypatch, capsys):
    """One step is left out."""
    real = replay.replay
    monkeypatch.setattr(replay, "replay", lambda base, path: real(base, path, 9) + 1)
    assert replay.main(["--steps", "10", "--scales", "64"]) == 1
    assert json.loads(capsys.readouterr().out)["same_bits"] is False
