"""Records, from files, folders and Python objects. A record is one of

    {"prompt": "...", "completion": "..."}                      the completion's tokens are learned; both may be lists
                                                                of messages: as messages, one list behind the other
    {"messages": [{"role": ..., "content": ...}, ...]}          the last (assistant) message's tokens are learned, or
                                                                those of all the assistant's; there may be
                                                                "tools": [...], for the chat template
    {"text": "..."}                                             every token is learned
    {"prompt": "...", "options": ["...", ...], "label": 0}      the right option among them; label: number or text
    {"conversations": [{"from": ..., "value": ...}, ...]}       ShareGPT's: as messages (chats.py)
    {"instruction": "...", "input": "...", "output": "..."}     Alpaca's: as messages; without a chat template, its
                                                                prompt and the output as completion

and is read as the first of these whose keys it has, whatever else it has. A file holds JSON lines, one JSON array, or a
table (tables.py).
"""

import difflib
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ..system.as_json import parsed
from . import tables
from .chats import conversation

SPLITS = {"train": ("train",), "valid": ("valid", "validation", "val", "dev"), "test": ("test",)}  # and their names
ENDINGS = (".jsonl", ".json", *tables.READ)
FORMS = (
    ("prompt", "options", "label"),
    ("prompt", "completion"),
    ("messages",),
    ("text",),
    ("conversations",),
    ("instruction", "output"),
)
KNOWN = "prompt+completion, messages, text, prompt+options+label, conversations, or instruction+output"
ALIKE = 0.75  # how like a key has to be to one that is known, to be taken for it misspelt
COMPRESSED = {".gz": "gzip -d", ".xz": "xz -d", ".bz2": "bzip2 -d", ".zst": "zstd -d", ".zip": "unzip"}
MAGIC = {b"PAR1": ".parquet", b"ARROW1": ".arrow", b"\x1f\x8b": ".gz", b"\xfd7zXZ": ".xz", b"BZh": ".bz2"}
MAGIC |= {b"\x28\xb5\x2f\xfd": ".zst", b"PK\x03\x04": ".zip"}
BOM = b"\xef\xbb\xbf"
Records = Iterable[Mapping[str, Any]]


class Line(dict):
    """A record that knows where it stands: the `number`-th `unit` ("line", "record" or "row") of `path`, a file or, of
    objects, a split."""

    def __init__(self, record: Mapping[str, Any], path: Path | str, number: int, unit: str = "line"):
        super().__init__(record)
        self.path, self.unit, self.place = path, unit, f"{path}, {unit} {number}"


def read_data(source: str | os.PathLike[str] | Records | Mapping[str, Records]) -> dict[str, list[Line]]:
    """split (train, valid, test) -> records.

    source: a file (train); a folder with a file of each split, of any kind that is read, such as train.jsonl and
    valid.csv, or Parquet files named as on the Hugging Face Hub, train-00000-of-00001.parquet, in it or in its folder
    data; a folder written by `save_to_disk`; or objects: an iterable of records (train), such as a list or a
    `datasets.Dataset`, or a mapping of split to iterable. "validation", "val" and "dev" are valid. A warning names
    splits that are none of these.

    FileNotFoundError when there is no such file or none of training in the folder; ValueError as `read_records`, for
    several files of one split, for a split in another kind of file, and for objects that are no records.
    """
    if isinstance(source, str | os.PathLike):
        return _read_path(Path(source))
    if not isinstance(source, Mapping):
        return {"train": _checked(source, "train")}
    return {split: _checked(source[name], name) for split, name in _known_splits(source, "the data").items()}


def _read_path(path: Path) -> dict[str, list[Line]]:
    if path.is_file():
        return {"train": read_records(path)}
    if not path.is_dir():
        raise FileNotFoundError(f"no data at {path}: give a JSONL file, or a folder that holds train.jsonl")
    if (path / tables.DATASET).is_file():
        return {"train": _read_files(tables.dataset_files(path))}
    if (path / tables.SPLIT_NAMES).is_file():
        splits = _known_splits(tables.dataset_splits(path), str(path))
        return {split: _read_files(tables.dataset_files(path / name)) for split, name in splits.items()}
    found = {split: files for split in SPLITS if (files := _files(path, split))}
    if "train" not in found:
        raise FileNotFoundError(
            f"{path} holds no train.jsonl (nor .json, .csv, .tsv, .parquet), and is no dataset that save_to_disk has "
            "written"
        )
    return {split: _read_files(files) for split, files in found.items()}


def _files(path: Path, split: str) -> list[Path]:
    """The files of a split in a folder: one, or numbered parts. ValueError for both, or for two of the first."""
    names = SPLITS[split]
    files = [file for name in names for ending in ENDINGS if (file := path / f"{name}{ending}").is_file()]
    parts = [p for name in names for f in (path, path / "data") for p in sorted(f.glob(f"{name}-*-of-*.parquet"))]
    if len(files) + bool(parts) > 1:
        raise ValueError(f"{path} holds both {files[0].name} and {(files + parts)[1].name}: keep one of them")
    if not files and not parts:  # one of another kind is refused by name, not passed over
        files = [file for file in sorted(path.glob(f"{split}.*")) if _other(file.suffix.lower(), file)][:1]
    return files or parts


def _known_splits(names: Iterable[str], where: str) -> dict[str, str]:
    """split -> its name among these. ValueError for two names of one, and for none that trains; a warning names those
    that are not read."""
    found: dict[str, str] = {}
    names = list(names)
    for name in names:
        for split in [split for split, known in SPLITS.items() if name in known]:
            if split in found:
                raise ValueError(f"{where} holds both {found[split]!r} and {name!r}: keep one of them")
            found[split] = name
    if "train" not in found:
        raise ValueError(
            f"{where} has no split 'train', but {', '.join(map(repr, names)) or 'none'}: give the one that trains alone"
        )
    left = [name for name in names if name not in found.values()]
    if left:
        warnings.warn(f"{where}: splits that are not read: {', '.join(map(str, left))}", stacklevel=4)
    return found


def _read_files(files: list[Path]) -> list[Line]:
    return [record for file in files for record in read_records(file)]


def read_records(path: str | Path) -> list[Line]:
    """The records of a file of JSON lines, of one JSON array, or of a table. ValueError naming the line, record or row
    that is no object or has none of the known shapes, and for a file of another kind what converts it."""
    path = Path(path)
    with open(path, "rb") as file:  # bytes: a line that is no UTF-8 has its number named
        head = file.read(4096)
        file.seek(0)
        kind = path.suffix.lower()
        seen = next((ending for magic, ending in MAGIC.items() if head.startswith(magic)), kind)
        other = _other(kind, path) or _other(seen, path)
        if other:
            raise ValueError(other)
        if seen in tables.READ:
            records = list(_rows(path, seen))
        else:
            array = _array(path, file.read()) if head.removeprefix(BOM).lstrip().startswith(b"[") else None
            file.seek(0)
            records = list(_lines(path, file)) if array is None else array
    if not records:
        raise ValueError(f"{path} holds no examples")
    return records


def _rows(path: Path, kind: str) -> Iterator[Line]:
    """The records of a table."""
    unit = "line" if kind in tables.DELIMITED else "row"
    for number, record in tables.rows(path, kind):
        wrong = problem(record)
        if wrong:
            named = "; the first line of a CSV names its columns" if unit == "line" and not form(record) else ""
            raise ValueError(f"{path}, {unit} {number}: {wrong}{named}")
        yield Line(record, path, number, unit)


def _checked(records: Records, split: str) -> list[Line]:
    """Objects as records. ValueError for what is none."""
    if isinstance(records, str | Mapping) or not isinstance(records, Iterable):
        raise ValueError(f"the split {split!r} must be an iterable of records (dicts), got {type(records).__name__}")
    found = []
    for number, record in enumerate(records, 1):
        plain = tables.without_nulls(dict(record)) if isinstance(record, Mapping) else record
        wrong = problem(plain)
        if wrong:
            raise ValueError(f"{split}, record {number}: {wrong}")
        found.append(Line(plain, split, number, "record"))
    if not found:
        raise ValueError(f"the split {split!r} holds no examples")
    return found


def form(record: dict[str, Any]) -> set[str] | None:
    """The keys that say what the record is, whatever else it has; None for no known shape."""
    return next((set(form) for form in FORMS if set(form) <= record.keys()), None)


def problem(record: Any) -> str | None:
    """What is wrong with a record, or None."""
    if not isinstance(record, dict):
        return f"expected a JSON object, got {type(record).__name__}"
    keys = form(record)
    if keys is None:
        return f"has the keys {sorted(map(str, record))}; wanted are {KNOWN}{_nearest(record)}{_list_inside(record)}"
    chat = bool(keys & {"messages", "conversations", "instruction"})
    if "completion" in keys and isinstance(record["prompt"], list) and isinstance(record["completion"], list):
        keys, chat = keys - {"prompt"}, True
    for key in () if chat else sorted(keys & {"prompt", "completion", "text"}):
        if not isinstance(record[key], str):
            turns = ""
            if isinstance(record[key], list):
                turns = ": give a conversation as 'messages'"
                if "completion" in keys:
                    turns += ", or both 'prompt' and 'completion' as lists of messages"
            return f"{key!r} must be a string, got {type(record[key]).__name__}{turns}"
    if "completion" in keys and isinstance(record.get("label"), bool):
        return (
            f"'label' is {str(record['label']).lower()}, and every completion is learned: leave out the unwanted "
            "ones, and the key"
        )
    if chat:
        try:
            conversation(record)
        except ValueError as error:
            return str(error)
    return _problem_of_options(record["options"], record["label"]) if "options" in keys else None


def _problem_of_options(options: Any, label: Any) -> str | None:
    if not isinstance(options, list) or len(options) < 2 or not all(isinstance(o, str) and o for o in options):
        return "'options' must be a list of at least two non-empty strings"
    if isinstance(label, bool) or not (
        label in options if isinstance(label, str) else isinstance(label, int) and 0 <= label < len(options)
    ):
        return f"label {label!r} is not among the options {options} (nor the number of one)"
    return None


def _nearest(record: dict[str, Any]) -> str:
    """Which known keys those of a record come nearest to, and what is to be done to them; "" where none comes near."""
    found = {str(key).strip().lower(): str(key) for key in record}
    best, told = 0.0, ""
    for keys in FORMS:
        matches = {key: difflib.get_close_matches(key, found, 1, ALIKE) for key in keys}
        share = sum(map(bool, matches.values())) / len(keys)
        if share <= best:
            continue
        renamed = {key: found[match[0]] for key, match in matches.items() if match and found[match[0]] != key}
        steps = [f"rename {old!r} to {new!r}" for new, old in renamed.items()]
        steps += [f"add {key!r}" for key, match in matches.items() if not match]
        best, told = share, f"; nearest is {'+'.join(keys)}: {', '.join(steps)}"
    return told


def _list_inside(record: dict[str, Any]) -> str:
    """A hint for an object around the records, such as {"data": [...]}."""
    for key, value in record.items():
        if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
            return f"; its {key!r} is a list of {len(value)} objects: if they are the records, write that list alone"
    return ""


def _lines(path: Path, file: BinaryIO) -> Iterator[Line]:
    """The records of JSON lines."""
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            record = parsed(line)
        except ValueError as error:
            file.seek(0)
            whole = _over_lines(file.read())
            raise ValueError(f"{path}{whole}" if whole else f"{path}, line {number}: not JSON ({error})") from None
        wrong = problem(record)
        if wrong:
            raise ValueError(f"{path}, line {number}: {wrong}")
        yield Line(record, path, number)


def _array(path: Path, data: bytes) -> list[Line] | None:
    """The records of one JSON array; None for lines of which the first is an array."""
    try:
        records = parsed(data)
    except ValueError as error:
        try:
            parsed(data.removeprefix(BOM).lstrip().partition(b"\n")[0])
            return None
        except ValueError:
            raise ValueError(f"{path} begins as a JSON array, and is not JSON ({error})") from None
    for number, record in enumerate(records, 1):
        wrong = problem(record)
        if wrong:
            raise ValueError(f"{path}, record {number}: {wrong}")
    return [Line(record, path, number, "record") for number, record in enumerate(records, 1)]


def _over_lines(data: bytes) -> str:
    """What to say of a file that is one JSON object over several lines; "" for any other."""
    try:
        record = parsed(data)
    except ValueError:
        return ""
    if not isinstance(record, dict):
        return ""
    return (
        f" is one JSON object over several lines, with the keys {sorted(record)}; wanted is a record on each line, or "
        f"all of them in one array{_list_inside(record)}"
    )


def _other(kind: str, path: Path) -> str:
    """What to say of a file of this kind (its ending); "" for one that may hold records."""
    if kind == ".xlsx":
        target = str(path.with_suffix(".jsonl"))
        return (
            f"{path} is an Excel file; JSON lines, a JSON array, CSV and Parquet are read. pandas converts it: "
            f"import pandas; pandas.read_excel({str(path)!r}).to_json({target!r}, orient='records', lines=True)"
        )
    if kind in COMPRESSED:
        return f"{path} is compressed; unpack it first: {COMPRESSED[kind]} {path}"
    return ""
