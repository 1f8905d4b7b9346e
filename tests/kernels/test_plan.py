"""Plans: made once for a weight and rows, launched with packed arguments, void when a tensor moves."""
import copy
import dataclasses
import io
import weakref

import pytest
import torch

import qzo
from qzo.kernels import plan
from qzo.kernels.operands import MOST_PLANS
from qzo.nn import ops
from tests.support.close import assert_same_bits
from tests.support.matmuls import TILE, Matmul
from tests.support.small_layers import asymmetric

SPLIT = dataclasses.replace(TILE, splits=4)


def plan_of(matmul, tile=SPLIT):
    weight, perturbation = matmul.operands()
    return plan.Plan(weight, perturbation, len(matmul.x), matmul.x.dtype,
                     plan.Options(tile, asm=False)), perturbation


def run(made, matmul, perturbation):
    y = torch.full((len(matmul.x), matmul.n), torch.nan)
    made(matmul.x, perturbation.seeds, perturbation.coefs, y)
    return y


# ------------------------------------------------------------------------------------------- the sum of the splits

def test_parts_are_added_in_their_order_then_the_bias(monkeypatch):
    matmul = Matmul(k=1024, group=64, bias=True)
    made, perturbation = plan_of(matmul)
    kept, scratch = [], plan.Plan.scratch
    monkeypatch.setattr(plan.Plan, "scratch", lambda self, shape: kept.append(scratch(self, shape)) or kept[-1])
    y = run(made, matmul, perturbation)
    (parts,) = kept
    assert parts.shape == (4, len(matmul.x), matmul.n)
    assert_same_bits(y, ((parts[0] + parts[1]) + parts[2]) + parts[3] + matmul.bias_values.float())


def test_a_plan_that_runs_again_finds_its_counters_at_zero():
    matmul = Matmul(k=1024, group=64)
    made, perturbation = plan_of(matmul)
    first = run(made, matmul, perturbation)
    counters = made.arguments["counters_ptr"]
    assert counters.dtype == torch.int32
    assert counters.numel() == made.grid[0] * made.grid[1]
    assert not counters.any()
    assert_same_bits(run(made, matmul, perturbation), first)


# ------------------------------------------------------------------------------------------- packed arguments

class Recorder:
    """Stands for a compiled kernel: takes what Triton would be given, then what its launcher is given."""

    def __init__(self, kernel):
        self.arg_names, self.fn, self.calls = kernel.arg_names, kernel.fn, []

    def __getitem__(self, grid):
        def launch(*packed, **named):
            self.calls.append((grid, packed, named))
            return self
        return launch


@pytest.mark.parametrize("others", [0, 1, 2])
def test_later_launches_say_the_same_in_the_order_of_the_kernels_arguments(monkeypatch, others):
    recorder = Recorder(plan._qmm_kernel)
    monkeypatch.setattr(plan, "_qmm_kernel", recorder)
    matmul = Matmul(k=1024, group=64, zeros="uint8", bias=True)
    weight, perturbation = matmul.operands()
    more = [dataclasses.replace(matmul, n=n, base4=n + 1).operands()[0] for n in (20, 40)[:others]]
    made = plan.Plan(weight, perturbation, len(matmul.x), torch.float16, plan.Options(SPLIT, asm=False), more)
    ys = [torch.empty(len(matmul.x), member.out_features) for member in (weight, *more)]
    for _ in range(2):
        made(matmul.x, perturbation.seeds, perturbation.coefs, *ys)
    (grid, positional, first), (later_grid, packed, named) = recorder.calls
    assert later_grid == grid == made.grid
    assert not positional
    assert not named
    assert set(first) - set(made.options) == set(recorder.arg_names)
    later = dict(zip(recorder.arg_names, packed, strict=True))
    fresh = {"partials_ptr"}            # allocated anew by each call
    for name in set(later) - fresh:
        value = first[name]
        assert later[name] == (value.data_ptr() if isinstance(value, torch.Tensor) else value), name
    for number, (member, y) in enumerate(zip((weight, *more), ys, strict=True)):
        mine = str(number) if number else ""
        assert first[f"y{mine}_ptr"] is y
        assert [first[f"{name}{mine}_ptr"] for name in ("codes", "scales", "zeros", "bias")] == [
            member.codes, member.scales, member.zeros, member.bias]
        assert [first[f"base4_{number}" if number else "base4"], first[f"N{mine}"]] == [
            member.base4, member.out_features]


# ------------------------------------------------------------------------------------------- a layer's plans

@pytest.fixture
def made(monkeypatch):
    """Every plan that is made, in order."""
    found, real = [], ops._plan
    monkeypatch.setattr(ops, "_plan", lambda x, *rest: found.append(tuple(x.shape)) or real(x, *rest))
    return found


def test_a_layer_plans_once_for_each_number_of_rows(made):
    layer = asymmetric()
    model = torch.nn.Sequential(layer)
    for rows in (4, 4, 6, 4):
        for seed in (1, 2):
            with qzo.evaluating(model, qzo.Evaluations([seed, seed], [0.1, -0.1])):
                layer(torch.randn(rows, layer.in_features))
    assert [rows for rows, _ in made] == [4, 6]


def test_plans_are_bounded(made):
    layer = asymmetric()
    for rows in range(1, MOST_PLANS + 3):
        layer(torch.randn(rows, layer.in_features))
    assert len(layer.kernel_weight().plans) == MOST_PLANS
    layer(torch.randn(1, layer.in_features))
    assert len(made) == MOST_PLANS + 3, "the first was dropped"


CHANGES = {
    "another bias": lambda layer: layer.bias.data.add_(1.0),
    "a bias in other memory": lambda layer: setattr(layer.bias, "data", layer.bias.data + 1),
    "another arena": lambda layer: setattr(layer.arena, "data", layer.arena.data * 2),
    "scales in place": lambda layer: layer.arena.data.mul_(2),
    "other zeros": lambda layer: setattr(layer, "zeros", (layer.zeros + 1) % 16),
    "other codes": lambda layer: setattr(layer, "codes", layer.codes.flip(0)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_that_changes_is_multiplied_as_it_was(change):
    layer = asymmetric(float_zeros=False)
    x = torch.randn(4, layer.in_features)
    before = layer(x)
    CHANGES[change](layer)
    after = layer(x)
    assert float((after - before).abs().max()) > 1e-3
    want = x.double() @ layer.dequantize().double().T + layer.bias.double()
    assert torch.allclose(after.double(), want, rtol=1e-4, atol=1e-5)


def test_another_table_is_the_one_that_runs():
    layer = qzo.QZOLinear.from_linear(torch.nn.Linear(128, 16, bias=False), group_size=64, table="nf4")
    x = torch.randn(4, 128)
    layer(x)
    assert layer.table is not None
    layer.table = tuple(2 * entry for entry in layer.table)
    assert torch.allclose(layer(x), x @ layer.dequantize().T, rtol=1e-4, atol=1e-5)


def test_what_is_replaced_is_let_go():
    """A device holds planes or rows, never both: not by way of a plan either."""
    for let_go in (lambda layer: setattr(layer, "codes", None), lambda layer: layer.to("meta")):
        layer = asymmetric()
        layer(torch.randn(4, layer.in_features))
        held = weakref.ref(layer.codes)
        let_go(layer)
        assert held() is None


def test_a_state_dict_that_is_loaded_is_what_runs():
    one, other = asymmetric(), asymmetric()
    other.codes, other.zeros = other.codes.flip(0), (other.zeros + 3) % 16
    other.arena.data.mul_(3)
    x = torch.randn(4, one.in_features)
    one(x)
    one.load_state_dict(other.state_dict())
    assert_same_bits(one(x), other(x))


def test_a_copy_makes_plans_of_its_own():
    layer = asymmetric()
    x = torch.randn(4, layer.in_features)
    y = layer(x)
    stored = io.BytesIO()
    torch.save(layer, stored)
    stored.seek(0)
    for other in (copy.deepcopy(layer), torch.load(stored, weights_only=False)):
        assert other._planned is None
        assert_same_bits(other(x), y)
        assert other.kernel_weight() is not layer.kernel_weight()


def test_what_asks_for_gradients_is_refused_and_not_answered_without():
    """The kernels have no backward: an operator that says so runs, not the kernel alone."""
    layer = asymmetric()
    y = layer(torch.randn(4, layer.in_features, requires_grad=True))
    assert y.requires_grad
    with pytest.raises(RuntimeError, match="autograd"):
        y.sum().backward()


# ------------------------------------------------------------------------------------------- the operator

def test_compiled_code_finds_the_layers_own_plans(made):
    """By the tensors it is given; a new seed is no new plan."""
    layer = asymmetric()
    x = torch.randn(4, layer.in_features)
    weight = layer.kernel_weight()
    arguments = (x, weight.codes, weight.scales, weight.zeros, weight.bias)
    for seed in (1, 2):
        torch.ops.qzo.qmm(*arguments, torch.tensor([seed]), torch.tensor([0.1]), weight.base4, weight.group, 1, True,
                          torch.float32)
    assert len(made) == len(weight.plans) == 1
    torch.ops.qzo.qmm(*arguments[:-1], None, torch.tensor([1]), torch.tensor([0.1]), weight.base4, weight.group, 1,
                      True, torch.float32)
    assert len(weight.plans) == 1, "without the bias it is another weight"


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16, 64])
def test_overlapping_launches_and_repetitions_have_the_same_bits(rows):
    """A chain of layers, each of which reads what the one before has written; eager launches, packed arguments."""
    model = qzo.quantize_(torch.nn.Sequential(*(torch.nn.Linear(1024, 1024) for _ in range(8)))).cuda().half()
    x = torch.randn(2 * rows, 1024, device="cuda").half()
    evaluations = qzo.Evaluations([3, 3], [0.01, -0.01])
    found = []
    for overlap in (True, False):
        with qzo.backend(overlap=overlap), qzo.evaluating(model, evaluations):
            found += [model(x) for _ in range(20)]
    for y in found:
        assert_same_bits(y.cpu(), found[0].cpu())
