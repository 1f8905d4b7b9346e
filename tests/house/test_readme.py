"""The README's tables are those of the results files."""

import json

import pytest

from qzo.bench import readme
from tests.support.paths import ROOT


def test_the_tables_are_made_from_the_results_files():
    text = (ROOT / "README.md").read_text()
    named = [found[2] for found in readme.SECTION.finditer(text)]
    assert len(named) == 2
    assert readme.with_tables(text) == text, "run python -m qzo.bench.readme"


def test_a_table_follows_its_file(tmp_path):
    report = {"subject": "a model", "predicted": {"total": 5e9}, "measured": {"total": 4.9e9}, "rivals": {"X": 1e10}}
    (tmp_path / "m.jsonl").write_text(json.dumps(report) + "\n")
    text = "before\n<!-- table of m.jsonl -->\nold\n<!-- end -->\nafter\n"
    made = readme.with_tables(text, tmp_path)
    assert made == (
        "before\n<!-- table of m.jsonl -->\n| step | qzo, predicted | measured | X |\n|---|---|---|---|\n"
        "| a model | 5.00 GB | 0.980x of it | 10.0 GB |\n<!-- end -->\nafter\n"
    )
    assert readme.with_tables(made, tmp_path) == made
    with pytest.raises(FileNotFoundError):
        readme.with_tables(text.replace("m.jsonl", "none.jsonl"), tmp_path)
