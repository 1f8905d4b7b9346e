"""Codes that stand for the entries of a table: lookup, matmul and chunks against the oracle."""
import dataclasses
import re

import numpy as np
import pytest
import torch

from qzo.kernels import codes, dequantize, table
from qzo.kernels.codes import pack_planes, pack_rows
from tests import oracle
from tests.kernels.test_codes import WORDS
from tests.support.close import assert_same_bits
from tests.support.matmuls import TILE, Matmul

pytestmark = pytest.mark.usefixtures("nan_poison")
ODD = tuple(float(v) for v in torch.randn(16, generator=torch.Generator().manual_seed(1)))
TABLES = {"nf4": table.NF4, "fp4": table.FP4, "odd": ODD}


def prmt(a, b, selector):
    """PTX's prmt.b32 in its default mode, on numpy arrays; a selector's top bit would repeat a sign, which nobody asks
    for here."""
    both = [(v >> 8 * i) & 0xFF for v in (a, b) for i in range(4)]
    result = np.zeros_like(selector)
    for i in range(4):
        pick = (selector >> 4 * i) & 0xF
        assert (pick < 8).all()
        result |= np.choose(pick, np.broadcast_arrays(*both, selector)[:8]) << 8 * i
    return result


def run_ptx(source, words):
    """The four registers that a lookup gives for registers of two words each, as int64 arrays."""
    held = {"$4": words, "%lanemask_eq": np.full_like(words, 1 << 5)}

    def value(name):
        return held[name] if name in held else np.full_like(words, int(name, 0))

    for line in re.sub(r"[{}]", "", source).replace("\n", " ").split(";"):
        operation, *operands = line.replace(",", " ").split() or [".reg"]
        if operation == ".reg":
            continue
        to, *read = operands
        a = [value(name) for name in read]
        if operation == "mov.u32":
            held[to] = a[0]
        elif operation == "xor.b32":
            held[to] = a[0] ^ a[1]
        elif operation == "and.b32":
            held[to] = a[0] & a[1]
        elif operation == "shr.u32":
            held[to] = a[0] >> a[1]
        elif operation == "prmt.b32":
            held[to] = prmt(*a)
        else:
            assert (operation, read[-1]) == ("lop3.b32", "0xca")
            held[to] = a[0] & a[1] | ~a[0] & a[2]
    return [held[f"${i}"] for i in range(4)]


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("neighbour", [0x0000, 0xFFFF, 0x5A3C])
def test_inline_ptx_on_every_word(name, dtype, neighbour):
    """Each register holds two words: every word in either half, beside three neighbours."""
    bits = torch.tensor(TABLES[name], dtype=torch.float64).to(dtype).view(torch.int16).numpy().astype(np.int64) & 0xFFFF
    words = WORDS.astype(np.int64)
    text = table.ptx(TABLES[name], dtype)
    for shift, beside in ((0, neighbour << 16), (16, neighbour)):
        for plane, register in enumerate(run_ptx(text, words << shift | beside)):
            half = register >> shift & 0xFFFF
            assert np.array_equal(half, bits[(words >> 4 * plane) & 15])


MATMULS = [Matmul(k=256, group=64, table=table.NF4), Matmul(k=192, group=64, table=table.FP4, law="ih4", bias=True),
           Matmul(k=320, group=64, table=ODD, relative=False, coefs=(0.01, -0.01, 0.003)),
           Matmul(k=96, group=32, table=table.NF4, shared=True), Matmul(k=256, group=128, table=ODD, law=None),
           Matmul(k=200, group=0, table=table.NF4), Matmul(k=256, group=64, table=table.NF4, dtype=torch.float32),
           Matmul(k=256, group=64, table=table.NF4, exact=True, seeds=(5, 5), coefs=(0.1, -0.1), pair=True),
           Matmul(k=192, group=32, table=ODD, exact=True, law="ih4")]


def name(m):
    return f"{m.k}-g{m.group}-{m.law}{'-exact' if m.exact else ''}"


FORMS = {"plain": TILE, "ratio": dataclasses.replace(TILE, ratio=True), "deep": dataclasses.replace(TILE, deep=True),
         "split": dataclasses.replace(TILE, splits=2)}


@pytest.mark.parametrize("matmul", MATMULS, ids=name)
@pytest.mark.parametrize("form", FORMS)
def test_kernel_is_true(matmul, form):
    matmul.assert_true(matmul.kernel(FORMS[form]))


@pytest.mark.parametrize("matmul", MATMULS, ids=name)
@pytest.mark.parametrize("pack", [pack_rows, pack_planes])
def test_cpu_backend_is_true(matmul, pack):
    matmul.assert_true(matmul.reference(pack))


def test_a_pair_has_the_bits_of_single_evaluations():
    matmul = Matmul(k=256, group=64, table=table.NF4, seeds=(5, 5), coefs=(0.1, -0.1), pair=True)
    matmul.__dict__["x"] = matmul.x.round()                     # exact sums: numpy adds a larger tile in another order
    alone = dataclasses.replace(matmul, pair=False)
    alone.__dict__.update({name: getattr(matmul, name) for name in ("x", "codes", "scales")})
    together = matmul.kernel()
    matmul.assert_true(together)
    torch.testing.assert_close(together, alone.kernel(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("matmul", [m for m in MATMULS if m.dtype == torch.float16], ids=name)
def test_a_chunk_has_the_bits_of_its_twin(matmul):
    weight, perturbation = matmul.operands()
    ours, reference = (torch.empty(20, matmul.k, dtype=matmul.dtype) for _ in range(2))
    dequantize.launch(weight, perturbation, ours, e=1, start=7, asm=False, exact=matmul.exact)
    dequantize.dequantize_torch(weight, perturbation, reference, e=1, start=7, exact=matmul.exact)
    assert_same_bits(ours, reference)
    p = oracle.perturbed(matmul.scales, matmul.raw_noise[1], float(perturbation.coefs[1]), matmul.relative)
    want = oracle.weight(matmul.codes, p, None, 4, matmul.entries)[7:27]
    assert bool(((ours.double() - want).abs() <= 2.0**-10 * want.abs() + 6e-8).all())


@pytest.mark.parametrize(("dtype", "left"), [(torch.float16, 2.0**-22), (torch.bfloat16, 2.0**-16)])
@pytest.mark.parametrize("entries", TABLES)
def test_an_exact_table_is_a_sum_of_two(entries, dtype, left):
    entries = TABLES[entries]
    want = torch.tensor(entries, dtype=torch.float64)
    high, low = (torch.tensor(part, dtype=torch.float64) for part in table.parts(entries, dtype, exact=True))
    assert torch.equal(high, want.to(dtype).double())
    assert bool(((high + low - want).abs() <= (left * want.abs()).clamp(min=2.0**-25)).all())
    assert table.parts(entries, torch.float32, exact=True) == table.parts(entries, torch.float32)


def test_entries_of_rows_and_planes_agree():
    some = torch.randint(0, 16, (6, 77), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    want = torch.tensor(ODD, dtype=torch.float64).to(torch.bfloat16).float()[some.long()][1:5]
    for packed in (codes.pack_rows(some), codes.pack_planes(some)):
        assert_same_bits(table.table_entries(packed, 77, 1, 5, ODD, torch.bfloat16).contiguous(), want)


@pytest.mark.parametrize("wrong", [table.NF4[:15], (*table.NF4, 2.0), (*table.NF4[:15], float("nan")),
                                   (*table.NF4[:15], float("inf"))])
def test_a_table_has_sixteen_finite_entries(wrong):
    with pytest.raises(ValueError, match="16 finite entries"):
        table.check_table(wrong)
