"""How long cases take: a formula, and a budget that learns."""

from qzo.bench import cases, estimate


def test_the_budget_learns_from_what_cases_took(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(estimate.time, "monotonic", lambda: now[0])
    budget = estimate.Budget(100, 1.0)
    assert budget.refuses(60) is None
    now[0] = 40.0
    budget.done(20)  # twice what its formula says
    assert budget.refuses(29) is None
    assert budget.refuses(31) == "left out: it takes about 62 s, and 60 s of --seconds 100 are left"
    assert estimate.Budget(None, 1.0).refuses(1e9) is None
    assert [estimate.said(x) for x in (40, 400, 7560)] == ["40 s", "7 min", "2.1 h"]


def test_the_formula_grows_with_the_case():
    few, many = (cases.Case("linear", "llama-2-7b", 4096, 4096, rows, 128, "float32") for rows in (1, 1024))
    assert 2 < estimate.seconds(few, "cpu") < estimate.seconds(many, "cpu")
    assert estimate.seconds(few, "cpu", ["qzo"]) < estimate.seconds(few, "cpu") / 4
    assert sum(estimate.seconds(c, "cpu") for c in cases.default("cpu")) < 600
    assert 0 < estimate.probe("cpu") < 100
