"""Runs broken off by a kill, a power cut and a full disk end in the bits of an unbroken one; more of them by hand."""

import json
import random

import pytest

from qzo.bench import crash
from tests.support.paths import ROOT

RESULTS = ROOT / "bench/results/crash-2026-11-30.jsonl"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return crash.Runs(tmp_path_factory.mktemp("crash"), steps=6)


def test_twenty_kills(runs):
    row = crash.kills(runs, 20)
    assert row["times"] == 20
    assert row["same_bits"] == row["runs"] > 0
    assert row["half_files"] == 0


def test_kills_of_one_or_both_of_two_ranks(runs, tmp_path):
    pairs = crash.Runs(tmp_path, steps=6, ranks=2)
    assert pairs.wanted["scales"] == runs.wanted["scales"]
    row = crash.kills(pairs, 5)
    assert (row["ranks"], row["times"]) == (2, sum(row["killed"].values())) == (2, 5)
    assert row["same_bits"] == row["runs"] > 0
    assert row["half_files"] == 0


def test_all_that_the_committed_file_tells_of_ended_in_the_same_bits():
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    alone, pairs = (row for row in rows if row["case"].startswith("SIGKILL"))
    assert (alone["ranks"], pairs["ranks"]) == (1, 2)
    assert alone["times"] + pairs["times"] >= 200
    assert {*pairs["killed"]} == {"0", "1", "all"}
    assert {row["case"] for row in rows} == {alone["case"], "a power cut at random moments", "a disk that is full"}
    for row in rows:
        assert row["same_bits"] == row["runs"] > 0
        assert row.get("half_files", 0) == row.get("other_errors", 0) == 0


def test_power_cuts(runs):
    row = crash.cuts(runs, 10)
    assert row["same_bits"] == row["runs"] == 10


def test_full_disks(runs):
    row = crash.disks(runs, stride=7)
    if row is None:
        pytest.skip("this machine lets no process mount a file system of its own")
    assert row["same_bits"] == row["runs"] > row["times"] > 0
    assert row["half_files"] == row["other_errors"] == 0


def test_a_run_that_ends_otherwise_is_seen(runs):
    out = runs.root / "other"
    runs.end(out)
    assert runs.same(out)
    assert not runs.half_saved(out)
    for name, half in (("scales", False), ("model/model.safetensors", True)):
        data = (out / name).read_bytes()
        (out / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert (runs.same(out), runs.half_saved(out)) == (False, half)
        (out / name).write_bytes(data)


def test_what_a_power_cut_leaves_of_a_file():
    left = {crash.torn(b"ab", b"abcde", random.Random(seed)) for seed in range(200)}
    assert left == {b"ab", b"abc", b"abcd", b"abcde", b"ab\0\0\0", b"abc\0\0", b"abcd\0"}
    assert crash.torn(b"old", b"new", random.Random(0)) == b"old"


def test_a_new_name_may_be_lost_until_its_folder_is_synced(tmp_path):
    followed = crash.Disk(tmp_path / "seen")
    (tmp_path / "seen").mkdir()
    with followed.followed(), open(tmp_path / "seen/a.tmp", "wb") as file:
        file.write(b"content")
        file.flush()
        crash.os.fsync(file.fileno())
        crash.os.replace(file.name, tmp_path / "seen/a")
        renamed = len(followed.moments) - 1
        crash.disk.sync(tmp_path / "seen")

    def names(moment):
        found = set()
        for seed in range(40):
            out = tmp_path / f"{moment}-{seed}"
            out.mkdir()
            followed.leave(followed.moments[moment], out, random.Random(seed))
            found.add(tuple(sorted(path.name for path in out.iterdir())))
            assert {path.read_bytes() for path in out.iterdir()} <= {b"content"}
        return found

    assert names(renamed) == {(), ("a",)}
    assert names(len(followed.moments) - 1) == {("a",)}


def test_rows_are_printed_and_appended(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(crash, "Runs", lambda *_: None)
    for name, same in (("kills", 2), ("cuts", 1)):
        monkeypatch.setattr(crash, name, lambda *_, same=same: {"runs": 2, "same_bits": same})
    monkeypatch.setattr(crash, "disks", lambda *_: None)
    assert crash.main(["--out", str(tmp_path / "rows.jsonl")]) == 1, "one run has ended otherwise"
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["same_bits"] for line in lines] == [2, 2, 1], "kills of one process and of two ranks, cuts"
    assert (tmp_path / "rows.jsonl").read_text().splitlines() == lines
