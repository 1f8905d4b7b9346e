"""`qzo train`."""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..checkpoints.save import save_pretrained
from ..checkpoints.tokenizer import load_tokenizer
from ..nn.tensor_parallel import is_sharded, unshard_
from ..optim.shares import TENSOR
from ..reports.memory import Run, predict_loaded
from ..system.ranks import FirstFailed, RankLost, Ranks, RanksDiffer, RanksDiverged, joined, launched
from ..training.controls import EXAMPLES, NAMES, Controls, controls
from ..training.data import IGNORED, Example
from ..training.folder import write_results
from ..training.loop import Trainable, build_task, check_batch_size, choose_layers, fit, fits_biases
from ..training.plan import lines, plan
from ..training.records import read_data
from ..training.schedule import planned_steps
from ..training.settings import PAPER, Settings
from ..training.task import Measure, Task, measure
from ..training.validation import PARTS, Base, Validation
from .common import load, say, scores_as_text, steps_of
from .options import model_of
from .outputs import JOURNAL
from .parts import load_parts


def merge_options(options: argparse.Namespace) -> tuple[Settings, dict[str, Any]]:
    """(Settings, all options) of a command line, over the recipe's. ValueError for what is missing or out of range."""
    own = vars(options) | {"model": model_of(options)}
    missing = [f"--{name.replace('_', '-')}" for name in ("model", "data", "output_dir") if not own[name]]
    if missing:
        raise ValueError(f"missing {', '.join(missing)} (on the command line or in --config)")
    names = {field.name for field in dataclasses.fields(Settings)}
    given = {key: value for key, value in own.items() if key in names and value is not None}
    return Settings(**{**(PAPER if options.recipe == "paper" else {}), **given}), own


def execute(options: argparse.Namespace) -> int:
    """Train, and tell; exit status. ValueError for bad input.

    Of several ranks the first tells, and writes; another says only what fails on it alone.
    """
    settings, own = merge_options(options)
    check_together(settings, own)
    options.output_dir = own["output_dir"]
    if not launched() and own["parallel"] is None:
        return execute_on(Ranks(), settings, own)
    with contextlib.ExitStack() as stack:
        try:
            ranks = stack.enter_context(joined())
        except ValueError as error:
            raise ValueError(
                f"--parallel {settings.parallel} divides {'layers' if settings.parallel == TENSOR else 'steps'} among "
                f"ranks, and this process was not started as one "
                f"({error}): torchrun --nproc-per-node N -m qzo train ..., or leave --parallel out"
            ) from None
        if ranks.first:
            return execute_on(ranks, settings, own)
        nowhere = stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(contextlib.redirect_stdout(nowhere))
        stack.enter_context(contextlib.redirect_stderr(nowhere))
        try:
            return execute_on(ranks, settings, own)
        except (RanksDiffer, RanksDiverged, FirstFailed, RankLost):  # which the first, or the one that is lost, tells
            return 1


def check_together(settings: Settings, own: Mapping[str, Any]) -> None:
    """ValueError for options of which one leaves the other nothing to work with."""
    if own["offload"] and settings.compile:
        raise ValueError("--compile with --offload: compiled code does not ask which block it runs; leave one out")
    if own["offload"] and settings.parallel == TENSOR:
        raise ValueError(
            f"--offload with --parallel {TENSOR}: the codes of a block that streams to the device are not cut; leave "
            "one out (each rank of --parallel data or directions may offload a model of its own)"
        )


def execute_on(ranks: Ranks, settings: Settings, own: Mapping[str, Any]) -> int:
    """The part of one of the ranks."""
    if own["resume"] and ranks.first:
        planned_steps(settings, Path(own["output_dir"]) / JOURNAL)
    records = read_data(own["data"])
    if settings.patience is not None and "valid" not in records:
        raise ValueError(
            f"--patience needs a validation split: {own['data']} has {', '.join(records)}; add valid.jsonl"
        )
    check_batch_size(settings, len(records["train"]))
    started = time.perf_counter()
    model = load_parts(own, settings, records) if settings.parallel == TENSOR else load(own["model"], own)
    tokenizer = load_tokenizer(own["model"], bool(own["trust_remote_code"]))
    prefix = choose_layers(model, settings.train_layers, settings.train_codebooks)
    task = build_task(model, records["train"], tokenizer, settings, prefix)
    held_out = {
        split: build_task(model, lines, tokenizer, settings, prefix)
        for split, lines in records.items()
        if split != "train"
    }
    show_plan(task, settings, model, bool(own["trust_remote_code"]))
    before, without_run = untrained(task, held_out)
    run = train(task, settings, own, held_out.get("valid"))
    if not run:
        return 0
    biases = task.fit_biases_() if fits_biases(task, settings) else []
    after = {split: held.evaluate() for split, held in held_out.items()}
    if is_sharded(model):
        unshard_(model.to("cpu"))  # whole it need not fit on a device
    if not ranks.first:
        return 0
    model_dir = save(model, own["output_dir"])
    split = "valid" if "valid" in after else "test"
    results = {
        "before": before.get(split),
        **{name: without_run.get(name, {}).get(split) for name in NAMES},
        "tuned": after.get(split),
        "splits": {
            name: {
                "before": before[name],
                **{kind: of_splits[name] for kind, of_splits in without_run.items() if name in of_splits},
                "tuned": after[name],
            }
            for name in after
        },
        **run,
        "label_bias": biases,
        "seconds": round(time.perf_counter() - started, 1),
        "seed": settings.seed,
        "device": str(task.device),
        "model": str(model_dir),
        "source": own["model"],
    }
    write_results(own["output_dir"], settings, results)
    if own["json"]:
        print(json.dumps(results))
    else:
        show_results(results, settings)
    warn_if_worse(results["splits"], results["best"], results["model_step"])
    return 0


def train(
    task: Trainable,
    settings: Settings,
    own: Mapping[str, Any],
    valid: Trainable | None,
    after: Callable[[int], object] = lambda steps: None,
) -> dict[str, Any]:
    """Make the run; the model is then the one of the step to keep. after: as for `fit`.

    Returns {"steps", "resumed_from", "best", "model_step"}: steps made, how many of them before, the best measurement
    of the validation task `valid` (None without one), and the step whose model this is; {} on ranks that have no more
    to do: others than the first, but where all are needed for a forward, their layers being in parts.
    """
    out, validation, base = Path(own["output_dir"]), None, None
    if valid is not None:
        every = settings.eval_every or max(1, settings.max_steps // PARTS)
        measured = functools.partial(valid.evaluate, fitted=fits_biases(task, settings))
        validation = Validation(measured, every, settings.patience)
        base = Base(task.model) if settings.keep == "best" else None
    already = fit(task, settings, out, resume=bool(own["resume"]), validation=validation, after=after)
    needed = Ranks(alone=not is_sharded(task.model))
    if not Ranks().first and needed.count == 1:
        return {}
    steps = kept = needed.from_first(lambda: steps_of(out / "journal.qzo"))
    best = None if validation is None else validation.best
    if base is not None and best is not None and best.step < steps:
        kept = best.step
        say(f"rebuilding the model of step {kept}, the best on valid")
        base.rebuild(out / "journal.qzo", kept)
    best_found = None if best is None else best._asdict()
    return {"steps": steps, "resumed_from": already, "best": best_found, "model_step": kept}


def untrained(task: Task, held_out: Mapping[str, Task]) -> tuple[dict[str, Measure], Controls]:
    """(each held-out split before the run, the controls there, fitted on training examples; {} without options)."""
    if task.examples[0].options is None or not held_out:
        return {split: held.evaluate() for split, held in held_out.items()}, {}
    looks = {split: held.look() for split, held in held_out.items()}
    before = {split: measure(look.scores, look.label) for split, look in looks.items()}
    return before, controls(task.look(first=EXAMPLES), looks)


def show_results(results: Mapping[str, Any], settings: Settings) -> None:
    """What the run has done, on standard output."""
    rows = [
        (f"{split}, {NAMES.get(when, when)}", scores)
        for split, of_split in results["splits"].items()
        for when, scores in of_split.items()
    ]
    if rows:
        print(scores_as_text(rows))
    if results["steps"] < settings.max_steps:
        print(f"ended after {results['steps']} of {settings.max_steps} steps: --patience {settings.patience}")
    best, step = results["best"], results["model_step"]
    if best and best["step"] < step:
        print(f"best on valid: step {best['step']}, loss {best['loss']:.3f} (--keep best, or qzo replay --until)")
    print(f"tuned model: {results['model']}{'' if step == results['steps'] else f' (step {step}, the best on valid)'}")


def show_plan(task: Task, settings: Settings, model: Any, trust_remote_code: bool) -> None:
    """What the run will do and hold in memory, on standard error."""
    told = plan(task, settings, model)
    say("\n".join(lines(told)))
    if is_sharded(model):
        return say("memory: not predicted of layers in parts (qzo memory predicts the whole model's)")
    rows, longest = told["rows_per_step"] // told["evaluations"], told["tokens_per_row"]["longest"]
    labels = max(1, round(statistics.fmean(map(labelled, task.examples))))
    run = Run(rows, longest, min(labels, longest - 1), -(-settings.evaluations // 2), settings.sequential)
    try:
        predicted = predict_loaded(model, run, trust_remote_code)
    except (ValueError, RuntimeError) as error:  # of a forward that needs values, not only shapes
        return say(f"memory: cannot be predicted ({str(error).splitlines()[0]:.200})")
    total = f"{predicted['total'] / 1e9:.2f} GB predicted for a step of {rows} x {longest} tokens on {task.device}"
    beside = [f", {predicted[where] / 1e9:.2f} GB on the {where}" for where in ("host", "disk") if where in predicted]
    say(f"memory: {total}, all blocks{''.join(beside)}")


def labelled(example: Example) -> int:
    """How many positions of a row of this example carry a label."""
    if example.options is not None:
        return max(map(len, example.options))
    return sum(label != IGNORED for label in example.labels)


def warn_if_worse(splits: Mapping[str, Any], best: Mapping[str, Any] | None, step: int) -> None:
    """A warning where the loss of held-out data is higher after the run than before.

    best: the best measurement on the way, or None; step: whose model this is.
    """
    better = f" (the best step on valid was {best['step']}: {best['loss']:.3f})" if best and best["step"] < step else ""
    for name, both in splits.items():
        before, after = both["before"]["loss"], both["tuned"]["loss"]
        if not after <= before:
            warnings.warn(
                f"the run has made the model worse on {name}: loss {before:.3f} before, {after:.3f} after{better}; "
                "try a lower --learning-rate, more --directions or more data, or fewer steps (qzo replay BASE "
                "OUT/journal.qzo "
                "--until N rebuilds the model as it was at step N)",
                stacklevel=2,
            )


def save(model: Any, out: str | Path) -> Path:
    """Write the tuned checkpoint to OUT/model and return that path."""
    target = Path(out) / "model"
    save_pretrained(model, target)
    return target
