"""`qzo eval`: the losses that training reports, before and after a run, beside the control; perplexity of text."""

import json
import math

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

import qzo
from qzo.cli.main import main
from qzo.loss.label_bias import fit_label_bias, set_biases_
from qzo.loss.linear_probe import fit_linear_probe
from qzo.training.data import tokenize
from qzo.training.task import Task, measure
from tests.support import tiny

TEXTS = [{"text": "red green blue"}, {"text": "stone leaf sky fire water up down"}, {"text": "one two"}]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(base, data, folder for a run)."""
    folder = tmp_path_factory.mktemp("eval")
    base, data = tiny.save_checkpoint(folder / "base"), folder / "data"
    data.mkdir()
    for split in ("train", "valid"):
        tiny.write_jsonl(data / f"{split}.jsonl", tiny.RECORDS)
    return base, data, folder


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """(base, a journal of 4 large steps on it, its folder)."""
    folder = tmp_path_factory.mktemp("tuned")
    base = tiny.save_checkpoint(folder / "base")
    train = tiny.write_jsonl(folder / "train.jsonl", tiny.RECORDS[:16])
    options = ["--data", train, "--output-dir", folder / "out", "--max-steps", 4, "--learning-rate", 0.5, "--clip", 50]
    assert main(["train", *map(str, [base, "--group-size", 32, *options])]) == 0
    return base, folder / "out/journal.qzo", folder


def told(capsys, *arguments):
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def task(base, records):
    model = qzo.from_pretrained(base, device="cpu", group_size=32)
    return Task(model, tokenize(records, qzo.load_tokenizer(base)), 0)


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


def test_the_untuned_model_and_the_control_stand_beside_a_run(tuned, tmp_path, capsys):
    base, journal, _ = tuned
    for split, part in (("train", tiny.RECORDS[:16]), ("valid", tiny.RECORDS[16:])):
        tiny.write_jsonl(tmp_path / f"{split}.jsonl", part)
    found = told(capsys, "eval", base, "--group-size", 32, "--data", tmp_path, "--journal", journal)
    train, valid = task(base, tiny.RECORDS[:16]), task(base, tiny.RECORDS[16:])
    bias = fit_label_bias(train.scores(), train.labels())
    probe = fit_linear_probe(train.scores(), train.look().states, train.labels())
    probed = measure(probe(valid.scores(), valid.look().states), valid.labels())
    assert found["linear_probe"] == {"valid": probed}
    assert found["zero_shot"] == {"train": train.evaluate(), "valid": valid.evaluate()}
    assert found["control"] == {"valid": measure(valid.scores() + bias, valid.labels())}
    assert found["control"]["valid"]["loss"] != found["zero_shot"]["valid"]["loss"] != found["splits"]["valid"]["loss"]
    assert qzo.replay(valid.model, journal) == found["steps"] == 4
    assert found["splits"]["valid"] != valid.evaluate(), "label biases were fitted at the end"
    set_biases_(valid.model, json.loads(journal.with_name("run.json").read_text())["label_bias"])
    assert found["splits"]["valid"] == valid.evaluate()
    assert main(["eval", str(base), "--group-size", "32", "--data", str(tmp_path), "--journal", str(journal)]) == 0
    names = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert names == [
        "train, zero-shot",
        "train, after 4 steps",
        "valid, zero-shot",
        "valid, control: label biases only",
        "valid, control: linear probe",
        "valid, after 4 steps",
    ]


def test_a_run_at_a_step(tuned, capsys):
    base, journal, folder = tuned
    data = tiny.write_jsonl(folder / "held-out.jsonl", tiny.RECORDS[16:])
    ask = ["eval", base, "--group-size", 32, "--data", data, "--journal", journal]
    losses = {}
    for until in (0, 2, 4):
        found = told(capsys, *ask, "--until", until)
        assert found["steps"] == until
        assert found["control"] is None
        assert found["linear_probe"] is None
        losses[until] = found["splits"]["held-out"]["loss"]
    assert losses[0] == found["zero_shot"]["held-out"]["loss"]
    assert len(set(losses.values())) == 3
    valid = task(base, tiny.RECORDS[16:])
    assert qzo.replay(valid.model, journal, until=2) == 2
    assert losses[2] == valid.evaluate()["loss"]


def test_biases_are_fitted_on_another_file(tuned, capsys):
    """--control-data gives what a train split gives, and without a journal too."""
    base, _, folder = tuned
    data = tiny.write_jsonl(folder / "scored.jsonl", tiny.RECORDS[16:])
    ask = ["eval", base, "--group-size", 32, "--data", data, "--control-data"]
    found = told(capsys, *ask, folder / "train.jsonl")
    train, scored = task(base, tiny.RECORDS[:16]), task(base, tiny.RECORDS[16:])
    bias = fit_label_bias(train.scores(), train.labels())
    assert found["control"] == {"scored": measure(scored.scores() + bias, scored.labels())}
    assert set(found["linear_probe"]) == {"scored"}
    assert found["linear_probe"] != found["control"]
    assert found["zero_shot"] is None
    assert found["splits"] == {"scored": scored.evaluate()}


def test_perplexity_is_that_of_a_token(tuned, tmp_path, capsys):
    """exp of the mean over all predicted tokens, whatever batch they stand in."""
    base, journal, _ = tuned
    data = tiny.write_jsonl(tmp_path / "texts.jsonl", TEXTS)
    found = told(capsys, "eval", base, "--group-size", 32, "--data", data, "--journal", journal, "--until", 0)
    held = task(base, TEXTS)
    total, tokens = 0.0, 0
    for example in held.examples:
        ids = torch.tensor([example.ids])
        with torch.no_grad():
            logits = held.model(ids).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        tokens += len(example.ids) - 1
    scores = found["splits"]["texts"]
    assert scores["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-5)
    assert scores["perplexity"] == math.exp(scores["loss"])
    assert scores["accuracy"] is None
    assert found["zero_shot"] == found["splits"]
    assert held.evaluate(batch_size=1)["loss"] == pytest.approx(scores["loss"], rel=1e-6)
    assert main(["eval", str(base), "--group-size", "32", "--data", str(data)]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["accuracy", "loss", "perplexity"]
    assert row.split() == ["texts", "-", f"{scores['loss']:.3f}", f"{scores['perplexity']:.2f}"]


@pytest.mark.parametrize(
    ("control", "said"),
    [
        ("scored.jsonl", "scored.jsonl is scored itself: label biases are fitted on other examples"),
        ("texts.jsonl", "its examples have 0 options, those that are scored 2 in scored"),
        ("missing.jsonl", "no data at"),
    ],
)
def test_control_data_that_does_not_fit(tuned, tmp_path, capsys, control, said):
    data = tiny.write_jsonl(tmp_path / "scored.jsonl", tiny.RECORDS[16:])
    tiny.write_jsonl(tmp_path / "texts.jsonl", TEXTS)
    options = ["--group-size", "32", "--data", str(data), "--control-data", str(tmp_path / control)]
    assert main(["eval", str(tuned[0]), *options]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_a_step_that_is_none_of_the_run(tuned, capsys):
    base, journal, folder = tuned
    ask = ["eval", str(base), "--data", str(folder / "train.jsonl")]
    for more, said in (
        (["--until", "1"], "--until 1 is a step of a run: give its journal too"),
        (["--until", "5", "--journal", str(journal)], "journal.qzo has 4 steps"),
        (["--until", "-1", "--journal", str(journal)], "--until -1: expected a step number >= 0"),
    ):
        assert main([*ask, *more]) == 2
        assert said in capsys.readouterr().err


def test_a_decoders_first_token_counts_too(tmp_path):
    """Behind an encoder every label is predicted: the mean over tokens is the same in batches of any size."""
    tiny.save_checkpoint(tmp_path)
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).unlink()
    shape = {"d_model": 64, "d_kv": 32, "d_ff": 128, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=30, **shape))
    t5.save_pretrained(tmp_path)
    model = qzo.from_pretrained(tmp_path, device="cpu", group_size=32)
    lines = [{"prompt": "red", "completion": "one"}, {"prompt": "blue sky", "completion": "ten nine eight seven six"}]
    held = Task(model, tokenize(lines, qzo.load_tokenizer(tmp_path), encoder=True), 0)
    total = 0.0
    for example in held.examples:
        labels = torch.tensor([example.labels])
        total += float(model(input_ids=torch.tensor([example.ids]), labels=labels).loss) * len(example.labels)
    want = total / sum(len(example.labels) for example in held.examples)
    for size in (1, 2):
        assert held.evaluate(size)["loss"] == pytest.approx(want, rel=1e-5)
