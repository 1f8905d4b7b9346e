"""What is timed: each agrees with the truth, reads weights that no cache holds, and is the rival it is named for."""

import dataclasses
import itertools
from typing import cast

import pytest
import torch

from qzo.bench import cases, run
from qzo.bench.providers import (
    EPS,
    PROVIDERS,
    Problem,
    error_of,
    four_alike,
    in_place_pair,
    sweep,
)
from tests.support.bench_cases import CASE, STEP, built

pytestmark = pytest.mark.usefixtures("quick_roof")


@pytest.mark.parametrize("provider", ["qzo", "qzo-unperturbed", "dequantize", "official", "official-fused", "dense"])
@pytest.mark.parametrize("codes", ["aqlm-2x8", "aqlm-1x16"])
def test_vectors_agree_with_the_truth(provider, codes):
    case = cases.Case("linear", "", 256, 80, 3, 256, "float32", codes=codes)
    problem = Problem(case, "cpu", 1)
    built = next(p for p in PROVIDERS if p.name == provider).build(problem)
    assert error_of(built, problem) < built.allowed


@pytest.mark.parametrize(("codes", "most"), [("nf4", 1e-5), ("int4", 0.2)])
def test_bitsandbytes_takes_both(codes, most):
    """It quantizes the dense weight itself: NF4 in blocks of 64 it finds again."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    problem = Problem(dataclasses.replace(CASE, codes=codes), "cpu", 1)
    built = next(p for p in run.LAYER_PROVIDERS if p.name == "bitsandbytes").build(problem)
    assert error_of(built, problem) < most <= built.allowed


@pytest.mark.parametrize("name", ["qzo", "dense", "dequantize", "official", "official-fused", "mezo"])
def test_weights_are_larger_than_the_cache(name):
    """As many outputs a pass as there are sets of weights, and these together exceed the cache."""
    provider = next(p for p in run.LAYER_PROVIDERS if p.name == name)
    built = provider.build(Problem(CASE, "cpu", 1 << 20))
    assert len(cast(list[torch.Tensor], built.run())) == built.passes
    assert built.passes * 64 * 192 * (4 if name in ("dense", "mezo") else 0.5) >= 1 << 20


def test_the_official_loop_is_the_papers():
    """+eps, -2 eps, +eps, then the update, with one seed: four sweeps, two forwards."""
    scales = torch.full((4, 8), 0.5)
    before, seen = scales.clone(), []

    def forward(some):
        seen.append(scales.clone())
        return [torch.zeros(some.stop - some.start, 1)]

    in_place_pair([scales], forward, 2, False, four_alike("cpu"))
    z = torch.zeros(4, 8)
    sweep([z], 1.0, torch.Generator().manual_seed(7))
    assert torch.allclose(seen[0], before + EPS * 0.02 * z)
    assert torch.allclose(seen[1], before - EPS * 0.02 * z)
    assert torch.allclose(scales, before, atol=1e-7)
    assert len(seen) == 2


@pytest.mark.parametrize("name", ["official", "official-fused", "mezo"])
def test_each_step_draws_one_noise_four_times_and_the_next_another(name):
    one = built(name, STEP)
    seen = [one.generators[0].get_state()]
    for _ in range(2):
        one.run()
        states = [generator.get_state() for generator in one.generators]
        assert all(torch.equal(state, states[0]) for state in states)
        seen.append(states[0])
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(seen))


@pytest.mark.parametrize("name", [p.name for p in PROVIDERS if not p.cuda_only])
def test_a_part_of_the_passes_is_that_much_work(name):
    one = built(name, CASE, 1 << 17)
    assert one.passes >= 3
    assert len(one.run(slice(1, 3))) == 2
    whole = built(name, STEP)
    assert len(whole.run(slice(0, 1))) == len(STEP.shapes)
