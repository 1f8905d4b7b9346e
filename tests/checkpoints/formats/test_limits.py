"""What a format cannot hold, named before anything is written."""

import pytest
import torch

from qzo.checkpoints.formats import limits
from qzo.kernels.table import NF4
from qzo.nn.weights import PackedWeight


def packed(n=8, k=64, bits=4, size=32, **more):
    codes = torch.zeros(n, k, dtype=torch.uint8)
    return PackedWeight.from_codes(codes, torch.ones(k // size, n), bits=bits, **more)


VECTORS = PackedWeight.from_vectors(torch.zeros(8, 8, 2, dtype=torch.int64), torch.ones(8), torch.zeros(2, 256, 8))
ZEROS = torch.full((2, 8), 3)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (VECTORS, r"^a has codes that stand for vectors \(AQLM\), which gptq does not hold; save it in its own format"),
        (
            packed(table=NF4),
            r"^a has codes that stand for a table's entries \(NF4, FP4\), which gptq does not hold; save",
        ),
        (packed(zeros=ZEROS.float()), r"^a has a float minimum .* which gptq's integer zero points cannot hold"),
    ],
)
def test_codes_that_stand_for_other_than_integers(weight, message):
    with pytest.raises(ValueError, match=message):
        limits.check_integers("a", weight, "gptq")
    limits.check_order("a", weight, "gptq")


def test_an_order_of_columns():
    sorted_columns = packed(perm=torch.arange(64).flip(0))
    with pytest.raises(ValueError, match=r"^a has its columns sorted by group \(act-order\), which awq does not hold"):
        limits.check_order("a", sorted_columns, "awq")
    limits.check_integers("a", sorted_columns, "awq")
    for weight in (packed(), packed(zeros=ZEROS.to(torch.uint8))):
        limits.check_order("a", weight, "awq")
        limits.check_integers("a", weight, "awq")


@pytest.mark.parametrize(
    ("n", "k", "bits", "inputs", "message"),
    [
        (12, 64, 4, False, "a has out_features=12, and awq packs 8 codes of 4 bits into a word; save it as compressed"),
        (8, 60, 4, True, "a has in_features=60, and awq packs 8 codes of 4 bits"),
        (8, 60, 4, False, None),
        (12, 60, 8, True, None),
        (24, 64, 2, False, "a has out_features=24, and awq packs 16 codes of 2 bits"),
    ],
)
def test_codes_that_do_not_fill_their_words(n, k, bits, inputs, message):
    weight = packed(n, k, bits, size=k)
    if message is None:
        limits.check_whole_words("a", weight, "awq", inputs)
    else:
        with pytest.raises(ValueError, match=message):
            limits.check_whole_words("a", weight, "awq", inputs)


def test_a_single_group_is_a_whole_row_unless_others_have_its_size():
    assert limits.group_sizes({"a": packed(size=32), "b": packed(k=32)}) == {"a": 32, "b": 32}
    assert limits.group_sizes({"a": packed(size=32), "b": packed(size=64)}) == {"a": 32, "b": -1}
    assert limits.group_sizes({"b": packed(size=64)}) == {"b": -1}
