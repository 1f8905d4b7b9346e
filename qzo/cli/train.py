"""`qzo train`."""

import dataclasses
import json
import statistics
import time
import warnings
from pathlib import Path

from ..checkpoints.save import save_pretrained
from ..checkpoints.tokenizer import load_tokenizer
from ..reports.memory import Run, predict_loaded
from ..training.data import IGNORED
from ..training.folder import write_results
from ..training.loop import build_task, check_batch_size, choose_layers, fit, planned_steps
from ..training.plan import lines, plan
from ..training.records import read_data
from ..training.settings import PAPER, Settings
from .common import load, say, table
from .options import model_of
from .outputs import JOURNAL


def merge_options(options):
    """(Settings, all options) of a command line, over the recipe's. ValueError for what is missing or out of range."""
    own = vars(options) | {"model": model_of(options)}
    missing = [f"--{name.replace('_', '-')}" for name in ("model", "data", "output_dir") if not own[name]]
    if missing:
        raise ValueError(f"missing {', '.join(missing)} (on the command line or in --config)")
    names = {field.name for field in dataclasses.fields(Settings)}
    given = {key: value for key, value in own.items() if key in names and value is not None}
    return Settings(**{**(PAPER if options.recipe == "paper" else {}), **given}), own


def execute(options):
    """Train, and tell; exit status. ValueError for bad input."""
    settings, own = merge_options(options)
    options.output_dir = own["output_dir"]
    if own["resume"]:
        planned_steps(settings, Path(own["output_dir"]) / JOURNAL)
    records = read_data(own["data"])
    check_batch_size(settings, len(records["train"]))
    started = time.perf_counter()
    model = load(own["model"], own)
    tokenizer = load_tokenizer(own["model"], bool(own["trust_remote_code"]))
    prefix = choose_layers(model, settings.train_layers, settings.train_codebooks)
    task = build_task(model, records["train"], tokenizer, settings, prefix)
    held_out = {
        split: build_task(model, lines, tokenizer, settings, prefix)
        for split, lines in records.items()
        if split != "train"
    }
    show_plan(task, settings, model, bool(own["trust_remote_code"]))
    before = {split: held.evaluate() for split, held in held_out.items()}
    already = fit(task, settings, own["output_dir"], resume=bool(own["resume"]))
    after = {split: held.evaluate() for split, held in held_out.items()}
    model_dir = save(model, own["output_dir"])
    split = "valid" if "valid" in after else "test"
    results = {
        "before": before.get(split),
        "tuned": after.get(split),
        "splits": {name: {"before": before[name], "tuned": after[name]} for name in after},
        "steps": settings.max_steps,
        "resumed_from": already,
        "seconds": round(time.perf_counter() - started, 1),
        "seed": settings.seed,
        "device": str(task.device),
        "model": str(model_dir),
        "source": own["model"],
    }
    write_results(own["output_dir"], settings, results)
    if options.json:
        print(json.dumps(results))
    else:
        rows = [
            (f"{name}, {when}", scores) for name, both in results["splits"].items() for when, scores in both.items()
        ]
        if rows:
            print(table(rows))
        print(f"tuned model: {model_dir}")
    warn_if_worse(results["splits"])
    return 0


def show_plan(task, settings, model, trust_remote_code):
    """What the run will do and hold in memory, on standard error."""
    told = plan(task, settings, model)
    say("\n".join(lines(told)))
    rows, longest = told["rows_per_step"] // told["evaluations"], told["tokens_per_row"]["longest"]
    labels = max(1, round(statistics.fmean(map(labelled, task.examples))))
    run = Run(rows, longest, min(labels, longest - 1), settings.directions, settings.sequential)
    try:
        total = predict_loaded(model, run, trust_remote_code)["total"]
    except (ValueError, RuntimeError) as error:  # of a forward that needs values, not only shapes
        return say(f"memory: cannot be predicted ({str(error).splitlines()[0]:.200})")
    say(f"memory: {total / 1e9:.2f} GB predicted for a step of {rows} x {longest} tokens on {task.device}, all blocks")


def labelled(example):
    """How many positions of a row of this example carry a label."""
    if example.options is not None:
        return max(map(len, example.options))
    return sum(label != IGNORED for label in example.labels)


def warn_if_worse(splits):
    """A warning where the loss of held-out data is higher after the run than before."""
    for name, both in splits.items():
        before, after = both["before"]["loss"], both["tuned"]["loss"]
        if not after <= before:
            warnings.warn(
                f"the run has made the model worse on {name}: loss {before:.3f} before, {after:.3f} after; try a lower "
                "--learning-rate, more --directions or more data, or fewer steps (qzo replay BASE OUT/journal.qzo "
                "--until N rebuilds the model as it was at step N)",
                stacklevel=2,
            )


def save(model, out):
    """Write the tuned checkpoint to OUT/model and return that path."""
    target = Path(out) / "model"
    save_pretrained(model, target)
    return target
