"""All layers of a module: quantize_, the arena, and the context managers."""

import pytest
import torch
from torch import nn

import qzo
from qzo import QZOLinear
from qzo.nn import ops
from qzo.nn.layers import arena_of, layers
from tests.support.close import ULP, assert_close, assert_same_bits
from tests.support.small_layers import Block, assert_same, bits, block, linear

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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 64, "strict": True}, r"down: group_size=64 does not divide in_features=160; use 32, -1"),
        ({"group_size": 64, "strict": True}, "without strict=True this layer alone takes another"),
        ({"group_size": 96}, r"up: group_size=96: use one of 32, 64, 128, or -1 for the whole row"),
    ],
)
def test_a_group_that_does_not_divide_leaves_the_module_unchanged(options, message):
    model = Block()
    with pytest.raises(ValueError, match=message):
        qzo.quantize_(model, **options)
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
    assert qzo.train_only_(model, lambda name: name == "up") == ["up"]
    assert_same(model, before)
    assert list(qzo.scales(model)) == ["up"]
    assert arena_of(model).data.numel() == 4 * 160
    x = torch.randn(2, 160)
    plain = torch.cat([model.down(row) for row in x.split(1)])  # the rows of one evaluation at a time
    with qzo.evaluating(model, qzo.Evaluations([1, 2], [0.5, -0.5])):
        assert_same_bits(model.down(x), plain)
        assert (model.up(x[:, :64])[0] - model.up(x[:, :64].flip(0))[1]).abs().max() > 0.01
    assert qzo.train_only_(model, lambda name: True) == ["down", "up"]
    assert_same(model, before)
    with pytest.raises(ValueError, match="no QZOLinear layer that trains"):
        qzo.train_only_(model, lambda name: False)


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
    with (
        pytest.raises(ValueError, match="3 rows do not divide into 2 evaluations"),
        qzo.evaluating(model, qzo.Evaluations([1, 1], [0.1, -0.1])),
    ):
        model(x)
    assert_same_bits(model(x), plain)


def test_rows_that_the_evaluations_do_not_divide_with_three_dimensions():
    """5 sequences of 2 tokens: the 10 rows would divide, the batch does not."""
    model = block()
    with (
        pytest.raises(ValueError, match="5 rows do not divide into 2 evaluations"),
        qzo.evaluating(model, qzo.Evaluations([1, 1], [0.1, -0.1])),
    ):
        model(torch.randn(5, 2, 64))


def test_evaluating_takes_evaluations():
    with pytest.raises(TypeError, match="got list"), qzo.evaluating(block(), [1]):
        pass


def test_row_shared_noise_is_an_epilogue_whose_noise_is_that_of_the_first_scale():
    model = block()
    name, layer = next(iter(layers(model).items()))
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
