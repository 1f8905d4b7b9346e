"""Damaged files of every format: each is read or refused in one line, within the memory that its size explains.

The cases come from seeded generators and from hypothesis without a database, so that every run has the same ones.
An address-space limit while a file is read turns any absurd allocation, torch's too, into a MemoryError, which no
test expects.
"""
import contextlib
import random
import resource
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from safetensors.torch import save

from qzo.formats import safetensors_file
from qzo.formats.gguf_file import GGUFFile
from qzo.formats.torch_file import TorchFile
from tests.checkpoints import TYPES, write_gguf

HEADROOM = 256 << 20         # bytes of address space beyond what the process has: far below any absurd size
EXAMPLES = settings(deadline=None, derandomize=True, database=None,
                    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
NASTY = [0, 1, -1, 2, 3, 7, 8, 255, 2**15, 2**31 - 1, 2**31, 2**32, 2**60, 2**63 - 1, 2**63, 2**64 - 1]


@contextlib.contextmanager
def little_memory():
    """A limit of HEADROOM bytes on what the process may take from here on."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + HEADROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def outcome(read):
    """What one case ends in: None when it was read, else the message, which is a short line."""
    try:
        read()
    except (ValueError, FileNotFoundError) as error:
        message = str(error)
        assert message
        assert "\n" not in message, message
        assert len(message) < 1500, message
        return message
    return None


def mutated(data, rng, head):
    """`data` with one to four faults, most of them in its first `head` bytes, where the sizes stand."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4])):
        at = rng.randrange(min(head, len(data)) if rng.random() < 0.9 else len(data))
        kind = rng.randrange(7)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.randrange(256)
        elif kind == 2:
            data[at:at + 8] = struct.pack("<Q", rng.choice(NASTY) % 2**64)
        elif kind == 3:
            data[at:at + 4] = struct.pack("<I", rng.choice(NASTY) % 2**32)
        elif kind == 4:
            del data[at:at + rng.choice([1, 8, 100])]
        elif kind == 5:
            data[at:at] = rng.randbytes(rng.choice([1, 8, 100]))
        else:
            del data[at:at + (1 if rng.random() < 0.7 else len(data))]
        if not data:
            return bytes(data)
    return bytes(data)


def run(path, cases, read):
    """How many of the cases were read, and how many refused; `path` is the only file that stands there after."""
    with little_memory():
        messages = [outcome(lambda data=data: (path.write_bytes(data), read(path))) for data in cases]
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    return messages.count(None), len(messages) - messages.count(None)


# ------------------------------------------------------------------------------------- containers

def read_safetensors(path):
    for place in safetensors_file.places(path).values():
        safetensors_file.read(path, place)


def read_gguf(path):
    file = GGUFFile(path)
    for info in file.tensors.values():
        file.raw(info)


def read_torch(path):
    file = TorchFile(path)
    if not isinstance(file.content, dict):
        raise ValueError("no dictionary")
    for name, tensor in file.content.items():
        if isinstance(tensor, torch.Tensor):
            file.read(tensor, str(name))


SAFETENSORS = save({"a": torch.arange(6, dtype=torch.float16).view(2, 3), "b": torch.ones(4, dtype=torch.int32),
                    "c": torch.zeros(0, 5)}, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    write_gguf(path, TYPES.Q4_1, layers=1)
    return path.read_bytes()


@pytest.fixture(scope="module")
def small_torch(tmp_path_factory):
    path = tmp_path_factory.mktemp("torch") / "small.pt"
    torch.save({"a": torch.arange(6, dtype=torch.float16).view(2, 3), "b": torch.ones(4, dtype=torch.uint8),
                "meta": {"shape": torch.Size([2, 3]), "dtype": torch.float16, "bits": 4}}, path)
    return path.read_bytes()


def test_safetensors_bytes(tmp_path):
    rng, header = random.Random(0), SAFETENSORS.index(b"}", 8) + 200
    read, refused = run(tmp_path / "x", (mutated(SAFETENSORS, rng, header) for _ in range(3000)), read_safetensors)
    assert read > 100
    assert refused > 1000


def test_gguf_bytes(tmp_path, small_gguf):
    rng = random.Random(1)
    small = small_gguf[:small_gguf.index(b"output_norm") + 2000]     # the tensors' bytes end too early then: so pad
    padded = small + bytes(len(small_gguf) - len(small))
    read, refused = run(tmp_path / "x", (mutated(padded, rng, 1600) for _ in range(3000)), read_gguf)
    assert read > 100
    assert refused > 1000


def test_torch_bytes(tmp_path, small_torch):
    rng = random.Random(2)
    read_torch_once = tmp_path / "warm"
    read_torch_once.write_bytes(small_torch)
    read_torch(read_torch_once)                     # imports take more memory than a file may
    read_torch_once.unlink()
    read, refused = run(tmp_path / "x", (mutated(small_torch, rng, len(small_torch)) for _ in range(1500)), read_torch)
    assert read > 100
    assert refused > 500
