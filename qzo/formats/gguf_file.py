"""The GGUF container: header, tensor directory and block layouts.

The header is parsed here rather than by gguf.GGUFReader, which makes a numpy view of every token and merge
and so takes seconds where this takes a tenth of one; the tests hold the two against each other.
"""
import dataclasses
import functools
import itertools
import struct
from pathlib import Path

import numpy as np
import torch

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS, _DEEPEST_ARRAY = 4, 8

F32, F16, Q4_0, Q4_1, Q8_0, Q6_K, BF16 = 0, 1, 2, 3, 8, 14, 30
_BLOCKS = {F32: (1, 4), F16: (1, 2), BF16: (1, 2), Q4_0: (32, 18), Q4_1: (32, 20), Q8_0: (32, 34),
           Q6_K: (256, 210)}                      # type -> weights and bytes of a block
_NAMES = {F32: "F32", F16: "F16", Q4_0: "Q4_0", Q4_1: "Q4_1", 6: "Q5_0", 7: "Q5_1", Q8_0: "Q8_0", 10: "Q2_K",
          11: "Q3_K", 12: "Q4_K", 13: "Q5_K", Q6_K: "Q6_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS",
          19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", BF16: "BF16", 39: "MXFP4"}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """A tensor's entry in the directory; shape is [N, K] (the file lists the fastest dimension first)."""

    name: str
    type: int
    shape: tuple
    offset: int          # from the start of the file
    nbytes: int

    @property
    def type_name(self):
        return _NAMES.get(self.type, f"type {self.type}")

    def blocks(self, raw):
        """Its bytes as uint8 [rows, blocks of a row, bytes of a block]."""
        weights, size = _BLOCKS[self.type]
        return raw.view(-1, self.shape[-1] // weights, size)


class GGUFFile:
    """metadata: key -> value; tensors: name -> TensorInfo in file order. ValueError for a damaged file."""

    def __init__(self, path):
        self.path = Path(path)
        self.size = self.path.stat().st_size
        with open(self.path, "rb") as file:
            cursor = _Cursor(file, self.path, self.size)
            if file.read(4) != b"GGUF":
                raise ValueError(f"{self.path} is not a GGUF file: it does not begin with 'GGUF'")
            version = cursor.scalar("I")
            if version not in (2, 3):
                raise ValueError(f"{self.path}: GGUF version {version}; only 2 and 3, little-endian, can be "
                                 "read")
            tensors, keys = cursor.scalar("Q"), cursor.scalar("Q")
            self.metadata = {}
            for _ in range(keys):
                key = cursor.string()
                self._once(key, self.metadata, "metadata")
                self.metadata[key] = cursor.value(cursor.scalar("I"))
            entries = [self._entry(cursor) for _ in range(tensors)]
            start = file.tell() + -file.tell() % self._alignment()
        self.tensors = {}
        for name, shape, kind, offset in entries:
            self._once(name, self.tensors, "tensor")
            self.tensors[name] = self._info(name, shape, kind, start + offset)
        self._check_overlaps()

    def _once(self, name, known, what):
        if name in known or not name.isprintable():
            raise ValueError(f"{self.path}: {what} {name!r:.200} is there twice or has no readable name; the "
                             "file is damaged, fetch it again")

    def _alignment(self):
        found = self.metadata.get("general.alignment", 32)
        if type(found) is not int or found < 1:
            raise ValueError(f"{self.path}: general.alignment is {found!r:.40}; it has to be a whole number "
                             "of bytes")
        return found

    def _check_overlaps(self):
        order = sorted(self.tensors.values(), key=lambda info: info.offset)
        for first, second in itertools.pairwise(order):
            if first.offset + first.nbytes > second.offset:
                raise ValueError(f"{self.path}: tensors {first.name} and {second.name} overlap; the file is "
                                 "damaged, fetch it again")

    def _entry(self, cursor):
        name, count = cursor.string(), cursor.scalar("I")
        dims = [cursor.scalar("Q") for _ in range(min(count, _MOST_DIMENSIONS))]
        if count > _MOST_DIMENSIONS or 0 in dims:
            raise ValueError(f"{self.path}: tensor {name!r:.200} has {count} dimensions, {dims}; GGUF has at "
                             f"most {_MOST_DIMENSIONS}, none of them 0: the file is damaged")
        return name, tuple(reversed(dims)), cursor.scalar("I"), cursor.scalar("Q")

    def _info(self, name, shape, kind, offset):
        if kind not in _BLOCKS:
            found = TensorInfo(name, kind, shape, offset, 0).type_name
            raise ValueError(f"{self.path}: tensor {name} is {found}; supported are Q4_0 and Q4_1 "
                             f"(trained), {', '.join(_NAMES[t] for t in _BLOCKS if t not in (Q4_0, Q4_1))} "
                             "(kept as they are)")
        weights, size = _BLOCKS[kind]
        if not shape or shape[-1] % weights:
            raise ValueError(f"{self.path}: tensor {name} has shape {list(shape)}, which {_NAMES[kind]} "
                             f"blocks of {weights} do not fill: the file is damaged")
        nbytes = int(np.prod(shape, dtype=object)) // weights * size
        if offset + nbytes > self.size:
            raise ValueError(f"{self.path} is truncated: tensor {name} ends at byte {offset + nbytes}, the "
                             f"file has {self.size}; fetch it again")
        return TensorInfo(name, kind, shape, offset, nbytes)

    def raw(self, info):
        """The tensor's bytes, uint8 [nbytes], read into memory of their own."""
        return torch.from_numpy(np.fromfile(self.path, np.uint8, info.nbytes, offset=info.offset))


class _Cursor:
    """Reads a header value by value; ValueError where the file ends too early."""

    def __init__(self, file, path, size):
        self.file, self.path, self.size = file, path, size

    def take(self, count):
        data = self.file.read(count) if count <= self.size else b""      # no memory for what cannot be there
        if len(data) != count:
            raise ValueError(f"{self.path} is truncated: its header ends after {self.file.tell()} bytes; "
                             "fetch it again")
        return data

    def scalar(self, code):
        code = _struct(code)
        return code.unpack(self.take(code.size))[0]

    def string(self):
        return self.take(self.scalar("Q")).decode("utf-8", errors="replace")

    def value(self, kind, depth=0):
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
def _struct(code):
    return struct.Struct("<" + code)


# ---------------------------------------------------------------------------------------------- block layouts

def halves(blocks, at):
    """The float16 that begins at byte `at` of every block: [rows, blocks of a row]."""
    return blocks[..., at:at + 2].contiguous().view(torch.float16).squeeze(-1)


def codes4(blocks, info):
    """uint8 [N, K] of Q4_0 or Q4_1 blocks: low nibbles are weights 0-15 of the block, high ones 16-31."""
    nibbles = blocks[..., 2 if info.type == Q4_0 else 4:]
    return torch.cat([nibbles & 15, nibbles >> 4], -1).flatten(1)


def dequantize(raw, info, dtype):
    """The tensor as `dtype`, in row blocks so that float32 temporaries stay small."""
    if info.type in (F32, F16, BF16):
        return raw.view({F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}[info.type]).view(
            info.shape).to(dtype)
    blocks = info.blocks(raw)
    out = torch.empty(blocks.shape[0], info.shape[-1], dtype=dtype)
    rows = max(1, (1 << 20) // info.shape[-1])
    for part, target in zip(blocks.split(rows), out.split(rows), strict=True):
        target.copy_(_block_values(part, info).flatten(1))
    return out.view(info.shape)


def _block_values(blocks, info):
    d = halves(blocks, 208 if info.type == Q6_K else 0).float().unsqueeze(-1)
    if info.type == Q8_0:
        return d * blocks[..., 2:].view(torch.int8).float()
    if info.type == Q6_K:
        return _q6_k(blocks, d)
    codes = codes4(blocks, info).view(*blocks.shape[:2], 32).float()
    return d * (codes - 8) if info.type == Q4_0 else d * codes + halves(blocks, 2).float().unsqueeze(-1)


def _q6_k(blocks, d):
    """Blocks of 256: 128 bytes of low nibbles, 64 of high bit pairs, 16 int8 scales, d; in two halves of 128
    weights, each of four runs of 32 whose high bits are the four pairs of the same 32 bytes."""
    low = blocks[..., :128].unflatten(-1, (2, 2, 32))                       # half, run parity, weight
    high = blocks[..., 128:192].unflatten(-1, (2, 1, 32))
    low = torch.cat([low & 15, low >> 4], -2)                               # runs 0, 1, 2, 3
    high = torch.cat([(high >> shift) & 3 for shift in (0, 2, 4, 6)], -2)
    codes = (low | high << 4).flatten(-3).unflatten(-1, (16, 16)).float() - 32
    scales = blocks[..., 192:208].contiguous().view(torch.int8).float()
    return ((d * scales).unsqueeze(-1) * codes).flatten(-2)
