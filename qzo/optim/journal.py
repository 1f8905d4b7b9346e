"""The journal: an append-only, checksummed file that IS the fine-tune. Base checkpoint + journal = tuned model.

    preamble  16 bytes   magic "QZOJRNL", version, length of the header, CRC-32 of these twelve bytes
    header    JSON       law version, arena map, digest of the loaded model, recipe, versions; then its CRC-32
    records   32 bytes each, one per direction of a step, step by step:
              step u32, direction u16, flags u16, seed i64, applied f32, loss plus f32, loss minus f32, CRC-32

Little-endian. The header is written to a temporary file and renamed, so a journal either has a whole one or does not
exist. A step counts when all its records are whole: a short tail (a killed run, a full disk) is dropped; a whole record
whose checksum is wrong means damage and is refused.

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

from ..system.disk import write_whole

VERSION = 1
MAGIC = b"QZOJRNL"
PREAMBLE = struct.Struct("<7sBI")
RECORD = struct.Struct("<IHHqfff")
CHECKSUM = struct.Struct("<I")
RECORD_BYTES = RECORD.size + CHECKSUM.size
SKIPPED = 1  # flag: a loss was not finite; nothing was applied
_OTHER_MODEL = "belongs to another model, or this model is already tuned"
SYNC_SECONDS = 2.0  # a power failure costs at most this much of a run; a killed process costs nothing


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
    """An open journal. `steps` holds the whole steps it was opened with: a list of lists of Record."""

    def __init__(self, path: Path, header: dict[str, Any], steps: list[list[Record]], file: io.FileIO) -> None:
        self.path, self.header, self.steps, self._file = path, header, steps, file
        self._synced = time.monotonic()

    @classmethod
    def create(cls, path: str | os.PathLike[str], header: dict[str, Any]) -> "Journal":
        """Start a journal. JournalError if the file exists: it may hold hours of work."""
        path = Path(path)
        if path.exists():
            raise JournalError(
                f"{path} exists already: resume it (--resume, or QZO(..., resume=True)), or name another file"
            )
        _write_new(path, header)
        return cls(path, header, [], open(path, "ab", buffering=0))

    @classmethod
    def resume(cls, path: str | os.PathLike[str], header: dict[str, Any]) -> "Journal":
        """Continue a journal, or start it where there is none or its header was never finished.

        Everything in `header` but "versions" has to agree with the file's; JournalError names the first difference.
        """
        path = Path(path)
        found = read(path) if path.exists() else None
        if found is None:
            _write_new(path, header)
            return cls(path, header, [], open(path, "ab", buffering=0))
        old, steps, end = found
        check_header(path, old, header)
        file = open(path, "r+b", buffering=0)  # noqa: SIM115
        file.truncate(end)
        file.seek(end)
        return cls(path, old, steps, file)

    def append(self, records: Sequence[Record]) -> None:
        """Write all records of a step at once. OSError (a full disk) leaves a tail that the next resume drops."""
        data = b"".join(record.pack() for record in records)
        start = self._file.tell()
        with _naming(self.path):
            written = self._file.write(data)
        if written != len(data):
            self._file.truncate(start)
            self._file.seek(start)  # else the next write would leave a hole
            raise OSError(errno.ENOSPC, "no space left for the next step of the journal", str(self.path))
        now = time.monotonic()
        if now - self._synced > SYNC_SECONDS:
            with _naming(self.path):
                os.fsync(self._file.fileno())
            self._synced = now

    def close(self) -> None:
        """Flush to the disk and close."""
        if not self._file.closed:
            with _naming(self.path):
                os.fsync(self._file.fileno())
                self._file.close()


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], list[list[Record]], int] | None:
    """-> (header, whole steps, offset of their end), or None where the header itself was cut off.

    Raises JournalError for a file that is no journal, for a damaged header, a record whose checksum is wrong (its
    offset is named) and records out of order; FileNotFoundError if there is none.
    """
    path = Path(path)
    data = path.read_bytes()
    first = PREAMBLE.size + CHECKSUM.size
    if data[:7] != MAGIC[: len(data)]:
        raise JournalError(f"{path} is not a qzo journal: it starts with {data[:7]!r}, not {MAGIC!r}")
    if len(data) < first:
        return None
    _, version, length = PREAMBLE.unpack_from(data)
    if zlib.crc32(data[: PREAMBLE.size]) != CHECKSUM.unpack_from(data, PREAMBLE.size)[0]:
        raise JournalError(f"{path} is damaged: the checksum of its first {PREAMBLE.size} bytes (offset 0) is wrong")
    if version != VERSION:
        raise JournalError(f"{path} has journal version {version}; this qzo reads version {VERSION}")
    body = data[first : first + length + CHECKSUM.size]
    if len(body) < length + CHECKSUM.size:
        return None
    if zlib.crc32(body[:length]) != CHECKSUM.unpack_from(body, length)[0]:
        raise JournalError(f"{path} is damaged: the checksum of its header (offset {first}) is wrong")
    header = json.loads(body[:length])
    steps, end = _read_steps(path, data, first + len(body), header["directions"])
    return header, steps, end


def _read_steps(path: Path, data: bytes, start: int, directions: int) -> tuple[list[list[Record]], int]:
    steps: list[list[Record]] = []
    end = start
    whole = (len(data) - start) // RECORD_BYTES
    for i in range(whole):
        at = start + i * RECORD_BYTES
        body = data[at : at + RECORD.size]
        if zlib.crc32(body) != CHECKSUM.unpack_from(data, at + RECORD.size)[0]:
            raise JournalError(
                f"{path} is damaged: the record at offset {at} (step {i // directions}, direction "
                f"{i % directions}) has a wrong checksum; cut the file there to keep the steps before"
            )
        step, direction, flags, seed, applied, plus, minus = RECORD.unpack(body)
        if (step, direction) != (i // directions, i % directions):
            raise JournalError(
                f"{path}: the record at offset {at} is step {step}, direction {direction}; step "
                f"{i // directions}, direction {i % directions} was expected"
            )
        if direction == 0:
            records = []
        records.append(Record(step, direction, seed, applied, plus, minus, bool(flags & SKIPPED)))
        if direction == directions - 1:
            steps.append(records)
            end = at + RECORD_BYTES
    return steps, end


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


def _write_new(path: Path, header: Mapping[str, Any]) -> None:
    body = json.dumps(header, sort_keys=True).encode()
    preamble = PREAMBLE.pack(MAGIC, VERSION, len(body))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, preamble + CHECKSUM.pack(zlib.crc32(preamble)) + body + CHECKSUM.pack(zlib.crc32(body)))


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """An OSError inside has this path: that of a write to an open file has none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
