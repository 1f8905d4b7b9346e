"""What rounded activations leave of the signal: the roundings themselves, their hooks, the order of their errors."""

import math

import pytest
import torch

import qzo
from qzo.checkpoints.load import from_pretrained
from qzo.loss.losses import losses
from qzo.nn.layers import arena_of, layers
from qzo.reports import signal
from tests.support import tiny

VALUES = torch.tensor(
    [
        [1.0, 1 + 2.0**-8, 1 + 2.0**-11, -3.0001220703125, 1e-7, 7e4],
        [127.0, 0.4999, 0.5001, -126.6, 63.4, 1.0],
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    ]
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return from_pretrained(tiny.save_checkpoint(tmp_path_factory.mktemp("tiny")), device="cpu", group_size=32)


@pytest.fixture(scope="module")
def batch():
    ids = torch.randint(3, 30, (4, 12), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_sixteen_bits_keep_what_the_dtype_holds():
    for name in ("float16", "bfloat16"):
        for rounding in signal.ROUNDINGS[name]:
            got = rounding(VALUES)
            assert got.dtype == torch.float32
            assert torch.equal(got, VALUES.to(getattr(torch, name)).float())
    half, brain = (signal.ROUNDINGS[name][0](VALUES)[0] for name in ("float16", "bfloat16"))
    # steps at 1 are 2^-10 and 2^-7; a tie goes to the even neighbour
    assert half[:3].tolist() == [1, 1 + 2.0**-8, 1]
    assert brain[:3].tolist() == [1, 1, 1]
    assert half[5] == math.inf
    assert brain[5] == 70144


def test_integers_are_scaled_by_the_largest_of_a_row():
    enters, leaves = signal.ROUNDINGS["int8"]
    assert torch.equal(enters(VALUES)[1], torch.tensor([127.0, 0, 1, -127, 63, 1]))
    assert torch.equal(enters(VALUES / 8)[1] * 8, enters(VALUES)[1])
    assert enters(VALUES)[0].tolist() == pytest.approx([0, 0, 0, 0, 0, 7e4])  # a step is 551
    assert torch.equal(enters(VALUES)[2], VALUES[2])
    assert torch.equal(leaves(VALUES), VALUES.half().float())


def test_eight_bit_floats_have_three_bits_of_mantissa():
    enters, _ = signal.ROUNDINGS["float8_e4m3"]
    row = torch.tensor([[448.0, 17.0, 19.0, -100.0, 1.06]])
    assert torch.equal(enters(row), torch.tensor([[448.0, 16, 20, -104, 1]]).where(row != -100, -96))
    assert torch.allclose(enters(row * 3e-5), enters(row) * 3e-5, rtol=1e-6)


def test_what_enters_and_leaves_every_layer_is_rounded(model, batch):
    name, layer = next(iter(layers(model).items()))
    seen = {}
    x = torch.randn(2, 3, layer.in_features, generator=torch.Generator().manual_seed(2))
    exact = layer(x.bfloat16().float())
    before, plain = hooks(model), losses(model, batch, 1)
    with signal.rounding(model, "bfloat16"):
        assert hooks(model) == before + 2 * len(layers(model, trainable=None))
        seen["y"] = layer(x)
        assert not torch.equal(losses(model, batch, 1), plain)
    assert torch.equal(seen["y"], exact.bfloat16().float()), name
    assert hooks(model) == before
    assert torch.equal(losses(model, batch, 1), plain)


def test_hooks_go_after_an_error(model):
    before = hooks(model)
    with pytest.raises(KeyError), signal.rounding(model, "bfloat16"):
        raise KeyError
    assert hooks(model) == before


def test_derivatives_are_those_of_moved_scales(model, batch):
    """The same from scales that are written: s (1 + eps z) and s (1 - eps z), z by the law's own function."""
    eps, arena, moved = 1e-2, arena_of(model), []
    got = signal.derivatives(model, batch, [5, 6], eps)
    scales = arena.data.clone()
    for seed in (5, 6):
        z = qzo.noise("rademacher", seed, torch.arange(len(scales)))
        for sign in (1, -1):
            arena.data.copy_(scales * (1 + sign * eps * z))
            moved.append(float(losses(model, batch, 1)))
        arena.data.copy_(scales)
    wanted = torch.tensor([moved[0] - moved[1], moved[2] - moved[3]], dtype=torch.float64) / (2 * eps)
    assert got.dtype == torch.float64
    assert torch.allclose(got, wanted, atol=1e-4)  # losses of 4 are rounded to 2e-7, and divided by 2e-2
    assert abs(got[0] - got[1]) > 0.01


def test_without_rounding_all_of_it_survives(model, batch, monkeypatch):
    monkeypatch.setitem(signal.ROUNDINGS, "float32", (lambda x: x.float(), lambda y: y.float()))
    assert signal.survival(model, batch, seeds=range(3), activations=("float32",)) == {
        "float32": {"error": 0.0, "cosine": pytest.approx(1.0)}
    }


def test_coarser_roundings_and_smaller_eps_leave_less(model, batch):
    found = signal.survival(model, batch, eps=1e-2, seeds=range(8))
    assert set(found) == set(signal.ROUNDINGS)
    assert found["bfloat16"]["error"] > 3 * found["float16"]["error"] > 0
    assert found["int8"]["error"] > found["float16"]["error"]
    assert found["float16"]["cosine"] > 0.999
    smaller = signal.survival(model, batch, eps=1e-4, seeds=range(8), activations=("bfloat16",))
    assert smaller["bfloat16"]["error"] > 10 * found["bfloat16"]["error"]
    assert smaller["bfloat16"]["cosine"] < found["bfloat16"]["cosine"]


def test_unknown_activations_are_refused(model, batch):
    with pytest.raises(ValueError, match=r"activations fp4, int3 are not known; there are float16, bfloat16, int8"):
        signal.survival(model, batch, activations=("float16", "fp4", "int3"))
