"""What a run leaves beside its journal: a line of metrics a step, what it was run with, and a curve."""

import json
import math
from typing import Any

import numpy as np
import pytest

from qzo.training import folder
from qzo.training.folder import Metrics, draw_curve, fitted_biases, versions, write_results
from qzo.training.settings import Settings

LINES = [{"step": step, "loss": 1.0 / (step + 1)} for step in range(6)]


def write(path, lines, tail=""):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize(("start", "kept"), [(0, []), (4, [0, 1, 2, 3]), (6, list(range(6))), (9, list(range(6)))])
def test_lines_from_the_first_step_on_are_dropped(tmp_path, start, kept):
    path = tmp_path / "metrics.jsonl"
    write(path, LINES)
    metrics = Metrics(path, start)
    assert steps(path) == kept
    with metrics as file:
        file.write({"step": start})
        assert steps(path) == [*kept, start], "a line is there as soon as it is written"
    assert metrics.file.closed


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"loss": 1}\n{"step": 4}\n', "7\n"])
def test_what_a_killed_run_left_of_a_line_is_dropped_with_all_behind_it(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    write(path, LINES[:3], torn)
    Metrics(path, 5)
    assert steps(path) == [0, 1, 2]


def test_a_run_that_goes_on_without_its_metrics_begins_them_anew(tmp_path):
    Metrics(tmp_path / "metrics.jsonl", 5)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_the_record_of_a_run(tmp_path):
    write(tmp_path / "metrics.jsonl", LINES)
    results = {"before": None, "tuned": {"loss": math.nan, "accuracy": 0.5}, "steps": 6}
    write_results(tmp_path, Settings(max_steps=6, clip=math.inf), results)
    record = json.loads((tmp_path / "run.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert record["tuned"] == {"loss": None, "accuracy": 0.5}
    assert (record["steps"], record["before"]) == (6, None)
    assert record["settings"]["max_steps"] == 6
    assert record["settings"]["clip"] is None, "infinity is no JSON"
    assert record["versions"] == versions()
    assert set(versions()) == {"qzo", "torch", "transformers", "python"}
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def drawn(monkeypatch, tmp_path, lines, results):
    """The axes of what draw_curve saves."""
    figures, figure = [], folder.Figure
    monkeypatch.setattr(folder, "Figure", lambda **given: figures.append(figure(**given)) or figures[-1])
    draw_curve(tmp_path / "c.png", lines, results)
    [axes] = figures[0].axes
    return {line.get_label(): np.asarray(line.get_xydata()).tolist() for line in axes.lines}


def test_a_curve_has_each_loss_its_running_mean_and_the_evaluations(monkeypatch, tmp_path):
    lines: list[dict[str, Any]] = [{"step": step, "loss": float(step % 2)} for step in range(40)]
    lines[7]["loss"] = None  # a step that was skipped
    results = {"zero_shot": {"loss": 0.75}, "control": None, "tuned": {"loss": 0.25}, "steps": 40}
    shown = drawn(monkeypatch, tmp_path, lines, results)
    assert list(shown) == ["batch", "mean of 1 steps", "held out, zero-shot", "held out, tuned"]
    assert [x for x, _ in shown["batch"]] == [step for step in range(40) if step != 7]
    assert {y for _, y in shown["held out, zero-shot"]} == {0.75}
    lines = [{"step": step, "loss": float(step % 2)} for step in range(40)]
    shown = drawn(monkeypatch, tmp_path, lines, {"before": {"loss": 3.0}})
    assert list(shown) == ["batch", "mean of 2 steps", "held out, before"]
    assert shown["mean of 2 steps"][:3] == [[0.0, 0.0], [1.0, 0.5], [2.0, 0.5]]


def test_a_run_whose_every_step_was_skipped_has_an_empty_curve(tmp_path):
    draw_curve(tmp_path / "c.png", [{"step": 0, "loss": None}], {})
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_biases_of_a_run_and_the_step_that_they_are_of(tmp_path):
    path = tmp_path / "run.json"
    assert fitted_biases(path) is None
    path.write_text('{"steps": 3, "label_bias": null}')
    assert fitted_biases(path) is None
    path.write_text('{"steps": 3, "model_step": 2, "label_bias": [[5, 0.25], [7, -1]]}')
    assert fitted_biases(path) == ([(5, 0.25), (7, -1.0)], 2)


@pytest.mark.parametrize(
    "text",
    ["[]", "[" * 5000, "{", '{"label_bias": [[1, 2]]}', '{"steps": 1, "label_bias": 5}']
    + [
        f'{{"steps": 1, "label_bias": {wrong}}}'
        for wrong in ("[[1]]", '[["x", 1]]', "[[-1, 1]]", "[[1, NaN]]", '{"a": 1}')
    ],
)
def test_a_run_json_that_no_run_has_written_is_named(tmp_path, text):
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"run.json"):
        fitted_biases(path)
