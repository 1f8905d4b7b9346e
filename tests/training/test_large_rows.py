"""large_rows="folded" and "auto": where each form runs, what rounding loses, and how a run decides."""

import functools

import pytest
import torch
from triton.runtime import interpreter

import qzo
from qzo.kernels import folded, tiles
from qzo.nn import ops
from qzo.training import large_rows as many_rows
from qzo.training.settings import Settings
from tests.nn.test_allocations import allocations
from tests.support.close import assert_same_bits
from tests.support.matmuls import Matmul

HALF = torch.float16


def weight(**form):
    return Matmul(**{"k": 256, "group": 64, **form}).operands()[0]


@pytest.mark.parametrize(
    ("asked", "rows", "dtype", "form", "wanted"),
    [
        ("fused", 8192, HALF, {}, "fused"),
        ("folded", 127, HALF, {}, "fused"),
        ("folded", 128, HALF, {}, "folded"),
        ("folded", 8192, torch.bfloat16, {}, "folded"),
        ("folded", 512, HALF, {"zeros": "float32"}, "fused"),
        ("folded", 512, HALF, {"group": 0}, "fused"),
        ("blas", 511, HALF, {}, "fused"),
        ("blas", 512, HALF, {}, "blas"),
        ("auto", 127, HALF, {}, "fused"),
        ("auto", 128, HALF, {}, "folded"),
        ("auto", 2047, HALF, {}, "folded"),
        ("auto", 2048, HALF, {}, "blas"),
        ("auto", 8192, torch.bfloat16, {}, "fused"),
        ("auto", 8192, torch.float32, {}, "fused"),
    ],
)
def test_the_form_follows_from_rows_type_and_layer(asked, rows, dtype, form, wanted):
    assert ops.many_rows_form(asked, rows, weight(**form), dtype) == wanted


def layer_and_rows(rows=128, dtype=HALF):
    torch.manual_seed(0)
    model = qzo.quantize_(torch.nn.Sequential(torch.nn.Linear(128, 32)), group_size=64)
    model[0].out_dtype = dtype
    return model, torch.randn(rows, 128).to(dtype).repeat(2, 1)


def test_a_layer_runs_the_folded_kernel_where_it_is_asked_for(monkeypatch):
    ran, real = [], folded.launch
    monkeypatch.setattr(folded, "launch", lambda *a, **k: (ran.append(k["tile"]), real(*a, **k)))
    model, x = layer_and_rows()
    with qzo.evaluating(model, qzo.Evaluations([3, 3], [0.1, -0.1])):
        with qzo.backend("triton"):
            exact = model(x)
        assert not ran
        with qzo.backend("triton", large_rows="folded"):
            rounded = model(x)
        assert ran == [tiles.pick_folded(tiles.Problem(128, 32, 128, 64, HALF, "interpreter"))]
        with qzo.backend("torch", large_rows="folded"):
            assert float((model(x).float() - exact.float()).abs().max()) < 2e-2
    assert len(ran) == 1
    part = float((rounded.double() - exact.double()).norm() / exact.double().norm())
    assert 1e-5 < part < 1e-3


def losses(model, x):
    return model(x).float().square().view(2, -1).mean(1)


def test_what_rounding_loses_is_measured_and_nothing_is_lost_where_nothing_is_rounded():
    model, x = layer_and_rows()
    with qzo.backend("triton"):
        part = many_rows.lost(model, functools.partial(losses, model, x), 1e-2)
        small = many_rows.lost(model, functools.partial(losses, model, x), 1e-4)
        assert 0 < part < many_rows.MOST_LOST
        assert small > 20 * part, "a hundredth of the difference, the same rounding"
        few, y = layer_and_rows(16)
        assert many_rows.lost(few, functools.partial(losses, few, y), 1e-2) == 0
    assert many_rows.lost(model, functools.partial(losses, model, x), 1e-2) == 0, "a CPU rounds nothing"


@pytest.mark.skipif(
    not hasattr(interpreter.InterpreterBuilder, "get_bf16"), reason="Triton 3.4 interprets no product of bfloat16"
)
def test_bfloat16_is_not_rounded_further():
    model, x = layer_and_rows(dtype=torch.bfloat16)
    with qzo.backend("triton"):
        assert many_rows.lost(model, functools.partial(losses, model, x), 1e-2) == 0


def never():
    raise AssertionError("measured where there is nothing to choose")


def test_a_run_decides_once():
    cpu = torch.device("cpu")
    assert many_rows.settle(cpu, never) == ("fused", None)
    with qzo.backend("triton"):
        for part, wanted in ((0.004, "auto"), (0.02, "fused"), (0.5, "fused"), (0.0, "fused")):
            assert many_rows.settle(cpu, functools.partial(float, part)) == (wanted, part)
        for recorded, wanted in (
            (many_rows.NAMES["auto"], "auto"),
            ("fused", "fused"),
            ("auto: folded from 64 rows, blas from 512", "fused"),
        ):
            assert many_rows.settle(cpu, never, recorded) == (wanted, None)


def test_it_is_said_what_was_decided():
    assert "0.4 % of L+ - L-, so they are" in many_rows.said("auto", 0.004)
    assert "2 % at the most is allowed, so they stay exact" in many_rows.said("fused", 0.031)
    assert many_rows.said("fused", None) == many_rows.said("fused", 0.0) == ""


def test_auto_is_the_default_of_a_run_and_exact_that_of_the_optimizer():
    assert Settings().large_rows == "auto"
    model, _ = layer_and_rows()
    assert qzo.QZO(model, lr=0.1).large_rows == "fused"


def test_a_coefficient_of_zero_is_the_plain_forward_in_each_form():
    model, x = layer_and_rows()
    for form in ("folded", "auto"):
        with qzo.backend("triton", large_rows=form):
            with qzo.evaluating(model, qzo.Evaluations([3, 3], [0.1, 0.0])):
                y = model(x)
            assert_same_bits(y[128:], model(x[:128]))


def test_layers_that_share_x_are_folded_as_they_are_alone():
    """128 rows: the most that share a launch, and the least that are folded. A first forward shares none."""
    model = qzo.quantize_(torch.nn.ModuleDict({name: torch.nn.Linear(128, 32) for name in "qkv"}), group_size=64)
    x = torch.randn(128, 128).half()
    with qzo.backend("triton", large_rows="auto"):
        first, *later = [[layer(x) for layer in model.values()] for _ in range(3)]
    for ys in later:
        for y, want in zip(ys, first, strict=True):
            assert_same_bits(y, want)


def test_folding_allocates_the_output_and_nothing_else():
    model, x = layer_and_rows()
    with qzo.backend("triton", large_rows="folded"), qzo.evaluating(model, qzo.Evaluations([3, 3], [0.1, -0.1])):
        y = model(x)
        assert [size for size in allocations(lambda: model(x)) if size > 64] == [y.nbytes]
