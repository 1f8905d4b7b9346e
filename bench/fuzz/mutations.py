"""Faults for files whose structure is known: in bytes, in trees of JSON, in tensors, in what a header counts.

Each takes a `random.Random` and gives a new value; what it was given stays as it is. hypothesis has such an object too
(`strategies.randoms`), so that tests and the nightly script have the same cases.
"""

import copy
import json
import struct
import zlib
from typing import Any

import torch

NUMBERS = [0, 1, -1, 2, 3, 7, 8, 255, 2**15, 2**31 - 1, 2**31, 2**32, 2**60, 2**63 - 1, 2**63, 2**64 - 1]
FLOATS = [float("nan"), float("inf"), -float("inf"), 1e308, -0.0, 0.5]
TEXTS = [
    "",
    "x",
    "..",
    "../../x",
    "/etc/passwd",
    "a\nb",
    "\0",
    "\ud800",
    "re:(",
    "re:a{9999999999}",
    "Linear",
    "é" * 300,
]
DTYPES = [torch.float16, torch.float32, torch.int32, torch.int64, torch.uint8, torch.bool]


def value(random):
    """Something that JSON can hold, of any type, and little of it what a reader expects."""
    kind = random.randrange(8)
    if kind == 0:
        return random.choice([None, True, False])
    if kind <= 2:
        return random.choice(NUMBERS)
    if kind == 3:
        return random.choice(FLOATS)
    if kind <= 5:
        return random.choice(TEXTS)
    if kind == 6:
        return random.choice([[], {}, [[]], [None], {"": None}, [1, 2], ["x", "x"], [{}], {"a": {"b": 1}}])
    return deep(random.choice([5, 90, 400, 990]), random.random() < 0.5)


def deep(levels, lists):
    """Lists in lists, or objects in objects."""
    found: Any = None
    for _ in range(levels):
        found = [found] if lists else {"a": found}
    return found


def tree(content, random, faults=3):
    """JSON content with one to so many values replaced, removed, moved to another key or written twice."""
    content = copy.deepcopy(content)
    for _ in range(random.randrange(1, faults + 1)):
        content = _one_fault(content, random)
    return content


def _one_fault(content, random):
    here = content
    if not isinstance(here, dict | list) or not here or random.random() < 0.03:
        return value(random)
    while True:
        key = random.choice(list(here)) if isinstance(here, dict) else random.randrange(len(here))
        inner = here[key]
        if isinstance(inner, dict | list) and inner and random.random() < 0.8:
            here = inner
            continue
        kind = random.randrange(10)
        if kind <= 1:
            del here[key]
        elif kind == 2 and isinstance(here, dict):
            here[random.choice([*TEXTS, key + "x", *here])] = here.pop(key)
        elif kind == 3:
            other = random.choice(list(here)) if isinstance(here, dict) else random.randrange(len(here))
            here[key], here[other] = here[other], here[key]
        elif kind == 4 and isinstance(here, list):
            here.extend(here * random.choice([1, 30]))
        elif type(inner) is int and kind <= 7:
            here[key] = inner + random.choice([-1, 1, 7, -inner, inner])
        else:
            here[key] = value(random)
        return content


def text(content, random):
    """JSON text of a tree with faults; now and then itself damaged."""
    try:
        written = json.dumps(tree(content, random)).encode()
    except RecursionError:
        written = b"[" * 5000 + b"]" * 5000
    return data(written, random) if random.random() < 0.2 else written


def data(whole, random, head=None):
    """Bytes with one to four faults, most of them in the first `head`, where sizes stand (None: anywhere)."""
    found = bytearray(whole)
    for _ in range(random.choice([1, 1, 2, 4])):
        if not found:
            break
        at = random.randrange(min(head or len(found), len(found)) if random.random() < 0.9 else len(found))
        kind = random.randrange(7)
        if kind == 0:
            found[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            found[at] = random.randrange(256)
        elif kind == 2:
            found[at : at + 8] = struct.pack("<Q", random.choice(NUMBERS) % 2**64)
        elif kind == 3:
            found[at : at + 4] = struct.pack("<I", random.choice(NUMBERS) % 2**32)
        elif kind == 4:
            del found[at : at + random.choice([1, 8, 100])]
        elif kind == 5:
            found[at:at] = bytes(random.randrange(256) for _ in range(random.choice([1, 8, 40])))
        else:
            del found[at : at + (1 if random.random() < 0.7 else len(found))]
    return bytes(found)


def tensor(original, random):
    """A tensor of another dtype, shape or content."""
    kind = random.randrange(7)
    if kind == 0:
        return original.to(random.choice(DTYPES))
    if kind == 1:
        return original.flatten()[: random.choice([0, 1, 2, 7])]
    if kind == 2:
        return original[: len(original) // 2].clone() if original.dim() else original
    if kind == 3:
        return original.unsqueeze(random.randrange(original.dim() + 1))
    if kind == 4:
        return original.T.contiguous() if original.dim() == 2 else torch.stack([original, original])
    found = original.clone().flatten()
    at = random.randrange(len(found)) if len(found) else 0
    if found.dtype == torch.bool:
        found[at : at + 1] ^= True
    elif found.is_floating_point():
        found[at : at + 1] = random.choice([float("nan"), float("inf"), -float("inf"), 0.0, -1.0])
    else:
        limits = torch.iinfo(found.dtype)
        numbers = [limits.min, limits.max, 0, -1 if limits.min else 1, 10**4 % (limits.max + 1)]
        found[at : at + 1] = random.choice(numbers)
    return found.view(original.shape)


def tensors(named, random, faults=2):
    """{name: tensor} with one to so many of them spoiled, renamed or gone."""
    found = dict(named)
    for _ in range(random.randrange(1, faults + 1)):
        if not found:
            break
        name = random.choice(list(found))
        kind = random.randrange(6)
        if kind == 0:
            del found[name]
        elif kind == 1:
            found[name + random.choice(["_g_idx", "_zero_point", ".x"])] = found.pop(name)
        else:
            found[name] = tensor(found[name], random)
    return found


def checked(body):
    """Bytes and their CRC-32, as journals and PNG's chunks have it."""
    return body + struct.pack("<I", zlib.crc32(body))
