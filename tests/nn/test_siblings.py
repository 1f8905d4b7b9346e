"""Layers of a module that are given the same x find each other, whatever callers do (test_shared_launches: how they
are multiplied)."""

import contextlib
import copy
import dataclasses
import gc
import io
import weakref

import pytest
import torch
from torch import nn

import qzo
from qzo.kernels import tiles
from qzo.nn import ops
from qzo.nn.siblings import MOST_KNOWN
from tests.support.close import assert_same_bits
from tests.support.matmuls import TILE


class Attention(nn.Module):
    """q, k and v of one x, then o; another forward for each test that wants one."""

    def __init__(self, sizes=(48, 47, 33), bias=True):
        super().__init__()
        torch.manual_seed(2)
        self.v, self.k, self.q = (nn.Linear(64, n, bias=bias) for n in reversed(sizes))
        self.o = nn.Linear(sum(sizes), 64)
        self.ask = self.all

    def all(self, x):
        return self.q(x), self.k(x), self.v(x)

    def forward(self, x):
        return self.o(torch.cat(self.ask(x), -1))


@pytest.fixture(autouse=True)
def triton():
    with qzo.backend("triton"):
        yield


def attention(**options):
    return qzo.quantize_(Attention(**options), group_size=32)


def xs(count=1, rows=4):
    random = torch.Generator().manual_seed(3)
    return [torch.randn(rows, 5, 64, generator=random).half() for _ in range(count)]


def alone(model, x, ask=None):
    """What the model gives with a launch for each layer, its memory of its calls left alone."""
    other = copy.deepcopy(model)
    other.ask = ask or other.all
    with qzo.backend(shared_launches=False):
        return other(x)


def taught(**options):
    """A model whose layers know who shares x with whom."""
    model = attention(**options)
    model(*xs())
    return model


def test_from_the_second_forward_on_there_is_one_launch(launches):
    model = attention()
    want = alone(model, *xs())
    for expected in ([1, 1, 1, 1], [3, 1], [3, 1]):
        launches.clear()
        assert_same_bits(model(*xs()), want)
        assert launches == expected


def test_the_same_x_again_is_another_forward(launches):
    model, (x,) = attention(), xs()
    for expected in ([1, 1, 1], [3], [3]):
        launches.clear()
        model.all(x)
        assert launches == expected


def test_sorted_columns_keep_a_layer_apart(launches):
    model = taught()
    model.k.perm = torch.arange(63, -1, -1)
    launches.clear()
    assert_same_bits(model(*xs()), alone(model, *xs()))
    assert launches == [2, 1, 1] + [1] * 4


def test_under_evaluations_of_any_seed_and_number(launches):
    model = taught()
    for seeds, coefs in (([1, 1], [0.1, -0.1]), ([2, 2], [0.1, 0.0]), ([3], [0.1]), ([4, 5, 6], [0.1, 0.2, 0.3])):
        x, evaluations = xs(rows=2 * len(seeds))[0], qzo.Evaluations(seeds, coefs)
        other = copy.deepcopy(model)
        with qzo.evaluating(model, evaluations), qzo.evaluating(other, evaluations):
            launches.clear()
            y = model(x)
            assert launches == [3, 1]
            with qzo.backend(shared_launches=False):
                assert_same_bits(y, other(x))


@pytest.mark.parametrize("choice", [dict(shared_launches=False), dict(name="torch")])
def test_where_nothing_is_shared(choice, launches):
    model = taught()
    with qzo.backend(**choice):
        launches.clear()
        y = model(*xs())
        assert max(launches, default=1) == 1
    if "name" not in choice:
        assert_same_bits(y, model(*xs()))


def test_layers_with_a_tile_of_their_own_are_multiplied_alone(monkeypatch, launches):
    """With grouped queries k and v are narrower than q, which may mean other splits."""
    pick = tiles.pick
    monkeypatch.setattr(tiles, "pick", lambda p: dataclasses.replace(pick(p), splits=1 + (p.n < 44)))
    model = attention(sizes=(48, 40, 40))
    want = model(*xs())
    launches.clear()
    assert_same_bits(model(*xs()), want)
    assert launches == [1, 2, 1]


def test_more_rows_than_a_launch_is_shared_for(launches):
    model = attention()
    for rows, shared in ((tiles.SHARED_UP_TO, True), (tiles.SHARED_UP_TO + 1, False)):
        x = torch.randn(rows, 64).half()
        model(x)
        launches.clear()
        model(x.clone())
        assert launches == ([3, 1] if shared else [1, 1, 1, 1])


def test_five_layers_share_two_launches(launches):
    class Five(nn.ModuleList):
        def forward(self, x):
            return [layer(x) for layer in self]

    model = qzo.quantize_(Five(nn.Linear(64, n) for n in (16, 8, 24, 40, 9)), group_size=32)
    (x,) = xs()
    want = model(x)
    launches.clear()
    for y, one in zip(model(x), want, strict=True):
        assert_same_bits(y, one)
    assert launches == [3, 2]


def test_who_trains_and_who_does_not_share_apart(launches):
    model = attention()
    qzo.train_only_(model, lambda name: name in ("q", "k"))
    evaluations = qzo.Evaluations([1, 1], [0.1, -0.1])
    with qzo.evaluating(model, evaluations):
        want = model(*xs())
        launches.clear()
        assert_same_bits(model(*xs()), want)
        assert launches == [2, 1, 1]
    qzo.train_only_(model, lambda name: name == "o")
    model(*xs())
    launches.clear()
    model(*xs())
    assert launches == [3, 1], "scales of layers that are frozen lie apart"


# ------------------------------------------------------------------------------------------- whatever callers do

ASKS = {
    "without v": lambda m: lambda x: (m.q(x), m.k(x), torch.zeros(*x.shape[:-1], 33).half()),
    "in another order": lambda m: lambda x: (lambda v, q, k: (q, k, v))(m.v(x), m.q(x), m.k(x)),
    "k of another x": lambda m: lambda x: (m.q(x), m.k(x.flip(0)), m.v(x)),
    "of equal copies": lambda m: lambda x: (m.q(x), m.k(x.clone()), m.v(x.clone())),
    "q twice": lambda m: lambda x: (m.q(x), (m.q(x), m.k(x))[1], m.v(x)),
    "x changed in place": lambda m: lambda x: (m.q(x), m.k(x.add_(1)), m.v(x)),
    "changed and changed back": lambda m: lambda x: (m.q(x), m.k(x.mul_(2)), m.v(x.div_(2))),
    "o first": lambda m: lambda x: (m.o(torch.cat([m.q(x), m.k(x), m.v(x)], -1))[..., :48], m.k(x), m.v(x)),
}


@pytest.mark.parametrize("ask", ASKS)
def test_a_forward_that_goes_another_way(ask, nan_poison):
    model = taught()
    for turn in (ask, None, ask, ask, None, None):
        x = xs()[0]
        other = copy.deepcopy(model)
        other.ask = ASKS[turn](other) if turn else other.all
        model.ask = ASKS[turn](model) if turn else model.all
        with qzo.backend(shared_launches=False):
            want = other(x.clone())
        assert_same_bits(model(x), want)


def test_an_output_that_nobody_asks_for_is_dropped_and_not_made_again(launches):
    model = taught()
    model.ask = ASKS["without v"](model)
    launches.clear()
    for _ in range(3):
        model(*xs())
    assert launches == [3, 1, 1, 1, 1, 2, 1]
    assert not model.q.siblings._run.kept


CHANGES = {
    "a step": lambda m: m.k.arena.data.mul_(2),
    "codes": lambda m: setattr(m.k, "codes", m.k.codes.flip(0)),
    "a bias": lambda m: m.k.bias.add_(1),
    "a bias in other memory": lambda m: setattr(m.k.bias, "data", m.k.bias.data + 1),
    "columns": lambda m: setattr(m.k, "perm", torch.arange(63, -1, -1)),
    "a state dict": lambda m: m.load_state_dict(m.state_dict() | {"k.codes": m.k.state_dict()["codes"].flip(1)}),
    "a dtype": lambda m: setattr(m.k, "out_dtype", torch.float32),
    "who trains": lambda m: setattr(m.k, "trainable", False),
}


@pytest.mark.parametrize(
    ("change", "between"),
    [
        *((change, False) for change in CHANGES),
        *((change, True) for change in CHANGES if change != "a bias in other memory"),
    ],
)  # which nothing tells
def test_what_changes_is_multiplied_as_it_is(change, between):
    """Between two forwards, or between two layers of one."""
    (x,) = xs()
    evaluations = qzo.Evaluations([1, 1], [0.1, -0.1])
    model = taught()
    with qzo.evaluating(model, evaluations):
        model(x)
        if between:
            model.q(x)
        CHANGES[change](model)
        found = [model.k(x)] if between else [*model.all(x)]
    for together in model.q.siblings._plans.values():
        assert [layer().kernel_weight() for layer in together.layers] == list(together.weights[1:])
    other = copy.deepcopy(model)
    with qzo.backend(shared_launches=False), qzo.evaluating(other, evaluations):
        want = [other.k(x)] if between else [*other.all(x)]
    for y, one in zip(found, want, strict=True):
        assert_same_bits(y, one)


@pytest.mark.parametrize("between", ["other seeds", "no evaluations", "tile", "coefficients", "seeds"])
def test_what_another_perturbation_or_choice_asks_for_is_not_what_was_kept(between, launches):
    model, (x,) = taught(), xs()
    first = now = qzo.Evaluations([1, 1], [0.1, -0.1])
    with qzo.evaluating(model, first):
        model.all(x)
        model.q(x)
    if between == "coefficients":  # in place
        first.kernel_coefs.mul_(0.5)
    if between == "seeds":
        first.seeds.add_(1)
    if between in ("other seeds", "no evaluations"):
        now = qzo.Evaluations([2, 2], [0.1, -0.1]) if between == "other seeds" else None
    with qzo.backend(tile=TILE) if between == "tile" else contextlib.nullcontext():
        model.k.evaluations = now
        launches.clear()
        y, other = model.k(x), copy.deepcopy(model)
        assert len(launches) == 1
        with qzo.backend(shared_launches=False):
            assert_same_bits(y, other.k(x))


def test_inference_tensors_and_traced_calls_share_nothing(launches):
    model = taught()
    want = model(*xs())
    for inference in (True, False):
        launches.clear()
        with torch.inference_mode(inference):
            assert_same_bits(model(xs()[0].requires_grad_(not inference)).detach(), want)
        assert launches == [1, 1, 1, 1]


# ------------------------------------------------------------------------------------------- copies and memory


def test_copies_learn_for_themselves(launches):
    model = taught()
    stored = io.BytesIO()
    torch.save(model.q, stored)
    stored.seek(0)
    assert_same_bits(torch.load(stored, weights_only=False)(*xs()), model.q(*xs()))
    other = copy.deepcopy(model)
    assert other.q.siblings is other.k.siblings is other.v.siblings is not model.q.siblings
    assert not other.q.siblings._after
    want = alone(model, *xs())
    other.ask = other.all  # a copied method is the original's
    for expected in ([1, 1, 1, 1], [3, 1]):
        launches.clear()
        assert_same_bits(other(*xs()), want)
        assert launches == expected


def test_nothing_is_kept_alive():
    model, (x,) = taught(), xs()
    gc.collect()
    gc.disable()
    try:
        held = [weakref.ref(x), weakref.ref(model.q(x)), weakref.ref(model.k(x)), weakref.ref(model.v(x))]
        assert [y() for y in held[1:]] == [None] * 3, "handed over once"
        del x
        assert held[0]() is None
        x = xs()[0]
        model.q(x)
        kept = weakref.ref(next(iter(model.q.siblings._run.kept.values()))[0])
        model.q(x.clone())
        assert kept() is None, "dropped at the next call with another x"
        for _ in range(3):
            model.all(x)
        assert any(together.layers for together in model.q.siblings._plans.values())
        codes = weakref.ref(model.k.codes)
        model.k.codes = model.k.codes.clone()
        assert codes() is None
        arena = weakref.ref(model.k.arena.data)
        model.to("meta")
        assert arena() is None
    finally:
        gc.enable()


def test_layers_are_let_go():
    model = taught()
    held = [weakref.ref(layer) for layer in (model.q, model.k, model.v)]
    model.ask = None
    gc.disable()
    try:
        del model
        assert [layer() for layer in held] == [None] * 3
    finally:
        gc.enable()


def test_a_layer_that_is_taken_away_is_not_missed():
    model = taught()
    want, *_ = model.all(*xs())
    model.k = model.ask = None
    gc.collect()
    for _ in range(2):
        assert_same_bits(model.q(*xs()), want)


def test_what_is_known_is_bounded():
    model = taught()
    for rows in range(1, MOST_KNOWN + 9):
        model(torch.randn(rows, 64).half())
    assert len(model.q.siblings._plans) <= MOST_KNOWN


def test_the_door_says_which_weights_a_launch_is_for():
    """Not those of a CPU's rows; and what does not fit is an error that names it."""
    model = attention()
    weights = [layer.kernel_weight() for layer in (model.q, model.k)]
    (x,) = xs()
    perturbation = ops.plain(x.device)
    assert all(weight.in_rows for weight in weights)
    assert ops.plan_together(x, weights, perturbation) == ((), None)
    with pytest.raises(ValueError, match="x has 32 columns"):
        ops.plan_together(x[..., :32], weights, perturbation)
