"""qzo bench run: its lines, its limits of time, and bad input in one line."""

import json
import re

import pytest

from qzo.bench import cases, estimate, results, run, timing
from qzo.cli.main import main
from tests.support.paths import FIXTURES

pytestmark = pytest.mark.usefixtures("quick_roof")


def test_run_writes_lines_and_names_cases(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 1)
    out = tmp_path / "out.jsonl"
    assert main(["bench", "run", "--filter", "JOURNAL", "--json", "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert [json.loads(line) for line in captured.out.splitlines()] == results.read(out)
    assert "1 cases on cpu" in captured.err
    assert main(["bench", "run", "--list", "--filter", "576x192", "--rows", "16"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed
    assert all("576x192 rows 16 " in name for name in listed)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--filter", "llama-9"], "no case of cpu has 'llama-9' in its name; there are"),
        (["run", "--providers", "qzo,marlin2"], "no provider marlin2; there are qzo, qzo-row"),
        (["run", "--filter", "576x192", "--rows", "3"], "--rows 3: the chosen cases have 1, 16, 256, 1024 rows"),
        (["run", "--rows", "0"], "--rows 0: expected rows per evaluation, each at least 1"),
        (["table", str(FIXTURES / "ct-w4a16-asym-g128-rtn/model.safetensors")], "model.safetensors is no text"),
        (["run", "--device", "cuda"], "--device cuda: there is no CUDA device here; use --device cpu"),
        (["table", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_bad_input_is_one_line_and_status_2(capsys, arguments, said):
    assert main(["bench", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_run_says_how_long_and_leaves_nothing_out_in_silence(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 1)
    monkeypatch.setattr(estimate, "seconds", lambda case, device, names: 0.01 if case.kind == "journal" else 7200.0)
    monkeypatch.setattr(estimate, "probe", lambda device: 1.0)
    out = tmp_path / "out.jsonl"
    assert main(["bench", "run", "--filter", "R", "--seconds", "60", "--providers", "qzo", "--out", str(out)]) == 0
    said = capsys.readouterr().err
    rows = results.read(out)
    assert len(rows) == len(cases.choose("cpu", "R"))
    timed = [r for r in rows if r["ms"]]
    assert [r["kind"] for r in timed] == ["journal"]
    for note in {r["note"] for r in rows if not r["ms"]}:  # a busy machine may have used a second or two
        assert re.fullmatch(r"left out: it takes about 2.0 h, and (60|5\d) s of --seconds 60 are left", note)
    assert said.count("left out") == len(rows) - 1
    assert f"{len(rows)} cases on cpu, about {2 * (len(rows) - 1)}.0 h, --seconds 60;" in said
    assert main(["bench", "run", "--seconds", "0"]) == 2
    assert "--seconds 0: expected more than 0" in capsys.readouterr().err


def test_a_cpu_without_a_filter_has_ten_minutes(capsys, monkeypatch):
    limits = []
    monkeypatch.setattr(
        "qzo.bench.command._measured",
        lambda chosen, device, names, limit: limits.append(limit) or [run.left_out(chosen[0], device, "")],
    )
    for more in ([], ["--seconds", "5"], ["--filter", "smollm2"]):
        assert main(["bench", "run", "--json", *more]) == 0
    assert limits == [600, 5.0, None]
