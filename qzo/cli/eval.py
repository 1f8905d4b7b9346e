"""`qzo eval`: loss, accuracy and perplexity on each split of the data, of a model or of one before and after a run.

Beside options stand the controls (training/controls.py): the untuned model with label biases, and a linear probe of it,
both fitted on training data. A run has learned something about the inputs only where it beats the first, and been worth
its steps only where it beats the second.
"""

import argparse
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..checkpoints.tokenizer import load_tokenizer
from ..optim.replay import replay
from ..system.as_json import finite
from ..training.controls import NAMES, Controls, controls
from ..training.loop import build_task
from ..training.records import Line, read_data
from ..training.settings import Settings
from ..training.task import Look, Task, measure
from .common import check_until, say, scores_as_text, tune, untuned
from .options import model_of


def execute(options: argparse.Namespace) -> int:
    """Evaluate, and show; exit status. ValueError for bad input."""
    model_name = model_of(options)
    if not model_name:
        raise ValueError("a model is missing: qzo eval MODEL --data FILE, a folder, a .gguf file or a Hub id")
    check_until(options.until, options.journal)
    settings = Settings(**({} if options.max_length is None else {"max_length": options.max_length}))
    records, fitting = read_all(options)
    model = untuned(model_name, options.journal, vars(options))
    if options.journal:
        replay(model, options.journal, 0)  # a journal of another model is told before anything is measured
    tokenizer = load_tokenizer(model_name, bool(options.trust_remote_code))
    tasks = {split: build_task(model, lines, tokenizer, settings, None) for split, lines in records.items()}
    for split, task in tasks.items():
        say(f"{split}: {len(task.examples)} examples")
    fitted = build_task(model, fitting, tokenizer, settings, None) if options.control_data else tasks.get("train")
    controlled = splits_with_control(records, tasks, fitting, fitted, options.control_data)

    before, looks = {}, {}
    for split, task in tasks.items():
        before[split], looks[split] = measured(task, split in controlled or (bool(controlled) and task is fitted))
    found: Controls = {}
    if fitted is not None and controlled:
        look = fitted.look() if options.control_data else looks["train"]
        found = controls(known(look), {split: known(looks[split]) for split in controlled})
    steps = tune(model, options.journal, options.until)
    after = {split: measured(task, False)[0] for split, task in tasks.items()} if options.journal else before
    results = {
        "model": model_name,
        "steps": steps,
        "splits": after,
        "zero_shot": before if options.journal else None,
        **{name: found.get(name) for name in NAMES},
        "device": str(next(iter(tasks.values())).device),
    }
    print(json.dumps(finite(results)) if options.json else scores_as_text(list(rows(results))))
    return 0


def read_all(options: argparse.Namespace) -> tuple[dict[str, list[Line]], list[Line]]:
    """(split -> records to score, the records to fit the controls on: those of --control-data or of training)."""
    records = read_data(options.data)
    fitting = read_data(options.control_data)["train"] if options.control_data else records["train"]
    if Path(options.data).is_file():
        records = {Path(options.data).stem: records["train"]}
    return records, fitting


def splits_with_control(
    records: Mapping[str, list[Line]],
    tasks: Mapping[str, Task],
    fitting: list[Line],
    fitted: Task | None,
    control_data: str | None,
) -> list[str]:
    """The splits that get a control: with as many options as the task `fitted` has, and in another file than `fitting`.
    ValueError where --control-data was given and there are none."""
    others = [split for split, lines in records.items() if not Path(lines[0].path).samefile(fitting[0].path)]
    if fitted is None:
        return []
    count = option_count(fitted)
    found = [split for split in others if count and option_count(tasks[split]) == count]
    if not control_data or found:
        return found
    if not others:
        raise ValueError(f"--control-data {control_data} is scored itself: label biases are fitted on other examples")
    scored = ", ".join(f"{option_count(tasks[split])} in {split}" for split in others)
    raise ValueError(
        f"--control-data {control_data}: its examples have {count} options, those that are scored {scored}; label "
        "biases need as many here as there"
    )


def option_count(task: Task) -> int:
    """Options of each example, 0 for a task without."""
    return len(task.examples[0].options or ())


def known(look: Look | None) -> Look:
    """What `measured` gave for a task with options."""
    assert look is not None
    return look


def measured(task: Task, with_states: bool) -> tuple[dict[str, float | None], Look | None]:
    """({"loss", "accuracy"}, the Look they are of), or ({"loss", "accuracy", "perplexity"}, None) without options."""
    if option_count(task):
        look = task.look(with_states=with_states)
        return measure(look.scores, look.label), look
    found = task.evaluate()
    assert found["loss"] is not None
    try:
        return {**found, "perplexity": math.exp(found["loss"])}, None
    except OverflowError:
        return {**found, "perplexity": math.inf}, None


def rows(results: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The lines of the table: of each split the untuned model, its controls, the tuned model."""
    tuned = results["zero_shot"] is not None
    for split, scores in results["splits"].items():
        yield (f"{split}, zero-shot", results["zero_shot"][split]) if tuned else (split, scores)
        for name, said in NAMES.items():
            if split in (results[name] or {}):
                yield f"{split}, {said}", results[name][split]
        if tuned:
            yield f"{split}, after {results['steps']} steps", scores
