"""The GGUF container: header and tensor directory.

The header is parsed here rather than by gguf.GGUFReader, which makes a numpy view of every token and merge
and so takes seconds where this takes a tenth of one; the tests hold the two against each other.
"""

import dataclasses
import functools
import itertools
import struct
from collections.abc import Container
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from .gguf_blocks import BLOCKS, NAMES, values

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS, _DEEPEST_ARRAY = 4, 8


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """A tensor's entry in the directory; shape is [N, K] (the file lists the fastest dimension first)."""

    name: str
    type: int
    shape: tuple
    offset: int  # from the start of the file
    nbytes: int

    @property
    def type_name(self) -> str:
        return NAMES.get(self.type, f"type {self.type}")

    @property
    def quantized(self) -> bool:
        return BLOCKS[self.type][0] > 1

    def blocks(self, raw: torch.Tensor) -> torch.Tensor:
        """Its bytes as uint8 [rows, blocks of a row, bytes of a block]."""
        weights, size = BLOCKS[self.type]
        return raw.view(-1, self.shape[-1] // weights, size)


class GGUFFile:
    """metadata: key -> value; tensors: name -> TensorInfo in file order. ValueError for a damaged file."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.size = self.path.stat().st_size
        with open(self.path, "rb") as file:
            cursor = _Cursor(file, self.path, self.size)
            if file.read(4) != b"GGUF":
                raise ValueError(f"{self.path} is not a GGUF file: it does not begin with 'GGUF'")
            version = cursor.scalar("I")
            if version not in (2, 3):
                raise ValueError(f"{self.path}: GGUF version {version}; only 2 and 3, little-endian, can be read")
            tensors, keys = cursor.scalar("Q"), cursor.scalar("Q")
            self.metadata: dict[str, Any] = {}
            for _ in range(keys):
                key = cursor.string()
                self._once(key, self.metadata, "metadata")
                self.metadata[key] = cursor.value(cursor.scalar("I"))
            entries = [self._entry(cursor) for _ in range(tensors)]
            start = file.tell() + -file.tell() % self._alignment()
        self.tensors: dict[str, TensorInfo] = {}
        for name, shape, kind, offset in entries:
            self._once(name, self.tensors, "tensor")
            self.tensors[name] = self._info(name, shape, kind, start + offset)
        self._check_overlaps()

    def _once(self, name: str, known: Container[str], what: str) -> None:
        if name in known or not name.isprintable():
            raise ValueError(
                f"{self.path}: {what} {name!r:.200} is there twice or has no readable name; the "
                "file is damaged, fetch it again"
            )

    def _alignment(self) -> int:
        found = self.metadata.get("general.alignment", 32)
        if type(found) is not int or found < 1:
            raise ValueError(f"{self.path}: general.alignment is {found!r:.40}; it has to be a whole number of bytes")
        return found

    def _check_overlaps(self) -> None:
        order = sorted(self.tensors.values(), key=lambda info: info.offset)
        for first, second in itertools.pairwise(order):
            if first.offset + first.nbytes > second.offset:
                raise ValueError(
                    f"{self.path}: tensors {first.name} and {second.name} overlap; the file is damaged, fetch it again"
                )

    def _entry(self, cursor: "_Cursor") -> tuple[str, tuple[int, ...], int, int]:
        name, count = cursor.string(), cursor.scalar("I")
        dims = [cursor.scalar("Q") for _ in range(min(count, _MOST_DIMENSIONS))]
        if count > _MOST_DIMENSIONS or 0 in dims:
            raise ValueError(
                f"{self.path}: tensor {name!r:.200} has {count} dimensions, {dims}; GGUF has at "
                f"most {_MOST_DIMENSIONS}, none of them 0: the file is damaged"
            )
        return name, tuple(reversed(dims)), cursor.scalar("I"), cursor.scalar("Q")

    def _info(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> TensorInfo:
        if kind not in BLOCKS:
            found = TensorInfo(name, kind, shape, offset, 0).type_name
            raise ValueError(
                f"{self.path}: tensor {name} is {found}; types that can be read are "
                f"{', '.join(NAMES[t] for t in BLOCKS)}"
            )
        weights, size = BLOCKS[kind]
        if not shape or shape[-1] % weights:
            raise ValueError(
                f"{self.path}: tensor {name} has shape {list(shape)}, which {NAMES[kind]} "
                f"blocks of {weights} do not fill: the file is damaged"
            )
        nbytes = int(np.prod(shape, dtype=object)) // weights * size
        if offset + nbytes > self.size:
            raise ValueError(
                f"{self.path} is truncated: tensor {name} ends at byte {offset + nbytes}, the "
                f"file has {self.size}; fetch it again"
            )
        return TensorInfo(name, kind, shape, offset, nbytes)

    def raw(self, info: TensorInfo) -> torch.Tensor:
        """The tensor's bytes, uint8 [nbytes], read into memory of their own."""
        return torch.from_numpy(np.fromfile(self.path, np.uint8, info.nbytes, offset=info.offset))

    def dense(
        self, info: TensorInfo, dtype: torch.dtype, order: torch.Tensor | None = None, minus: float = 0.0
    ) -> torch.Tensor:
        """A matrix or vector as `dtype`, row order[i] of the file as row i, `minus` taken off in float32.

        Read and converted in blocks of rows, so that what is needed besides the result stays small.
        """
        count, width = info.shape if len(info.shape) == 2 else (int(np.prod(info.shape)), 1)
        nbytes, rows = info.nbytes // count, max(1, (1 << 20) // width)
        out = torch.empty(count, width, dtype=dtype)
        places = torch.arange(count) if order is None else order.argsort()
        for start in range(0, count, rows):
            taken = min(rows, count - start)
            data = np.fromfile(self.path, np.uint8, taken * nbytes, offset=info.offset + start * nbytes)
            part = values(torch.from_numpy(data).view(taken, nbytes), info.type)
            out[places[start : start + taken]] = (part.float() - minus if minus else part).to(dtype)
        return out.view(info.shape)


class _Cursor:
    """Reads a header value by value; ValueError where the file ends too early."""

    def __init__(self, file: BinaryIO, path: Path, size: int) -> None:
        self.file, self.path, self.size = file, path, size

    def take(self, count: int) -> bytes:
        data = self.file.read(count) if count <= self.size else b""  # no memory for what cannot be there
        if len(data) != count:
            raise ValueError(
                f"{self.path} is truncated: its header ends after {self.file.tell()} bytes; fetch it again"
            )
        return data

    def scalar(self, code: str) -> Any:
        packing = _struct(code)
        return packing.unpack(self.take(packing.size))[0]

    def string(self) -> str:
        return self.take(self.scalar("Q")).decode("utf-8", errors="replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY and depth < _DEEPEST_ARRAY:
            inner, count = self.scalar("I"), self.scalar("Q")
            if inner in _SCALARS:
                code = _SCALARS[inner]
                return list(struct.unpack(f"<{count}{code}", self.take(count * _struct(code).size)))
            return [self.value(inner, depth + 1) for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(f"{self.path}: metadata of unknown type {kind}: the file is damaged or too new")
        return self.scalar(_SCALARS[kind])


@functools.cache
def _struct(code: str) -> struct.Struct:
    return struct.Struct("<" + code)
