"""The safetensors container: an 8-byte length, a JSON header, the tensors' bytes."""
import json
import struct

import torch

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "BOOL": torch.bool}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


def places(path):
    """name -> (dtype code, shape, file offset, bytes) of every tensor. ValueError for a damaged file."""
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            length, = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length)) if length < size else None
    except (struct.error, UnicodeDecodeError, json.JSONDecodeError):
        header = None
    if not isinstance(header, dict):
        raise ValueError(f"{path} is not a whole safetensors file: its header cannot be read; fetch it again")
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            if 8 + length + end > size:
                raise ValueError(f"{path} is truncated: tensor {name} ends at byte {8 + length + end}, the "
                                 f"file has {size}; fetch it again")
            found[name] = (entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin)
    return found


def read(path, place):
    """The tensor at a place that `places` gave, in memory of its own."""
    code, shape, offset, nbytes = place
    if code not in DTYPES:
        raise ValueError(f"{path}: a tensor of dtype {code}; supported are {', '.join(DTYPES)}")
    if nbytes == 0:
        return torch.empty(shape, dtype=DTYPES[code])
    with open(path, "rb") as file:
        file.seek(offset)
        data = bytearray(nbytes)
        file.readinto(data)
    return torch.frombuffer(data, dtype=DTYPES[code]).view(shape)


def write(path, entries, metadata):
    """Write (name, dtype, shape, make) entries; `make()` gives a tensor when its turn comes: one is held at a
    time.

    Wide elements come first: every tensor then begins at a multiple of its element size.
    """
    entries = sorted(entries, key=lambda entry: -entry[1].itemsize)
    header, at = {"__metadata__": metadata}, 0
    for name, dtype, shape, _ in entries:
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, dtype, shape, make in entries:
            tensor = make()
            assert (tensor.dtype, tensor.shape) == (dtype, torch.Size(shape)), name
            file.write(to_bytes(tensor))


def to_bytes(tensor):
    """A tensor's elements as the file holds them."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
