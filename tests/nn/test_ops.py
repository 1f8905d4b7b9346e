"""The torch.library operators: registration, fakes and checks."""

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import qzo
from qzo.kernels import noise
from qzo.kernels.tiles import Tile
from qzo.nn import ops
from tests.support.aqlm_checkpoints import a_layer
from tests.support.small_layers import asymmetric


def qmm_arguments(layer, out_dtype=torch.float32):
    return (
        torch.randn(4, layer.in_features),
        layer.codes,
        layer.arena.quads(layer.arena_name),
        layer.zeros,
        layer.bias.detach(),
        torch.tensor([1, 2]),
        torch.tensor([0.1, 0.0]),
        0,
        layer.group_size,
        noise.RADEMACHER,
        True,
        out_dtype,
    )


@pytest.mark.parametrize("float_zeros", [True, False])
def test_opcheck_qmm(float_zeros):
    torch.library.opcheck(torch.ops.qzo.qmm.default, qmm_arguments(asymmetric(float_zeros=float_zeros)))


def test_opcheck_update():
    arguments = torch.rand(64), torch.tensor([1, 2]), torch.tensor([0.1, -0.1]), 3, noise.IH4, True, 0.0
    torch.library.opcheck(torch.ops.qzo.update_.default, arguments)


def test_fake_tensors_pass_through_a_layer_and_meet_the_same_checks():
    arguments = qmm_arguments(asymmetric(), torch.float16)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        y = torch.ops.qzo.qmm(*fake)
        assert (y.shape, y.dtype) == ((4, 6), torch.float16)
        with pytest.raises(ValueError, match="3 rows do not divide into 2 evaluations"):
            torch.ops.qzo.qmm(fake[0][:3], *fake[1:])


def test_operators_refuse_what_does_not_fit():
    """What else the matmul refuses: test_checks.py."""
    x, codes, scales, zeros, bias, seeds, coefs, *rest = qmm_arguments(asymmetric())
    with pytest.raises(ValueError, match="2 seeds and 1 coefficients"):
        torch.ops.qzo.qmm(x, codes, scales, zeros, bias, seeds, coefs[:1], *rest)
    with pytest.raises(ValueError, match="whole quads"):
        torch.ops.qzo.update_(torch.ones(5), seeds, coefs, 0, noise.IH4, True, 0.0)
    with pytest.raises(ValueError, match="int64 and float32"):
        torch.ops.qzo.update_(torch.ones(8), seeds, coefs.double(), 0, noise.IH4, True, 0.0)


def vector_arguments():
    layer = a_layer()
    x, seeds, coefs = torch.randn(4, 128), torch.tensor([1, 2]), torch.tensor([0.1, 0.0])
    plain = (
        x,
        layer.codes,
        layer.arena.quads(""),
        None,
        None,
        seeds,
        coefs,
        0,
        128,
        noise.RADEMACHER,
        True,
        torch.float32,
    )
    return plain, dict(bits=8, codebooks=layer.codebooks)


def test_opcheck_vectors():
    plain, form = vector_arguments()
    torch.library.opcheck(torch.ops.qzo.qmm.default, plain, form)
    torch.library.opcheck(torch.ops.qzo.qmm.default, plain, form | {"book4": 24})


def test_operators_refuse_codebooks_that_do_not_fit():
    plain, form = vector_arguments()
    with pytest.raises(ValueError, match="contiguous float32 with noise for each number, got "):
        torch.ops.qzo.qmm(*plain, **form | {"codebooks": form["codebooks"].half(), "book4": 24})


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_exact_tables_are_nearer(backend):
    layer = qzo.QZOLinear.from_linear(torch.nn.Linear(128, 16, bias=False), group_size=64, table="nf4")
    x = torch.randn(8, 128, generator=torch.Generator().manual_seed(0)).half()
    want = x.double() @ layer.dequantize().double().T
    errors, out = {}, torch.float32
    for tables in ("rounded", "exact"):
        layer.out_dtype = out
        with qzo.backend(backend, tables=tables):
            errors[tables] = float((layer(x).double() - want).norm() / want.norm())
    assert errors["exact"] < 1e-6 < 5e-5 < errors["rounded"]
    with pytest.raises(ValueError, match="'rounded' or 'exact' is wanted"), qzo.backend(tables="split"):
        pass


def test_exact_tables_run_tiles_of_their_own(monkeypatch):
    layer = qzo.QZOLinear.from_linear(torch.nn.Linear(64, 16), group_size=64, table="nf4")
    asked, pick = [], ops.tiles.pick
    monkeypatch.setattr(ops.tiles, "pick", lambda p: (asked.append(p.lookup), pick(p))[1])
    with qzo.backend("triton", tables="exact"):
        layer(torch.randn(2, 64).half())
    with qzo.backend("triton"):
        layer(torch.randn(2, 64).half())
        a_layer()(torch.randn(2, 128).half())
    assert asked == ["exact", "table", "vectors"]


def test_a_tile_that_is_asked_for_is_the_one_that_runs(monkeypatch):
    ran, layer = [], asymmetric()
    made = ops.plan.Plan
    monkeypatch.setattr(ops.plan, "Plan", lambda *a: (ran.append(a[4].tile), made(*a))[1])
    x, tile = torch.randn(4, layer.in_features), Tile(16, 16, 4, 1)
    with qzo.backend("triton"):
        plain = layer(x)
        with qzo.backend(tile=tile), qzo.backend("triton"):
            other = layer(x)
        layer(x)
    assert ran[1] == tile != ran[0]
    assert len(ran) == 2, "the first plan is used again"
    assert torch.allclose(plain, other, rtol=1e-5, atol=1e-6)


def test_a_tile_is_never_ignored():
    layer, tile = asymmetric(), Tile(16, 16, 4, 1)
    x = torch.randn(4, layer.in_features)
    with qzo.backend("torch", tile=tile), pytest.raises(ValueError, match="has no tiles; ask for one of the two"):
        layer(x)
    with qzo.backend("triton", tile=tile, large_rows="blas"), pytest.raises(ValueError, match="'blas' has no tiles"):
        layer(x)
    for wrong in ({"rows": 24}, {"outputs": 8}, {"warps": 0}, {"splits": 3}, {"stages": 0}):
        name = next(iter(wrong))
        with pytest.raises(ValueError, match=f"{name} must be"), qzo.backend(tile=dataclasses.replace(tile, **wrong)):
            pass
