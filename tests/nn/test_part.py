"""What a rank holds of a layer: every input and output once, whole quads of groups, and all of it back again."""

import itertools
import types
from typing import Any, cast

import pytest
import torch

from qzo.kernels.codes import pack_planes, pack_rows
from qzo.kernels.vectors import pack_vectors
from qzo.nn.part import STYLES, Part
from qzo.system.ranks import Ranks
from tests.support.close import assert_same_bits


def parts_of(outputs, inputs, group, style, count, **form):
    """The Part of each rank."""
    ranks = cast(Ranks, types.SimpleNamespace(count=count))
    return [Part(outputs, inputs, group, style, ranks, rank, **form) for rank in range(count)]


class Exchange:
    """Ranks of which one is asked after another: the first round hears what each sends, the second gives it to all."""

    def __init__(self, count):
        self.count, self.heard, self.all = count, [], False

    def exchange(self, values):
        if not self.all:
            self.heard.append(values)
        return self.heard if self.all else [values] * self.count


def whole_of(parts, pieces, what):
    """What each rank finds the whole to be."""
    ranks = Exchange(len(parts))
    parts = [Part(**{**vars(part), "ranks": cast(Any, ranks)}) for part in parts]
    for part, piece in zip(parts, pieces, strict=True):
        getattr(part, what)(piece)
    ranks.all = True
    return [getattr(part, what)(piece) for part, piece in zip(parts, pieces, strict=True)]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    ("inputs", "group", "count"), [(1024, 64, 2), (288, 32, 3), (352, 32, 2), (96, 96, 2), (64, 32, 4)]
)
def test_each_input_and_output_is_some_ranks_own_and_quads_are_whole(inputs, group, count, style):
    """Of 352 = 11 x 32 inputs half a rank's are 5.5 groups; of 64 = 2 x 32 a quarter is half a group."""
    parts = parts_of(24, inputs, group, style, count)
    total = inputs if style.startswith("rowwise") else 24
    owned = itertools.chain(*(range(total)[part.own] for part in parts))
    assert [*owned] == [*range(total)]
    for part in parts:
        held, own = part.columns, part.own if part.by_inputs else slice(0, inputs)
        assert held.start <= own.start
        assert own.stop <= held.stop
        if group != inputs:
            assert held.start % (4 * group) == held.stop % group == 0
            assert held.stop - held.start < own.stop - own.start + 5 * group
        else:
            assert held == own


FORMS = {
    "rows": (4, 0, pack_rows),
    "planes": (4, 0, pack_planes),
    "2 bits": (2, 0, pack_planes),
    "8 bits": (8, 0, pack_rows),
    "vectors": (8, 2, pack_vectors),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("style", ["colwise", "rowwise"])
def test_codes_and_zeros_are_whole_again(name, style):
    bits, books, pack = FORMS[name]
    n, k = 6, 288
    group = k if books else 32
    shape = (n, k // 8, books) if books else (n, k)
    codes = pack(torch.randint(0, 1 << bits, shape).to(torch.int32 if books else torch.uint8), bits)
    zeros = torch.rand(k // group, n)
    parts = parts_of(n, k, group, style, 3, bits=bits, books=books)
    for whole in whole_of(parts, [part.codes_of(codes) for part in parts], "whole_codes"):
        assert_same_bits(whole, codes)
    for whole in whole_of(parts, [part.zeros_of(zeros) for part in parts], "whole_zeros"):
        assert_same_bits(whole, zeros)
    assert parts[0].zeros_of(None) is None
    assert parts[0].whole_zeros(None) is None


@pytest.mark.parametrize(
    ("layer", "style", "more", "text"),
    [
        ((10, 64, 32), "colwise", {}, r"10 outputs \(colwise\) cannot be divided over 4 ranks"),
        ((12, 66, 66), "rowwise", {}, r"66 inputs \(rowwise\) cannot be divided over 4 ranks"),
        ((12, 48, 48), "rowwise", {"books": 1}, r"48 inputs \(rowwise\) over 4 ranks are 12 each, .* vectors of 8"),
    ],
)
def test_what_cannot_be_divided_is_refused(layer, style, more, text):
    outputs, inputs, group = layer
    with pytest.raises(ValueError, match=text):
        parts_of(outputs, inputs, group, style, 4, **more)


def test_sums_are_added_in_the_order_of_the_ranks():
    """1e9 - 1e9 + 1 is 1 in float32, 1e9 + 1 - 1e9 is 0. The bias is added once."""
    ranks = Exchange(3)
    ranks.heard, ranks.all = [torch.full((1, 2), value) for value in (1e9, -1e9, 1.0)], True
    part = Part(2, 96, 32, "rowwise", cast(Any, ranks), 1)
    y = part.forward(torch.ones(1, 32).half(), lambda x, dtype: torch.ones(1, 2), None, torch.tensor([0.0, 3.0]))
    assert_same_bits(y, torch.tensor([[1.0, 4.0]]).half())


@pytest.mark.parametrize(("style", "width"), [("rowwise", 48), ("rowwise_split_input", 96)])
def test_an_input_of_another_width_is_refused(style, width):
    """What feeds the layer was not cut as the plan has it."""
    part = Part(8, 96, 32, style, cast(Any, Exchange(2)), 1)
    with pytest.raises(
        ValueError, match=f"x has 32 columns, .* of 96 inputs over 2 ranks takes {width}: what feeds it"
    ):
        part.forward(torch.zeros(2, 32), lambda x, dtype: x, None, None)
