"""`qzo bench`: what it would write is looked at first, and the benchmark is given the rest."""

import pytest

from qzo.cli import bench
from qzo.cli.main import main


@pytest.fixture(autouse=True)
def ran(monkeypatch):
    calls = []
    monkeypatch.setattr(bench.command, "execute", lambda options: calls.append(options.action) or 1)
    return calls


def test_the_status_is_the_benchmarks(ran, tmp_path):
    assert main(["bench", "compare", "a", "b"]) == 1
    assert main(["bench", "table", "a"]) == 1
    assert main(["bench", "run", "--out", str(tmp_path / "new.jsonl")]) == 1
    assert ran == ["compare", "table", "run"]


@pytest.mark.parametrize("action", [["run"], ["plot", "rows.jsonl"]])
def test_a_file_that_is_there_is_replaced_on_request_only(ran, tmp_path, capsys, action):
    (tmp_path / "old").write_text("mine")
    given = ["bench", *action, "--out", str(tmp_path / "old")]
    assert main(given) == 2
    assert f"--out {tmp_path / 'old'} exists already" in capsys.readouterr().err
    assert not ran
    assert main([*given, "--overwrite"]) == 1
    assert ran == [action[0]]
