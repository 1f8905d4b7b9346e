"""Journals of runs that began."""

from pathlib import Path
from typing import Any

from qzo.optim.journal import Record, read


def read_whole(path: str | Path) -> tuple[dict[str, Any], list[list[Record]], int]:
    """(header, steps, where they end) of a journal that has a whole header."""
    found = read(path)
    assert found is not None, f"{path} has no whole header"
    return found
