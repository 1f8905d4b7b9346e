"""Examples that are cut to the longest length: counted, and refused where they are too many."""

import json
import warnings

import pytest

from qzo.cli.main import main
from qzo.training.data import tokenize
from tests.support import tiny
from tests.training.test_data import words


def texts(*lengths):
    return [{"text": "a " * length} for length in lengths]


def test_more_than_the_share_is_an_error_that_names_the_lengths_needed():
    tokenizer = words("$A", eos=None)
    with pytest.warns(UserWarning, match="2 of 4 lines have more than 5 tokens"):
        tokenize(texts(3, 5, 6, 9), tokenizer, 5, max_cut=0.5)
    with pytest.raises(ValueError) as error:
        tokenize(texts(3, 6, 7, 9), tokenizer, 5, max_cut=0.5)
    assert str(error.value) == (
        "3 of 4 lines have more than 5 tokens (the longest 9): more than the 50 % that may be cut; --max-length 9 "
        "holds them whole, 6 cuts no more than that; to learn from what is left of them, give --max-cut 1"
    )
    with pytest.warns(UserWarning, match="2 of 4 lines have more than 6 tokens"):
        tokenize(texts(3, 6, 7, 9), tokenizer, 6, max_cut=0.5)
    with pytest.raises(
        ValueError, match=r"1 of 4 lines .* more than the 0 % that may be cut; --max-length 9 holds them"
    ):
        tokenize(texts(3, 6, 7, 9), tokenizer, 8, max_cut=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenize(texts(3, 6, 7, 9), tokenizer, 9, max_cut=0)
    with pytest.warns(UserWarning, match="4 of 4 lines have more than 2 tokens"):
        tokenize(texts(3, 6, 7, 9), tokenizer, 2, max_cut=1)


def test_examples_know_what_they_have_lost_and_are_the_same_without():
    """A journal's digest of the data is of their repr: it must not change."""
    tokenizer = words("<s> $A", eos=None)
    with pytest.warns(UserWarning, match="have more than 4 tokens"):
        short, long = tokenize([*texts(2), {"prompt": "a b c a", "completion": " yes"}], tokenizer, 4)
    assert (short.lost, long.lost) == (0, 2)
    assert "lost" not in repr(long)
    [same] = tokenize([{"prompt": "c a", "completion": " yes"}], tokenizer, 4)
    assert (same, same.lost) == (long, 0)


@pytest.mark.parametrize("split", ["train", "valid"])
def test_the_command_line_refuses_a_length_that_leaves_ends_only(tmp_path, capsys, split):
    base = tiny.save_checkpoint(tmp_path / "base")
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    words_of = " ".join(tiny.WORDS[11:30])
    long = [{"prompt": f"{words_of} {end}", "completion": "warm"} for end in ("one", "two", "three", "four")]
    for name in ("train", "valid"):
        tiny.write_jsonl(
            data / f"{name}.jsonl", long if name == split else [{"prompt": "red", "completion": "warm"}] * 4
        )
    line = ["train", "--model", str(base), "--data", str(data), "--output-dir", str(out), "--group-size", "32"]
    line += ["--device", "cpu", "--max-steps", "1", "--batch-size", "2", "--max-length", "3"]
    assert main(line) == 2
    [said] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("qzo train: ")]
    assert f"4 of 4 lines of {data / split}.jsonl have more than 3 tokens" in said
    longest = int(said.partition("--max-length ")[2].split()[0])
    assert not out.exists()
    assert main([*line[:-1], str(longest)]) == 0
    assert "more than" not in capsys.readouterr().err
    assert main([*line, "--max-cut", "1", "--output-dir", str(tmp_path / "cut")]) == 0
    assert f"4 of 4 lines of {data / split}.jsonl have more than 3 tokens" in capsys.readouterr().err
    settings = json.loads((tmp_path / "cut" / "run.json").read_text())["settings"]
    assert (settings["max_cut"], settings["text_eos"]) == (1.0, True)
