"""Kinds of codes by name: what is read for a weight, how many numbers codebooks have, and how tiles know them."""

import dataclasses
from typing import Any

import pytest

from qzo.kernels.table import NF4
from qzo.kernels.tiles import GROUPS
from qzo.nn.weights import check_bits
from qzo.reports.codes import CODES, Codes


@pytest.mark.parametrize(
    ("name", "bits", "entries", "lookup"),
    [
        ("int4", 4, 0, None),
        ("int2", 2, 0, None),
        ("int8", 8, 0, None),
        ("nf4", 4, 0, "table"),
        ("aqlm-1x16", 2, 65536 * 8, "vectors"),  # 16 bits for eight weights
        ("aqlm-2x8", 2, 2 * 256 * 8, "vectors"),
    ],
)
def test_what_a_name_stands_for(name, bits, entries, lookup):
    kind = CODES[name]
    assert (kind.weight_bits, kind.book_entries, kind.lookup) == (bits, entries, lookup)
    if not kind.books:
        check_bits(kind.bits)
    assert kind.group in (None, -1, *GROUPS)
    assert (kind.table == NF4) == (name == "nf4")


def test_codebooks_of_more_words_are_another_kind_of_tile():
    assert Codes(8, "", books=4).lookup == "vectors"
    assert Codes(8, "", books=5).lookup == "long vectors"
    assert Codes(12, "", books=3).lookup == "long vectors"
    assert [Codes(8, "", books=books).weight_bits for books in (1, 2, 3, 5)] == [2, 2, 4, 6], "whole words are read"


def test_names_of_cases_end_in_what_tells_their_codes_apart():
    suffixes = [kind.suffix for kind in CODES.values()]
    assert len(set(suffixes)) == len(suffixes)
    assert CODES["int4"].suffix == "", "the names that results files have from before there were others"
    kind: Any = CODES["int4"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        kind.bits = 8
