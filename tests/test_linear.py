"""QZOLinear as a drop-in for nn.Linear, quantize_, the arena, and the context managers."""
import copy
import io
import pickle

import pytest
import torch
from torch import nn

import qzo
from qzo import PackedWeight, QZOLinear, ops
from qzo.layers import arena_of
from tests.close import ULP, assert_close, assert_same_bits


def linear(k=128, n=24, bias=True, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(k, n, bias=bias)


class Block(nn.Module):
    """Three Linears whose definition is not in the order of their names, one of which has more groups."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.up = nn.Linear(64, 160)
        self.act = nn.SiLU()
        self.down = nn.Linear(160, 8, bias=False)
        self.lm_head = nn.Linear(8, 5)

    def forward(self, x):
        return self.lm_head(self.down(self.act(self.up(x))))


def block(**options):
    return qzo.quantize_(Block(), **{"group_size": 32, **options})


def asymmetric(k=128, n=6, float_zeros=False):
    """A layer with distinct scales, of both signs, and zero points."""
    random = torch.Generator().manual_seed(k + n)
    scales = torch.randn(k // 32, n, generator=random)
    zeros = 15 * torch.rand(k // 32, n, generator=random)
    codes = torch.randint(0, 16, (n, k), generator=random).to(torch.uint8)
    packed = PackedWeight.from_codes(codes, scales, zeros if float_zeros else zeros.to(torch.uint8))
    return QZOLinear.from_packed(packed, torch.randn(n, generator=random))


def bits(module):
    """Everything quantized in a module, by name."""
    return {(name, what): tensor.clone() for name, what, tensor in qzo.layers.digest_parts(module)}


def assert_same(module, before):
    now = bits(module)
    assert now.keys() == before.keys()
    for name, tensor in before.items():
        assert_same_bits(now[name], tensor)


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
    assert QZOLinear(64, 8, group_size=64, dtype=torch.float16).bias.dtype == torch.float16


def test_it_holds_no_gradients_and_says_what_it_is():
    layer = QZOLinear(128, 8, group_size=32)
    assert not any(p.requires_grad for p in layer.parameters())
    assert not layer(torch.randn(2, 128)).requires_grad
    assert repr(layer) == ("QZOLinear(in_features=128, out_features=8, bias=True, bits=4, group_size=32, "
                           "symmetric, trained)")
    assert "uint8 zeros" in repr(asymmetric())


@pytest.mark.parametrize(("options", "message"), [
    (dict(bits=3), "bits=3"), (dict(group_size=48), "group_size=48"),
    (dict(group_size=128), r"group_size=128 does not divide in_features=96; use 32, -1")])
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

def plain_rounding(weight, group, symmetric):
    """Round to nearest without refitting the scale: the error that from_linear has to beat."""
    w = weight.detach().double().unflatten(1, (-1, group))
    low, high = w.amin(2, keepdim=True), w.amax(2, keepdim=True)
    if symmetric:
        scale, zero = w.abs().amax(2, keepdim=True) / 7.5, 8.0
    else:
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = (high - low) / 15
        zero = (-low / scale).round()
    codes = ((w / scale).round() + zero).clamp(0, 15)
    return ((codes - zero) * scale).flatten(1)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 128, 256])
def test_from_linear_is_close_and_better_than_plain_rounding(symmetric, group):
    """Uniform weights over a range r: rounding alone gives an error of about r / 15 / sqrt(12) = 0.0193 r."""
    source = linear(256, 48)
    layer = QZOLinear.from_linear(source, group_size=-1 if group == 256 else group, symmetric=symmetric)
    weight = source.weight.detach().double()
    error = (layer.dequantize().double() - weight).square().mean().sqrt()
    plain = (plain_rounding(source.weight, group, symmetric) - weight).square().mean().sqrt()
    assert error < plain
    assert error < 0.022 * (weight.max() - weight.min())
    steps = layer.read_scales().T.repeat_interleave(group, 1).double()
    assert ((layer.dequantize().double() - weight).abs() / steps).max() < 1.1
    assert torch.equal(layer.read_scales(), layer.read_scales().half().float()), "checkpoints hold float16"
    assert_same_bits(layer.bias.detach(), source.bias.detach())


def test_a_zero_group_and_values_that_are_not_finite():
    source = linear()
    with torch.no_grad():
        source.weight[3] = 0
    assert torch.equal(QZOLinear.from_linear(source).dequantize()[3], torch.zeros(128))
    with torch.no_grad():
        source.weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match="NaN or infinity"):
        QZOLinear.from_linear(source)


# ------------------------------------------------------------------------------------------ moving and saving

CHANGES = {"to": lambda m: m.to(torch.bfloat16), "half": nn.Module.half,
           "double_and_back": lambda m: m.double().float(), "copy": copy.deepcopy,
           "pickle": lambda m: pickle.loads(pickle.dumps(m))}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_a_model_leave_the_arena_whole(change):
    model = block(symmetric=False)
    before = bits(model)
    changed = CHANGES[change](model)
    assert_same(changed, before)
    arena = arena_of(changed)
    assert arena.data.dtype == torch.float32
    assert all(layer.arena is arena for layer in qzo.layers.layers(changed).values())
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


@pytest.mark.parametrize("make", [asymmetric, lambda: asymmetric(float_zeros=True),
                                  lambda: QZOLinear(96, 8, group_size=-1)])
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


# -------------------------------------------------------------------------------------------------- quantize_

def test_quantize_skips_names_and_returns_the_module():
    model = Block()
    assert qzo.quantize_(model, group_size=32) is model
    assert isinstance(model.up, QZOLinear)
    assert isinstance(model.lm_head, nn.Linear)
    nested = qzo.quantize_(nn.Sequential(Block()), group_size=-1, skip=("0.up", "head"))
    assert isinstance(nested[0].up, nn.Linear), "a skipped name may have several parts"
    assert isinstance(nested[0].lm_head, QZOLinear), "only whole parts of a name count"


def test_nothing_to_quantize():
    with pytest.raises(ValueError, match=r"has no nn\.Linear"):
        qzo.quantize_(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match="from_linear"):
        qzo.quantize_(nn.Linear(32, 32))


def test_a_group_that_does_not_divide_leaves_the_module_unchanged():
    model = Block()
    with pytest.raises(ValueError, match=r"down: group_size=64 does not divide in_features=160; use 32, -1"):
        qzo.quantize_(model, group_size=64)
    assert not any(isinstance(m, QZOLinear) for m in model.modules())


def test_a_linear_under_two_names_stays_one_layer():
    shared = linear(64, 64)
    model = qzo.quantize_(nn.ModuleDict({"b": shared, "a": shared}), group_size=32)
    assert model["a"] is model["b"]
    assert isinstance(model["a"], QZOLinear)
    assert len(arena_of(model).slots) == 1


# -------------------------------------------------------------------------------------------------- the arena

def test_scale_index_is_where_a_scale_lies_in_the_arena():
    model = block()
    arena, index, scales = arena_of(model).data, qzo.scale_index(model), qzo.scales(model)
    assert list(index) == sorted(index) == ["down", "up"]
    for name, at in index.items():
        assert_same_bits(arena[at], scales[name])
    used = torch.cat([at.flatten() for at in index.values()])
    assert len(used.unique()) == len(used)
    unused = torch.ones(len(arena), dtype=torch.bool).index_fill_(0, used, False)
    assert not arena[unused].any(), "what fills the last quads is zero"
    assert int(index["down"].max()) < int(index["up"].min()), "sorted names, not definition order"


def test_the_arena_is_laid_out_by_name_whatever_the_order_it_is_given():
    shapes = {"b": (5, 3), "a.10": (1, 7), "a.9": (4, 2)}
    slots = qzo.ScaleArena.of_shapes(shapes, "cpu").slots
    assert {name: slot.base4 for name, slot in slots.items()} == {"a.10": 0, "a.9": 7, "b": 9}


def test_the_arena_follows_the_model_to_another_device():
    model = block()
    arena = arena_of(model)
    model.to("meta")
    assert arena.data.is_meta
    assert (arena.data.dtype, arena.data.numel()) == (torch.float32, arena_of(block()).data.numel())


def test_a_layers_noise_follows_its_index():
    """An absolute perturbation of the whole model is noise() at scale_index()."""
    model = block(skip=("lm_head", "down"))
    x = torch.eye(64)
    with qzo.evaluating(model, qzo.Evaluations([5], [0.01], relative=False)):
        moved = model.up(x)
    codes = model.up.packed().unpacked().double() - 8
    z = qzo.noise("rademacher", 5, qzo.scale_index(model)["up"]).double()
    p = qzo.scales(model)["up"].double() + 0.01 * z
    want = (codes * p.T.repeat_interleave(32, 1)).T + model.up.bias.double()
    assert_close(moved, want, want.abs() + 1, 4 * ULP)


def test_train_only():
    model = block()
    before = bits(model)
    assert qzo.train_only(model, lambda name: name == "up") == ["up"]
    assert_same(model, before)
    assert list(qzo.scales(model)) == ["up"]
    assert arena_of(model).data.numel() == 4 * 160
    x = torch.randn(2, 160)
    plain = torch.cat([model.down(row) for row in x.split(1)])       # the rows of one evaluation at a time
    with qzo.evaluating(model, qzo.Evaluations([1, 2], [0.5, -0.5])):
        assert_same_bits(model.down(x), plain)
        assert (model.up(x[:, :64])[0] - model.up(x[:, :64].flip(0))[1]).abs().max() > 0.01
    assert qzo.train_only(model, lambda name: True) == ["down", "up"]
    assert_same(model, before)
    with pytest.raises(ValueError, match="no QZOLinear layer that trains"):
        qzo.train_only(model, lambda name: False)


# --------------------------------------------------------------------------------------------------- contexts

def test_evaluating_perturbs_nests_and_restores():
    model, x = block(), torch.randn(4, 64)
    plain = model(x)
    with qzo.evaluating(model, qzo.Evaluations([1, 1], [0.1, -0.1])) as outer:
        first = model(x)
        with qzo.evaluating(model, qzo.Evaluations([2], [0.1])):
            assert (model(x) - first).abs().max() > 1e-3
        assert_same_bits(model(x), first)
        assert len(outer) == 2
    assert (first - plain).abs().max() > 1e-3
    assert_same_bits(model(x), plain)


def test_evaluating_restores_after_an_error():
    model, x = block(), torch.randn(3, 64)
    plain = model(x)
    with pytest.raises(ValueError, match="3 rows do not divide into 2 evaluations"), \
            qzo.evaluating(model, qzo.Evaluations([1, 1], [0.1, -0.1])):
        model(x)
    assert_same_bits(model(x), plain)


def test_rows_that_the_evaluations_do_not_divide_with_three_dimensions():
    """5 sequences of 2 tokens: the 10 rows would divide, the batch does not."""
    model = block()
    with pytest.raises(ValueError, match="5 rows do not divide into 2 evaluations"), \
            qzo.evaluating(model, qzo.Evaluations([1, 1], [0.1, -0.1])):
        model(torch.randn(5, 2, 64))


def test_evaluating_takes_evaluations():
    with pytest.raises(TypeError, match="got list"), qzo.evaluating(block(), [1]):
        pass


@pytest.mark.parametrize(("arguments", "message"), [
    (([1], [0.1, 0.2]), "as many seeds as coefs"), (([], []), "at least one"),
    (([1], [float("nan")]), "finite"), (([1], [0.1], "uniform"), "not a noise law"),
    (([1], [0.1], "ih4", True, "column"), "sharing='column'"),
    (([1], [0.1], "ih4", False, "row"), "sharing='row' scales a whole output row, so it is relative")])
def test_bad_evaluations(arguments, message):
    with pytest.raises(ValueError, match=message):
        qzo.Evaluations(*arguments)


def test_pairs_are_known_and_travel_with_the_evaluations():
    assert qzo.Evaluations([1, 1, 2**64 - 1, -1], [0.1] * 4).pairs
    assert not qzo.Evaluations([1, 1, 2], [0.1] * 3).pairs
    assert not qzo.Evaluations([1, 2, 2, 1], [0.1] * 4).pairs
    moved = qzo.Evaluations([1, 1], [0.1, -0.1], "ih4").to("meta")         # where nothing can be compared
    assert moved.pairs
    assert (moved.seeds.device.type, moved.coefs.device.type, moved.kernel_coefs.device.type) == ("meta",) * 3


def test_row_shared_noise_is_an_epilogue_whose_noise_is_that_of_the_first_scale():
    model = block()
    name, layer = next(iter(qzo.layers.layers(model).items()))
    x = torch.randn(4, layer.in_features)
    z = qzo.noise("ih4", 7, qzo.scale_index(model)[name][0])
    bias = 0 if layer.bias is None else layer.bias
    want = (layer(x) - bias) * (1 + 0.1 * z) + bias
    with qzo.evaluating(model, qzo.Evaluations([7], [0.1], "ih4", sharing="row")):
        assert_close(layer(x), want, want.abs() + 1, 64 * ULP + 2.0**-15)


def test_backends_agree_and_the_choice_ends_with_the_block():
    model, x = block(), torch.randn(4, 64)
    with qzo.evaluating(model, qzo.Evaluations([1, 1], [0.1, -0.1])):
        with qzo.backend("torch"):
            want = model(x)
        with qzo.backend("triton"):
            assert ops.uses_triton(x.device)
            got = model(x)
        assert not ops.uses_triton(x.device)
    assert_close(got, want, want.abs() + 1, 64 * ULP)
    assert not torch.equal(got, want), "two backends with the same bits would be one backend"
    with pytest.raises(ValueError, match="'cuda'"), qzo.backend("cuda"):
        pass
