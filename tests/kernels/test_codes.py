"""Codes and their layouts: bijections, and every 16-bit word through each way from a word to floats."""
import inspect
import re

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from qzo.kernels import codes
from tests.support.close import assert_same_bits

pytestmark = pytest.mark.usefixtures("nan_poison")

WORDS = np.arange(1 << 16, dtype=np.uint32)


BITS = (2, 4, 8)


def random_codes(n, k, bits=4):
    return torch.randint(0, 1 << bits, (n, k), generator=torch.Generator().manual_seed(n * k)).to(torch.uint8)


def fields(bits):
    """The first bit of each code of a word, in the order of k: one after another, or byte by byte in turn."""
    return {2: (0, 8, 2, 10, 4, 12, 6, 14), 4: (0, 4, 8, 12), 8: (0, 8)}[bits]


def centred(bits, field):
    """What the code at bit `field` of every word has to give."""
    return ((WORDS >> field) & (1 << bits) - 1).astype(np.float64) - 2 ** (bits - 1)


# ---------------------------------------------------------------------------------------------------- layouts

@pytest.mark.parametrize("k", [1, 31, 32, 100, 127, 128, 129, 255, 256, 576])
@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("bits", BITS)
def test_planes_are_a_bijection(n, k, bits):
    want = random_codes(n, k, bits)
    planes = codes.pack_planes(want, bits)
    assert (planes.shape, planes.dtype) == ((-(-k // 128), n, 8 * bits), torch.int16)
    assert list(planes.shape) == codes.plane_shape(n, k, bits)
    assert torch.equal(codes.unpack_planes(planes, k, bits), want)
    padding = codes.unpack_planes(planes, len(planes) * 128, bits)[:, k:]
    assert torch.equal(padding, torch.full_like(padding, 2 ** (bits - 1)))


def test_a_word_holds_four_codes_32_apart():
    want = random_codes(3, 256)
    planes = codes.pack_planes(want)
    word = int(planes[1, 2, 17]) % 2**16
    assert [word >> shift & 15 for shift in (0, 4, 8, 12)] == want[2, 128 + 17::32].tolist()


@pytest.mark.parametrize(("bits", "word", "at"), [
    (8, 17, (17, 32 + 17)), (8, 32 + 17, (64 + 17, 96 + 17)),
    (2, 5, tuple(32 * j + 16 * byte + 5 for j in range(4) for byte in range(2)))])
def test_where_the_codes_of_a_word_lie(bits, word, at):
    want = random_codes(3, 256, bits)
    found = int(codes.pack_planes(want, bits)[1, 2, word]) % 2**16
    assert [found >> field & (1 << bits) - 1 for field in fields(bits)] == [int(want[2, 128 + k]) for k in at]


@pytest.mark.parametrize("k", [1, 2, 31, 100, 129, 576])
@pytest.mark.parametrize(("bits", "tail"), [(2, torch.float16), (4, torch.float16), (8, torch.float32)])
def test_rows_are_a_bijection(k, bits, tail):
    want = random_codes(7, k, bits)
    rows = codes.pack_rows(want, bits)
    assert rows.shape == (7, -(-k * bits // 8) + 2 * tail.itemsize)
    assert list(rows.shape) == codes.row_shape(7, k, bits)
    assert torch.equal(codes.unpack_rows(rows, k, bits), want)
    assert torch.equal(rows[:, -2 * tail.itemsize:].contiguous().view(tail),
                       torch.tensor([[1.0, -(2.0 ** (bits - 1))]] * 7).to(tail))


def test_rows_keep_the_low_nibble_first():
    rows = codes.pack_rows(torch.tensor([[3, 12, 5]], dtype=torch.uint8))
    assert rows[0, :2].tolist() == [3 + 16 * 12, 5 + 16 * 8]


@pytest.mark.parametrize("k", [1, 31, 100, 129, 256])
@pytest.mark.parametrize("pack", [codes.pack_rows, codes.pack_planes])
@pytest.mark.parametrize(("start", "stop"), [(0, 6), (2, 3), (1, 5)])
@pytest.mark.parametrize("bits", BITS)
def test_centred_codes(pack, k, start, stop, bits):
    want = random_codes(6, k, bits)
    got = codes.centred_codes(pack(want, bits), k, start, stop, bits)
    assert_same_bits(got.contiguous(), want[start:stop].float() - 2 ** (bits - 1))


UNPACKERS = {2: "embedding_bag_2bit_unpack", 4: "embedding_bag_4bit_unpack", 8: "embedding_bag_byte_unpack"}


@pytest.mark.parametrize("bits", BITS)
def test_torchs_unpacker_and_the_fallback_agree(monkeypatch, bits):
    """On every pair of codes; the fallback is what runs where torch was built without the unpacker."""
    unpacker = codes._row_unpacker(bits)
    assert unpacker is getattr(torch.ops.quantized, UNPACKERS[bits]), "this torch lacks the fast unpacker"
    every = torch.arange(1 << bits)
    pairs = torch.cartesian_prod(every, every).to(torch.uint8).view(1 << bits, -1)
    k = pairs.shape[1]
    fast = codes.centred_codes(codes.pack_rows(pairs, bits), k, 0, len(pairs), bits)
    monkeypatch.setattr(codes, "_row_unpacker", lambda bits: None)
    assert_same_bits(fast, codes.centred_codes(codes.pack_rows(pairs, bits), k, 0, len(pairs), bits))
    assert_same_bits(fast, pairs.float() - 2 ** (bits - 1))


@pytest.mark.parametrize("bits", BITS)
def test_a_faulty_unpacker_is_not_used(monkeypatch, bits):
    codes._row_unpacker.cache_clear()
    monkeypatch.setattr(torch.ops.quantized, UNPACKERS[bits], lambda rows: torch.zeros(16, 128 // bits))
    assert codes._row_unpacker(bits) is None
    codes._row_unpacker.cache_clear()


# --------------------------------------------------------------------------------------------- the plain reference

@triton.jit
def _unpack_kernel(words_ptr, out_ptr, BITS: tl.constexpr, DT: tl.constexpr, COUNT: tl.constexpr):
    """Every word through the plain branch of codes.unpack2, 4 or 8; out [codes of a word, COUNT / 32, 32]."""
    at = tl.arange(0, COUNT // 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    q = tl.load(words_ptr + at)
    if BITS == 2:
        parts = codes.unpack2(q, DT, False)
    elif BITS == 4:
        parts = codes.unpack4(q, DT, False)
    else:
        parts = codes.unpack8(q, DT, False)
    for i in tl.static_range(16 // BITS):
        tl.store(out_ptr + i * COUNT + at, parts[i].to(tl.float32))


@pytest.mark.parametrize("dtype", [tl.float16, tl.float32])
@pytest.mark.parametrize("bits", BITS)
def test_plain_twin_on_every_word(dtype, bits):
    words = torch.from_numpy(WORDS.astype(np.uint16).view(np.int16))
    out = torch.empty(16 // bits, len(words))
    _unpack_kernel[(1,)](words, out, bits, dtype, len(words))
    for part, field in zip(out, fields(bits), strict=True):
        assert np.array_equal(part.double().numpy(), centred(bits, field))


@triton.jit
def _tile_kernel(codes_ptr, out_ptr, t, N, BITS: tl.constexpr, DT: tl.constexpr):
    """out [16, 128] = tile t of output rows 0..15."""
    n = tl.arange(0, 16)
    planes = codes.load_tile(codes.word_pointers(codes_ptr, t + tl.program_id(0), N, n, 8 * BITS,
                                                        16 if BITS == 2 else 32), 16, BITS, DT, False)
    for j in tl.static_range(4):
        tl.store(out_ptr + n[:, None] * 128 + 32 * j + tl.arange(0, 32)[None, :], planes[j].to(tl.float32))


@pytest.mark.parametrize("bits", BITS)
def test_a_tile_comes_in_the_order_of_k(bits):
    want, out = random_codes(20, 384, bits), torch.empty(16, 128)
    _tile_kernel[(1,)](codes.pack_planes(want, bits), out, 2, 20, bits, tl.float16)
    assert torch.equal(out, want[:16, 256:].float() - 2 ** (bits - 1))


@pytest.mark.parametrize("bits", [2, 4])
def test_plain_twin_in_bf16_on_every_code(bits):
    """The interpreter's bfloat16 is broken, so torch, which rounds right, runs the formula's constants."""
    source = inspect.getsource(codes._plain.fn)
    base = int(re.search(r"bfloat16:\s+u = \(c \| (0x\w+)\)", source)[1], 16)
    offset = float(re.search(r"return u - tl.full\(\(1, 1\), ([\d.]+) \+ \(1 << BITS - 1\), DT\)", source)[1])
    c = torch.arange(1 << bits, dtype=torch.int16)
    middle = 2 ** (bits - 1)
    total = torch.tensor(offset + middle, dtype=torch.bfloat16)
    assert torch.equal((c | base).view(torch.bfloat16) - total, c - middle)


# --------------------------------------------------------------------------------------------- the inline PTX

def half_float(bits):
    return bits.astype(np.uint16).view(np.float16).astype(np.float64)


def brain_float(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


FLOATS = {"f16x2": half_float, "bf16x2": brain_float}


def run_ptx(source, words):
    """Run a block of inline PTX on numpy: integer steps bit for bit, float steps in float64.

    Returns for each result the pair (low half, high half) of float64 arrays; the words are the operand after the
    last of them. An exact result that the type can hold is what the hardware's rounding gives too, so float64
    loses nothing on small integers.
    """
    count = max(int(n) for n in re.findall(r"\$(\d)", source))
    registers = {f"${count}": words.astype(np.uint64)}
    for line in re.sub(r"[{}]", "", source).split(";"):
        statement = line.split(None, 1)
        if not statement or statement[0] == ".reg":
            continue
        to, *names = (name.strip() for name in statement[1].split(","))
        values = [registers[n] if n in registers else np.uint64(int(n, 0)) for n in names]
        registers[to] = execute(statement[0], values)
    return [registers[f"${i}"] for i in range(count)]


def execute(operation, values):
    name, *_, kind = operation.split(".")
    if name == "shr":
        return values[0] >> values[1]
    if name == "mov":
        return values[0]
    if name == "lop3":
        return lop3(*values)
    halves = [[as_float(FLOATS[kind], v, shift) for v in values] for shift in (0, 16)]
    return [a * b[0] + b[1] if name == "fma" else {"sub": a - b[0]}[name] for a, *b in halves]


def as_float(decode, value, shift):
    """One half of a register; what a float step has written is a pair of halves already."""
    if isinstance(value, list):
        return value[shift // 16]
    return decode(np.atleast_1d(value) >> np.uint64(shift) & np.uint64(0xFFFF))


def lop3(a, b, c, truth):
    """The truth table's bit 4a + 2b + c for each bit of the three operands."""
    result = np.zeros_like(a)
    for entry in range(8):
        if int(truth) >> entry & 1:
            terms = [v if entry & bit else ~v for v, bit in ((a, 4), (b, 2), (c, 1))]
            result |= terms[0] & terms[1] & terms[2]
    return result & np.uint64(0xFFFFFFFF)


def ptx(function):
    """The text of a kernel function's one inline block."""
    source = inspect.getsource(function.fn)
    return re.search(r'"""(\{.*?\})"""', source, re.DOTALL)[1]


BLOCKS = [(2, codes._asm2_bf16), (2, codes._asm2_fp16), (4, codes._asm4_bf16), (4, codes._asm4_fp16),
          (8, codes._asm8_bf16), (8, codes._asm8_fp16)]


@pytest.mark.parametrize(("bits", "function"), BLOCKS)
@pytest.mark.parametrize("neighbour", [0x0000, 0xFFFF, 0x5A3C])
def test_inline_ptx_on_every_word(bits, function, neighbour):
    """Each register holds two words: every word in either half, beside three neighbours."""
    low = run_ptx(ptx(function), WORDS | neighbour << 16)
    high = run_ptx(ptx(function), WORDS << 16 | neighbour)
    for i, field in enumerate(fields(bits)):
        assert np.array_equal(low[i][0], centred(bits, field))
        assert np.array_equal(high[i][1], centred(bits, field))


@pytest.mark.parametrize(("bits", "function"), BLOCKS)
def test_a_changed_constant_of_the_ptx_is_seen(bits, function):
    """The test above is only worth something if the emulation reads each constant of the text."""
    block = ptx(function)
    constants = sorted(set(re.findall(r"0x[0-9a-f]{8}", block)))
    assert len(constants) >= 3
    for constant in constants:
        changed = block.replace(constant, f"{int(constant, 16) ^ 0x10:#x}")
        with np.errstate(invalid="ignore"):
            parts = run_ptx(changed, WORDS)
        same = [np.array_equal(parts[i][0], centred(bits, field)) for i, field in enumerate(fields(bits))]
        assert not all(same), constant
