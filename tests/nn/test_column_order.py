"""Codes whose columns are sorted by group (GPTQ's act-order): one gather of the input, everything else as it was."""

import copy
import io

import pytest
import torch
from torch import nn

import qzo
from qzo import PackedWeight, QZOLinear
from qzo.nn.layers import digest_parts
from tests.support.close import ULP, assert_close, assert_same_bits

K, N, GROUP = 128, 24, 32


def parts(k=K, n=N, seed=0):
    """codes uint8 [N, K] in the inputs' own order, scales and zeros [G, N], the group of each input."""
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(16, (n, k), generator=random).to(torch.uint8)
    scales = (torch.rand(k // GROUP, n, generator=random) + 0.5) * (torch.randint(2, (n,), generator=random) * 2 - 1)
    zeros = torch.randint(16, (k // GROUP, n), generator=random)
    return codes, scales, zeros, torch.randperm(k, generator=random) // GROUP


def ordered(bias=True, **shape):
    """(a layer of sorted columns, its weight by a plain loop over the inputs)."""
    codes, scales, zeros, group = parts(**shape)
    perm = group.argsort(stable=True)
    packed = PackedWeight.from_codes(codes[:, perm], scales, zeros, perm=perm)
    want = torch.stack([scales[g] * (codes[:, k].float() - zeros[g]) for k, g in enumerate(group)], 1)
    values = torch.randn(len(codes), generator=torch.Generator().manual_seed(1)) if bias else None
    return QZOLinear.from_packed(packed, values), want


def test_dequantize_gives_the_inputs_order():
    layer, want = ordered()
    assert_same_bits(layer.dequantize(), want)
    assert "sorted columns" in repr(layer)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(K,), (3, K), (2, 3, K), (2, 0, K)])
def test_forward(backend, dtype, shape):
    layer, weight = ordered()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    want = x.double() @ weight.double().T + layer.bias.double()
    size = x.double().abs() @ weight.double().abs().T + layer.bias.double().abs()
    with qzo.backend(backend):
        # rounding the result, and a sum of 128 terms: 4 ULP of its magnitude
        assert_close(layer.to(dtype)(x), want, want.abs() + 1e-2 * size, torch.finfo(dtype).eps + 400 * ULP)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_perturbed_scales_are_those_of_the_groups(backend):
    """The group of an input decides its scale and so its noise, wherever the input lies."""
    layer, _ = ordered(bias=False)
    codes, scales, zeros, group = parts()
    z = qzo.noise("ih4", 7, qzo.scale_index(layer)[""])
    moved = scales * (1 + 0.25 * z)
    want = torch.stack([moved[g] * (codes[:, k].float() - zeros[g]) for k, g in enumerate(group)], 1)
    with qzo.backend(backend), qzo.evaluating(layer, qzo.Evaluations([7], [0.25], "ih4")):
        got = layer(torch.eye(K)).T
    # an evaluation's coefficient is rounded, so that its product with the noise is exact
    assert_close(got, want, want.abs() + 1e-3, 16 * ULP + 2.0**-15)


def test_input_of_another_width_is_named():
    with pytest.raises(ValueError, match="x has 96 columns"):
        ordered()[0](torch.randn(2, 96))


@pytest.mark.parametrize("change", [copy.deepcopy, nn.Module.half, lambda m: m.to(torch.bfloat16).float()])
def test_changes_of_a_model_keep_the_order(change):
    layer, weight = ordered()
    changed = change(layer)
    assert changed.perm.dtype == torch.int64
    assert_same_bits(changed.dequantize(), weight)


def test_a_copy_has_an_order_of_its_own():
    layer, weight = ordered()
    copy.deepcopy(layer).perm.zero_()
    assert_same_bits(layer.dequantize(), weight)


def test_the_order_follows_the_layer_to_another_device():
    assert ordered()[0].to("meta").perm.is_meta


@pytest.mark.parametrize("make", [lambda: QZOLinear(K, N, group_size=GROUP), lambda: ordered(seed=1)[0]])
def test_state_dict_round_trip(make):
    layer, weight = ordered()
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other = make()
    other.load_state_dict(torch.load(buffer))
    assert_same_bits(other.dequantize(), weight)
    x = torch.randn(3, K)
    assert_same_bits(other(x), layer(x))


def test_a_state_without_an_order_takes_it_off():
    layer, plain = ordered()[0], QZOLinear(K, N, group_size=GROUP)
    assert "perm" not in plain.state_dict()
    layer.load_state_dict(plain.state_dict())
    assert layer.perm is None
    assert_same_bits(layer.dequantize(), plain.dequantize())


def test_the_journals_digest_covers_the_order():
    assert [what for _, what, _ in digest_parts(nn.Sequential(ordered()[0]))] == ["codes", "scales", "zeros", "perm"]


@pytest.mark.parametrize(
    "perm",
    [
        torch.zeros(K, dtype=torch.int64),
        torch.arange(K - 1),
        torch.arange(K).int(),
        torch.arange(K) + 1,
        torch.arange(K) - 1,
    ],
)
def test_what_is_no_order_is_refused(perm):
    codes, scales, zeros, _ = parts()
    with pytest.raises(ValueError, match=r"perm must be int64 \[128\] that holds 0\.\.127 once each, got"):
        PackedWeight.from_codes(codes, scales, zeros, perm=perm)
    layer, weight = ordered()
    with pytest.raises(RuntimeError, match=r"perm must be int64"):
        layer.load_state_dict({**layer.state_dict(), "perm": perm})
    assert_same_bits(layer.dequantize(), weight)
