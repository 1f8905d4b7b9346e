"""`qzo train`."""

import argparse
import dataclasses
import json
import time
from pathlib import Path

import yaml

from ..checkpoints.save import save_pretrained
from ..checkpoints.tokenizer import load_tokenizer
from ..kernels.noise import SHARINGS, VERSIONS
from ..nn.ops import LARGE_ROWS
from ..training.data import read_data
from ..training.folder import write_results
from ..training.loop import build_task, choose_layers, fit, trained_text
from ..training.packing import PACKINGS
from ..training.settings import LEARNING_RATE_PER_DIRECTION, PAPER, Settings
from .common import DTYPES, add_model_options, load, say, table

CHOICES = {
    "noise": tuple(VERSIONS),
    "sharing": SHARINGS,
    "large_rows": LARGE_ROWS,
    "packing": PACKINGS,
    "recipe": ("paper",),
    "dtype": DTYPES,
}
CUDA_GRAPH = dict(
    action=argparse.BooleanOptionalAction,
    help="run the steps of each shape of batch as one CUDA graph: "
    "the same bits, sooner (default: where the model is on a CUDA device)",
)
OWN_OPTIONS = (
    "model",
    "data",
    "output_dir",
    "resume",
    "recipe",
    "device",
    "dtype",
    "group_size",
    "trust_remote_code",
    "weight_only",
)


def add_options(parser):
    files = parser.add_argument_group("files")
    files.add_argument("--model", help="a checkpoint: a folder, a .gguf file, or a hub id that is in the local cache")
    files.add_argument(
        "--data",
        help="a JSONL file, or a folder with train.jsonl and perhaps valid.jsonl, test.jsonl; "
        "lines are prompt+completion, messages, text, or prompt+options+label",
    )
    files.add_argument("--output-dir", help="where journal, metrics, curve and model go")
    files.add_argument("--config", help="a YAML file with any of these options; options on the command line win")
    files.add_argument(
        "--resume",
        action="store_true",
        default=None,
        help="continue the journal in --output-dir: the result has the bits of an unbroken run",
    )
    run = parser.add_argument_group("the run")
    run.add_argument("--max-steps", type=int, help=f"steps (default {Settings.max_steps})")
    run.add_argument("--batch-size", type=int, help=f"examples a step (default {Settings.batch_size})")
    run.add_argument(
        "--learning-rate",
        type=float,
        help=f"at the first step, falling linearly to a tenth (default {LEARNING_RATE_PER_DIRECTION:g} per direction)",
    )
    run.add_argument("--eps", type=float, help=f"perturbation, relative to a scale (default {Settings.eps:g})")
    run.add_argument("--clip", type=float, help=f"bound on the directional derivative (default {Settings.clip:g})")
    run.add_argument(
        "--directions", type=int, help=f"directions a step, two evaluations each (default {Settings.directions})"
    )
    run.add_argument("--noise", choices=CHOICES["noise"], help="noise law (default rademacher)")
    run.add_argument(
        "--sharing", choices=SHARINGS, help="one z per scale (group, the default) or one per output row (row)"
    )
    run.add_argument(
        "--large-rows",
        choices=LARGE_ROWS,
        help="on a GPU, from 128 tokens per evaluation on: exact "
        "(fused), or perturbed weights rounded to 16 bits, in registers (folded) or in chunks for a "
        "library's matmul (blas); auto, the default: rounded if under 2 %% of the signal is lost by it",
    )
    run.add_argument(
        "--sequential",
        action="store_true",
        default=None,
        help="run the evaluations of a step one after "
        "another instead of stacked: activations of one, not of all 2 x directions",
    )
    run.add_argument("--cuda-graph", **CUDA_GRAPH)
    run.add_argument(
        "--compile",
        action="store_true",
        default=None,
        help="what lies between the quantized layers goes "
        "through torch.compile: other roundings, and the first step of each shape waits (default: off)",
    )
    run.add_argument(
        "--packing",
        choices=PACKINGS,
        help="auto: a batch of unequal lengths is one row without "
        "padding where that costs less and the model computes the same (default off)",
    )
    run.add_argument("--seed", type=int, help="seed of noise and data order (default 0)")
    run.add_argument(
        "--train-layers",
        type=int,
        metavar="K",
        help="train the top K blocks only; the blocks below run "
        "once per example and their output is kept (default: the whole model trains)",
    )
    run.add_argument(
        "--train-codebooks",
        action="store_true",
        default=None,
        help="train the codebooks of AQLM layers too (default: the scales alone)",
    )
    run.add_argument(
        "--recipe",
        choices=CHOICES["recipe"],
        help="the paper's setting: absolute eps 1e-3, clip 100, "
        "lr 1e-7, Gaussian noise, one direction, batch 16, floor 0; single options still win",
    )
    run.add_argument("--max-length", type=int, help=f"longest example in tokens (default {Settings.max_length})")
    add_model_options(parser)


def merge_options(options):
    """Command line over YAML over recipe; returns (Settings, the other options). ValueError for an unknown key."""
    given = {key: value for key, value in vars(options).items() if value is not None}
    from_file = {}
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
