"""A step of QZO: losses in, scales out; the same bits through Triton, torch and the oracle, and again by replay."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn

import qzo
from qzo.nn.layers import arena_of
from tests import oracle
from tests.support.journals import read_whole


def two_layers(seed=0):
    torch.manual_seed(seed)
    return qzo.quantize_(nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 32)), group_size=32)


def given(values):
    """Closures that return these losses, one list a step, after a forward."""
    turns = iter(values)
    return lambda: torch.tensor(next(turns))


LOSSES = [[1.0, 0.75, 2.0, 2.125], [0.5, 0.625, 1.0, 1.0], [0.1, 0.7, 0.3, 0.2]]


@pytest.mark.parametrize("noise", ["rademacher", "ih4"])
@pytest.mark.parametrize(("relative", "sharing"), [(True, "group"), (False, "group"), (True, "row")])
def test_three_steps_through_triton_have_the_bits_of_torch(noise, relative, sharing):
    """Whole steps: the perturbed forward runs in both, the update follows from given losses."""
    arenas = []
    for backend in ("triton", "torch"):
        model = two_layers()
        optimizer = qzo.QZO(
            model, lr=3e-2 if relative else 1e-4, noise=noise, relative=relative, sharing=sharing, directions=2, seed=7
        )
        turns = iter(LOSSES)

        def closure(model=model, turns=turns):
            model(torch.ones(4, 96, dtype=torch.float16))
            return torch.tensor(next(turns))

        with qzo.backend(backend):
            for _ in LOSSES:
                optimizer.step(closure)
        arenas.append(arena_of(model).data)
    assert torch.equal(arenas[0], arenas[1])
    assert not torch.equal(arenas[0], arena_of(two_layers()).data)


def test_a_step_is_the_papers():
    """d = (L+ - L-) / 2 eps, clipped; a = -(lr / J) d; s <- s * (1 + sum a_j z_j), against tests/oracle.py."""
    model = two_layers()
    before = arena_of(model).data.clone()
    optimizer = qzo.QZO(model, lr=0.04, eps=0.02, clip=4.0, directions=2, seed=11)
    optimizer.step(given([[1.0, 0.9, 3.0, 1.0]]))
    assert optimizer.last is not None
    assert optimizer.last.derivatives == pytest.approx([2.5, 50.0], rel=1e-6)
    a = [-(0.04 / 2) * d for d in ((torch.tensor(1.0) - torch.tensor(0.9)).item() / 0.04, 4.0)]
    assert optimizer.last.applied == pytest.approx(a, rel=1e-6)
    noises = [oracle.raw_at("rademacher", oracle.step_seed(11, 0, j), torch.arange(len(before))) for j in range(2)]
    want = oracle.update(before, noises, optimizer.last.applied, relative=True, floor=2.0**-24)
    assert torch.equal(arena_of(model).data, want)


def test_equal_losses_change_no_bit():
    model = two_layers()
    before = arena_of(model).data.clone()
    optimizer = qzo.QZO(model, lr=1.0)
    for _ in range(3):
        optimizer.step(given([[0.5, 0.5]]))
    assert torch.equal(arena_of(model).data, before)


def test_evaluations_leave_nothing_behind():
    model, x = two_layers(), torch.randn(8, 96)
    before, plain = arena_of(model).data.clone(), model(x)
    for seed in range(5):
        with qzo.evaluating(model, qzo.Evaluations([seed, seed], [0.3, -0.3])):
            assert not torch.equal(model(x), plain)
    assert torch.equal(arena_of(model).data, before)
    assert torch.equal(model(x), plain)


def test_it_learns_and_paired_equals_unpaired():
    x, target = torch.randn(16, 96), torch.randn(16, 32)

    def paired(model):
        return (model(qzo.pair(x, 4)) - qzo.pair(target, 4)).square().view(4, -1).mean(1)

    ends = []
    for form in (True, False):
        model = two_layers()
        optimizer = qzo.QZO(model, lr=2e-2, directions=2)
        closure = (lambda m=model: paired(m)) if form else (lambda m=model: (m(x) - target).square().mean())
        losses = [optimizer.step(closure, paired=form) for _ in range(15)]
        assert losses[-1] < losses[0]
        ends.append(arena_of(model).data)
    assert torch.allclose(ends[0], ends[1], rtol=1e-3)  # the mean of a batch is added up in another order


@pytest.mark.parametrize("bad", [lambda: torch.tensor(1.0), lambda: torch.ones(3), lambda: 1.0])
def test_a_closure_of_another_shape_is_refused(bad):
    with pytest.raises(ValueError, match=r"must return a tensor \[2\]"):
        qzo.QZO(two_layers(), lr=0.1).step(bad)


def test_a_loss_that_is_not_finite_skips_the_step(tmp_path):
    model = two_layers()
    optimizer = qzo.QZO(model, lr=0.1, journal=tmp_path / "j", max_skipped=3)
    optimizer.step(given([[1.0, 0.5]]))
    before = arena_of(model).data.clone()
    optimizer.step(given([[1.0, math.nan]]))
    optimizer.step(given([[math.inf, 1.0]]))
    assert optimizer.last is not None
    assert optimizer.last.skipped
    assert torch.equal(arena_of(model).data, before)
    with pytest.raises(FloatingPointError, match="3 steps in a row had a NaN or infinite loss"):
        optimizer.step(given([[math.nan, math.nan]]))
    optimizer.close()
    again = two_layers()
    assert qzo.replay(again, tmp_path / "j") == 4
    assert torch.equal(arena_of(again).data, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_float16_is_named_where_losses_stay_infinite(dtype):
    model = two_layers().to(dtype)
    optimizer = qzo.QZO(model, lr=0.1, max_skipped=1)
    with pytest.raises(FloatingPointError, match="1 steps in a row") as caught:
        optimizer.step(given([[math.inf, 1.0]]))
    said = "float16 activations end at 65504: load the model in bfloat16 or float32 (--dtype bfloat16 or float32)"
    assert (said in str(caught.value)) == (dtype == torch.float16)
    optimizer = qzo.QZO(model, lr=0.1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        optimizer.step(given([[math.inf, 1.0]]))
        optimizer.step(given([[math.inf, 1.0]]))
    [text] = [str(warning.message) for warning in told if "step" in str(warning.message)]
    assert text.startswith("step 0 had a NaN or infinite loss and changes nothing; if that goes on: ")
    assert (said in text) == (dtype == torch.float16)
    assert "lower lr (0.1) or eps (0.01)" in str(caught.value)


def test_with_row_sharing_a_rows_scales_move_by_one_factor():
    model = two_layers()
    before, index = qzo.scales(model), qzo.scale_index(model)
    optimizer = qzo.QZO(model, lr=0.05, sharing="row", seed=3)
    seed = optimizer.evaluations().seeds[0].item()
    optimizer.step(given([[1.0, 0.9]]))
    for name, scales in qzo.scales(model).items():
        assert optimizer.last is not None
        factor = 1 + optimizer.last.applied[0] * qzo.noise("rademacher", seed, index[name][0])
        assert torch.equal(scales, before[name] * factor)
    assert len(factor.unique()) == 2


def test_row_sharing_is_relative_and_known():
    with pytest.raises(ValueError, match="sharing='row' scales a whole output row, so it is relative"):
        qzo.QZO(two_layers(), lr=0.1, sharing="row", relative=False)
    with pytest.raises(ValueError, match="sharing='rows': 'group'"):
        qzo.QZO(two_layers(), lr=0.1, sharing="rows")


@pytest.mark.parametrize(("sharing", "law"), [("group", "rademacher/1"), ("row", "rademacher-row/1")])
def test_resume_and_replay_end_in_the_same_bits(tmp_path, sharing, law):
    def run(journal, steps, resume=False):
        model = two_layers()
        optimizer = qzo.QZO(model, lr=0.05, directions=2, journal=journal, resume=resume, sharing=sharing)
        start = optimizer.param_groups[0]["step"]
        for t in range(start, steps):
            optimizer.step(given([[1.0 + 0.1 * t, 1.0, 0.3, 0.2 * t]]))
        optimizer.close()
        return arena_of(model).data

    whole = run(tmp_path / "a", 6)
    run(tmp_path / "b", 2)
    assert torch.equal(run(tmp_path / "b", 6, resume=True), whole)
    model = two_layers()
    assert qzo.replay(model, tmp_path / "a") == 6
    assert torch.equal(arena_of(model).data, whole)
    assert read_whole(tmp_path / "a")[0]["law"] == law


def test_a_journal_of_other_settings_is_not_resumed(tmp_path):
    qzo.QZO(two_layers(), lr=0.1, journal=tmp_path / "j").close()
    with pytest.raises(qzo.JournalError, match=r"its eps is 0\.01, this run's is 0\.02"):
        qzo.QZO(two_layers(), lr=0.1, eps=0.02, journal=tmp_path / "j", resume=True)


def test_a_submodule_is_a_step_of_its_own():
    model = two_layers()
    first = model[0].read_scales()
    optimizer = qzo.QZO(nn.ModuleDict({"only": model[2]}), lr=0.1)
    optimizer.step(given([[1.0, 0.0]]))
    assert torch.equal(model[0].read_scales(), first)
    assert len(optimizer.arena.slots) == 1


def test_it_is_a_torch_optimizer():
    model = two_layers()
    optimizer = qzo.QZO(model, lr=0.1, directions=2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5**t)
    optimizer.step(given(LOSSES))
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.05
    other = qzo.QZO(copy.deepcopy(model), lr=9.0, directions=2)
    other.load_state_dict(optimizer.state_dict())
    assert (other.param_groups[0]["lr"], other.param_groups[0]["step"]) == (0.05, 1)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"lr": -1}, "lr=-1"),
        ({"eps": 0}, "eps=0"),
        ({"clip": 0}, "clip=0"),
        ({"directions": 0}, "directions=0"),
        ({"noise": "white"}, "'white' is not a noise law"),
        ({"seed": 1 << 65}, "64-bit"),
    ],
)
def test_bad_settings(wrong, text):
    with pytest.raises(ValueError, match=text):
        qzo.QZO(two_layers(), **{"lr": 0.1, **wrong})


def test_nothing_to_train():
    with pytest.raises(ValueError, match="no QZOLinear layer that trains"):
        qzo.QZO(nn.Linear(4, 4), lr=0.1)


def test_an_eps_that_rounding_drowns_is_warned_of():
    model = two_layers().to(torch.bfloat16)
    with pytest.warns(UserWarning, match=r"eps=0.001 is too small for bfloat16 activations.*use eps >= 0.01"):
        qzo.QZO(model, lr=0.1, eps=1e-3)


def test_a_derivative_that_leaves_float32_is_an_error_and_moves_nothing():
    model = two_layers()
    before = arena_of(model).data.clone()
    with pytest.raises(FloatingPointError, match="leaves float32; lower lr or clip"):
        qzo.QZO(model, lr=1e30, clip=math.inf).step(given([[1e30, 0.0]]))
    assert torch.equal(arena_of(model).data, before)
