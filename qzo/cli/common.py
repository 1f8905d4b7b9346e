"""What several commands share: loading a model, results as text."""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.load import from_pretrained
from ..kernels.tiles import GROUPS
from ..loss.label_bias import set_biases_
from ..nn.layers import train_slots_
from ..nn.weights import check_group_size
from ..optim.pieces import contents
from ..optim.replay import replay
from ..training.folder import RESULTS, fitted_biases
from .early import size_of


def load(path: str | Path, own: Mapping[str, Any]) -> Any:
    """The model at `path`, as the options of "the model" say."""
    device_of(own)
    chosen = {
        "device": own["device"],
        "group_size": own["group_size"],
        "dtype": getattr(torch, own["dtype"]) if own["dtype"] else None,
        "trust_remote_code": bool(own["trust_remote_code"]),
        "weight_only": bool(own["weight_only"]),
        "strict": bool(own.get("strict")),
    }
    if own.get("offload"):
        chosen |= {"offload": own["offload"], "offload_folder": own["offload_dir"] or own["output_dir"]}
    if own["group_size"] is not None:  # also where the checkpoint is in codes already and none is used
        check_group_size(own["group_size"], math.lcm(*GROUPS))
    say(f"loading {path}{size_of(path)}")
    return from_pretrained(path, **{key: value for key, value in chosen.items() if value is not None})


def device_of(own: Mapping[str, Any]) -> tuple[torch.device, torch.dtype]:
    """(device, dtype of the activations) of the options. ValueError for a device that torch cannot use."""
    name = own["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch raises either for a device it was not built for
        raise ValueError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None
    device = torch.device(name)
    return device, getattr(torch, own["dtype"] or ("float16" if device.type == "cuda" else "float32"))


def _header_and_steps(journal: str | Path) -> tuple[dict[str, Any], int]:
    """Of a journal that has begun. ValueError for one that has not, FileNotFoundError for none."""
    found = contents(journal)
    found.check_run()
    return found.header, len(found.steps)


def steps_of(journal: str | Path) -> int:
    """How many whole steps a journal holds."""
    return _header_and_steps(journal)[1]


def check_until(until: int | None, journal: str | Path | None) -> None:
    """ValueError for a step that a journal does not have, or of no journal; until, journal: None if not given."""
    if until is None:
        return
    if not journal:
        raise ValueError(f"--until {until} is a step of a run: give its journal too, --journal OUT/journal.qzo")
    if until < 0:
        raise ValueError(f"--until {until}: expected a step number >= 0")
    held = steps_of(journal)
    if until > held:
        raise ValueError(f"--until {until}: {journal} has {held} steps")


def untuned(base: str | Path, journal: str | Path | None, own: Mapping[str, Any]) -> Any:
    """The model at `base` as the run of a journal found it: what trained there trains, no step is applied. Options of
    the model as for `load`; journal: None for no run."""
    if not journal:
        return load(base, own)
    header, _ = _header_and_steps(journal)
    model = load(base, own)
    train_slots_(model, set(header["arena"]))
    return model


def tune(model: Any, journal: str | Path | None, until: int | None) -> int:
    """Apply the steps of a journal to a model that is `untuned`, and say so; how many these are. JournalError for
    another model's journal; journal: None for no steps."""
    if not journal:
        return 0
    steps = steps_of(journal)
    steps = steps if until is None else min(until, steps)
    say(f"replaying {steps} steps")
    applied = replay(model, journal, until)
    _take_biases(model, Path(journal).with_name(RESULTS), steps)
    return applied


def _take_biases(model: Any, results: Path, steps: int) -> None:
    """The label biases that a run has fitted for its model, which stand in its run.json, beside the journal."""
    biases, fitted = fitted_biases(results) or ([], steps)
    if fitted != steps:
        say(f"the label biases in {results} are those of step {fitted}: the model of step {steps} has none")
    elif biases:
        set_biases_(model, biases)


def replayed(
    base: str | Path, journal: str | Path | None, until: int | None, own: Mapping[str, Any]
) -> tuple[Any, int]:
    """(the model at `base` with the steps of a journal, how many these are). Options of the model as for `load`;
    journal: None for no run."""
    model = untuned(base, journal, own)
    return model, tune(model, journal, until)


def scores_as_text(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """(name, {"loss", "accuracy"} and perhaps "perplexity") rows as aligned text."""
    width = max(len(name) for name, _ in rows)
    more = any("perplexity" in scores for _, scores in rows)
    lines = [f"{'':{width}}  accuracy    loss" + ("  perplexity" if more else "")]
    for name, scores in rows:
        accuracy = "       -" if scores["accuracy"] is None else f"{100 * scores['accuracy']:6.1f} %"
        perplexity = f"  {scores['perplexity']:10.2f}" if "perplexity" in scores else ""
        lines.append(f"{name:{width}}  {accuracy}  {scores['loss']:6.3f}{perplexity}")
    return "\n".join(lines)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
