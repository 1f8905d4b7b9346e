"""The journal: an append-only, checksummed file that IS the fine-tune. Base checkpoint + journal = tuned model.

    preamble  16 bytes   magic "QZOJRNL", version, length of the header, CRC-32 of these twelve bytes
    header    JSON       law version, arena map, digest of the loaded model, recipe, versions; then its CRC-32
    records   32 bytes each, one per direction of a step, step by step:
              step u32, direction u16, flags u16, seed i64, applied f32, loss plus f32, loss minus f32, CRC-32

Little-endian; docs/journal.md has it byte by byte. The header is written to a temporary file and renamed, so a journal
either has a whole one or does not exist. A step counts when all its records are whole: a tail (a killed run, a full
disk, zeros where a power cut took what was not synced) is dropped; a whole record whose checksum is wrong means damage
and is refused. One process at a time has a journal open: it is locked.

Terms (journal): docs/glossary.md.
"""

import contextlib
import dataclasses
import errno
import io
import json
import os
import struct
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..system import disk, lock
from ..system.as_json import parsed
from .defaults import SYNC_SECONDS
from .header import wrong_field

VERSION = 1
MAGIC = b"QZOJRNL"
PREAMBLE = struct.Struct("<7sBI")
RECORD = struct.Struct("<IHHqfff")
CHECKSUM = struct.Struct("<I")
RECORD_BYTES = RECORD.size + CHECKSUM.size
SKIPPED = 1  # flag: a loss was not finite; nothing was applied
_OTHER_MODEL = "belongs to another model, or this model is already tuned"
_FIRST = PREAMBLE.size + CHECKSUM.size  # where the header begins


class JournalError(ValueError):
    """A journal that cannot be used; the message names the file, the offset or the field, and what to do.

    It is raised by `replay` and `QZO`: for a file that is no journal, a wrong checksum, a header of another model,
    noise law or recipe, and for a new journal where one exists.
    """


@dataclasses.dataclass(frozen=True)
class Record:
    """One direction of one step: the seed, the coefficient that was applied to its raw noise, the two losses."""

    step: int
    direction: int
    seed: int
    applied: float
    loss_plus: float
    loss_minus: float
    skipped: bool = False

    def pack(self) -> bytes:
        body = RECORD.pack(
            self.step,
            self.direction,
            SKIPPED if self.skipped else 0,
            self.seed,
            self.applied,
            self.loss_plus,
            self.loss_minus,
        )
        return body + CHECKSUM.pack(zlib.crc32(body))


class Journal:
    """An open, locked journal. `steps` holds the whole steps it was opened with: a list of lists of Record.

    sync_seconds: steps reach the operating system at once, so a killed process loses none; they are synced to the disk
    when this much time has passed since the last sync, so a power failure costs no more of a run. 0: each step.
    """

    def __init__(
        self,
        path: Path,
        header: dict[str, Any],
        steps: list[list[Record]],
        file: io.FileIO,
        sync_seconds: float = SYNC_SECONDS,
    ) -> None:
        self.path, self.header, self.steps, self._file = path, header, steps, file
        self._sync_seconds = sync_seconds
        self._synced, self._safe = time.monotonic(), file.tell()  # when, and how many bytes of the file

    @classmethod
    def create(
        cls, path: str | os.PathLike[str], header: dict[str, Any], sync_seconds: float = SYNC_SECONDS
    ) -> "Journal":
        """Start a journal. JournalError if the file exists: it may hold hours of work."""
        return cls(Path(path), header, [], _begin(Path(path), header), sync_seconds)

    @classmethod
    def resume(
        cls, path: str | os.PathLike[str], header: dict[str, Any], sync_seconds: float = SYNC_SECONDS
    ) -> "Journal":
        """Continue a journal, or start it where there is none or its header was never finished.

        Everything in `header` but "versions" has to agree with the file's; JournalError names the first difference, or
        who is writing this journal.
        """
        path = Path(path)
        if not path.exists():
            return cls.create(path, header, sync_seconds)
        file = open(path, "r+b", buffering=0)  # noqa: SIM115  closed with the journal
        try:
            _lock(file, path)
            found = read(path)
            if found is None:
                with _naming(path):
                    _write_header(file, header)
                return cls(path, header, [], file, sync_seconds)
            old, steps, end = found
            check_header(path, old, header)
            file.truncate(end)
            file.seek(end)
        except BaseException:
            file.close()
            raise
        return cls(path, old, steps, file, sync_seconds)

    def append(self, records: Sequence[Record]) -> None:
        """Write all records of a step at once. OSError (a full disk) leaves whole steps only, and at most a tail that
        the next resume drops."""
        data = b"".join(record.pack() for record in records)
        start = self._file.tell()
        with _naming(self.path):
            try:
                _write(self._file, data)
            except OSError:
                self._cut(start)
                raise
        if time.monotonic() - self._synced >= self._sync_seconds:
            self._sync()

    def _sync(self) -> None:
        """Wait for the disk. What it fails to take may be lost later, though it can be read now: that is cut off."""
        with _naming(self.path):
            try:
                os.fsync(self._file.fileno())
            except OSError:
                self._cut(self._safe)
                raise
        self._synced, self._safe = time.monotonic(), self._file.tell()

    def _cut(self, end: int) -> None:
        with contextlib.suppress(OSError):  # of a disk that fails already
            self._file.truncate(end)
        self._file.seek(end)  # else the next write would leave a hole

    def close(self) -> None:
        """Flush to the disk, close, and let other processes have it."""
        if not self._file.closed:
            try:
                self._sync()
            finally:
                self._file.close()


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a file holds: its header, its whole steps, where they end, how long the file is, and what is wrong behind
    them (None: nothing, or a tail that a resume drops)."""

    path: Path
    header: dict[str, Any]
    steps: list[list[Record]]
    end: int
    size: int
    damage: JournalError | None

    def check(self) -> None:
        """JournalError for damage."""
        if self.damage is not None:
            raise self.damage

    def check_run(self) -> None:
        """JournalError for damage, and for a piece that begins in the middle of a run."""
        self.check()
        if self.first:
            raise JournalError(
                f"{self.path} is a piece of a journal, from step {self.first} on: qzo journal concat joins it to the "
                "steps before"
            )

    @property
    def first(self) -> int:
        """The step that it begins with: 0, but of a piece that was cut out of a journal."""
        return self.header.get("first_step", 0)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], list[list[Record]], int] | None:
    """-> (header, whole steps, offset of their end), or None where the header itself was cut off.

    Raises JournalError for a file that is no journal, for a damaged header, a record whose checksum is wrong (its
    offset is named), records out of order, and a piece that begins in the middle of a run; FileNotFoundError if there
    is none.
    """
    found = scan(path)
    if found is None:
        return None
    found.check_run()
    return found.header, found.steps, found.end


def scan(path: str | os.PathLike[str]) -> Contents | None:
    """What a journal, or a piece of one, holds, damaged steps or not; None where the header itself was cut off.

    JournalError for a file that is no journal and for a damaged header; FileNotFoundError if there is none.
    """
    path = Path(path)
    with open(path, "rb") as file:
        data = file.read(_FIRST)
        if data[:7] != MAGIC[: len(data)]:
            raise JournalError(f"{path} is not a qzo journal: it starts with {data[:7]!r}, not {MAGIC!r}")
        data += file.read()
    if len(data) < _FIRST:
        return None
    _, version, length = PREAMBLE.unpack_from(data)
    if zlib.crc32(data[: PREAMBLE.size]) != CHECKSUM.unpack_from(data, PREAMBLE.size)[0]:
        raise JournalError(f"{path} is damaged: the checksum of its first {PREAMBLE.size} bytes (offset 0) is wrong")
    if version != VERSION:
        raise JournalError(f"{path} has journal version {version}; this qzo reads version {VERSION}")
    body = data[_FIRST : _FIRST + length + CHECKSUM.size]
    if len(body) < length + CHECKSUM.size:
        return None
    if zlib.crc32(body[:length]) != CHECKSUM.unpack_from(body, length)[0]:
        raise JournalError(f"{path} is damaged: the checksum of its header (offset {_FIRST}) is wrong")
    header = _header_of(path, body[:length])
    steps, end, damage = _read_steps(path, data, _FIRST + len(body), header)
    return Contents(path, header, steps, end, len(data), damage)


def _header_of(path: Path, text: bytes) -> dict[str, Any]:
    """The header in these bytes, whose checksum is right: so it was written as it is."""
    try:
        header = parsed(text)
    except ValueError as error:
        raise JournalError(f"{path} is not a qzo journal: its header (offset {_FIRST}) is not JSON: {error}") from None
    if not isinstance(header, dict) or "directions" not in header:
        what = "does not say how many directions"
        raise JournalError(f"{path} is not a qzo journal: its header (offset {_FIRST}) {what}")
    wrong = wrong_field(header)
    if wrong is not None:
        raise JournalError(f"{path} is not a qzo journal: the {wrong} of its header is {header[wrong]!r:.60}")
    return header


def _read_steps(
    path: Path, data: bytes, start: int, header: Mapping[str, Any]
) -> tuple[list[list[Record]], int, JournalError | None]:
    """(whole steps, where they end, what is wrong behind them)."""
    directions, first = header["directions"], header.get("first_step", 0)
    steps: list[list[Record]] = []
    records: list[Record] = []
    end = start
    for at in range(start, len(data) - RECORD_BYTES + 1, RECORD_BYTES):
        body = data[at : at + RECORD.size]
        step, direction, flags, seed, applied, plus, minus = RECORD.unpack(body)
        wanted = first + len(steps), len(records)
        if zlib.crc32(body) != CHECKSUM.unpack_from(data, at + RECORD.size)[0]:
            if not data[at + RECORD_BYTES - 1 :].strip(b"\0"):
                break  # zeros up to the end
            text = (
                f"{path} is damaged: the record at offset {at} (step {wanted[0]}, direction {wanted[1]}) has a wrong "
                f"checksum; qzo journal cut {path} --until {wanted[0]} keeps the steps before"
            )
            return steps, end, JournalError(text)
        if (step, direction) != wanted or flags & ~SKIPPED:
            what = f"step {step}, direction {direction}" + (f", flags {flags}" if flags & ~SKIPPED else "")
            text = (
                f"{path}: the record at offset {at} is {what}; step {wanted[0]}, direction {wanted[1]} was expected"
                + (" without flags that version 1 does not have" if flags & ~SKIPPED else "")
            )
            return steps, end, JournalError(text)
        records.append(Record(step, direction, seed, applied, plus, minus, bool(flags & SKIPPED)))
        if direction == directions - 1:
            steps.append(records)
            records, end = [], at + RECORD_BYTES
    return steps, end, None


def check_header(path: str | os.PathLike[str], old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """JournalError naming the first field in which a journal and this run differ ("versions" may)."""
    new = json.loads(json.dumps(new))  # as the file holds it: tuples are lists
    if old.get("arena") != new.get("arena"):
        raise JournalError(f"{path} {_OTHER_MODEL}: {_other_layers(old.get('arena', {}), new['arena'])}")
    if old.get("digest") != new.get("digest"):
        raise JournalError(f"{path} {_OTHER_MODEL}: the layers are alike, their codes, zero points or scales are not")
    for key in new:
        if key == "versions" or old.get(key) == new[key]:
            continue
        name, before, now = key, old.get(key), new[key]
        if key == "recipe" and isinstance(before, dict):
            name = next(k for k in sorted({*before, *now}) if before.get(k) != now.get(k))
            before, now = before.get(name), now.get(name)
        if name == "data":
            raise JournalError(f"{path}: the training data or their tokens have changed; resume with the original ones")
        raise JournalError(
            f"{path}: its {name} is {json.dumps(before)}, this run's is {json.dumps(now)}: resume with the settings "
            "that the run began with"
        )


def _other_layers(old: Mapping[str, list[int]], new: Mapping[str, list[int]]) -> str:
    """The first difference of two arena maps, in words."""
    for name in sorted({*old, *new}):
        if name not in new:
            return f"its run trained {name}, which does not train here"
        if name not in old:
            return f"{name} trains here, which did not in its run"
        if old[name][1:] != new[name][1:]:
            (_, there, rows_there), (_, here, rows_here) = old[name], new[name]
            return f"{name} has {rows_there} rows of {there} scales there, {rows_here} of {here} here"
    return "its layers lie in another order"


def encoded(header: Mapping[str, Any]) -> bytes:
    """Preamble and header: what stands in front of the records."""
    body = json.dumps(header, sort_keys=True).encode()
    preamble = PREAMBLE.pack(MAGIC, VERSION, len(body))
    return preamble + CHECKSUM.pack(zlib.crc32(preamble)) + body + CHECKSUM.pack(zlib.crc32(body))


def _begin(path: Path, header: Mapping[str, Any]) -> io.FileIO:
    """A new journal with its header on the disk, open and locked.

    It is locked under a temporary name before it has its own: of two processes that begin one, the second is refused.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    _check_absent(path)
    with _naming(path):
        file = open(temporary, "a+b", buffering=0)  # noqa: SIM115  closed with the journal
    _lock(file, path)
    try:
        _check_absent(path)  # the other may be done by now
        with _naming(path):
            _write_header(file, header)
            os.replace(temporary, path)
            disk.sync(path.parent)
    except BaseException:
        if temporary.exists() and os.path.samestat(temporary.stat(), os.fstat(file.fileno())):
            temporary.unlink()
        file.close()
        raise
    return file


def _check_absent(path: Path) -> None:
    if path.exists():
        raise JournalError(
            f"{path} exists already: resume it (--resume, or QZO(..., resume=True)), or name another file"
        )


def check_free(path: str | os.PathLike[str]) -> None:
    """JournalError for a journal that is being written, OSError for one that cannot be, before a model is loaded."""
    with open(path, "r+b", buffering=0) as file:
        _lock(file, Path(path))


def _lock(file: io.FileIO, path: Path) -> None:
    """Lock, or close and refuse."""
    if not lock.take(file.fileno()):
        who = lock.holder(file.fileno())
        file.close()
        raise JournalError(f"{path} is in use by {who}: one at a time writes a journal; stop it, or name another file")


def _write_header(file: io.FileIO, header: Mapping[str, Any]) -> None:
    file.truncate(0)
    _write(file, encoded(header))
    os.fsync(file.fileno())


def _write(file: io.FileIO, data: bytes) -> None:
    """All of it, or OSError."""
    if file.write(data) != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """An OSError inside has this path: that of a write to an open file has none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
