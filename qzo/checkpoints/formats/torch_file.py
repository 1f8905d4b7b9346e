"""torch.save's container: a zip archive with a pickle and an uncompressed entry for the bytes of each
storage.

The pickle is first searched for names other than those that tensors need, then run by torch.load with
weights_only=True and without memory for tensors: it gives their shapes and places, which are held against the
archive before a byte of them is read. So a file neither runs code nor takes more memory than it has bytes.
"""

import dataclasses
import itertools
import math
import pickletools
import struct
import zipfile
import zlib
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

_LOCAL, _CENTRAL, _DESCRIPTOR = b"PK\x03\x04", b"PK\x01\x02", b"PK\x07\x08"
_LOCAL_CRC, _CENTRAL_CRC, _DESCRIPTOR_CRC = 14, 16, 4  # byte of the CRC-32 in each record
_NAMES = {
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "collections OrderedDict",
    "torch Size",
    "torch device",
}
# what zipfile raises for an archive, and the unpickler for a pickle, that is not whole
_NO_ARCHIVE = (zipfile.BadZipFile, struct.error, NotImplementedError, OverflowError, UnicodeDecodeError)
_NO_PICKLE = (
    RuntimeError,
    UnpicklingError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    ValueError,
    AssertionError,
    ArithmeticError,
    OSError,
    struct.error,
)


@dataclasses.dataclass(frozen=True)
class _Entry:
    """An entry of the archive: where its bytes lie, and every place of the file that holds their CRC-32."""

    start: int
    size: int
    crc_at: tuple


class TorchFile:
    """content: what the file holds, its tensors with shape, dtype and place but no memory.

    Raises ValueError for a file that is damaged, compressed or of the format before torch 1.6, or whose
    pickle asks for more than tensors, numbers and containers of them.
    """

    def __init__(self, path):
        self.path = Path(path)
        try:
            entries = self._entries()
        except _NO_ARCHIVE as error:
            raise ValueError(
                f"{path} is not a whole torch file, which is a zip archive: {error}; fetch it again"
            ) from None
        self._check(entries)
        self._by_start = {entry.start: entry for entry in entries.values()}
        self.content = self._unpickle()

    def _entries(self):
        """name -> _Entry."""
        found, end = {}, self.path.stat().st_size
        with zipfile.ZipFile(self.path) as archive, open(self.path, "rb") as file:
            at = archive.start_dir
            for info in archive.infolist():
                if info.compress_type or info.compress_size != info.file_size or info.flag_bits & 1:
                    raise ValueError(
                        f"{self.path}: entry {info.filename!r:.200} is compressed or encrypted; "
                        "only files as torch.save writes them can be read"
                    )
                if info.filename in found or not 0 <= info.header_offset <= end - info.file_size:
                    raise zipfile.BadZipFile(f"entry {info.filename!r:.200} is there twice or lies beyond the end")
                found[info.filename], at = _entry(file, info, at)
        if any(entry.start + entry.size > end for entry in found.values()):
            raise zipfile.BadZipFile("an entry lies beyond the end")
        spans = sorted((entry.start, entry.start + entry.size) for entry in found.values())
        if any(first[1] > second[0] for first, second in itertools.pairwise(spans)):
            raise zipfile.BadZipFile("entries overlap")
        return found

    def _check(self, entries):
        pickles = [name for name in entries if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"{self.path} holds {len(pickles)} entries data.pkl; a file of torch.save has one")
        for name, entry in entries.items():
            if name.endswith("/byteorder") and self._bytes(entry) != b"little":
                raise ValueError(f"{self.path}: its numbers are not little-endian; save it on such a machine")
        for opcode, argument, _ in self._opcodes(self._bytes(entries[pickles[0]])):
            if opcode.name in ("GLOBAL", "INST", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4") and not (
                opcode.name == "GLOBAL" and _is_plain(argument)
            ):
                raise ValueError(
                    f"{self.path}: its pickle asks for {argument or opcode.name!r:.200}; "
                    "only tensors, numbers and containers of them are read"
                )

    def _opcodes(self, pickle):
        try:
            yield from pickletools.genops(pickle)
        except (struct.error, ValueError) as error:
            raise ValueError(f"{self.path}: its pickle is damaged ({error}); fetch it again") from None

    def _bytes(self, entry):
        with open(self.path, "rb") as file:
            file.seek(entry.start)
            return file.read(entry.size)

    def _unpickle(self):
        try:
            with FakeTensorMode():
                return torch.load(self.path, map_location="cpu", weights_only=True)
        except _NO_PICKLE as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{self.path} cannot be unpickled ({reason}); fetch it again") from None

    def place(self, tensor, name):
        """(offset in the file, bytes) of a tensor of the content.

        ValueError naming it where the file does not hold it whole and in one piece.
        """
        at = f"{name} in {self.path.name}"
        if tensor.layout != torch.strided or not tensor.is_contiguous():
            raise ValueError(f"{at} is not contiguous; call .contiguous() on it and save it again")
        storage, size = tensor.untyped_storage(), tensor.dtype.itemsize
        entry = self._by_start.get(getattr(storage, "_checkpoint_offset", None))
        begin, nbytes = tensor.storage_offset() * size, math.prod(tensor.shape) * size
        if entry is None or begin + nbytes > min(entry.size, storage.nbytes()):
            raise ValueError(
                f"{at}: the bytes of {tensor.dtype} {list(tensor.shape)} are not where torch.save "
                "puts them; fetch the file again"
            )
        return entry.start + begin, nbytes

    def read(self, tensor, name):
        """A tensor of the content in memory of its own."""
        offset, nbytes = self.place(tensor, name)
        if nbytes == 0:
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        data = torch.from_numpy(np.fromfile(self.path, np.uint8, nbytes, offset=offset))
        return data.view(tensor.dtype).view(tensor.shape)

    def patches(self, chunks):
        """`chunks` of (offset, bytes) inside entries, followed by those that make the CRC-32s fit again.

        ValueError where two chunks overlap: their tensors share a storage.
        """
        for (first, data), (second, _) in itertools.pairwise(sorted(chunks)):
            if first + len(data) > second:
                raise ValueError(
                    f"{self.path}: two layers share the bytes of their scales, which cannot be "
                    "saved apart; save the source with a copy for each"
                )
        checksums = []
        for entry in self._by_start.values():
            inside = [(at - entry.start, data) for at, data in chunks if 0 <= at - entry.start < entry.size]
            if inside:
                content = bytearray(self._bytes(entry))
                for at, data in inside:
                    content[at : at + len(data)] = data
                checksums += [(at, struct.pack("<I", zlib.crc32(content))) for at in entry.crc_at]
        return [*chunks, *checksums]


def _is_plain(name):
    """Whether a pickle's global, "module attribute", is one that a file of plain tensors needs."""
    module, _, attribute = name.partition(" ")
    return name in _NAMES or (
        module == "torch"
        and (attribute.endswith("Storage") or isinstance(getattr(torch, attribute, None), torch.dtype))
    )


def _entry(file, info, at):
    """(_Entry, where the next record begins) of the central directory's record at `at`."""
    crc = struct.pack("<I", info.CRC)
    file.seek(at)
    central, *lengths = struct.unpack("<4s24x3H12x", file.read(46))
    file.seek(info.header_offset)
    local, flags, local_crc, name, extra = struct.unpack("<4s2xH6x4s8x2H", file.read(30))
    start = info.header_offset + 30 + name + extra
    crc_at = [at + _CENTRAL_CRC]
    if local_crc == crc or not flags & 8:
        crc_at.append(info.header_offset + _LOCAL_CRC)
    if flags & 8:  # the sizes and the CRC follow the bytes
        file.seek(start + info.file_size)
        tail = file.read(8)
        crc_at.append(start + info.file_size + (_DESCRIPTOR_CRC if tail[:4] == _DESCRIPTOR else 0))
        local_crc = tail[4:] if tail[:4] == _DESCRIPTOR else tail[:4]
    if (central, local, local_crc) != (_CENTRAL, _LOCAL, crc):
        raise zipfile.BadZipFile(f"the records of entry {info.filename!r:.200} do not agree")
    return _Entry(start, info.file_size, tuple(crc_at)), at + 46 + sum(lengths)
