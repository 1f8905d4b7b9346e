"""What several commands share: loading a model, results as text."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.load import from_pretrained
from ..nn.layers import train_slots_
from ..optim.journal import read
from ..optim.replay import replay


def load(path: str | Path, own: Mapping[str, Any]) -> Any:
    """The model at `path`, as the options of "the model" say."""
    try:
        torch.empty(0, device=own["device"])
    except (RuntimeError, AssertionError) as error:  # torch raises either for a device it was not built for
        raise ValueError(f"--device {own['device']} cannot be used: {str(error).splitlines()[0]}") from None
    chosen = {
        "device": own["device"],
        "group_size": own["group_size"],
        "dtype": getattr(torch, own["dtype"]) if own["dtype"] else None,
        "trust_remote_code": bool(own["trust_remote_code"]),
        "weight_only": bool(own["weight_only"]),
    }
    say(f"loading {path}{_size(path)}")
    return from_pretrained(path, **{key: value for key, value in chosen.items() if value is not None})


def _header_and_steps(journal: str | Path) -> tuple[dict[str, Any], int]:
    """Of a journal that has begun. ValueError for one that has not, FileNotFoundError for none."""
    if not Path(journal).is_file():
        what = f"{journal} is a folder" if Path(journal).is_dir() else f"there is no journal {journal}"
        raise FileNotFoundError(f"{what}; a run's journal is OUT/journal.qzo")
    found = read(journal)
    if found is None:
        raise ValueError(f"{journal} has no whole header: the run ended before its first step")
    return found[0], len(found[1])


def steps_of(journal: str | Path) -> int:
    """How many whole steps a journal holds."""
    return _header_and_steps(journal)[1]


def replayed(base: str | Path, journal: str | Path, until: int | None, own: Mapping[str, Any]) -> tuple[Any, int]:
    """(the model at `base` with the steps of a journal, how many these are); options of the model as for `load`."""
    header, steps = _header_and_steps(journal)
    model = load(base, own)
    train_slots_(model, set(header["arena"]))
    say(f"replaying {steps if until is None else min(until, steps)} steps")
    return model, replay(model, journal, until)


def _size(path: str | Path) -> str:
    """ ", 1.2 GB" of a file or folder; nothing for what has to be fetched."""
    path = Path(path).expanduser()
    files = [path] if path.is_file() else path.iterdir() if path.is_dir() else []
    nbytes = sum(file.stat().st_size for file in files if file.is_file())
    return f", {nbytes / 1e9:.2f} GB" if nbytes >= 1e7 else ""


def scores_as_text(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """(name, {"loss", "accuracy"}) rows as aligned text."""
    width = max(len(name) for name, _ in rows)
    lines = [f"{'':{width}}  accuracy    loss"]
    for name, scores in rows:
        accuracy = "       -" if scores["accuracy"] is None else f"{100 * scores['accuracy']:6.1f} %"
        lines.append(f"{name:{width}}  {accuracy}  {scores['loss']:6.3f}")
    return "\n".join(lines)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
