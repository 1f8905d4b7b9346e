"""`qzo eval`: the losses that training reports, before and after a run."""

import json

import pytest

from qzo.cli.main import main
from tests.support import tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(base, data, folder for a run)."""
    folder = tmp_path_factory.mktemp("eval")
    base, data = tiny.save_checkpoint(folder / "base"), folder / "data"
    data.mkdir()
    for split in ("train", "valid"):
        tiny.write_jsonl(data / f"{split}.jsonl", tiny.RECORDS)
    return base, data, folder


def told(capsys, *arguments):
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_before_and_after_a_run(run, capsys):
    base, data, folder = run
    out = folder / "out"
    trained = told(capsys, "train", base, "--group-size", 32, "--data", data, "--output-dir", out, "--max-steps", 4)
    before = told(capsys, "eval", base, "--group-size", 32, "--data", data)
    assert before["steps"] == 0
    assert before["splits"]["valid"] == trained["before"]
    after = told(
        capsys, "eval", base, "--group-size", 32, "--data", data / "valid.jsonl", "--journal", out / "journal.qzo"
    )
    assert after["steps"] == 4
    assert after["splits"] == {"valid": trained["tuned"]}
    assert main(["eval", str(out / "model"), "--data", str(data)]) == 0
    text = capsys.readouterr().out
    assert "accuracy    loss" in text
    assert "valid" in text


def test_a_missing_model_is_said(capsys):
    assert main(["eval", "--data", "d"]) == 2
    assert "a model is missing: qzo eval MODEL" in capsys.readouterr().err
