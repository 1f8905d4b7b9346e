"""A second reader of the journal's version 1, written from docs/journal.md; it imports nothing of qzo.

python read_journal.py FILE prints the header, then a line for each record.
"""

import json
import struct
import sys
import zlib
from typing import Any

Parsed = tuple[dict[str, Any], list[list[tuple[Any, ...]]], int]


def parse(data: bytes) -> Parsed | None:
    """(header, steps, where they end) of a file's bytes; None where its header was cut off. A step is a list of
    (step, direction, flags, seed, applied, loss plus, loss minus). ValueError("offset N") for damage."""
    if data[:7] != b"QZOJRNL"[: len(data)]:
        raise ValueError("offset 0")
    if len(data) < 16:
        return None
    version, length, crc = struct.unpack("<BII", data[7:16])
    if crc != zlib.crc32(data[:12]) or version != 1:
        raise ValueError("offset 0")
    start = 16 + length + 4
    if len(data) < start:
        return None
    body = data[16 : 16 + length]
    if data[16 + length : start] != struct.pack("<I", zlib.crc32(body)):
        raise ValueError("offset 16")
    header = json.loads(body)
    directions, first = header["directions"], header.get("first_step", 0)
    records = []
    for number, at in enumerate(range(start, len(data) - 31, 32)):
        record, crc = data[at : at + 28], data[at + 28 : at + 32]
        if struct.pack("<I", zlib.crc32(record)) != crc:
            if data[at + 31 :].strip(b"\0") == b"":  # zeros to the end: what a power cut left
                break
            raise ValueError(f"offset {at}")
        fields = struct.unpack("<IHHqfff", record)
        if fields[:2] != (first + number // directions, number % directions) or fields[2] > 1:
            raise ValueError(f"offset {at}")
        records.append(fields)
    whole = len(records) // directions * directions
    steps = [records[i : i + directions] for i in range(0, whole, directions)]
    return header, steps, start + 32 * whole


if __name__ == "__main__":
    with open(sys.argv[1], "rb") as file:
        found = parse(file.read())
    print(json.dumps(found[0]) if found else "no whole header")
    for step in found[1] if found else []:
        print(*step, sep="\n")
