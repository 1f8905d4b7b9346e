"""Files of records: JSON lines, or one JSON array of them. A record is one of

    {"prompt": "...", "completion": "..."}                      the completion's tokens are learned
    {"messages": [{"role": ..., "content": ...}, ...]}          the last (assistant) message's tokens are learned; there
                                                                may be "tools": [...], for the chat template
    {"text": "..."}                                             every token is learned
    {"prompt": "...", "options": ["...", ...], "label": 0}      the right option among them; label: number or text
    {"conversations": [{"from": ..., "value": ...}, ...]}       ShareGPT's: as messages (chats.py)
    {"instruction": "...", "input": "...", "output": "..."}     Alpaca's: as messages; without a chat template, its
                                                                prompt and the output as completion

and is read as the first of these whose keys it has, whatever else it has.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .chats import conversation

SPLITS = ("train", "valid", "test")
ENDINGS = (".jsonl", ".json")
FORMS = (
    {"prompt", "options", "label"},
    {"prompt", "completion"},
    {"messages"},
    {"text"},
    {"conversations"},
    {"instruction", "output"},
)
TABLES = {  # what pandas reads, and how
    ".parquet": ("a Parquet", "read_parquet({!r})"),
    ".csv": ("a CSV", "read_csv({!r})"),
    ".tsv": ("a TSV", "read_csv({!r}, sep='\\t')"),
    ".feather": ("a Feather", "read_feather({!r})"),
    ".arrow": ("an Arrow", "read_feather({!r})"),
    ".xlsx": ("an Excel", "read_excel({!r})"),
}
COMPRESSED = {".gz": "gzip -d", ".xz": "xz -d", ".bz2": "bzip2 -d", ".zst": "zstd -d", ".zip": "unzip"}
MAGIC = {b"PAR1": ".parquet", b"ARROW1": ".arrow", b"\x1f\x8b": ".gz", b"\xfd7zXZ": ".xz", b"BZh": ".bz2"}
MAGIC |= {b"\x28\xb5\x2f\xfd": ".zst", b"PK\x03\x04": ".zip"}
BOM = b"\xef\xbb\xbf"


class Line(dict):
    """A record that knows where it stands: in the `number`-th `unit` ("line" or "record") of the file `path`."""

    def __init__(self, record: dict[str, Any], path: Path, number: int, unit: str = "line"):
        super().__init__(record)
        self.path, self.unit, self.place = path, unit, f"{path}, {unit} {number}"


def read_data(path: str | Path) -> dict[str, list[Line]]:
    """split -> records. path: a file of JSON lines or of one array (train), or a folder with train.jsonl or train.json
    and perhaps valid and test of the same kinds.

    FileNotFoundError when there is no such file or none of training in the folder; ValueError as `read_records`, for
    two files of one split, and for a split in another kind of file.
    """
    path = Path(path)
    if path.is_file():
        return {"train": read_records(path)}
    if not path.is_dir():
        raise FileNotFoundError(f"no data at {path}: give a JSONL file, or a folder that holds train.jsonl")
    found = {}
    for split in SPLITS:
        files = [path / f"{split}{ending}" for ending in ENDINGS if (path / f"{split}{ending}").is_file()]
        if len(files) > 1:
            raise ValueError(f"{path} holds both {files[0].name} and {files[1].name}: keep one of them")
        if not files:  # one of another kind is refused by name, not passed over
            files = [file for file in sorted(path.glob(f"{split}.*")) if _other(file.suffix.lower(), file)][:1]
        if files:
            found[split] = files[0]
    if "train" not in found:
        raise FileNotFoundError(f"{path} holds no train.jsonl (or train.json)")
    return {split: read_records(file) for split, file in found.items()}


def read_records(path: str | Path) -> list[Line]:
    """The records of a file of JSON lines, or of one JSON array. ValueError naming the line or record that is no
    object or has none of the known shapes, and for a file of another kind what converts it."""
    path = Path(path)
    with open(path, "rb") as file:  # bytes: a line that is no UTF-8 has its number named
        head = file.read(4096)
        file.seek(0)
        seen = next((ending for magic, ending in MAGIC.items() if head.startswith(magic)), "")
        other = _other(path.suffix.lower(), path) or _other(seen, path)
        if other:
            raise ValueError(other)
        array = _array(path, file.read()) if head.removeprefix(BOM).lstrip().startswith(b"[") else None
        file.seek(0)
        records = list(_lines(path, file)) if array is None else array
    if not records:
        raise ValueError(f"{path} holds no examples")
    return records


def form(record: dict[str, Any]) -> set[str] | None:
    """The keys that say what the record is, whatever else it has; None for no known shape."""
    return next((form for form in FORMS if form <= record.keys()), None)


def problem(record: Any) -> str | None:
    """What is wrong with a record, or None."""
    if not isinstance(record, dict):
        return f"expected a JSON object, got {type(record).__name__}"
    keys = form(record)
    if keys is None:
        return (
            f"has the keys {sorted(record)}; wanted are prompt+completion, messages, text, prompt+options+label, "
            f"conversations, or instruction+output{_list_inside(record)}"
        )
    for key in keys & {"prompt", "completion", "text"}:
        if not isinstance(record[key], str):
            turns = ": give a conversation as 'messages'" if isinstance(record[key], list) else ""
            return f"{key!r} must be a string, got {type(record[key]).__name__}{turns}"
    if "completion" in keys and isinstance(record.get("label"), bool):
        return (
            f"'label' is {str(record['label']).lower()}, and every completion is learned: leave out the unwanted "
            "ones, and the key"
        )
    if keys & {"messages", "conversations", "instruction"}:
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
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
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
        records = json.loads(data)
    except (ValueError, RecursionError) as error:
        try:
            json.loads(data.removeprefix(BOM).lstrip().partition(b"\n")[0])
            return None
        except (ValueError, RecursionError):
            raise ValueError(f"{path} begins as a JSON array, and is not JSON ({error})") from None
    for number, record in enumerate(records, 1):
        wrong = problem(record)
        if wrong:
            raise ValueError(f"{path}, record {number}: {wrong}")
    return [Line(record, path, number, "record") for number, record in enumerate(records, 1)]


def _over_lines(data: bytes) -> str:
    """What to say of a file that is one JSON object over several lines; "" for any other."""
    try:
        record = json.loads(data)
    except (ValueError, RecursionError):
        return ""
    if not isinstance(record, dict):
        return ""
    return (
        f" is one JSON object over several lines, with the keys {sorted(record)}; wanted is a record on each line, or "
        f"all of them in one array{_list_inside(record)}"
    )


def _other(kind: str, path: Path) -> str:
    """What to say of a file of this kind (its ending); "" for one that may hold records."""
    if kind in TABLES:
        name, call = TABLES[kind]
        target = str(path.with_suffix(".jsonl"))
        return (
            f"{path} is {name} file; JSON lines or a JSON array are read. pandas converts it: "
            f"import pandas; pandas.{call.format(str(path))}.to_json({target!r}, orient='records', lines=True)"
        )
    if kind in COMPRESSED:
        return f"{path} is compressed; JSON lines or a JSON array are read. Unpack it first: {COMPRESSED[kind]} {path}"
    return ""
