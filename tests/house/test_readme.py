"""The README's tables are those of the results files."""

import json
import statistics

import pytest

from qzo.bench import readme
from qzo.bench.study import report
from qzo.training.records import FORMS, form, read_records
from tests.support.paths import ROOT


def test_the_tables_are_made_from_the_results_files():
    named = []
    for page in readme.pages():
        text = page.read_text()
        named += [found[2] for found in readme.SECTION.finditer(text)]
        assert readme.with_tables(text) == text, f"{page.name}: run python -m qzo.bench.readme"
    assert len(named) == 9


def rows_under(heading):
    """Cells of the table under a heading of the README, without the two lines of its head."""
    text = (ROOT / "README.md").read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    return [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines]


def results_of(name):
    return [json.loads(line) for line in (ROOT / "bench/results" / name).read_text().splitlines()]


def test_the_readmes_memory_is_that_of_the_results():
    reports = {
        (report["subject"].split(":")[0], report["subject"].split(": ")[1].split(" tokens")[0]): report
        for report in results_of("memory-2026-11-25.jsonl")
        if "codes" not in report["subject"]
    }
    names = {"Llama-2-7B": ("meta-llama-2-7b", "1 x 64"), "Llama-2-13B": ("meta-llama-2-13b", "1 x 64")}
    names["Llama-2-13B, 16 x 512 tokens"] = "meta-llama-2-13b", "16 x 512"
    names["SD3.5 Large's transformer, 333 tokens"] = "stabilityai-sd3.5-large", "1 x 333"
    for name, predicted, _, *rivals in rows_under("What it takes: memory"):
        report = reports[names.pop(name)]
        assert predicted == f"{report['predicted']['total'] / 1e9:.2f} GB"
        assert rivals == [f"{size / 1e9:.1f} GB" for size in report["rivals"].values()]
    assert not names


def test_the_readmes_speed_is_that_of_its_own_numbers():
    for _, ours, dense, ratio in rows_under("How fast"):
        assert float(ratio) == pytest.approx(float(dense) / float(ours), abs=0.006)


def percent(*lines):
    """The accuracies of all seeds of some lines, as a cell has them."""
    return " / ".join(f"{100 * accuracy:.1f}" for line in lines for accuracy in line.accuracies) + " %"


def test_the_readmes_learning_is_that_of_the_results():
    made = {
        (line.method, line.rows): line
        for line in report.lines(results_of("study-2026-11-30.jsonl"))
        if line.task == "headlines"
    }
    zero_shot, control, probe, half, tuned, recipe, gradients, *longer = rows_under("What it learns")
    names = (report.ZERO_SHOT, report.BIASES, report.PROBE)
    untrained = zip((zero_shot, control, probe), ((name, 0) for name in names), strict=True)
    for row, name in (*untrained, (half, ("default", 3072)), (tuned, ("default", 6144))):
        assert row[1] == percent(made[name])
        assert row[2] == " / ".join(f"{loss:.3f}" for loss in made[name].losses)
    for row, name in ((recipe, ("paper's recipe", 6144)), (gradients, (report.GRADIENTS, 6144))):
        assert row[0].endswith(f"mean of {len(made[name].losses)}")
        assert row[1] == f"{100 * statistics.fmean(filter(None, made[name].accuracies)):.1f} %"
        assert row[2] == f"{statistics.fmean(made[name].losses):.3f}"
    long = report.lines(results_of("study-long-2026-12-01.jsonl"))
    assert [line.method for line in long] == [
        m for m in ("default", "paper's recipe", report.GRADIENTS) for _ in longer
    ]
    for number, row in enumerate(longer):
        lines = long[number :: len(longer)]
        assert {f"{line.rows:,}" for line in lines} == {row[0].partition(":")[0].partition(", seed")[0]}
        assert row[1] == percent(*lines)
        assert row[2] == " / ".join(f"{line.losses[0]:.3f}" for line in lines)


def test_the_readmes_lines_of_data_are_read(tmp_path):
    text = (ROOT / "README.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith('{"')]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    kinds = [form(record) for record in read_records(tmp_path / "data.jsonl")]
    assert sorted(sorted(kind or ()) for kind in kinds) == sorted(map(sorted, FORMS[:4]))


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
