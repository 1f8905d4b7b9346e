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


def test_the_table_of_variances_has_a_line_for_each_design_and_robust_mean():
    each = {"ratio": [1.254, 0.04], "squared_mean": [0.0012345, 0.0002]}
    sizes = {"rows": 16, "batches": 8, "directions": 2, "eps": 0.01}
    of = {"device": "a core", "versions": {"torch": "2"}, "date": "today"}
    rows = [
        {"case": case, "design": design, **sizes, "means": {"mean": each, "trimmed mean": each | {"ratio": [0.9, 0.1]}}}
        | of
        for case in ("digits", "emoji")
        for design in ("stratified", "antithetic")
    ]
    rows[-1]["batches"] = 6
    assert readme.variance_table(rows).splitlines() == [
        "| rows of a step | digits: variance | (E d)², 10⁻³ | emoji: variance | (E d)², 10⁻³ |",
        "|---|---|---|---|---|",
        "| stratified | 1.25 (0.04) | 1.23 (0.20) | 1.25 (0.04) | 1.23 (0.20) |",
        "| antithetic | 1.25 (0.04) | 1.23 (0.20) | 1.25 (0.04) | 1.23 (0.20) |",
        "| stratified, trimmed mean | 0.90 (0.10) | 1.23 (0.20) | 0.90 (0.10) | 1.23 (0.20) |",
        "",
        "Batches: 8 (digits), 6 (emoji), of 16 rows; 2 directions, eps 0.01; a core; torch 2; today.",
    ]


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
