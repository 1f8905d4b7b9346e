"""What several commands share: the options of the model, loading it, results as text."""

import sys

import torch

from ..checkpoints.load import from_pretrained
from ..nn.layers import train_slots
from ..optim.journal import read
from ..optim.replay import replay

DTYPES = ("float32", "float16", "bfloat16")


def add_model_options(parser):
    model = parser.add_argument_group("the model")
    model.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda if there is one)")
    model.add_argument("--dtype", choices=DTYPES, help="of activations (default: float32 on a CPU, float16 on a GPU)")
    model.add_argument(
        "--group-size", type=int, help="when a float checkpoint is quantized on the way in (default 128)"
    )
    model.add_argument(
        "--trust-remote-code", action="store_true", default=None, help="run code from the checkpoint's folder"
    )
    model.add_argument(
        "--weight-only",
        action="store_true",
        default=None,
        help="of a checkpoint whose layers' inputs are quantized too (W4A8): train the weights as if they were not",
    )


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
