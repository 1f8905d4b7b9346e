"""The fuzzing script: what counts as a crash, what is kept of it, and its rows."""

import json
import os
import random
import signal

import pytest

from qzo.bench.fuzz import runs
from tests.support.paths import ROOT


def reader(work):
    return {"planted": (lambda draws: {"x": bytes([draws.randrange(256)])}, work)}


def refuses(folder):
    raise ValueError(f"{folder} is no good: byte {(folder / 'x').read_bytes()[0]}")


def crash_on_three(folder):
    if (folder / "x").read_bytes()[0] % 16 == 3:
        raise KeyError("three")


def die(folder):
    os.kill(os.getpid(), signal.SIGKILL)


def allocate(folder):
    bytearray(1 << 40)


def spin(folder):
    while True:
        pass


def two_lines(folder):
    raise ValueError("a\nb")


def row(monkeypatch, tmp_path, work, count=64):
    monkeypatch.setattr(runs, "PARSERS", reader(work))
    (tmp_path / "root").mkdir()
    return runs.row_of("planted", count, 7, tmp_path / "root", tmp_path / "kept")


def test_what_is_refused_is_counted_and_of_one_kind(monkeypatch, tmp_path):
    found = row(monkeypatch, tmp_path, refuses)
    assert (found["refused"], found["loaded"], found["crashes"], found["kinds_of_refusal"]) == (64, 0, 0, 1)
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize(
    ("work", "told"), [(crash_on_three, "KeyError: 'three'"), (allocate, "MemoryError"), (two_lines, "no line")]
)
def test_another_exception_is_a_crash_and_its_files_are_kept(monkeypatch, tmp_path, work, told):
    found = row(monkeypatch, tmp_path, work)
    assert found["crashes"] > 0
    assert told in found["first_crash"]
    kept = sorted((tmp_path / "kept").iterdir())
    assert len(kept) == 2 * found["crashes"]
    assert (kept[0] / "x").is_file()
    assert told in kept[1].read_text()
    (tmp_path / "again").mkdir()
    assert row_without_times(found) == row_without_times(row(monkeypatch, tmp_path / "again", work))


def row_without_times(found):
    return {name: found[name] for name in ("cases", "loaded", "refused", "crashes", "first_crash")}


def test_a_process_that_is_ended_is_a_crash(monkeypatch, tmp_path):
    monkeypatch.setattr(runs, "WARM", 0)
    found = row(monkeypatch, tmp_path, die)
    assert found["crashes"] == 1
    assert "status -9" in found["first_crash"]


def test_a_case_that_does_not_end_is_a_crash(monkeypatch, tmp_path):
    monkeypatch.setattr(runs, "WARM", 0)
    monkeypatch.setattr(runs, "SECONDS", 0.05)
    assert row(monkeypatch, tmp_path, spin, count=1)["first_crash"].startswith("qzo.bench.fuzz.runs.Slow")


def test_shares_of_the_cases():
    names = list(runs.PARSERS)
    shares = {name: runs.share(name, 10_000, names) for name in names}
    assert abs(sum(shares.values()) - 10_000) <= len(names)
    assert shares["hqq"] < shares["gptq"]


def test_the_script_appends_a_row_of_each_reader(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    asked = ["--cases", "30", "--parser", "journal", "--parser", "records", "--seed", "3", "--out", str(out)]
    assert runs.main([*asked, "--crashes", str(tmp_path / "kept")]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [found["parser"] for found in rows] == ["journal", "records"]
    assert all(found["seed"] == 3 and found["cases"] == 15 for found in rows)
    assert all(found["loaded"] + found["refused"] == found["cases"] for found in rows)


def test_a_case_has_its_own_files_alone(tmp_path):
    runs.write(tmp_path, {"a": b"1", "b/c": b"2"})
    runs.write(tmp_path, {"d": b"3"})
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_messages_of_one_line_of_code_are_of_one_shape(tmp_path):
    texts = [f"{tmp_path}: bits is {n}; 'x{n}' is [1, {n}]" for n in (3, 77)]
    assert len({runs.shape_of(text, tmp_path) for text in texts}) == 1
    assert random.Random("3 journal 0").random() != random.Random("3 journal 1").random()


def test_the_committed_run_has_every_reader_and_no_crash():
    rows = [json.loads(line) for line in (ROOT / "bench/results/fuzz-2026-11-30.jsonl").read_text().splitlines()]
    assert {found["parser"] for found in rows} == set(runs.PARSERS)
    assert sum(found["cases"] for found in rows) >= 100_000
    assert not any(found["crashes"] for found in rows)
    assert all(found["loaded"] + found["refused"] == found["cases"] for found in rows)
    assert all(found["loaded"] > 0 and found["peak_mb"] < 256 for found in rows)
