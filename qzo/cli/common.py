"""What several commands share: loading a model, results as text."""

import math
import sys
from pathlib import Path

import torch

from ..checkpoints.load import from_pretrained
from ..kernels.tiles import GROUPS
from ..nn.layers import train_slots
from ..nn.weights import check_group_size
from ..optim.journal import read
from ..optim.replay import replay
from .early import size_of


def load(path, own):
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
        "strict": bool(own.get("strict")),
    }
    if own["group_size"] is not None:  # also where the checkpoint is in codes already and none is used
        check_group_size(own["group_size"], math.lcm(*GROUPS))
    say(f"loading {path}{size_of(path)}")
    return from_pretrained(path, **{key: value for key, value in chosen.items() if value is not None})


def _header_and_steps(journal):
    """Of a journal that has begun. ValueError for one that has not, FileNotFoundError for none."""
    if not Path(journal).is_file():
        what = f"{journal} is a folder" if Path(journal).is_dir() else f"there is no journal {journal}"
        raise FileNotFoundError(f"{what}; a run's journal is OUT/journal.qzo")
    found = read(journal)
    if found is None:
        raise ValueError(f"{journal} has no whole header: the run ended before its first step")
    return found[0], len(found[1])


def steps_of(journal):
    """How many whole steps a journal holds."""
    return _header_and_steps(journal)[1]


def replayed(base, journal, until, own):
    """(the model at `base` with the steps of a journal, how many these are); options of the model as for `load`."""
    header, steps = _header_and_steps(journal)
    model = load(base, own)
    train_slots(model, set(header["arena"]))
    say(f"replaying {steps if until is None else min(until, steps)} steps")
    return model, replay(model, journal, until)


def table(rows):
    """(name, {"loss", "accuracy"}) rows as aligned text."""
    width = max(len(name) for name, _ in rows)
    lines = [f"{'':{width}}  accuracy    loss"]
    for name, scores in rows:
        accuracy = "       -" if scores["accuracy"] is None else f"{100 * scores['accuracy']:6.1f} %"
        lines.append(f"{name:{width}}  {accuracy}  {scores['loss']:6.3f}")
    return "\n".join(lines)


def say(text):
    print(text, file=sys.stderr, flush=True)
