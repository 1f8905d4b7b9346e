"""Files that records are read from, and what is said of those that hold none."""

import gzip
import json

import pytest

from qzo.training.records import problem, read_data, read_records
from tests.support import tiny

RECORDS = [{"text": "a b"}, {"prompt": "a", "completion": " b"}]


def written(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("front", [b"", b"\n \n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n"])
@pytest.mark.parametrize("name", ["d.json", "d.jsonl"])
def test_one_array_is_read_as_lines_are(tmp_path, indent, front, name):
    path = written(tmp_path / name, front + json.dumps(RECORDS, indent=indent).encode())
    found = read_records(path)
    assert found == RECORDS == read_records(tiny.write_jsonl(tmp_path / "lines", RECORDS))
    assert [record.place for record in found] == [f"{path}, record 1", f"{path}, record 2"]


def test_lines_in_a_json_file_are_lines(tmp_path):
    found = read_records(tiny.write_jsonl(tmp_path / "d.json", RECORDS))
    assert found == RECORDS
    assert found[1].place == f"{tmp_path / 'd.json'}, line 2"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "d.json holds no examples"),
        ("", "d.json holds no examples"),
        ("[[1]]", "d.json, record 1: expected a JSON object, got list"),
        ('[{"text": "a"}, 3]', "d.json, record 2: expected a JSON object, got int"),
        ('[{"text": "a"}, {"text": 3}]', "d.json, record 2: 'text' must be a string, got int"),
        ('[{"text": "a"},\n{"text": }]', "d.json begins as a JSON array, and is not JSON (Expecting value: line 2"),
        ('[{"text": "a"}', "d.json begins as a JSON array, and is not JSON (Expecting"),
        ("[" * 100000, "d.json begins as a JSON array, and is not JSON ("),
        (b'[{"text": "\xff"}]', "d.json begins as a JSON array, and is not JSON ("),
        ('["a"]\n["b"]', "d.json, line 1: expected a JSON object, got list"),
        (
            '{"version": 1, "data": [{"text": "a"}, {"text": "b"}]}',
            "d.json, line 1: has the keys ['data', 'version']; wanted are prompt+completion, messages, text, "
            "prompt+options+label, conversations, or instruction+output; its 'data' is a list of 2 objects: if they "
            "are the records, write that list alone",
        ),
        (
            json.dumps({"data": RECORDS, "version": 1}, indent=1),
            "d.json is one JSON object over several lines, with the keys ['data', 'version']; wanted is a record on "
            "each line, or all of them in one array; its 'data' is a list of 2 objects",
        ),
        (
            json.dumps(RECORDS[0], indent=1),
            "d.json is one JSON object over several lines, with the keys ['text']; wanted is a record on each line",
        ),
        ('{"text": "a"}\n{\n"text": "b"}', "d.json, line 2: not JSON ("),
        ('"a\n"', "d.json, line 1: not JSON ("),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path, text, said):
    path = written(tmp_path / "d.json", text)
    with pytest.raises(ValueError) as error:
        read_records(path)
    assert str(error.value).startswith(f"{tmp_path}/{said}")


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("d.xlsx", b"PK\x03\x04", ["is an Excel file", "read_excel"]),
        ("d.jsonl.gz", gzip.compress(b'{"text": "a"}', mtime=0), ["is compressed; unpack it first: gzip -d"]),
        ("d.jsonl", gzip.compress(b'{"text": "a"}', mtime=0), ["is compressed", "gzip -d"]),
        ("d.zip", b"PK\x03\x04", ["is compressed", "unzip"]),
        ("d.jsonl.zst", b"\x28\xb5\x2f\xfd", ["is compressed", "zstd -d"]),
    ],
)
def test_a_file_of_another_kind_is_told_what_converts_it(tmp_path, name, data, said):
    with pytest.raises(ValueError) as error:
        read_data(written(tmp_path / name, data))
    for part in [str(tmp_path / name), *said]:
        assert part in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_folder_of_lines_and_arrays(tmp_path):
    tiny.write_jsonl(tmp_path / "train.jsonl", RECORDS)
    written(tmp_path / "valid.json", json.dumps(RECORDS[:1]))
    written(tmp_path / "notes.csv", "a")
    assert read_data(tmp_path) == {"train": RECORDS, "valid": RECORDS[:1]}
    written(tmp_path / "test.csv", "text\na b\n")
    assert read_data(tmp_path)["test"] == RECORDS[:1]
    written(tmp_path / "test.csv", "text\n")
    with pytest.raises(ValueError, match=r"test.csv holds no examples"):
        read_data(tmp_path)
    (tmp_path / "test.csv").unlink()
    written(tmp_path / "test.xlsx", b"PK")
    with pytest.raises(ValueError, match=r"test.xlsx is an Excel file"):
        read_data(tmp_path)
    written(tmp_path / "train.json", json.dumps(RECORDS))
    with pytest.raises(ValueError, match=r"holds both train.jsonl and train.json: keep one"):
        read_data(tmp_path)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["input", "output"], "; nearest is instruction+output: add 'instruction'"),
        (["prompt", "response"], "; nearest is prompt+completion: add 'completion'"),
        (["options", "prompt"], "; nearest is prompt+options+label: add 'label'"),
        (
            ["Completion", "Prompt"],
            "; nearest is prompt+completion: rename 'Prompt' to 'prompt', rename 'Completion' to",
        ),
        (["message"], "; nearest is messages: rename 'message' to 'messages'"),
        ([" text"], "; nearest is text: rename ' text' to 'text'"),
        (["TEXT"], "; nearest is text: rename 'TEXT' to 'text'"),
        (["answer", "question"], ""),
        ([], ""),
    ],
)
def test_the_nearest_form_is_named(keys, said):
    told = problem(dict.fromkeys(keys, "a"))
    start = (
        f"has the keys {keys}; wanted are prompt+completion, messages, text, prompt+options+label, conversations, or "
        "instruction+output"
    )
    assert told is not None
    assert told.startswith(start)
    assert told.removeprefix(start).startswith(said)
    assert bool(said) == (told != start)


def test_a_folder_without_training_records(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no train.jsonl \(nor .json, .csv, .tsv, .parquet\)"):
        read_data(tmp_path)
    written(tmp_path / "train.xlsx", "a")
    with pytest.raises(ValueError, match=r"train.xlsx is an Excel file"):
        read_data(tmp_path)
    with pytest.raises(FileNotFoundError, match="no data at"):
        read_data(tmp_path / "nowhere")
