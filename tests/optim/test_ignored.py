"""An objective that does not depend on the perturbation is named, once it has had a fair number of steps."""

import itertools
import warnings

import pytest
import torch

import qzo
from qzo.optim.optimizer import ALIKE
from tests.support.graphs import two_layers

SAME, OTHER, LOST = [1.0, 1.0, 0.5, 0.5], [1.0, 1.0, 0.5, 0.75], [float("nan")] * 4


def optimizer(**options):
    return qzo.QZO(two_layers(), lr=0.1, directions=2, **options)


def made(of, steps):
    """How many steps could be made with these losses in turn; the error that ended them, or None."""
    turns = itertools.islice(steps, 3 * ALIKE)
    for count, losses in enumerate(turns):
        try:
            of.step(lambda losses=losses: torch.tensor(losses))
        except ValueError as error:
            return count + 1, str(error)
    return 3 * ALIKE, None


def test_an_objective_that_ignores_the_perturbation_ends_the_run():
    steps, said = made(optimizer(eps=0.25), itertools.repeat(SAME))
    assert steps == ALIKE
    assert said.startswith(f"the losses of +eps and -eps had the same bits in all of the first {ALIKE} steps: the ")
    assert "a larger eps (0.25)" in said


@pytest.mark.parametrize("at", [0, 7, ALIKE - 1])
def test_a_metric_that_ties_but_once_does_not(at):
    """Nor one that has nothing left to gain."""
    assert made(optimizer(), [OTHER if step == at else SAME for step in range(3 * ALIKE)]) == (3 * ALIKE, None)


def test_skipped_steps_say_nothing():
    turns = itertools.chain.from_iterable(zip(itertools.repeat(SAME), itertools.repeat(LOST), strict=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        steps, said = made(optimizer(), turns)
    assert (steps, said is None) == (2 * ALIKE - 1, False)


def test_a_resumed_run_counts_as_the_unbroken_one(tmp_path):
    first = optimizer(journal=tmp_path / "j")
    for _ in range(10):
        first.step(lambda: torch.tensor(SAME))
    first.close()
    second = optimizer(journal=tmp_path / "j", resume=True)
    steps, said = made(second, itertools.repeat(SAME))
    assert steps == ALIKE - 10
    assert said is not None
    second.close()


def test_a_resumed_run_remembers_a_difference(tmp_path):
    first = optimizer(journal=tmp_path / "j")
    first.step(lambda: torch.tensor(OTHER))
    first.close()
    second = optimizer(journal=tmp_path / "j", resume=True)
    assert made(second, itertools.repeat(SAME)) == (3 * ALIKE, None)
    second.close()
