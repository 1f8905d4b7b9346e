"""Few unperturbed rows on a CPU, summed straight from codes, against the oracle."""

from typing import Any

import pytest
import torch

from qzo.kernels import few_rows, qmm_torch
from qzo.kernels.codes import pack_planes, pack_rows
from qzo.kernels.few_rows import MOST_ROWS, Turned, supports
from qzo.kernels.table import NF4
from tests.support.matmuls import Matmul

PLAIN: dict[str, Any] = dict(law=None, seeds=(5,), coefs=(0.0,), dtype=torch.float32)
CASES = {
    "symmetric": Matmul(k=256, n=34, **PLAIN),
    "one row, as many groups as fill no quad": Matmul(k=576, n=64, rows=1, group=64, **PLAIN),
    "integer zero points, bias, outputs that fill no byte": Matmul(
        k=160, n=33, group=32, zeros="uint8", bias=True, **PLAIN
    ),
    "float zero points": Matmul(k=320, n=40, group=32, zeros="float32", rows=MOST_ROWS, **PLAIN),
    "whole row, in bags of 128 and one of 72": Matmul(k=200, n=20, group=0, zeros="float32", bias=True, **PLAIN),
    "whole row of one bag": Matmul(k=72, n=6, group=0, **PLAIN),
    "2 bits": Matmul(k=256, n=37, bits=2, zeros="uint8", **PLAIN),
    "8 bits": Matmul(k=256, n=37, bits=8, zeros="uint8", bias=True, **PLAIN),
    "8 bits, float zero points": Matmul(k=128, n=16, bits=8, zeros="float32", **PLAIN),
    "float16": Matmul(k=256, n=33, bias=True, zeros="float32", **PLAIN | dict(dtype=torch.float16)),
}


def product(matmul):
    """float32 y of a Matmul by a Turned."""
    weight, _ = matmul.operands(form=pack_rows)
    y = torch.full((len(matmul.x), matmul.n), float("nan"))
    Turned(weight).multiply(matmul.x, weight, y)
    return y


@pytest.mark.parametrize("name", CASES)
def test_against_the_oracle(name):
    """The codes' own products and the middle code's are added apart, and still it keeps the bound of a kernel."""
    CASES[name].assert_true(product(CASES[name]))


def test_torch_sums_codes_of_every_width_here():
    """Or all of this would be skipped where qzo runs, in silence."""
    assert all(few_rows._bag(bits) is not None for bits in (2, 4, 8))


@pytest.mark.parametrize("zeros", [None, "float32"])
@pytest.mark.parametrize("inference", [False, True])
def test_scales_that_change_are_followed(zeros, inference):
    matmul = Matmul(k=256, n=34, zeros=zeros, **PLAIN)
    with torch.inference_mode(inference):
        weight, perturbation = matmul.operands(form=pack_rows)
        turned, got, want = Turned(weight), torch.empty(3, 34), torch.empty(3, 34)
        weight.scales.mul_(-2.0)
        turned.multiply(matmul.x, weight, got)
        qmm_torch.qmm_torch(matmul.x, weight, perturbation, want)
    assert want.abs().max() > 1
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * want.abs().max().item())


def test_what_has_no_integer_codes_in_rows_is_left_alone():
    assert supports(CASES["symmetric"].operands(form=pack_rows)[0])
    assert not supports(CASES["symmetric"].operands(form=pack_planes)[0])
    assert not supports(Matmul(k=128, table=NF4, **PLAIN).operands(form=pack_rows)[0])
    assert not supports(Matmul(k=200, group=0, books=2, bits=8, **PLAIN).operands(form=pack_rows)[0])


def test_a_torch_that_lacks_the_operators_is_left_alone(monkeypatch):
    weight, _ = CASES["symmetric"].operands(form=pack_rows)
    monkeypatch.setattr(few_rows, "_BAGS", dict.fromkeys((2, 4, 8), "no_such_operator"))
    few_rows._bag.cache_clear()
    try:
        assert not supports(weight)
    finally:
        monkeypatch.undo()
        few_rows._bag.cache_clear()
    assert supports(weight)
