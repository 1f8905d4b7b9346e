"""Journals taken apart, joined and compared, without the model that they belong to.

A piece is a journal that does not begin with step 0, which its header says (`first_step`); it is joined to those before
it again, and only then replayed or resumed.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..system import disk
from .journal import Contents, JournalError, Record, encoded, scan

_FREE = ("versions", "first_step")  # in which pieces of one journal may differ


def contents(path: str | os.PathLike[str]) -> Contents:
    """What a journal or a piece holds. JournalError for one without a whole header, as `scan` has it for others."""
    if not Path(path).is_file():
        what = f"{path} is a folder" if Path(path).is_dir() else f"there is no journal {path}"
        raise FileNotFoundError(f"{what}; a run's journal is OUT/journal.qzo")
    found = scan(path)
    if found is None:
        raise JournalError(f"{path} has no whole header: the run ended before its first step")
    return found


def cut(path: str | os.PathLike[str], out: str | os.PathLike[str], start: int | None, until: int | None) -> int:
    """Write the steps from `start` up to, and without, `until` to a new file; None: from the first, up to the last.

    Returns how many these are. JournalError for damage before `until`, ValueError for steps that there are not.
    """
    found = contents(path)
    end = found.first + len(found.steps)
    if until is None or until > end:
        found.check()
    start, until = found.first if start is None else start, end if until is None else until
    if not found.first <= start <= until <= end:
        raise ValueError(f"{path} has the steps from {found.first} up to {end}, not those from {start} up to {until}")
    steps = found.steps[start - found.first : until - found.first]
    _write(out, found.header, start, steps)
    return len(steps)


def concat(paths: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> int:
    """Join pieces of one journal, given in order, to a new file; returns the number of steps.

    JournalError for a damaged piece, one of another journal, and one that does not begin where the one before ends.
    """
    first = contents(paths[0])
    steps: list[list[Record]] = []
    for path in paths:
        piece, wanted = contents(path), first.first + len(steps)
        piece.check()
        for name, (there, here) in header_differences(first, piece).items():
            if name.partition(".")[0] not in _FREE:
                raise JournalError(
                    f"{path}: its {name} is {here!r}, that of {paths[0]} is {there!r}: pieces of one journal agree"
                )
        if piece.first != wanted:
            raise JournalError(f"{path} begins with step {piece.first}, step {wanted} was expected there")
        steps += piece.steps
    _write(out, first.header, first.first, steps)
    return len(steps)


def header_differences(one: Contents, other: Contents) -> dict[str, tuple[Any, Any]]:
    """Field -> its value in each of two headers, None where it has none; fields inside others as "recipe.data"."""
    left, right = dict(_fields(one.header)), dict(_fields(other.header))
    names = sorted(left.keys() | right.keys())
    return {name: (left.get(name), right.get(name)) for name in names if left.get(name) != right.get(name)}


def alike(one: Contents, other: Contents) -> int:
    """How many steps, from the first on, have the same bits in both."""
    count = 0
    for left, right in zip(one.steps, other.steps, strict=False):
        if [record.pack() for record in left] != [record.pack() for record in right]:
            break
        count += 1
    return count


def _fields(header: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in header.items():
        if isinstance(value, dict):
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _write(out: str | os.PathLike[str], header: dict[str, Any], first: int, steps: Sequence[Sequence[Record]]) -> None:
    """A new file; JournalError where there is one: no journal is ever overwritten."""
    if Path(out).exists():
        raise JournalError(f"{out} exists already, and a journal is never overwritten: name another file")
    header = {name: value for name, value in header.items() if name != "first_step"}
    if first:
        header["first_step"] = first
    disk.write_whole(Path(out), encoded(header) + b"".join(record.pack() for step in steps for record in step))
