"""The study's table says what its rows say, at the rate that validation chose."""

import json
import statistics

import pytest

from qzo.bench.study import readout, report
from tests.support.paths import ROOT


def row(method, seed, rate, validation, loss, task="headlines", rows=6144, accuracy=0.5):
    scores = {
        "validation": {"loss": validation, "accuracy": 0.1},
        "held_out": {"loss": loss, "accuracy": accuracy},
    }
    return {"task": task, "method": method, "rows": rows, "seed": seed, "rate": rate, "scores": scores}


ROWS = [
    row("default", 0, 0.1, 0.6, 0.5),
    row("default", 1, 0.1, 1.2, 0.9),
    row("default", 0, 0.2, 0.7, 0.8, accuracy=0.7),
    row("default", 1, 0.2, 0.9, 0.6, accuracy=0.8),
    row("zero-shot", None, None, 1.1, 1.2, rows=0),
    row("label biases only", None, None, 1.0, 1.0, rows=0),
    row("linear probe", None, None, 0.6, 0.7, rows=0),
    row("first-order, scales", 0, 0.001, 0.4, 0.4),
    row("default", 0, 0.2, 0.7, 0.3, task="movie"),
    row("default", 0, 0.32, 5.1, 5.2, task="plain texts", accuracy=None),
]


def rows_of(*names):
    """The rows of committed results files."""
    texts = ((ROOT / f"bench/results/{name}.jsonl").read_text() for name in names)
    return [json.loads(line) for text in texts for line in text.splitlines()]


def test_lines_are_of_the_rate_with_the_least_mean_validation_loss():
    made = report.lines(ROWS)
    assert [(line.task, line.method) for line in made] == [
        ("headlines", "zero-shot"),
        ("headlines", "label biases only"),
        ("headlines", "linear probe"),
        ("headlines", "default"),
        ("headlines", "first-order, scales"),
        ("movie", "default"),
        ("plain texts", "default"),
    ]
    default = made[3]
    assert (default.rate, default.losses, default.accuracies) == (0.2, [0.8, 0.6], [0.7, 0.8])
    assert report.share(default, made) == pytest.approx((1.0 - 0.7) / (1.0 - 0.4))
    assert report.share(made[1], made) is None
    assert report.share(made[5], made) is None, "of movie neither end is known"
    assert report.share(made[2], made) == pytest.approx(0.3 / 0.6)
    text = report.as_markdown(made)
    assert "| headlines | default | 6,144 | 0.2 | 2 | 75.0 %, 70.0 % | 0.700, 0.800 | 50 % |" in text
    assert "| plain texts | default | 6,144 | 0.32 | 1 |  | 5.200, 5.200 |  |" in text


def test_from_files_to_a_table_and_a_picture(tmp_path, capsys):
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in ROWS))
    report.main([str(path), "--plot", str(tmp_path / "r.png")])
    assert capsys.readouterr().out.count("\n") == 2 + 7
    assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("task", ["headlines", "movie", "spam"])
def test_the_default_needs_at_most_half_of_the_rows_of_the_papers_recipe(task):
    """The committed runs: as low a loss on held-out rows, mean of five seeds, the paper's recipe at its best rate."""
    made = report.lines(rows_of("study-2026-11-30"))
    [ours] = [line for line in made if (line.task, line.method, line.rows) == (task, "default", 3072)]
    [papers] = [line for line in made if (line.task, line.method, line.rows) == (task, "paper's recipe", 6144)]
    assert len(ours.losses) == len(papers.losses) == 5
    assert statistics.fmean(ours.losses) <= statistics.fmean(papers.losses)


def test_a_linear_probe_beats_every_zeroth_order_run():
    """As the README says: at every learning rate and seed."""
    rows = rows_of("study-2026-11-30", "study-long-2026-12-01", "staleness-2026-12-01")
    probes = {row["task"]: row["scores"]["held_out"] for row in rows if row["method"] == report.PROBE}
    assert set(probes) == {"headlines", "movie", "spam", "headlines, four topics"}
    runs = [row for row in rows if row["rows"] and not row["method"].startswith("first-order")]
    assert len(runs) > 90
    for row in runs:
        probe, run = probes[row["task"]], row["scores"]["held_out"]
        assert probe["loss"] < run["loss"], row
        assert probe["accuracy"] > run["accuracy"], row


def test_readouts_of_texts_beat_the_default():
    """As the README says."""
    rows = [row for row in rows_of("texts-2026-12-01") if row["method"] in ("default", *readout.NAMES)]
    losses = {
        name: [row["scores"]["held_out"]["loss"] for row in rows if row["method"] == name]
        for name in ("default", *readout.NAMES)
    }
    assert {row["rows"] for row in rows if row["method"] == "default"} == {1536, 6144}
    assert losses["final norm"][0] < losses["token biases"][0] < min(losses["default"])
