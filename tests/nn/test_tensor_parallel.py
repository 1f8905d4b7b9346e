"""Layers in parts on two ranks: what a rank holds, what it computes, and that noise does not know of it."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import qzo
from qzo.kernels.dequantize import dequantize_torch
from qzo.kernels.noise import LAWS
from qzo.kernels.operands import Perturbation
from qzo.nn.layers import arena_of, layers
from qzo.nn.part import STYLES
from qzo.nn.weights import to_planes
from tests.support import ranks
from tests.support.close import assert_same_bits
from tests.support.matmuls import TILE
from tests.support.small_layers import assert_same, asymmetric, bits

PLAN = {"up": "colwise", "down": "rowwise", "wide": "colwise_gather_output", "own": "rowwise_split_input"}


class Mlp(nn.Module):
    """A layer of each style. Over two ranks `down` has 5 groups each, which are no whole quads."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.up, self.down = nn.Linear(96, 320), nn.Linear(320, 64)
        self.wide, self.own = nn.Linear(64, 96, bias=False), nn.Linear(96, 16)

    def forward(self, x):
        return self.own(self.wide(self.down(self.up(x).relu())))


def mlp(symmetric=False):
    return qzo.quantize_(Mlp(), group_size=32, symmetric=symmetric)


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=32,
            initializer_range=0.2,
        )
    )


EVALUATIONS = qzo.Evaluations([5, 5, -3, 9], [0.1, -0.1, 0.05, 0.0], noise="ih4")
X = torch.randn(16, 96, generator=torch.Generator().manual_seed(4))


def outputs(model, x, names=()):
    """What the model gives, and what its modules of these names do, under EVALUATIONS and without noise."""
    found: dict[str, list] = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda _, __, y, name=name: found[name].append(y.tolist()))
        for name in names
    ]
    with torch.no_grad(), qzo.evaluating(model, EVALUATIONS):
        found["y"] = [model(x).tolist()]
    with torch.no_grad():
        found["y"].append(model(x).tolist())
    for hook in hooks:
        hook.remove()
    return found


def on_a_rank(model, x, names):
    cut = qzo.shard_(model, PLAN)
    held = {name: layer.codes.nbytes for name, layer in layers(model).items()}
    return {"cut": cut, "held": held, **outputs(model, x, names)}


def test_each_style_on_two_ranks(tmp_path):
    """By outputs a rank has the bits of its slice; a sum over inputs is another only in its last digits, and the same
    on both ranks. Columns of a layer that is cut by outputs may be sorted (act-order)."""
    model = mlp()
    model.up.perm = torch.arange(96).flip(0)
    before = bits(model)
    found = ranks.run(tmp_path, 2, on_a_rank, model, X, ["up", "down"])
    want = outputs(model, X, ["up", "down"])
    for name in ("y", "down"):
        assert found[0][name] == found[1][name]
        torch.testing.assert_close(torch.tensor(found[0][name]), torch.tensor(want[name]), rtol=1e-4, atol=1e-5)
    halves = [torch.tensor(one["up"]) for one in found]
    assert_same_bits(torch.cat(halves, 2), torch.tensor(want["up"]))
    assert found[0]["cut"] == PLAN
    assert_same(model, before)  # forks do not share it


def test_a_rank_holds_its_part_of_the_codes(tmp_path):
    model = qzo.quantize_(nn.Sequential(nn.Linear(1024, 256), nn.Linear(256, 512)), group_size=32)

    def held(style):
        qzo.shard_(model, {"*": style})
        return [layer.codes.nbytes for layer in layers(model).values()]

    whole = [layer.codes.numel() - 4 * layer.out_features for layer in layers(model).values()]  # a row ends in 4 bytes
    for number, style in enumerate(STYLES):
        for found in ranks.run(tmp_path / str(number), 2, held, style):
            for (name, layer), size, mine in zip(layers(model).items(), whole, found, strict=True):
                rows = layer.out_features // (1 if style.startswith("rowwise") else 2)
                assert mine == size // 2 + 4 * rows, (style, name)


def written(model):
    """Every layer's weight under an evaluation, as the noise law and the scales give it, of the part that is held."""
    found = {}
    perturbation = Perturbation(torch.tensor([77]), torch.tensor([0.125]), LAWS["rademacher"])
    for name, layer in layers(model).items():
        weight = layer.kernel_weight()
        w = torch.empty(weight.out_features, weight.in_features)
        dequantize_torch(weight, perturbation, w, e=0, start=0)
        found[name] = w
    return found


def test_perturbed_weights_of_all_parts_are_those_of_the_whole(tmp_path):
    model = mlp()

    def mine(styles):
        qzo.shard_(model, styles)
        own = {}
        for name, w in written(model).items():
            part = layers(model)[name].part
            assert part is not None
            first = part.own.start - part.columns.start if part.by_inputs else 0
            own[name] = (w[:, first : first + part.own.stop - part.own.start] if part.by_inputs else w).tolist()
        return own

    whole = written(model)
    for number, style in enumerate(("colwise", "rowwise")):
        parts = ranks.run(tmp_path / str(number), 2, mine, dict.fromkeys(PLAN, style))
        for name, w in whole.items():
            assert_same_bits(torch.cat([torch.tensor(one[name]) for one in parts], number), w)


@pytest.mark.parametrize("style", ["colwise", "rowwise"])
def test_a_layer_is_whole_again(style, tmp_path):
    """Zero points too, and planes as on a GPU. In between nothing is saved."""
    model = mlp()
    model.planes = asymmetric(k=192, n=8, float_zeros=True)
    model.planes.codes = to_planes(model.planes.codes, 192)
    before, state = bits(model), copy.deepcopy(model.state_dict())

    def there_and_back():
        qzo.shard_(model, dict.fromkeys([*PLAN, "planes"], style))
        assert_same(model, before)
        with pytest.raises(RuntimeError, match="one rank's part"):
            model.load_state_dict(state)
        for refused, text in (
            (model.state_dict, "one rank's part of its codes: qzo.unshard_"),  # of which the first alone may be asked
            (lambda: qzo.save_pretrained(model, tmp_path), "unshard_"),
            (lambda: qzo.shard_(model, PLAN), "up is cut in parts already"),
            (lambda: qzo.offload(model), "cut in parts .*, which cannot be offloaded"),
        ):
            with pytest.raises(ValueError, match=text):
                refused()
        qzo.unshard_(model)
        assert_same(model, before)
        assert all(layer.part is None for layer in layers(model).values())
        saved = model.state_dict()
        assert all(torch.equal(saved[name], tensor) for name, tensor in state.items())
        return "whole"

    assert ranks.run(tmp_path, 2, there_and_back) == ["whole"] * 2


def test_kernels_run_a_part(tmp_path):
    """Of two layers that are given the same x, which run in one launch from the second time on."""
    model = nn.ModuleList([asymmetric(k=160, n=32), asymmetric(k=160, n=64)])
    arena_of(model)
    x, tile = torch.randn(2, 160), dataclasses.replace(TILE, outputs=16)

    def ys():
        with qzo.backend("triton", tile=tile), torch.no_grad(), qzo.evaluating(model, EVALUATIONS[:2]):
            return [[layer(x).tolist() for layer in model] for _ in range(2)]

    def cut():
        qzo.shard_(model, {"*": "colwise"})
        return ys()

    found = [[torch.tensor(y) for y in one[1]] for one in ranks.run(tmp_path, 2, cut)]
    for number, y in enumerate(ys()[1]):
        assert_same_bits(torch.cat([one[number] for one in found], 1), torch.tensor(y))


def test_a_models_own_plan(tmp_path):
    """A Llama of two key heads: attention, MLP and loss on two ranks."""
    model = qzo.quantize_(llama(), group_size=32)
    ids = torch.arange(24).view(4, 6)
    batch = qzo.pair({"input_ids": ids, "labels": ids}, 2)

    def losses():
        evaluations = qzo.Evaluations([5, 5], [0.05, -0.05])
        with torch.no_grad(), qzo.evaluating(model, evaluations):
            return qzo.losses(model, batch, 2).tolist()

    def sharded():
        cut = qzo.shard_(model)
        return [len(cut), losses()]

    found, want = ranks.run(tmp_path, 2, sharded), losses()
    assert found[0] == found[1]
    assert found[0][0] == 14
    assert found[0][1] == pytest.approx(want, rel=1e-5)
    assert found[0][1] != losses_of_other_noise(model, batch)


def losses_of_other_noise(model, batch):
    with torch.no_grad(), qzo.evaluating(model, qzo.Evaluations([6, 6], [0.05, -0.05])):
        return qzo.losses(model, batch, 2).tolist()


REFUSED = {
    "no plan": (None, "Mlp has no tp_plan"),
    "another style": ({"up": "packed_colwise"}, "up: the plan cuts it 'packed_colwise'; 'colwise'"),
    "names nothing": ({"layers.*.up": "colwise"}, "names no quantized layer of Mlp; it names layers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_plan_that_cannot_be_followed_is_refused(case):
    plan, text = REFUSED[case]
    with pytest.raises(ValueError, match=text):
        qzo.shard_(mlp(), plan)


def test_what_ranks_cannot_divide_is_refused(tmp_path):
    """By its name and both numbers, on all ranks, and nothing is changed."""
    model = mlp()
    attention = qzo.quantize_(llama(), group_size=32)
    partly = qzo.quantize_(Mlp(), group_size=32, skip=("down",))
    sorted_ = mlp()
    sorted_.own.perm = torch.arange(96)

    def refusals():
        found = []
        for one, plan in (
            (model, {"down": "rowwise", "up": "colwise"}),
            (attention, {"model.layers.*.self_attn.k_proj": "colwise"}),
            (partly, PLAN),
            (sorted_, {"own": "rowwise_split_input"}),
        ):
            before = arena_of(one), {name: layer.codes for name, layer in layers(one).items()}
            with pytest.raises(ValueError) as error:
                qzo.shard_(one, plan)
            assert all(layer.codes is before[1][name] for name, layer in layers(one).items())
            found.append(str(error.value))
        return found

    [first, *others] = ranks.run(tmp_path, 3, refusals)
    assert others == [first] * 2
    assert first[0].startswith("up: 320 outputs (colwise) cannot be divided over 3 ranks")
    assert first[1].startswith("model.layers.0.self_attn.k_proj: 32 outputs (colwise) cannot be divided over 3")
    assert first[2].startswith("up: ") or first[2].startswith("down: the plan cuts it (rowwise), but it is a float")
    assert first[3].startswith("own: its columns are sorted by group")
