"""Cases of damage and what runs them, within little memory.

The cases come from seeded generators and from hypothesis without a database, so that every run has the same ones. An
address-space limit while a file is read turns any absurd allocation, torch's too, into a MemoryError, which no test
expects.
"""

import contextlib
import resource
import struct
from pathlib import Path

import torch
from hypothesis import HealthCheck, settings
from safetensors.torch import save

from tests.support.paths import FIXTURES as FIXTURES

HEADROOM = 256 << 20  # bytes of address space beyond what the process has: far below any absurd size
EXAMPLES = settings(
    max_examples=1500,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
NASTY = [0, 1, -1, 2, 3, 7, 8, 255, 2**15, 2**31 - 1, 2**31, 2**32, 2**60, 2**63 - 1, 2**63, 2**64 - 1]
SAFETENSORS = save(
    {
        "a": torch.arange(6, dtype=torch.float16).view(2, 3),
        "b": torch.ones(4, dtype=torch.int32),
        "c": torch.zeros(0, 5),
    },
    metadata={"format": "pt"},
)


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
            data[at : at + 8] = struct.pack("<Q", rng.choice(NASTY) % 2**64)
        elif kind == 3:
            data[at : at + 4] = struct.pack("<I", rng.choice(NASTY) % 2**32)
        elif kind == 4:
            del data[at : at + rng.choice([1, 8, 100])]
        elif kind == 5:
            data[at:at] = rng.randbytes(rng.choice([1, 8, 100]))
        else:
            del data[at : at + (1 if rng.random() < 0.7 else len(data))]
        if not data:
            return bytes(data)
    return bytes(data)


def renew(path, data):
    """Write a file anew: on some file systems to overwrite one is to wait for the disk."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def run(path, cases, read):
    """How many of the cases were read, and how many refused; `path` is the only file that stands there after."""
    with little_memory():
        messages = [outcome(lambda data=data: (renew(path, data), read(path))) for data in cases]
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    return messages.count(None), len(messages) - messages.count(None)
