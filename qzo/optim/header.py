"""What the fields of a journal's header hold: a file whose checksums are right may still come from anywhere."""

from collections.abc import Callable, Mapping
from typing import Any

_LARGEST = 3.4028234e38  # of float32, which the update computes in


def wrong_field(header: Mapping[str, Any]) -> str | None:
    """The first field that is there and holds what no run writes; None: each holds what it should."""
    return next((name for name, fits in _FIELDS.items() if name in header and not fits(header[name])), None)


def _whole(least: int, most: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value <= most


def _of(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kind)


def _number(most: float) -> Callable[[Any], bool]:
    return lambda value: type(value) in (int, float) and 0 <= value <= most


def _is_arena(value: Any) -> bool:
    """Name of a layer -> [first quad, groups, output rows]."""
    size = _whole(0, 1 << 40)
    slots = list(value.values()) if isinstance(value, dict) else [None]
    return all(isinstance(slot, list) and len(slot) == 3 and all(map(size, slot)) for slot in slots)


_FIELDS: dict[str, Callable[[Any], bool]] = {
    "directions": _whole(1, 1 << 16),
    "first_step": _whole(0, 1 << 32),
    "seed": _whole(-(1 << 63), (1 << 64) - 1),
    "relative": _of(bool),
    "noise": _of(str),
    "sharing": _of(str),
    "law": _of(str),
    "eps": _number(_LARGEST),
    "clip": _number(float("inf")),
    "floor": _number(_LARGEST),
    "arena": _is_arena,
    "digest": _of(str),
    "recipe": _of(dict),
    "versions": _of(dict),
}
