"""`qzo train`."""

import dataclasses
import json
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import yaml

from ..checkpoints.save import save_pretrained
from ..checkpoints.tokenizer import load_tokenizer
from ..reports.memory import Run, predict_loaded
from ..training.data import IGNORED
from ..training.folder import write_results
from ..training.loop import build_task, choose_layers, fit
from ..training.plan import lines, plan
from ..training.records import read_data
from ..training.settings import PAPER, Settings
from .common import load, say, table
from .options import CHAT_LOSSES, DTYPES, LARGE_ROWS, NOISES, PACKINGS, RECIPES, SHARINGS, model_of
from .outputs import check_run

CHOICES = {
    "noise": NOISES,
    "sharing": SHARINGS,
    "large_rows": LARGE_ROWS,
    "packing": PACKINGS,
    "chat_loss": CHAT_LOSSES,
    "recipe": RECIPES,
    "dtype": DTYPES,
}
OWN_OPTIONS = (
    "model",
    "data",
    "output_dir",
    "resume",
    "overwrite",
    "recipe",
    "device",
    "dtype",
    "group_size",
    "trust_remote_code",
    "weight_only",
)


def merge_options(options):
    """Command line over YAML over recipe; returns (Settings, the other options). ValueError for an unknown key."""
    given = {key: value for key, value in vars(options).items() if value is not None}
    if options.checkpoint:
        given["model"] = model_of(options)
    from_file: dict[str, Any] = {}
    if options.config:
        with open(options.config, encoding="utf-8") as file:
            try:
                from_file = yaml.safe_load(file) or {}
            except yaml.YAMLError as error:
                raise ValueError(f"{options.config} is not YAML: {error}") from None
        if not isinstance(from_file, dict):
            raise ValueError(f"{options.config} must hold keys and values, got {type(from_file).__name__}")
        from_file = {str(key).replace("-", "_"): value for key, value in from_file.items()}
    names = {field.name for field in dataclasses.fields(Settings)}
    unknown = sorted(map(str, set(from_file) - names - set(OWN_OPTIONS)))
    if unknown:
        raise ValueError(
            f"{options.config}: unknown keys {', '.join(unknown)}; known are "
            f"{', '.join(sorted(names | set(OWN_OPTIONS)))}"
        )
    merged = {**from_file, **given}
    missing = [f"--{name.replace('_', '-')}" for name in ("model", "data", "output_dir") if not merged.get(name)]
    if missing:
        raise ValueError(f"missing {', '.join(missing)} (on the command line or in --config)")
    for key, wanted in CHOICES.items():
        if merged.get(key) not in (None, *wanted):
            raise ValueError(f"{key}: {merged[key]!r} in {options.config}; known are {', '.join(wanted)}")
    base = PAPER if merged.get("recipe") == "paper" else {}
    settings = Settings(**{**base, **{key: value for key, value in merged.items() if key in names}})
    return settings, {key: merged.get(key) for key in OWN_OPTIONS}


def execute(options):
    """Train, and tell; exit status. ValueError for bad input."""
    settings, own = merge_options(options)
    options.output_dir = own["output_dir"]
    check_run(own["output_dir"], own["resume"], own["overwrite"])
    records = read_data(own["data"])
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
