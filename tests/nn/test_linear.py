"""QZOLinear as a drop-in for nn.Linear: forward, quantizing, moving and saving."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import qzo
from qzo import QZOLinear
from qzo.nn.layers import arena_of, layers
from qzo.nn.no_values import NoValues
from qzo.nn.quantize import quantize_weight
from tests.support.close import ULP, assert_close, assert_same_bits
from tests.support.small_layers import assert_same, asymmetric, bits, block, linear

# ---------------------------------------------------------------------------------------------------- drop-in


@pytest.mark.parametrize("shape", [(128,), (1, 128), (5, 128), (2, 3, 128), (2, 0, 128)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_forward_is_that_of_a_linear_with_the_dequantized_weight(shape, bias, dtype):
    layer = QZOLinear.from_linear(linear(bias=bias)).to(dtype)
    x = torch.randn(shape).to(dtype)
    y = layer(x)
    offset = 0 if layer.bias is None else layer.bias.double()
    want = x.double() @ layer.dequantize().double().T + offset
    assert (y.shape, y.dtype) == ((*shape[:-1], 24), dtype)
    assert_close(y, want, want.abs() + 1, torch.finfo(dtype).eps / 2 + 16 * ULP)


def test_output_has_the_dtype_asked_for_else_that_of_the_input():
    x = torch.randn(2, 64).bfloat16()
    assert QZOLinear(64, 8, group_size=64)(x).dtype == torch.bfloat16
    assert QZOLinear(64, 8, group_size=64, dtype=torch.float32)(x).dtype == torch.float32
    bias = QZOLinear(64, 8, group_size=64, dtype=torch.float16).bias
    assert bias is not None
    assert bias.dtype == torch.float16


def test_it_holds_no_gradients_and_says_what_it_is():
    layer = QZOLinear(128, 8, group_size=32)
    assert not any(p.requires_grad for p in layer.parameters())
    assert not layer(torch.randn(2, 128)).requires_grad
    assert repr(layer) == (
        "QZOLinear(in_features=128, out_features=8, bias=True, bits=4, group_size=32, symmetric, trained)"
    )
    assert "uint8 zeros" in repr(asymmetric())


def test_its_weight_has_shape_dtype_and_device_and_is_in_no_state():
    layer = QZOLinear(64, 8, group_size=32)
    assert isinstance(layer.weight, NoValues)
    assert (layer.weight.shape, layer.weight.dtype, layer.weight.device.type) == ((8, 64), torch.float32, "cpu")
    assert QZOLinear(64, 8, bias=False, group_size=32, dtype=torch.float16).weight.dtype == torch.float16
    assert QZOLinear(64, 8, group_size=32, device="meta").weight.device.type == "meta"
    assert "weight" not in layer.state_dict()
    assert_same_bits(layer.dequantize(), layer.packed().dequantize())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(bits=3), "bits=3"),
        (dict(group_size=48), "group_size=48"),
        (dict(group_size=128), r"group_size=128 does not divide in_features=96; use 32, -1"),
    ],
)
def test_bad_options_are_one_clear_line(options, message):
    with pytest.raises(ValueError, match=message):
        QZOLinear(96, 8, **options)
    with pytest.raises(ValueError, match=message):
        QZOLinear.from_linear(nn.Linear(96, 8), **options)


def test_input_of_another_width_or_dtype():
    with pytest.raises(ValueError, match="x has 96 columns"):
        QZOLinear(128, 8)(torch.randn(2, 96))
    with pytest.raises(TypeError, match="float64"):
        QZOLinear(128, 8)(torch.randn(2, 128).double())


# ---------------------------------------------------------------------------------------------- the quantizer


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (8, False)])
def test_from_linear_holds_what_the_quantizer_makes_and_the_same_bias(bits, symmetric):
    source = linear(256, 48)
    layer = QZOLinear.from_linear(source, bits, 64, symmetric)
    packed = quantize_weight(source.weight, 64, symmetric, bits)
    assert (layer.bits, layer.group_size, layer.zeros is None) == (bits, 64, symmetric)
    assert_same_bits(layer.dequantize(), packed.dequantize())
    assert_same_bits(layer.read_scales(), packed.scales)
    assert layer.bias is not None
    assert_same_bits(layer.bias.detach(), source.bias.detach())


# ------------------------------------------------------------------------------------------ moving and saving

CHANGES = {
    "to": lambda m: m.to(torch.bfloat16),
    "half": nn.Module.half,
    "double_and_back": lambda m: m.double().float(),
    "copy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_a_model_leave_the_arena_whole(change):
    model = block(symmetric=False)
    before = bits(model)
    changed = CHANGES[change](model)
    assert_same(changed, before)
    arena = arena_of(changed)
    assert arena.data.dtype == torch.float32
    assert all(layer.arena is arena for layer in layers(changed).values())
    arena.data.mul_(2)
    assert torch.equal(qzo.scales(changed)["up"], 2 * before["up", "scales"])


@pytest.mark.parametrize("change", ["copy", "pickle"])
def test_a_copy_has_an_arena_of_its_own(change):
    model = block()
    before = bits(model)
    arena_of(CHANGES[change](model)).data.zero_()
    assert_same(model, before)


def test_float_zero_points_stay_float32():
    layer = asymmetric(float_zeros=True)
    before = layer.zeros.clone()
    assert_same_bits(layer.half().zeros, before)


@pytest.mark.parametrize(
    "make", [asymmetric, lambda: asymmetric(float_zeros=True), lambda: QZOLinear(96, 8, group_size=-1)]
)
def test_state_dict_round_trip(make):
    layer = make()
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other = QZOLinear(layer.in_features, layer.out_features, group_size=layer.group_size)
    other.load_state_dict(torch.load(buffer))
    assert_same(other, bits(layer))
    x = torch.randn(3, layer.in_features)
    assert_same_bits(other(x), layer(x))


def test_state_dict_of_a_model_goes_into_the_shared_arena():
    source, target = block(symmetric=False), block(symmetric=False)
    arena_of(source).data.mul_(1.5)
    target.load_state_dict(source.state_dict())
    assert_same(target, bits(source))
    assert_same_bits(arena_of(target).data, arena_of(source).data)


def test_state_dict_errors_name_what_is_wrong():
    layer = QZOLinear(128, 8, group_size=32)
    state = layer.state_dict()
    for name in ("codes", "scales", "bias"):
        with pytest.raises(RuntimeError, match=rf'Missing key.*"{name}"'):
            layer.load_state_dict({k: v for k, v in state.items() if k != name})
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"extra"'):
        layer.load_state_dict({**state, "extra": torch.zeros(1)})
    other = QZOLinear(128, 9, group_size=32, bias=False)
    with pytest.raises(RuntimeError, match="holds 8 outputs in groups of 32, the layer has 9"):
        other.load_state_dict({k: v for k, v in state.items() if k != "bias"})
    with pytest.raises(RuntimeError, match="scales hold NaN"):
        layer.load_state_dict({**state, "scales": state["scales"] * torch.nan})


def test_meta_device_then_values():
    source = block()
    with torch.device("meta"):
        model = nn.Module()
        model.up = QZOLinear(64, 160, group_size=32)
        model.down = QZOLinear(160, 8, bias=False, group_size=32)
    arena_of(model)
    assert model.up(torch.empty(2, 3, 64, device="meta")).shape == (2, 3, 160)
    model.to_empty(device="cpu")
    model.load_state_dict({k: v for k, v in source.state_dict().items() if "lm_head" not in k})
    assert_same(model, bits(source))
    x = torch.randn(2, 64)
    assert_same_bits(model.up(x), source.up(x))
    assert_same_bits(arena_of(model).data, arena_of(source).data)
