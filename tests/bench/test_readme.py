"""The README's table of ratios, made of a results file."""

import pytest

from qzo.bench import readme, results
from tests.support.bench_cases import rows_of


def test_the_readme_shows_both_kinds_of_step_and_no_ratio_across_them():
    rows = rows_of(
        "H100",
        ("qzo", "graph", 2.0),
        ("qzo", "eager", 8.0),
        ("dense", "graph", 3.0),
        ("dense", "eager", 4.0),
        ("official", "eager", 40.0),
    )
    assert readme.ratio_table(rows).splitlines()[2:4] == [
        "| step a, graph | 2 | 1.50x |  |",
        "| step a, eager | 8 | 0.50x | 5.00x |",
    ]
    shown = results.as_markdown(rows)
    assert "| step a, graph | dense | 3 (3-3) |" in shown
    assert "| step a | official | 40 (40-40) |" in shown
    with pytest.raises(ValueError, match="share no case, provider, mode and device"):
        results.compare(rows[:1], rows[1:2], 0.05)


def test_errors_of_the_derivative_stand_by_eps_law_and_type():
    errors = {("rademacher", 1e-3): 0.1234, ("rademacher", 1e-2): 12, ("ih4", 1e-3): 3e-4, ("ih4", 1e-2): 1}
    rows = [
        {"noise": law, "activations": "float16", "eps": eps, "error": error, "one_sided": {"error": 2 * error}}
        for (law, eps), error in errors.items()
    ]
    assert readme.eps_table(rows).splitlines() == [
        "| noise, activations | eps 0.001 | eps 0.01 |",
        "|---|---|---|",
        "| rademacher, float16 | 0.12 / 0.25 | 12 / 24 |",
        "| ih4, float16 | 0.0003 / 0.0006 | 1 / 2 |",
    ]
