"""Version 1 as docs/journal.md has it: golden files that each later qzo reads, a second reader that shares no code."""

import dataclasses
import hashlib
import json
import math
import random
import re
import subprocess
import sys

import pytest

import qzo
from qzo.nn.layers import arena_of
from qzo.optim.journal import MAGIC, RECORD_BYTES, SKIPPED, Journal, JournalError, read
from tests.support.journals import GOLDEN, golden_model, read_whole, write_golden
from tests.support.paths import ROOT
from tests.support.read_journal import parse

SCRIPT = ROOT / "tests/support/read_journal.py"
ARENAS = {  # SHA-256 of the scales after all steps
    "v1-absolute.qzo": "382fe68efce88f0e4800d528320a4bd19fdaf7fceeff84b6b6acef620b15f553",
    "v1-ih4.qzo": "3a20329f9682039d3ed42ade9f42472d7946a981dcf010ed3d4d929146edff7e",
}


def ours(path):
    """(header, steps as tuples of bits, end), None, or the offset of the damage."""
    try:
        found = read(path)
    except JournalError as error:
        at = re.search(r"offset (\d+)", str(error))
        return int(at[1]) if at else 0
    return found and same_form(found[0], [[dataclasses.astuple(r) for r in step] for step in found[1]], found[2])


def theirs(data):
    try:
        found = parse(data)
    except ValueError as error:
        return int(str(error).split()[1])
    if found is None:
        return None
    moved = [[(*record[:2], *record[3:], bool(record[2] & SKIPPED)) for record in step] for step in found[1]]
    return same_form(found[0], moved, found[2])


def same_form(header, steps, end):
    return header, repr(steps), end  # in repr a NaN equals itself


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.name)
def test_golden_files_are_read_and_replayed_to_the_same_bits(path):
    model = golden_model()
    assert qzo.replay(model, path) == len(read_whole(path)[1])
    assert hashlib.sha256(arena_of(model).data.numpy().tobytes()).hexdigest() == ARENAS[path.name]


def test_golden_files_hold_every_kind_of_value():
    assert {path.name for path in GOLDEN} == set(ARENAS)
    headers, records = [], []
    for path in GOLDEN:
        header, steps, _ = read_whole(path)
        headers.append(header)
        records += [record for step in steps for record in step]
    assert {header["directions"] for header in headers} == {1, 2}
    assert {header["relative"] for header in headers} == {False, True}
    assert math.inf in {header["clip"] for header in headers}
    assert any(r.skipped for r in records)
    assert any(math.isnan(r.loss_minus) for r in records)
    assert {r.seed < 0 for r in records} == {r.applied < 0 for r in records} == {False, True}


@pytest.mark.filterwarnings("ignore:step . had a NaN")
def test_what_is_written_today_differs_in_its_versions_alone(tmp_path):
    write_golden(tmp_path)
    for path in GOLDEN:
        header, steps, _ = read_whole(tmp_path / path.name)
        assert header | {"versions": None} == read_whole(path)[0] | {"versions": None}
        assert repr(steps) == repr(read_whole(path)[1])


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.name)
def test_a_golden_file_is_written_again_byte_for_byte(path, tmp_path):
    header, steps, _ = read_whole(path)
    journal = Journal.create(tmp_path / "j", header)
    for records in steps:
        journal.append(records)
    journal.close()
    assert (tmp_path / "j").read_bytes() == path.read_bytes()


def test_the_second_reader_is_short_and_shares_nothing():
    text = SCRIPT.read_text()
    assert len(text.splitlines()) <= 60
    assert set(re.findall(r"^(?:import|from) (\w+)", text, re.M)) <= sys.stdlib_module_names
    assert not re.search(r"^ +(import|from) ", text, re.M)


def test_the_second_reader_runs_alone(tmp_path):
    done = subprocess.run([sys.executable, "-I", SCRIPT, GOLDEN[0]], cwd=tmp_path, capture_output=True, text=True)
    first, *records = done.stdout.splitlines()
    header, steps, _ = read_whole(GOLDEN[0])
    assert json.loads(first) == header
    assert len(records) == len(steps) * header["directions"]


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.name)
def test_both_readers_agree_wherever_a_file_is_cut_or_damaged(path, tmp_path):
    whole, changed = path.read_bytes(), tmp_path / "j"
    assert theirs(whole) == ours(path)

    def agree(data):
        changed.write_bytes(data)
        found = theirs(data)
        assert found == ours(changed)
        return found

    for length in range(len(whole)):
        agree(whole[:length])
        agree(whole[:length] + bytes(RECORD_BYTES * 3))
    for at in range(len(whole)):
        assert isinstance(agree(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :]), int)
    random_bytes = random.Random(0).randbytes
    for length in range(1, 200):
        agree(whole + random_bytes(length))
        agree(MAGIC[: length % 8] + random_bytes(length))


@pytest.mark.parametrize("header", ["[]", "{}", '{"directions": 0}', '{"directions": "2"}', "[" * 100_000, "\x00"])
def test_a_header_that_no_qzo_wrote_is_refused(header, tmp_path, monkeypatch):
    """Its checksum is right: somebody made it."""
    monkeypatch.setattr("qzo.optim.journal.json.dumps", lambda *_, **__: header)
    Journal.create(tmp_path / "j", {}).close()
    with pytest.raises(JournalError, match=r"j is not a qzo journal: (its header \(offset 16\)|the directions of its)"):
        read(tmp_path / "j")


def test_a_flag_that_version_1_does_not_have_is_refused(tmp_path, monkeypatch):
    header, steps, _ = read_whole(GOLDEN[0])
    monkeypatch.setattr("qzo.optim.journal.SKIPPED", 2)
    journal = Journal.create(tmp_path / "j", header)
    for records in steps:
        journal.append(records)
    journal.close()
    monkeypatch.undo()
    with pytest.raises(JournalError, match="is step 2, direction 0, flags 2; step 2, direction 0 was expected without"):
        read(tmp_path / "j")
