"""What several commands share: loading a model, results as text."""

import sys

import torch

from ..checkpoints.load import from_pretrained
from ..nn.layers import train_slots
from ..optim.journal import read
from ..optim.replay import replay


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
    }
    return from_pretrained(path, **{key: value for key, value in chosen.items() if value is not None})


def replayed(base, journal, until, own):
    """(the model at `base` with the steps of a journal, how many these are); options of the model as for `load`."""
    found = read(journal)
    if found is None:
        raise ValueError(f"{journal} has no whole header: the run ended before its first step")
    model = load(base, own)
    train_slots(model, set(found[0]["arena"]))
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
