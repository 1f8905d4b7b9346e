"""The journal: cut anywhere it goes on, damaged anywhere it says so."""

import errno
import itertools
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qzo.optim.journal import RECORD_BYTES, Journal, JournalError, Record, read
from qzo.system import lock
from tests.support.journals import read_whole
from tests.support.paths import ROOT

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


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("begin", [Journal.create, Journal.resume])
def test_a_place_that_is_read_only_is_named_and_stays(path, monkeypatch, code, begin):
    target = path if begin == Journal.resume else path.with_name("new")
    before = {p: p.read_bytes() for p in path.parent.iterdir()}
    really = open

    def read_only(name, mode="r", **options):
        if set(mode) & set("wa+"):
            raise OSError(code, os.strerror(code), str(name))
        return really(name, mode, **options)

    monkeypatch.setattr("builtins.open", read_only)
    with pytest.raises(OSError, match=os.strerror(code)) as caught:
        begin(target, HEADER)
    assert caught.value.filename == str(target)
    assert {p: p.read_bytes() for p in path.parent.iterdir()} == before


def test_a_header_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        Journal.create(tmp_path / "journal.qzo", HEADER)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------- what a power cut leaves


def test_zeros_behind_any_byte_of_the_steps_are_a_tail(path):
    """The length of the file was on the disk, its content was not: the whole steps count, and the run goes on."""
    whole = path.read_bytes()
    start = len(whole) - 8 * RECORD_BYTES
    for length in range(start, len(whole)):
        for zeros in (RECORD_BYTES, 4096):
            path.write_bytes(whole[:length] + bytes(zeros))
            journal = Journal.resume(path, HEADER)
            kept = (length - start) // (2 * RECORD_BYTES)
            assert kept <= len(journal.steps) <= kept + 1, "zeros may be what the file held"
            for number in range(len(journal.steps), 4):
                journal.append(step(number, skipped=number == 2))
            journal.close()
            assert path.read_bytes() == whole


def test_zeros_with_a_record_behind_them_are_damage(path):
    whole = path.read_bytes()
    at = len(whole) - 4 * RECORD_BYTES
    path.write_bytes(whole[:at] + bytes(RECORD_BYTES) + whole[at + RECORD_BYTES :])
    with pytest.raises(JournalError, match=rf"the record at offset {at} \(step 2, direction 0\) has a wrong checksum"):
        read(path)


class Syncs(list):
    """Paths that are synced, in order, each with its size then."""

    def __init__(self, monkeypatch):
        super().__init__()
        monkeypatch.setattr(os, "fsync", self.sync)

    def sync(self, handle):
        path = Path(f"/proc/self/fd/{handle}").resolve()
        self.append((path.name, 0 if path.is_dir() else path.stat().st_size))


@pytest.mark.parametrize(("seconds", "synced"), [(0, [0, 1, 2, 3]), (2.0, [1, 3]), (float("inf"), [3])])
def test_steps_are_synced_when_so_much_time_has_passed(tmp_path, monkeypatch, seconds, synced):
    """A step a second; the header, its name, and the last steps are synced whatever is asked."""
    syncs, clock = Syncs(monkeypatch), [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    journal = Journal.create(tmp_path / "j", HEADER, sync_seconds=seconds)
    start = (tmp_path / "j").stat().st_size
    assert syncs == [("j.tmp", start), (tmp_path.name, 0)], "the content before the name, then the name"
    del syncs[:]
    for number in range(4):
        clock[0] += 1
        journal.append(step(number))
    journal.close()
    sizes = [("j", start + 2 * RECORD_BYTES * (number + 1)) for number in synced]
    assert list(dict.fromkeys(syncs)) == sizes


def test_a_clock_that_goes_back_changes_nothing(path, monkeypatch):
    whole, now = path.read_bytes(), itertools.count(0, -3600)
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    other = Journal.create(path.with_name("other"), HEADER)
    for number in range(4):
        other.append(step(number, skipped=number == 2))
    other.close()
    assert path.with_name("other").read_bytes() == whole
    assert next(now) == 0, "no part of it asks for the time of day"


def test_what_the_disk_did_not_take_is_cut_off(path, monkeypatch):
    """After a sync that fails, what was written can be read, and may be gone later all the same."""
    whole, journal = path.read_bytes(), Journal.resume(path, HEADER, sync_seconds=0)
    journal.append(step(4))

    def broken(_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        with pytest.raises(OSError, match=r"Input/output error: .*journal\.qzo"):
            journal.append(step(5))
    journal.append(step(5))
    journal.close()
    assert path.read_bytes() == whole + b"".join(r.pack() for number in (4, 5) for r in step(number))


# ------------------------------------------------------------------------------------- two processes


def in_use(path):
    return rf"{path} is in use by process {os.getpid()}, this one: one at a time writes a journal"


def test_a_journal_that_is_open_is_refused_and_stays(path):
    first = Journal.resume(path, HEADER)
    with pytest.raises(JournalError, match=in_use(path)):
        Journal.resume(path, HEADER)
    first.append(step(4))
    first.close()
    second = Journal.resume(path, HEADER)
    assert len(second.steps) == 5
    second.close()


def test_another_process_is_named(path):
    code = (
        "import sys, qzo.optim.journal as j\np = sys.argv[1]\nh, _, _ = j.read(p)\njournal = j.Journal.resume(p, h)\n"
        "print('open', flush=True)\nsys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, path], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        assert len(read_whole(path)[1]) == 4, "to read it is free"
        with pytest.raises(JournalError, match=f"is in use by process {other.pid}: one at a time"):
            Journal.resume(path, HEADER)
        other.kill()
    Journal.resume(path, HEADER).close()  # the lock has ended with its process


def test_a_resume_that_is_refused_lets_go_of_the_journal(path):
    with pytest.raises(JournalError, match="its eps is"):
        Journal.resume(path, {**HEADER, "eps": 1})
    Journal.resume(path, HEADER).close()


def test_of_two_that_begin_a_journal_the_second_is_refused(tmp_path, monkeypatch):
    """Both have seen that there is none; the first is about to name its file, or has just done so."""
    path, replace, refused = tmp_path / "j", os.replace, []

    def begin_another(*names):
        with pytest.raises(JournalError) as error:
            Journal.create(path, HEADER)
        refused.append(str(error.value))
        replace(*names)

    monkeypatch.setattr(os, "replace", begin_another)
    first = Journal.create(path, HEADER)
    assert re.match(in_use(path), refused[0])
    first.append(step(0))
    first.close()
    assert len(read_whole(path)[1]) == 1


def test_one_that_comes_when_the_first_is_done_leaves_its_journal(tmp_path, monkeypatch):
    """It has opened the temporary file before that got its name."""
    path, take = tmp_path / "j", lock.take
    Journal.create(path, HEADER).close()
    whole = path.read_bytes()
    path.rename(tmp_path / "j.tmp")

    def finished(handle):
        (tmp_path / "j.tmp").rename(path)
        return take(handle)

    monkeypatch.setattr(lock, "take", finished)
    with pytest.raises(JournalError, match="j exists already"):
        Journal.create(path, HEADER)
    assert path.read_bytes() == whole
