"""Codes and their layouts: bijections, and every 16-bit word through each way from a word to floats."""
import inspect
import re

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from qzo.kernels import codes
from tests.close import assert_same_bits

pytestmark = pytest.mark.usefixtures("nan_poison")

WORDS = np.arange(1 << 16, dtype=np.uint32)


def random_codes(n, k):
    return torch.randint(0, 16, (n, k), generator=torch.Generator().manual_seed(n * k)).to(torch.uint8)


def code_minus_8(plane):
    """What plane j of every word has to give."""
    return ((WORDS >> 4 * plane) & 15).astype(np.float64) - 8


# ---------------------------------------------------------------------------------------------------- layouts

@pytest.mark.parametrize("k", [1, 31, 32, 100, 127, 128, 129, 255, 256, 576])
@pytest.mark.parametrize("n", [1, 5])
def test_planes_are_a_bijection(n, k):
    want = random_codes(n, k)
    planes = codes.pack_planes(want)
    assert (planes.shape, planes.dtype) == ((-(-k // 128), n, 32), torch.int16)
    assert torch.equal(codes.unpack_planes(planes, k), want)
    padding = codes.unpack_planes(planes, len(planes) * 128)[:, k:]
    assert torch.equal(padding, torch.full_like(padding, 8))


def test_a_word_holds_four_codes_32_apart():
    want = random_codes(3, 256)
    planes = codes.pack_planes(want)
    word = int(planes[1, 2, 17]) % 2**16
    assert [word >> shift & 15 for shift in (0, 4, 8, 12)] == want[2, 128 + 17::32].tolist()


@pytest.mark.parametrize("k", [1, 2, 31, 100, 129, 576])
def test_rows_are_a_bijection(k):
    want = random_codes(7, k)
    rows = codes.pack_rows(want)
    assert rows.shape == (7, (k + 1) // 2 + 4)
    assert torch.equal(codes.unpack_rows(rows, k), want)
    assert torch.equal(rows[:, -4:].contiguous().view(torch.float16), torch.tensor([[1.0, -8.0]] * 7).half())


def test_rows_keep_the_low_nibble_first():
    rows = codes.pack_rows(torch.tensor([[3, 12, 5]], dtype=torch.uint8))
    assert rows[0, :2].tolist() == [3 + 16 * 12, 5 + 16 * 8]


@pytest.mark.parametrize("k", [1, 31, 100, 129, 256])
@pytest.mark.parametrize("pack", [codes.pack_rows, codes.pack_planes])
@pytest.mark.parametrize(("start", "stop"), [(0, 6), (2, 3), (1, 5)])
def test_centred_codes(pack, k, start, stop):
    want = random_codes(6, k)
    got = codes.centred_codes(pack(want), k, start, stop)
    assert_same_bits(got.contiguous(), want[start:stop].float() - 8)


def test_torchs_unpacker_and_the_fallback_agree(monkeypatch):
    """On every pair of codes; the fallback is what runs where torch was built without the unpacker."""
    unpacker = codes._row_unpacker()
    assert unpacker is torch.ops.quantized.embedding_bag_4bit_unpack, "this torch lacks the fast unpacker"
    pairs = torch.cartesian_prod(torch.arange(16), torch.arange(16)).to(torch.uint8).view(16, 32)
    fast = codes.centred_codes(codes.pack_rows(pairs), 32, 0, 16)
    monkeypatch.setattr(codes, "_row_unpacker", lambda: None)
    assert_same_bits(fast, codes.centred_codes(codes.pack_rows(pairs), 32, 0, 16))
    assert_same_bits(fast, pairs.float() - 8)


def test_a_faulty_unpacker_is_not_used(monkeypatch):
    codes._row_unpacker.cache_clear()
    monkeypatch.setattr(torch.ops.quantized, "embedding_bag_4bit_unpack", lambda rows: torch.zeros(16, 32))
    assert codes._row_unpacker() is None
    codes._row_unpacker.cache_clear()


# --------------------------------------------------------------------------------------------- the plain twin

@triton.jit
def _unpack_kernel(words_ptr, out_ptr, DT: tl.constexpr, COUNT: tl.constexpr):
    """Every word through codes.unpack4's plain branch; out [4, COUNT / 32, 32]."""
    at = tl.arange(0, COUNT // 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    w0, w1, w2, w3 = codes.unpack4(tl.load(words_ptr + at), DT, False)
    tl.store(out_ptr + at, w0.to(tl.float32))
    tl.store(out_ptr + COUNT + at, w1.to(tl.float32))
    tl.store(out_ptr + 2 * COUNT + at, w2.to(tl.float32))
    tl.store(out_ptr + 3 * COUNT + at, w3.to(tl.float32))


@pytest.mark.parametrize("dtype", [tl.float16, tl.float32])
def test_plain_twin_on_every_word(dtype):
    words = torch.from_numpy(WORDS.astype(np.uint16).view(np.int16))
    out = torch.empty(4, len(words))
    _unpack_kernel[(1,)](words, out, dtype, len(words))
    for plane in range(4):
        assert np.array_equal(out[plane].double().numpy(), code_minus_8(plane))


def plain_source():
    return inspect.getsource(codes._plain.fn)


def test_plain_twin_in_bf16_on_every_code():
    """The interpreter's bfloat16 is broken, so torch, which rounds right, runs the formula's constants."""
    base = int(re.search(r"bfloat16:\s+u = \(c \| (0x\w+)\)", plain_source())[1], 16)
    offset = float(re.search(r"return u - tl.full\(\(1, 1\), ([\d.]+), DT\)", plain_source())[1])
    c = torch.arange(16, dtype=torch.int16)
    assert torch.equal((c | base).view(torch.bfloat16) - torch.tensor(offset, dtype=torch.bfloat16), c - 8.0)


# --------------------------------------------------------------------------------------------- the inline PTX

def half_float(bits):
    return bits.astype(np.uint16).view(np.float16).astype(np.float64)


def brain_float(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


FLOATS = {"f16x2": half_float, "bf16x2": brain_float}


def run_ptx(source, words):
    """Run a block of inline PTX on numpy: integer steps bit for bit, float steps in float64.

    Returns for $0..$3 the pair (low half, high half) of float64 arrays. An exact result that the type can
    hold is what the hardware's rounding gives too, so float64 loses nothing on small integers.
    """
    registers = {"$4": words.astype(np.uint64)}
    for line in re.sub(r"[{}]", "", source).split(";"):
        statement = line.split(None, 1)
        if not statement or statement[0] == ".reg":
            continue
        to, *names = (name.strip() for name in statement[1].split(","))
        values = [registers[n] if n in registers else np.uint64(int(n, 0)) for n in names]
        registers[to] = execute(statement[0], values)
    return [registers[f"${i}"] for i in range(4)]


def execute(operation, values):
    name, *_, kind = operation.split(".")
    if name == "shr":
        return values[0] >> values[1]
    if name == "mov":
        return values[0]
    if name == "lop3":
        return lop3(*values)
    halves = [[FLOATS[kind](v >> np.uint64(shift) & np.uint64(0xFFFF)) for v in map(np.atleast_1d, values)]
              for shift in (0, 16)]
    return [a * b[0] + b[1] if name == "fma" else {"sub": a - b[0]}[name] for a, *b in halves]


def lop3(a, b, c, table):
    """The truth table's bit 4a + 2b + c for each bit of the three operands."""
    result = np.zeros_like(a)
    for entry in range(8):
        if int(table) >> entry & 1:
            terms = [v if entry & bit else ~v for v, bit in ((a, 4), (b, 2), (c, 1))]
            result |= terms[0] & terms[1] & terms[2]
    return result & np.uint64(0xFFFFFFFF)


def ptx(function):
    """The text of a kernel function's one inline block."""
    source = inspect.getsource(function.fn)
    return re.search(r'"""(\{.*?\})"""', source, re.DOTALL)[1]


@pytest.mark.parametrize("function", [codes._asm_bf16, codes._asm_fp16])
@pytest.mark.parametrize("neighbour", [0x0000, 0xFFFF, 0x5A3C])
def test_inline_ptx_on_every_word(function, neighbour):
    """Each register holds two words: every word in either half, beside three neighbours."""
    low = run_ptx(ptx(function), WORDS | neighbour << 16)
    high = run_ptx(ptx(function), WORDS << 16 | neighbour)
    for plane in range(4):
        assert np.array_equal(low[plane][0], code_minus_8(plane))
        assert np.array_equal(high[plane][1], code_minus_8(plane))


@pytest.mark.parametrize("function", [codes._asm_bf16, codes._asm_fp16])
def test_a_changed_constant_of_the_ptx_is_seen(function):
    """The test above is only worth something if the emulation reads each constant of the text."""
    block = ptx(function)
    constants = sorted(set(re.findall(r"0x[0-9a-f]+", block)))
    assert len(constants) >= 5
    for constant in constants:
        changed = block.replace(constant, f"{int(constant, 16) ^ 0x10:#x}")
        with np.errstate(invalid="ignore"):
            planes = run_ptx(changed, WORDS)
        assert not all(np.array_equal(planes[j][0], code_minus_8(j)) for j in range(4)), constant
