"""Codes that stand for vectors of eight weights: words, loads, matmul and chunks against the oracle."""
import dataclasses
import re

import numpy as np
import pytest
import torch

from qzo.kernels import dequantize, plan, qmm, tiles, vectors
from tests import oracle
from tests.support.close import assert_same_bits
from tests.support.matmuls import TILE, Matmul

pytestmark = pytest.mark.usefixtures("nan_poison")
SHAPES = [(1, 16), (1, 12), (2, 8), (3, 8), (2, 10), (4, 5), (1, 8)]      # codebooks, bits


@pytest.mark.parametrize(("books", "bits"), SHAPES)
@pytest.mark.parametrize("k", [8, 128, 200, 512])
def test_words_come_back(books, bits, k):
    codes = torch.randint(0, 1 << bits, (5, k // 8, books), generator=torch.Generator().manual_seed(k))
    words = vectors.pack_vectors(codes, bits)
    assert words.dtype == torch.int16
    assert list(words.shape) == vectors.vector_shape(5, k, books, bits)
    assert torch.equal(vectors.unpack_vectors(words, k, books, bits), codes.to(torch.int32))


def test_where_a_word_lies():
    codes = torch.zeros(3, 40, 3, dtype=torch.int64)
    codes[2, 37] = torch.tensor([1, 2, 3])                # vector 5 of tile 2
    words = vectors.pack_vectors(codes, 8)
    assert words[2, 2, 5] == 1 | 2 << 8
    assert words[2, 2, 16 + 5] == 3
    assert int((words != 0).sum()) == 2


@pytest.mark.parametrize(("books", "bits", "damaged"), [(1, 12, 1 << 12), (3, 8, 1 << 8), (2, 7, -1 << 15),
                                                       (2, 7, 1 << 7), (3, 7, 1 << 7), (2, 10, -1)])
def test_a_code_beyond_the_codebook_is_found(books, bits, damaged):
    words = vectors.pack_vectors(torch.randint(0, 1 << bits, (3, 32, books)), bits)
    assert vectors.in_range(words, books, bits)
    words[1, 2, -1] = damaged
    assert not vectors.in_range(words, books, bits)


def run_ptx(source, words, memory):
    """The eight registers that the loads give for registers of two words each; memory: the codebooks' 16-bit halves."""
    held = {"$8": words.astype(np.int64)}

    def value(name):
        return held[name] if name in held else np.full(len(words), int(name, 0), np.int64)

    for line in re.sub(r"^{|}$", "", source.strip()).replace("\n", " ").split(";"):
        operation, _, rest = line.strip().partition(" ")
        operands = [o.strip() for o in re.split(r",(?![^{]*})", rest)]
        if operation in ("", ".reg"):
            continue
        if operation == "ld.global.nc.v4.b32":
            address, _, offset = operands[1].strip("[]").partition("+")
            at = (held[address.strip()] + int(offset or 0)) // 2
            assert (held[address.strip()] % 16 == 0).all()
            for i, to in enumerate(operands[0].strip("{}").split(",")):
                held[to.strip()] = memory[at + 2 * i] | memory[at + 2 * i + 1] << 16
            continue
        if operation == "ld.param.u64":
            assert operands[1] == "[the_parameter]"
            held[operands[0]] = np.zeros(len(words), np.int64)
            continue
        to, a = operands[0], [value(name) for name in operands[1:]]
        if operation == "mov.b32":
            held[to] = a[0]
        elif operation == "and.b32":
            held[to] = a[0] & a[1]
        elif operation == "shr.u32":
            held[to] = a[0] >> a[1]
        elif operation == "bfe.u32":
            held[to] = a[0] >> a[1] & (1 << a[2]) - 1
        elif operation == "add.u64":
            held[to] = a[0] + a[1]
        elif operation == "mad.wide.u32":
            held[to] = a[0] * a[1] + a[2]
        elif operation == "add.rn.f16x2":
            held[to] = add_halves(a[0], a[1], torch.float16)
        else:
            assert operation == "fma.rn.bf16x2"
            assert (a[1] == 0x3F803F80).all()
            held[to] = add_halves(a[0], a[2], torch.bfloat16)
    return [held[f"${i}"] for i in range(8)]


def value_of(register, dtype):
    return torch.from_numpy(register.astype(np.uint32)).view(dtype).float()


def add_halves(a, b, dtype):
    total = (value_of(a, dtype) + value_of(b, dtype)).to(dtype)
    return total.view(torch.int32).numpy().astype(np.int64) & 0xFFFFFFFF


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("books", "bits"), [(1, 16), (3, 12), (5, 8), (2, 8), (1, 8), (8, 7)])
def test_inline_ptx(books, bits, dtype):
    """Every word of a vector, in either half of a register, gives the sums of its codebooks in the order of planes."""
    random = torch.Generator().manual_seed(bits)
    codebooks = torch.randn(books, 1 << bits, 8, generator=random).to(dtype)
    memory = codebooks.view(torch.int16).flatten().numpy().astype(np.int64) & 0xFFFF
    low, high = (torch.randint(0, 1 << bits, (70_000, 1, books), generator=random) for _ in range(2))
    low[:1 << bits, 0, 0] = torch.arange(1 << bits)
    high[:1 << bits, 0, -1] = torch.arange(1 << bits)
    packed = [vectors.pack_vectors(c, bits)[0, :, ::16].to(torch.int64) & 0xFFFF for c in (low, high)]
    texts = vectors.vector_texts(books, bits, dtype, "the_parameter")
    ones = torch.ones(1, len(low), dtype=torch.float64)
    assert len(texts) == vectors.words_of(books, bits)
    for w, text in enumerate(texts):
        found = run_ptx(text, (packed[0][:, w] | packed[1][:, w] << 16).numpy(), memory)
        mine = slice(2 * w, 2 * w + 2) if bits <= 8 else slice(w, w + 1)
        for codes, registers in ((low, found[:4]), (high, found[4:])):
            want = oracle.vector_weight(codes[:, :, mine], ones, codebooks[mine], bits).float()
            got = torch.stack([value_of(r, dtype).view(-1, 2) for r in registers], 1).flatten(1)
            assert torch.equal(got, want)


@pytest.mark.parametrize("rows", [1, 8, 16])
def test_one_program_reads_the_codes_of_a_pair(monkeypatch, rows):
    """Of few rows: what bench/codegen/sass.py sees read once by a program is read by one program for each part of K."""
    grids, matmul = [], Matmul(k=512, group=0, books=2, bits=8, rows=rows, seeds=(5, 5), coefs=(0.1, -0.1), pair=True)

    class Recorder:
        fn, arg_names = qmm._qmm_kernel.fn, qmm._qmm_kernel.arg_names

        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *a, **k: None
    monkeypatch.setattr(plan, "_qmm_kernel", Recorder())
    for arch in tiles.PROCESSORS:
        matmul.kernel(tiles.pick(tiles.Problem.of(rows, matmul.operands()[0], torch.float16, arch)))
    assert len(grids) == len(tiles.PROCESSORS)
    assert {row_blocks for _, row_blocks, _ in grids} == {1}


MATMULS = [Matmul(k=256, group=0, books=2, bits=8), Matmul(k=128, group=0, books=1, bits=12, law="ih4", bias=True),
           Matmul(k=328, group=0, books=3, bits=8, relative=False, coefs=(0.001, -0.001, 0.0003)),
           Matmul(k=200, group=0, books=1, bits=16, shared=True), Matmul(k=256, group=0, books=2, bits=9, law=None),
           Matmul(k=64, group=0, books=4, bits=6), Matmul(k=256, group=0, books=5, bits=8),
           Matmul(k=64, group=0, books=3, bits=9),
           Matmul(k=128, group=0, books=2, bits=8, dtype=torch.float32)]
FORMS = {"plain": TILE, "deep": dataclasses.replace(TILE, deep=True), "split": dataclasses.replace(TILE, splits=2)}


def name(m):
    return f"{m.books}x{m.bits}-{m.k}-{m.law}"


@pytest.mark.parametrize("matmul", MATMULS, ids=name)
@pytest.mark.parametrize("form", FORMS)
def test_kernel_is_true(matmul, form):
    matmul.assert_true(matmul.kernel(FORMS[form]))


@pytest.mark.parametrize("matmul", MATMULS, ids=name)
def test_cpu_backend_is_true(matmul):
    matmul.assert_true(matmul.reference())


@pytest.mark.parametrize("matmul", [m for m in MATMULS if m.dtype == torch.float16], ids=name)
def test_a_chunk_has_the_bits_of_its_twin(matmul):
    weight, perturbation = matmul.operands()
    ours, reference = (torch.empty(20, matmul.k, dtype=matmul.dtype) for _ in range(2))
    for e in (0, 1):
        dequantize.launch(weight, perturbation, ours, e=e, start=7, asm=False)
        dequantize.dequantize_torch(weight, perturbation, reference, e=e, start=7)
        assert_same_bits(ours, reference)
        p = oracle.perturbed(matmul.scales, matmul.raw_noise[e], float(perturbation.coefs[e]), matmul.relative)
        want = matmul.weight(p)[7:27]
        assert bool(((ours.double() - want).abs() <= 2.0**-10 * want.abs() + 6e-8).all())


def test_chunks_through_a_library():
    matmul = dataclasses.replace(MATMULS[0], rows=5)
    largest = float(matmul.magnitude().max())
    torch.testing.assert_close(matmul.chunked().double(), matmul.want(), rtol=0, atol=2e-3 * largest)


@pytest.mark.parametrize("matmul", [MATMULS[0], MATMULS[3]], ids=name)
def test_a_pair_has_the_bits_of_single_evaluations(matmul):
    matmul = dataclasses.replace(matmul, seeds=(5, 5), coefs=(0.1, -0.1), pair=True)
    alone = dataclasses.replace(matmul, pair=False)
    alone.__dict__.update({name: getattr(matmul, name) for name in ("x", "codes", "scales", "codebooks")})
    together = matmul.kernel()
    matmul.assert_true(together)
    torch.testing.assert_close(together, alone.kernel(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("books", "bits", "k"), [(2, 8, 256), (5, 5, 200), (1, 12, 64)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_coefficient_zero_has_the_bits_of_the_plain_forward(books, bits, k, dtype):
    matmul = Matmul(k=k, group=0, books=books, bits=bits, dtype=dtype, coefs=(0.1, 0.0, 0.0))
    plain = dataclasses.replace(matmul, law=None)
    plain.__dict__.update({name: getattr(matmul, name) for name in ("x", "codes", "scales", "codebooks")})
    for run in (Matmul.kernel, Matmul.reference):
        assert_same_bits(run(matmul)[matmul.rows:], run(plain)[matmul.rows:])
