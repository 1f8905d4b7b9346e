"""The safetensors container: an 8-byte length, a JSON header, the tensors' bytes."""

import json
import math
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ...system.progress import tracked
from .protocol import NewTensor, Place

DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_LONGEST_HEADER = 100_000_000  # bytes; the safetensors library's own limit
_MOST_DIMENSIONS = 64  # torch's own limit
_CODES = {dtype: code for code, dtype in DTYPES.items()}


def places(path: Path) -> dict[str, Place]:
    """name -> (dtype code, shape, file offset, bytes) of every tensor.

    ValueError for a damaged file: a header that is cut off, longer than 100 MB or no JSON object, and a
    tensor whose bytes reach beyond the file, overlap another's or do not fill its shape.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        header, start = _header(file, size)
    if header is None:
        raise ValueError(f"{path} is not a whole safetensors file: its header cannot be read; fetch it again")
    found = {name: _place(path, name, entry, start, size) for name, entry in header.items() if name != "__metadata__"}
    end, last = start, None
    for name, (_, _, offset, nbytes) in sorted(found.items(), key=lambda item: (item[1][2], item[1][3])):
        if nbytes and offset < end:
            raise ValueError(f"{path}: tensors {last} and {name} overlap; the file is damaged, fetch it again")
        end, last = max(end, offset + nbytes), name
    return found


def metadata(path: Path) -> dict[str, str] | None:
    """The file's own {text: text}, or None."""
    with open(path, "rb") as file:
        header, _ = _header(file, path.stat().st_size)
    return None if header is None else header.get("__metadata__")


def _header(file: BinaryIO, size: int) -> tuple[dict[str, Any] | None, int]:
    """(dictionary, where the tensors' bytes begin); None instead of what is no dictionary."""
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, _LONGEST_HEADER):
        return None, 0
    try:
        header = json.loads(file.read(length), object_pairs_hook=_unique)
    except (ValueError, RecursionError):  # no UTF-8, no JSON, a number of thousands of digits
        header = None
    return header if isinstance(header, dict) else None, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The dictionary of a JSON object; ValueError for a name that is there twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found


def _place(path: Path, name: str, entry: object, start: int, size: int) -> Place:
    """(dtype code, shape, file offset, bytes) of a header's entry."""
    entry = entry if isinstance(entry, dict) else {}
    code: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    countable = _whole(shape) and len(shape) <= _MOST_DIMENSIONS
    countable = countable and math.prod(size or 1 for size in shape) < 1 << 63
    ordered = _whole(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1]
    if not (name.isprintable() and isinstance(code, str) and countable and ordered):
        raise ValueError(f"{path}: the header's entry of tensor {name!r:.200} is damaged; fetch the file again")
    begin, end = offsets
    if start + end > size:
        raise ValueError(
            f"{path} is truncated: tensor {name} ends at byte {start + end}, the file has {size}; fetch it again"
        )
    if code in DTYPES and math.prod(shape) * DTYPES[code].itemsize != end - begin:
        raise ValueError(
            f"{path}: tensor {name} has {end - begin} bytes, which are not {code} {shape}; the "
            "file is damaged, fetch it again"
        )
    return code, tuple(shape), start + begin, end - begin


def _whole(value: object) -> bool:
    """Whether it is a list of whole numbers, none below 0."""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def read(path: Path, place: Place) -> torch.Tensor:
    """The tensor at a place that `places` gave, in memory of its own."""
    code, shape, offset, nbytes = place
    if code not in DTYPES:
        raise ValueError(f"{path}: a tensor of dtype {code!r:.40}; supported are {', '.join(DTYPES)}")
    if nbytes == 0:
        return torch.empty(shape, dtype=DTYPES[code])
    with open(path, "rb") as file:
        file.seek(offset)
        data = bytearray(nbytes)
        file.readinto(data)
    return torch.frombuffer(data, dtype=DTYPES[code]).view(shape)


def write(path: Path, entries: Iterable[NewTensor], metadata: dict[str, str] | None) -> None:
    """Write (name, dtype, shape, make) entries; `make()` gives a tensor when its turn comes: one is held at a
    time.

    Wide elements come first: every tensor then begins at a multiple of its element size.
    """
    entries = sorted(entries, key=lambda entry: -entry[1].itemsize)
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    at = 0
    for name, dtype, shape, _ in entries:
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, dtype, shape, make in tracked(entries, "writing", "tensors"):
            tensor = make()
            assert (tensor.dtype, tensor.shape) == (dtype, torch.Size(shape)), name
            file.write(to_bytes(tensor))


def to_bytes(tensor: torch.Tensor) -> bytes:
    """A tensor's elements as the file holds them."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
