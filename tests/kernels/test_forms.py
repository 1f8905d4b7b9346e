"""What codes stand for: shapes, decoded numbers, and what the kernels are told of it."""
import re

import pytest
import torch

from qzo.kernels import dequantize, forms, qmm
from qzo.kernels.codes import pack_planes, pack_rows
from qzo.kernels.table import NF4
from tests.support.close import assert_same_bits
from tests.support.matmuls import Matmul

KINDS = {"2 bits": Matmul(k=200, group=0, bits=2), "4 bits": Matmul(k=200, group=0), "8 bits": Matmul(k=96, bits=8),
         "table": Matmul(k=200, group=0, table=NF4), "vectors": Matmul(k=200, group=0, books=3, bits=8),
         "long vectors": Matmul(k=64, group=0, books=2, bits=12)}


def form_of(matmul):
    return forms.form_of(matmul.bits, matmul.table, matmul.codebooks)


@pytest.mark.parametrize(("kind", "cls"), [("8 bits", forms.Integers), ("table", forms.Table),
                                          ("vectors", forms.Vectors)])
def test_the_form_of_a_weight(kind, cls):
    assert type(form_of(KINDS[kind])) is cls


@pytest.mark.parametrize("pack", [pack_planes, pack_rows])
@pytest.mark.parametrize("kind", KINDS)
def test_the_shape_is_that_of_packed_codes(kind, pack):
    matmul = KINDS[kind]
    assert list(form_of(matmul).shape(matmul.n, matmul.k, pack is pack_rows)) == list(matmul.packed(pack).shape)


@pytest.mark.parametrize("pack", [pack_planes, pack_rows])
@pytest.mark.parametrize("kind", KINDS)
def test_decoded_rows_are_the_numbers_that_codes_stand_for(kind, pack):
    """Some output rows in the middle, as float16 activations meet them; and nobody else's memory."""
    matmul = KINDS[kind]
    packed, ones = matmul.packed(pack), torch.ones(1, matmul.n, dtype=torch.float64)
    found = form_of(matmul).decode(packed, matmul.k, 5, 12, torch.float16)
    assert_same_bits(found.contiguous(), matmul.weight(ones)[5:12].float())
    before = packed.clone()
    found.zero_()
    assert torch.equal(packed, before)


def test_an_exact_table_keeps_what_float16_rounds_away():
    matmul = Matmul(k=128, group=0, table=NF4)
    found = form_of(matmul).decode(matmul.packed(), matmul.k, 0, matmul.n, torch.float16, exact=True)
    exact = torch.tensor(NF4, dtype=torch.float64)[matmul.codes.long()]
    assert float((found - exact).abs().max()) < 2.0**-21
    assert float((exact.half() - exact).abs().max()) > 2.0**-13


def test_codebooks_are_decoded_in_float32_once_they_are_asked_for_so():
    form = form_of(KINDS["vectors"])
    assert form.codebooks.dtype == torch.float16
    assert form.in_float32().codebooks.dtype == torch.float32
    assert_same_bits(form.in_float32().codebooks, form.codebooks.float())
    assert form.in_float32().bits == form.bits
    table = form_of(KINDS["table"])
    assert table.in_float32() is table


@pytest.mark.parametrize(("kind", "exact", "name"), [("4 bits", True, None), ("table", False, "table"),
                                                    ("table", True, "exact"), ("vectors", False, "vectors"),
                                                    ("long vectors", False, "vectors")])
def test_the_tiles_that_a_form_asks_for(kind, exact, name):
    assert form_of(KINDS[kind]).tiles(exact) == name


def test_vectors_of_more_than_two_words_have_tiles_of_their_own():
    """Two codebooks of 8 bits share a word, of 12 bits they do not."""
    names = [forms.Vectors(torch.zeros(books, 2, 8), bits).tiles(False) for books, bits in ((4, 8), (5, 8), (3, 12))]
    assert names == ["vectors", "long vectors", "long vectors"]


@pytest.mark.parametrize(("kind", "significant"), [("2 bits", 2), ("8 bits", 8), ("table", 11), ("vectors", 11)])
def test_bits_of_the_numbers_that_are_multiplied(kind, significant):
    """A code is exact in any type of activations; what is looked up has as many bits as that type."""
    assert form_of(KINDS[kind]).significant(11) == significant


def test_what_kernels_look_codes_up_in():
    scales = torch.ones(1, 3, 4)
    looked, fields = forms.Integers(4).lookup(qmm._qmm_kernel, torch.float16, False, scales)
    assert looked is scales                     # nothing: a pointer has to point somewhere
    assert fields == dict(BOOKS=0, PASSES=1, TEXTS=("",))
    for exact, passes in ((False, 1), (True, 2)):
        entries, fields = forms.Table(NF4).lookup(qmm._qmm_kernel, torch.float16, exact, scales)
        assert (fields["PASSES"], len(fields["TEXTS"]), fields["BOOKS"]) == (passes, passes, 0)
        parts = entries.double().view(passes, 16)
        assert_same_bits(parts.half().double(), parts)              # float16 numbers, whatever holds them
        assert float((parts.sum(0) - torch.tensor(NF4, dtype=torch.float64)).abs().max()) < 2.0**-12 / 2**(11 * exact)


@pytest.mark.parametrize("kernel", [qmm._qmm_kernel, dequantize._dequantize_kernel], ids=lambda k: k.fn.__name__)
def test_the_parameter_that_assembly_names_is_the_codebooks(kernel):
    """PTX numbers what is passed at run time: pointers only stand before this one, none of which Triton leaves out.
    bench/sass.py holds the name against the parameters of every kernel that is compiled."""
    books = torch.zeros(2, 256, 8, dtype=torch.float16)
    looked, constants = forms.Vectors(books, 8).lookup(kernel, torch.float16, False, None)
    assert looked is books
    assert (constants["BOOKS"], constants["PASSES"]) == (2, 1)
    found = re.search(r"\[(\w+)_param_(\d+)\]", constants["TEXTS"][0])
    assert found is not None
    name, number = found.groups()
    assert name == kernel.fn.__name__
    before = kernel.arg_names[:int(number) + 1]
    assert before[-1] == "entries_ptr"
    assert all(argument.endswith("_ptr") for argument in before)
