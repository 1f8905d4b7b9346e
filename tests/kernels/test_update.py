"""The step on the scales: kernel and torch reference have the oracle's bits, projection included."""
import math

import pytest
import torch

from qzo.kernels import noise, update
from tests import oracle
from tests.support.close import assert_close, assert_same_bits

pytestmark = pytest.mark.usefixtures("nan_poison")

RUNS = {"kernel": update.launch, "reference": update.update_torch}
FLOOR = 2.0**-24
PAIRS = [((3,), (0.05,)), ((3, -1, 2**63 - 1, 3), (0.05, -0.3, 1e-4, 0.02))]


def scales_of(quads):
    """Both signs over six decades, with zeros, in whole quads."""
    random = torch.Generator().manual_seed(quads)
    decades = torch.randint(-6, 1, (4 * quads,), generator=random)
    scales = torch.randn(4 * quads, generator=random) * 10.0**decades
    scales[5::17] = 0.0
    scales[6::34] = -0.0
    return scales


def run_both(run, scales, seeds, coefs, law="rademacher", relative=True, floor=FLOOR, base4=0):
    """(what the implementation leaves, what the oracle leaves); coefs are on z."""
    raw = [oracle.raw_coef(law, c) for c in coefs]
    at = 4 * base4 + torch.arange(len(scales))
    want = oracle.update(scales, [oracle.raw_at(law, seed, at) for seed in seeds], raw, relative, floor)
    got = scales.clone()
    RUNS[run](got, torch.tensor(seeds), torch.tensor(raw), base4=base4, law=noise.LAWS[law],
              relative=relative, floor=floor)
    return got, want


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("law", ["rademacher", "ih4"])
@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize(("seeds", "coefs"), PAIRS)
@pytest.mark.parametrize("floor", [0.0, FLOOR, 1e-3])
def test_integer_laws_have_the_oracles_bits(run, law, relative, seeds, coefs, floor):
    """300 quads: two programs, the second one ragged."""
    got, want = run_both(run, scales_of(300), seeds, coefs, law, relative, floor)
    assert_same_bits(got, want)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("base4", [1, 2**30 + 7, 2**32 - 10, 2**33 + 3])
def test_wide_base(run, base4):
    """Quads on both sides of 2^32, where the second counter word begins."""
    assert_same_bits(*run_both(run, scales_of(20), (77, -77), (0.1, 0.2), "ih4", base4=base4))


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("relative", [True, False])
def test_gaussian_within_tolerance(run, relative):
    """Each direction errs by at most 3e-6 * coef in z (test_noise.py) and a few roundings of the sum."""
    scales = scales_of(64)
    got, want = run_both(run, scales, (1, 2), (0.05, -0.02), "gaussian", relative)
    unit = scales.abs().double() if relative else torch.ones(len(scales), dtype=torch.float64)
    assert_close(got, want, unit.clamp(min=1e-30), 0.07 * 3e-6 + 4 * 2.0**-24)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("floor", [0.0, FLOOR])
def test_a_scale_keeps_the_sign_it_was_loaded_with(run, relative, floor):
    """A coefficient so large that half of the scales would cross zero: they end at the floor."""
    scales = torch.tensor([0.01, -0.01] * 128)
    got, want = run_both(run, scales, (9,), (3.0,), relative=relative, floor=floor)
    assert_same_bits(got, want)
    assert torch.equal(torch.signbit(got), torch.signbit(scales))
    floored = got.abs() == floor
    assert 64 < floored.sum() < 192
    assert (got[~floored].abs() > 0.01).all()


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("relative", [True, False])
def test_a_zero_scale_stays_zero_and_keeps_its_bit(run, relative):
    scales = torch.tensor([0.0, -0.0] * 32)
    got, _ = run_both(run, scales, (9, 10), (0.5, 0.5), relative=relative, floor=1e-3)
    assert_same_bits(got, scales)


@pytest.mark.parametrize("run", RUNS)
def test_directions_are_added_in_their_order(run):
    """Float additions do not associate: the reverse order gives other bits; the oracle knows which."""
    scales = scales_of(300)
    seeds, coefs = (1, 2, 3), (0.3, 1e-4, -0.29)
    forward, want = run_both(run, scales, seeds, coefs, "ih4")
    backward, _ = run_both(run, scales, seeds[::-1], coefs[::-1], "ih4")
    assert_same_bits(forward, want)
    assert not torch.equal(forward, backward)


@pytest.mark.parametrize("run", RUNS)
def test_an_arena_is_updated_as_its_slices_are(run):
    """Position in the launch does not matter, only the global index."""
    whole, _ = run_both(run, scales_of(300), (5,), (0.1,))
    parts = scales_of(300)
    for start, stop in ((0, 7), (7, 290), (290, 300)):
        RUNS[run](parts[4 * start:4 * stop], torch.tensor([5]), torch.tensor([0.1]), base4=start,
                  law=noise.RADEMACHER, relative=True, floor=FLOOR)
    assert_same_bits(parts, whole)


STEPS = [((3, -1), (0.05, -0.3)), ((3, 4), (1e-4, 0.02)), ((7, 7), (2.0, 0.5)), ((2**63 - 1, 9), (-0.9, 0.8))]


def run_steps(run, scales, law, relative, floor=1e-3, device="cpu"):
    """As run_both, of STEPS; the third has a coefficient that is none, and moves nothing."""
    want, at = scales, torch.arange(len(scales))
    raw = [[oracle.raw_coef(law, c) for c in coefs] for _, coefs in STEPS]
    raw[2][1] = math.nan
    for (seeds, _), coefs in zip(STEPS, raw, strict=True):
        if not math.isnan(coefs[1]):
            want = oracle.update(want, [oracle.raw_at(law, seed, at) for seed in seeds], coefs, relative, floor)
    got, pairs = scales.to(device, copy=True), (torch.tensor([seeds for seeds, _ in STEPS]), torch.tensor(raw))
    RUNS[run](got, *(t.to(device) for t in pairs), base4=0, law=noise.LAWS[law], relative=relative, floor=floor)
    return got.cpu(), want


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("law", ["rademacher", "ih4"])
@pytest.mark.parametrize("relative", [True, False])
def test_several_steps_at_once_have_the_oracles_bits(run, law, relative):
    """Each is rounded and projected before the next begins."""
    assert_same_bits(*run_steps(run, scales_of(300), law, relative))


@pytest.mark.parametrize("run", RUNS)
def test_several_gaussian_steps_have_the_bits_of_one_after_another(run):
    at_once, in_turn = scales_of(64), scales_of(64)
    seeds, coefs = torch.tensor([[3, -1], [4, 9]]), torch.tensor([[0.05, -0.3], [0.02, 0.01]])
    options = dict(base4=0, law=noise.GAUSSIAN, relative=True, floor=FLOOR)
    RUNS[run](at_once, seeds, coefs, **options)
    for some, its in zip(seeds, coefs, strict=True):
        RUNS[run](in_turn, some, its, **options)
    assert_same_bits(at_once, in_turn)


LAYERS = [(5, 32), (1, 700), (33, 32)]               # groups, outputs


def rows_run(run, law="ih4", floor=FLOOR, device="cpu", steps=1):
    """As run_both, noise shared by the rows of LAYERS; so many steps."""
    slots, base4 = [], 0
    for groups, outputs in LAYERS:
        quads = -(-groups // 4) * outputs
        slots.append((base4, base4 + quads, outputs))
        base4 += quads
    scales, seeds = scales_of(base4), (3, -1, 2**63 - 1)
    raw = [oracle.raw_coef(law, c) for c in (0.05, -0.3, 1e-4)]
    first = torch.cat([torch.tensor([4 * (begin + (quad - begin) % outputs) for quad in range(begin, end)])
                       for begin, end, outputs in slots]).repeat_interleave(4)
    want, every = scales, [[seed - step for seed in seeds] for step in range(steps)]
    for its in every:
        want = oracle.update(want, [oracle.raw_at(law, seed, first) for seed in its], raw, True, floor)
    got = scales.to(device, copy=True)
    pairs = [torch.tensor(of_each).to(device) for of_each in (every, [raw] * steps)]
    RUNS[run](got, *pairs, base4=0, law=noise.LAWS[law],
              relative=True, floor=floor, layers=torch.tensor(slots).to(device))
    return got.cpu(), want


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("law", ["rademacher", "ih4"])
@pytest.mark.parametrize("floor", [0.0, 1e-3])
def test_noise_shared_by_rows_has_the_oracles_bits(run, law, floor):
    """Layers of one, two and nine quads an output; the second has more blocks than programs."""
    assert_same_bits(*rows_run(run, law, floor))


@pytest.mark.parametrize("run", RUNS)
def test_several_steps_of_noise_shared_by_rows(run):
    assert_same_bits(*rows_run(run, floor=1e-3, steps=3))


def test_the_twins_blocks_of_rows_do_not_show(monkeypatch):
    monkeypatch.setattr(update, "BLOCK_QUADS", 100)
    assert_same_bits(*rows_run("reference"))


def test_the_twins_blocks_do_not_show(monkeypatch):
    whole, _ = run_both("reference", scales_of(300), (5, 6), (0.1, 0.2), "ih4")
    monkeypatch.setattr(update, "BLOCK_QUADS", 7)
    assert_same_bits(run_both("reference", scales_of(300), (5, 6), (0.1, 0.2), "ih4")[0], whole)


def test_the_twins_blocks_of_several_steps_do_not_show(monkeypatch):
    """Of the noise, too: so many at a time that a step's directions are in two."""
    monkeypatch.setattr(update, "BLOCK_QUADS", 300)
    monkeypatch.setattr(update, "CACHED_QUADS", 100)
    assert_same_bits(*run_steps("reference", scales_of(250), "ih4", True))
    assert_same_bits(*rows_run("reference", steps=2))
