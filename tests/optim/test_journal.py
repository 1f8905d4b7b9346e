"""The journal: cut anywhere it goes on, damaged anywhere it says so."""

import os

import pytest

from qzo.optim.journal import RECORD_BYTES, Journal, JournalError, Record, read
from tests.support.journals import read_whole

HEADER = {"directions": 2, "digest": "sha256:0", "eps": 0.01, "versions": {"qzo": "x"}}


def step(number, skipped=False):
    return [
        Record(number, j, seed=-(1 << 60) + number, applied=0.5 * j, loss_plus=1.25, loss_minus=2.5, skipped=skipped)
        for j in range(2)
    ]


@pytest.fixture
def path(tmp_path):
    journal = Journal.create(tmp_path / "journal.qzo", HEADER)
    for number in range(4):
        journal.append(step(number, skipped=number == 2))
    journal.close()
    return tmp_path / "journal.qzo"


def test_round_trip(path):
    header, steps, end = read_whole(path)
    assert header == HEADER
    assert steps == [step(n, skipped=n == 2) for n in range(4)]
    assert end == path.stat().st_size
    assert RECORD_BYTES <= 64


def test_cut_at_every_byte(path):
    """Whole steps survive, the tail goes; a header that was never finished starts at step 0."""
    whole = path.read_bytes()
    start = len(whole) - 8 * RECORD_BYTES
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        journal = Journal.resume(path, HEADER)
        kept = max(0, length - start) // (2 * RECORD_BYTES)
        assert len(journal.steps) == kept
        for number in range(kept, 4):
            journal.append(step(number, skipped=number == 2))
        journal.close()
        assert path.read_bytes() == whole


def test_every_flipped_byte_is_found(path):
    whole = path.read_bytes()
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        with pytest.raises(JournalError, match=r"offset \d+|not a qzo journal") as error:
            read(path)
        start = len(whole) - 8 * RECORD_BYTES
        if at >= start:
            assert f"offset {start + (at - start) // RECORD_BYTES * RECORD_BYTES} " in str(error.value)


def test_records_out_of_order_are_refused(path):
    whole = path.read_bytes()
    path.write_bytes(whole + b"".join(r.pack() for r in step(9)))
    with pytest.raises(JournalError, match="step 9, direction 0; step 4, direction 0 was expected"):
        read(path)


def test_an_existing_journal_is_refused(path):
    with pytest.raises(JournalError, match="exists already"):
        Journal.create(path, HEADER)


@pytest.mark.parametrize(
    ("field", "value", "hint"),
    [
        ("digest", "sha256:1", "belongs to another model"),
        ("eps", 0.02, r"its eps is .*settings that the run began with"),
    ],
)
def test_another_header_is_refused_by_field(path, field, value, hint):
    with pytest.raises(JournalError, match=hint):
        Journal.resume(path, {**HEADER, field: value})
    Journal.resume(path, {**HEADER, "versions": {"qzo": "y"}}).close()


def test_something_else_is_no_journal(tmp_path):
    (tmp_path / "x").write_bytes(b"PK\x03\x04 a zip archive")
    with pytest.raises(JournalError, match="is not a qzo journal"):
        read(tmp_path / "x")


def test_a_full_disk_leaves_whole_steps(path, monkeypatch):
    journal = Journal.resume(path, HEADER)

    class Full:
        """A file that takes ten bytes more."""

        def __init__(self, file):
            self.file = file

        def write(self, data):
            return self.file.write(data[:10])

        def __getattr__(self, name):
            return getattr(self.file, name)

    monkeypatch.setattr(journal, "_file", Full(journal._file))
    with pytest.raises(OSError, match="No space left"):
        journal.append(step(4))
    journal.close()
    assert len(read_whole(path)[1]) == 4
    assert read_whole(path)[2] == path.stat().st_size


def test_a_header_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        Journal.create(tmp_path / "journal.qzo", HEADER)
    assert list(tmp_path.iterdir()) == []
