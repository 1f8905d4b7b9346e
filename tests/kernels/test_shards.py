"""A part of a layer's outputs, or of its inputs, under the noise that the whole layer has: every kernel (interpreted)
and its reference implementation."""
import dataclasses
from typing import Any

import pytest
import torch

from qzo.kernels import dequantize, folded, plan, qmm_torch
from qzo.kernels.codes import pack_planes, pack_rows
from tests.support.close import assert_same_bits
from tests.support.matmuls import TILE, Matmul

pytestmark = pytest.mark.usefixtures("nan_poison")

SIGNS: dict[str, Any] = {"seeds": (5, 5), "coefs": (0.1, -0.1), "rows": 1, "n": 32}
FORMS = {
    "zeros": Matmul(k=160, group=32, zeros="uint8", bias=True, law="ih4", **SIGNS),
    "one quad": Matmul(k=256, group=64, **SIGNS),
    "whole row": Matmul(k=256, group=0, zeros="uint8", **SIGNS),
    "shared by rows": Matmul(k=320, group=64, shared=True, **SIGNS),
    "absolute": Matmul(k=320, group=64, relative=False, law="ih4", **SIGNS),
    "pairs": Matmul(k=320, group=64, pair=True, **SIGNS),
    "second counter word": Matmul(k=320, group=64, base4=2**32 - 40, **SIGNS),
}
SMALL = dataclasses.replace(TILE, outputs=16)


def columns(weight, codes, number, count, pack):
    """Part `number` of `count` of a weight's outputs."""
    size = weight.out_features // count
    own = slice(number * size, (number + 1) * size)
    return dataclasses.replace(
        weight, codes=pack(codes[own], weight.bits), scales=weight.scales[:, own],
        zeros=None if weight.zeros is None else weight.zeros[:, own].contiguous(),
        bias=None if weight.bias is None else weight.bias[own], base4=weight.base4 + own.start, plans={})


def fused(matmul, weight, y):
    plan.launch(matmul.x, weight, matmul.operands()[1], y, tile=SMALL, asm=False)


def fused_in_parts(matmul, weight, y):
    """Programs that share K begin in the middle of the scales."""
    plan.launch(matmul.x, weight, matmul.operands()[1], y, tile=dataclasses.replace(SMALL, splits=2), asm=False)


def fused_torch(matmul, weight, y):
    qmm_torch.qmm_torch(matmul.x, weight, matmul.operands()[1], y)


def folds(matmul, weight, y):
    folded.launch(matmul.x, weight, matmul.operands()[1], y, tile=SMALL, asm=False)


def folds_torch(matmul, weight, y):
    folded.folded_torch(matmul.x, weight, matmul.operands()[1], y)


def chunks(matmul, weight, y):
    dequantize.matmul(matmul.x, weight, matmul.operands()[1], y, asm=False)


@pytest.mark.parametrize(
    ("run", "name"),
    [
        *((fused, name) for name in FORMS if name not in ("one quad", "absolute")),
        (fused_in_parts, "zeros"),
        *((fused_torch, name) for name in FORMS),
        *((folds, name) for name in ("zeros", "second counter word")),
        *((folds_torch, name) for name in FORMS if name != "whole row"),
        (chunks, "zeros"),
    ],
)
def test_a_part_of_the_outputs_has_the_bits_of_the_whole(run, name):
    matmul = FORMS[name]
    pack = pack_rows if run is fused_torch else pack_planes
    weight, _ = matmul.operands(form=pack)
    dtype = matmul.dtype if run is chunks else torch.float32
    whole = torch.empty(len(matmul.x), matmul.n, dtype=dtype)
    run(matmul, weight, whole)
    part = columns(weight, matmul.codes, 1, 2, pack)
    assert part.next_quad == matmul.n or len(part.scales) == 1
    got = torch.empty(len(matmul.x), matmul.n // 2, dtype=dtype)
    run(matmul, part, got)
    assert_same_bits(got, whole[:, 16:].contiguous())


@pytest.mark.parametrize("name", ["zeros", "absolute"])
@pytest.mark.parametrize("exact", [False, True])
def test_parts_of_perturbed_weights_are_those_of_the_whole(name, exact):
    """Written down for every evaluation: in float32, by the kernel and in torch, both ways of cutting."""
    matmul = FORMS[name]
    weight, perturbation = matmul.operands()
    run = dequantize.dequantize_torch if exact else lambda *a, **k: dequantize.launch(*a, asm=False, **k)

    def written(part):
        w = torch.empty(part.out_features, part.in_features)
        run(part, perturbation, w, e=1, start=0)
        return w

    whole, quad = written(weight), 4 * weight.group
    assert_same_bits(torch.cat([written(columns(weight, matmul.codes, i, 4, pack_planes)) for i in range(4)]), whole)
    pieces = [rows(weight, matmul.codes, slice(0, quad)), rows(weight, matmul.codes, slice(quad, matmul.k))]
    assert_same_bits(torch.cat([written(piece) for piece in pieces], 1), whole)


def rows(weight, codes, own):
    """A part of a weight's inputs, whole quads of groups from its first on."""
    groups = slice(own.start // weight.group, own.stop // weight.group)
    quads = slice(groups.start // 4, -(-groups.stop // 4))
    return dataclasses.replace(
        weight, codes=pack_planes(codes[:, own], weight.bits), scales=weight.scales[quads],
        zeros=None if weight.zeros is None else weight.zeros[groups].contiguous(),
        base4=weight.base4 + quads.start * weight.out_features, in_features=own.stop - own.start, plans={})


def test_parts_of_different_layers_may_share_a_launch_if_they_are_as_many():
    """q has other outputs than k and v, and each is cut in as many parts."""
    wide = FORMS["pairs"]
    narrow = dataclasses.replace(wide, n=16, base4=5000)
    narrow.__dict__["x"] = wide.x
    parts = [columns(m.operands()[0], m.codes, 1, 2, pack_planes) for m in (wide, narrow)]
    assert plan.together(*parts)
    assert not plan.together(parts[0], narrow.operands()[0])
    ys = [torch.empty(len(wide.x), part.out_features) for part in parts]
    plan.launch(wide.x, parts[0], wide.operands()[1], *ys, others=parts[1:], tile=SMALL, asm=False)
    for part, y in zip(parts, ys, strict=True):
        alone = torch.empty_like(y)
        plan.launch(wide.x, part, wide.operands()[1], alone, tile=SMALL, asm=False)
        assert_same_bits(y, alone)


def test_a_whole_weight_is_one_of_one():
    weight, _ = FORMS["zeros"].operands()
    assert (weight.shards, weight.next_quad) == (1, 32)
