"""The model of up to 1,024 ranks: its formulas by hand and by drawing, and the page's table."""

import random
import statistics

import pytest

from qzo.bench import ranks_model
from tests.support.paths import ROOT


def test_the_page_has_the_models_table():
    table = ranks_model.as_markdown(*ranks_model.measured())
    assert len(table.splitlines()) == 2 + len(ranks_model.RANKS)
    assert table in (ROOT / "docs" / "many-gpus.md").read_text()


def test_a_gather_is_a_call_its_hops_and_its_bytes():
    network = ranks_model.Network("", call=5.0, hop=3.0, near=1.0, per_machine=4, gbps=2.0)
    assert network.gather(4, 0) == pytest.approx(1e-3 * (5 + 3 * 1))
    assert network.gather(10, 0) == pytest.approx(1e-3 * (5 + 2 * 3 + 7 * 1)), "three machines: two hops between them"
    assert network.gather(4, 1000) - network.gather(4, 0) == pytest.approx(1e3 * 4 * 1000 / 2e9)


@pytest.mark.parametrize("ranks", [1, 2, 64])
def test_the_slowest_of_so_many_is_as_late_as_drawing_says(ranks):
    chance = random.Random(ranks)
    drawn = statistics.fmean(max(chance.gauss(0, 2.0) for _ in range(ranks)) for _ in range(1000))
    assert ranks_model.lateness(ranks, 2.0) == pytest.approx(drawn, abs=0.15)


def test_what_is_not_a_ranks_own_work_is_missing_from_the_efficiency():
    network = ranks_model.Network("", call=1000.0, hop=0.0, near=0.0, per_machine=1, gbps=1e9)
    late = ranks_model.lateness(8, 1.0)
    assert ranks_model.efficiency(8, network, 10.0, 1.0) == pytest.approx(10 / (10 + late + 1))


def test_a_case_that_was_not_measured():
    with pytest.raises(ValueError, match="has no row of qzo for 'whole step of a dream'"):
        ranks_model.measured(case="whole step of a dream")
