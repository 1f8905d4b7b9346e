"""The flow-matching objective: the law of the times, what a step draws, and the loss of each row."""

import dataclasses
import math

import pytest
import torch

from qzo.diffusion.objective import (
    MODE_SCALE,
    FlowLaw,
    derivative_error,
    draw,
    mixed,
    row_losses,
)

LAWS = {
    "logit-normal": FlowLaw(shift=3.0),
    "moved": FlowLaw(shift=1.5, mean=-0.5, std=1.4),
    "uniform": FlowLaw("uniform", shift=3.0),
    "mode": FlowLaw("mode", shift=3.0),
}


def distribution(law, s):
    """P(time <= s), by the formulas of the paper and the normal distribution, float64; bisection for "mode"."""
    u = s / (law.shift - (law.shift - 1) * s)
    if law.density == "uniform":
        return u
    if law.density == "logit-normal":
        logit = torch.log(u / (1 - u))
        return 0.5 * (1 + torch.erf((logit - law.mean) / (law.std * math.sqrt(2))))
    low, high = torch.zeros_like(u), torch.ones_like(u)
    for _ in range(60):  # f(v) = 1 - v - scale (cos^2(pi v / 2) - 1 + v) falls from 1 to 0; P(f(V) <= u) = 1 - v(u)
        middle = (low + high) / 2
        above = 1 - middle - MODE_SCALE * (torch.cos(math.pi / 2 * middle) ** 2 - 1 + middle) > u
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return 1 - low


def kolmogorov(law, times):
    """p of the Kolmogorov-Smirnov test, by the series of its limit."""
    count = len(times)
    held = distribution(law, times.double().sort().values)
    ranks = torch.arange(count + 1) / count
    statistic = max(float((ranks[1:] - held).max()), float((held - ranks[:-1]).max()))
    x = statistic * math.sqrt(count)
    return 2 * sum((-1) ** (k - 1) * math.exp(-2 * k * k * x * x) for k in range(1, 100))


def check_law(law, times):
    assert kolmogorov(law, times) > 0.01
    assert kolmogorov(dataclasses.replace(law, shift=law.shift * 1.2), times) < 0.01


@pytest.mark.parametrize("name", LAWS)
def test_times_follow_the_law(name):
    """10,000 draws, Kolmogorov-Smirnov; the same test sees another shift."""
    law = dataclasses.replace(LAWS[name], stratified=False)
    check_law(law, draw(law, 1, 0, 10_000, ()).times)


def test_stratified_times_follow_the_law():
    """The first row of each of 10,000 steps: those of a step are not independent."""
    law = LAWS["logit-normal"]
    check_law(law, torch.stack([draw(law, 1, step, 2, ()).times[0] for step in range(10_000)]))


def test_a_shift_moves_the_mean_of_the_logit():
    """In logit space it adds ln a: 1.10 for Stable Diffusion 3's 3."""
    times = draw(FlowLaw(shift=3.0), 0, 0, 100_000, ()).times.double()
    assert float(torch.logit(times).mean()) == pytest.approx(math.log(3), abs=0.02)


def test_a_step_is_drawn_from_seed_and_number_alone():
    law = FlowLaw(shift=3.0, dropout=0.5)
    first = draw(law, 7, 3, 8, (2, 4, 4))
    torch.manual_seed(99)
    again = draw(law, 7, 3, 8, (2, 4, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for seed, step in ((7, 4), (8, 3)):
        other = draw(law, seed, step, 8, (2, 4, 4))
        assert not torch.equal(other.times, first.times)
        assert not torch.equal(other.noise, first.noise)
    assert abs(float(first.noise.mean())) < 0.3
    assert 0 < int(first.dropped.sum()) < 8


def test_stratified_times_lie_in_intervals_of_their_own():
    """Over the step, and each image's draws over theirs."""
    law = FlowLaw(shift=3.0, draws=4)
    times = draw(law, 0, 5, 6, ()).times.double()
    places = distribution(law, times)
    assert (places * 24).floor().sort().values.tolist() == list(range(24))
    assert all((row * 4).floor().sort().values.tolist() == [0, 1, 2, 3] for row in places.view(6, 4))


def test_what_is_predicted_takes_noise_to_the_image():
    """x_t moves from x0 to n as s goes from 0 to 1, and the target is its derivative by s."""
    x0, noise = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    start, target = mixed(x0, noise, torch.zeros(3))
    end, _ = mixed(x0, noise, torch.ones(3))
    assert torch.equal(start, x0)
    assert torch.equal(end, noise)
    there, _ = mixed(x0, noise, torch.tensor([0.1, 0.5, 0.9]))
    assert torch.allclose(there, x0 + torch.tensor([0.1, 0.5, 0.9]).view(3, 1, 1, 1) * target, atol=1e-6)


def test_losses_are_kept_by_row_in_float32():
    predicted, target = torch.randn(6, 2, 3).half(), torch.randn(6, 2, 3)
    rows = row_losses(predicted, target)
    assert rows.dtype == torch.float32
    assert torch.allclose(rows, ((predicted.double() - target.double()) ** 2).mean((1, 2)).float(), rtol=1e-6)
    assert torch.equal(row_losses(predicted, target, torch.full((6,), 2.0)), 2 * rows)


def test_the_bounded_weighting():
    law = FlowLaw(weighting="cosmap")
    assert law.weights(torch.tensor([0.0, 0.5, 1.0])).tolist() == pytest.approx([2 / math.pi, 4 / math.pi, 2 / math.pi])
    assert FlowLaw().weights(torch.tensor([0.2, 0.9])).tolist() == [1, 1]


def test_the_error_of_a_derivative():
    rows = torch.tensor([[1.0, 3.0], [0.0, 0.0], [2.0, 2.0], [1.0, 1.0]])  # differences 1, 3 and 1, 1; over 2 eps = 0.5
    assert derivative_error(rows, 0.25).tolist() == pytest.approx([math.sqrt(2) * 2 / math.sqrt(2), 0.0])


def test_rows_of_one_image_are_no_more_evidence_than_the_image():
    """Where they are all alike."""
    rows = torch.randn(6, 5)
    assert torch.allclose(derivative_error(rows.repeat_interleave(4, 1), 0.1, draws=4), derivative_error(rows, 0.1))
    assert derivative_error(rows, 0.1, draws=5).isnan().all()


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"weighting": "sigma_sqrt"}, "s.-2, a million at s = 0.001"),
        ({"weighting": "mse"}, "known are none, cosmap"),
        ({"density": "cosine"}, "density='cosine': expected one of logit-normal"),
        ({"shift": 0.0}, "shift=0.0"),
        ({"std": -1.0}, "std=-1.0"),
        ({"draws": 0}, "draws=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_a_law_that_cannot_be_is_refused(fields, told):
    with pytest.raises(ValueError, match=told):
        FlowLaw(**fields)
