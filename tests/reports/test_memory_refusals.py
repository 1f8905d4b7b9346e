"""`qzo memory` refuses what it cannot plan, and a run that this machine has no room for, before anything is loaded."""

import json

import pytest
import transformers as t

from qzo.cli.main import main
from qzo.reports import memory
from tests.support import tiny
from tests.support.checkpoints import TYPES, write_gguf

GB = 10**9


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(a float folder, a GGUF file, a BERT without a head)."""
    folder = tmp_path_factory.mktemp("models")
    config = t.BertConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1, vocab_size=16
    )
    t.BertModel(config).save_pretrained(folder / "bert")
    write_gguf(folder / "m.gguf", TYPES.Q4_0)
    return tiny.save_checkpoint(folder / "float"), folder / "m.gguf", folder / "bert"


@pytest.fixture
def no_load(monkeypatch):
    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(memory, "from_pretrained", load)
    monkeypatch.setattr(memory.models, "fill_random", load)


def refused(capsys, *line):
    assert main(["memory", *map(str, line)]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    [said] = told.err.splitlines()
    return said


def test_a_run_that_does_not_fit(models, no_load, monkeypatch, capsys):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    for model in models[:2]:
        said = refused(capsys, model, "--device", "cpu")
        assert f"qzo memory: {model}: a step is predicted to take 0.00 GB, and cpu has 0.00 GB free" in said
    said = refused(capsys, "--config", "smollm2", "--measure", "--device", "cpu")
    assert "so nothing was loaded; measure it where there is more, or predict it only" in said


def test_a_prediction_says_what_is_free(monkeypatch, capsys):
    for free, said in ((10 * GB, "free here: 10.000 GB"), (1000, "free here: 0.000 GB; that is not enough")):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        assert main(["memory", "--config", "smollm2", "--device", "cpu"]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == said
    monkeypatch.setattr(memory, "free_bytes", lambda device: None)
    assert main(["memory", "--config", "smollm2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["free"] is None


def test_a_model_that_cannot_be_planned(models, no_load, capsys):
    for given in ((models[2],), ("--config", models[2])):
        assert "BertModel has no language-model head" in refused(capsys, *given, "--device", "cpu")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--seq-len 0", "--seq-len 0: expected at least 2"),
        ("--batch-size 0", "--batch-size 0: expected at least 1"),
        ("--labels 64", "64 labelled positions (--labels) in rows of 64 tokens (--seq-len): between 1 and 63"),
        ("--batch-size 9000 --directions 9", "--batch-size 9000 in --directions 9: up to 65,536 rows"),
        ("--plot x.foo", "--plot x.foo: a picture's name ends in .png"),
        ("--plot none/x.png", "--plot none/x.png: there is no folder none"),
    ],
)
def test_options_out_of_range_are_named(line, said, no_load, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert said in refused(capsys, "--config", "smollm2", "--device", "cpu", *line.split())
    assert list(tmp_path.iterdir()) == []
