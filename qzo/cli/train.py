"""`qzo train`."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import yaml

from ..checkpoints.save import save_pretrained
from ..checkpoints.tokenizer import load_tokenizer
from ..training.data import read_data
from ..training.folder import write_results
from ..training.loop import build_task, choose_layers, fit, trained_text
from ..training.settings import PAPER, Settings
from .common import load, say, table
from .options import DTYPES, LARGE_ROWS, NOISES, PACKINGS, RECIPES, SHARINGS, model_of

CHOICES = {
    "noise": NOISES,
    "sharing": SHARINGS,
    "large_rows": LARGE_ROWS,
    "packing": PACKINGS,
    "recipe": RECIPES,
    "dtype": DTYPES,
}
OWN_OPTIONS = ("model", "data", "output_dir", "resume", "recipe", "device", "dtype", "group_size", "trust_remote_code")


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
    records = read_data(own["data"])
    started = time.perf_counter()
    model, tokenizer = load(own["model"], own), load_tokenizer(own["model"], bool(own["trust_remote_code"]))
    prefix = choose_layers(model, settings.train_layers, settings.train_codebooks)
    task = build_task(model, records["train"], tokenizer, settings, prefix)
    held_out = {
        split: build_task(model, records[split], tokenizer, settings, prefix)
        for split in ("valid", "test")
        if split in records
    }
    say(
        f"{trained_text(model)} train; {len(task.examples)} examples, {settings.max_steps} steps of "
        f"{settings.batch_size} rows under {2 * settings.directions} evaluations"
    )
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
    return 0


def save(model, out):
    """Write the tuned checkpoint to OUT/model and return that path."""
    target = Path(out) / "model"
    save_pretrained(model, target)
    return target
