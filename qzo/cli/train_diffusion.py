"""`qzo train-diffusion`."""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..diffusion import cache
from ..diffusion.objective import FlowLaw
from ..diffusion.pictures import Grid
from ..diffusion.pipeline import Pipeline, open_pipeline
from ..diffusion.schedulers import shift_of
from ..diffusion.task import STRATA, DiffusionTask
from ..diffusion.transformer import Origin, load_transformer, save_pipeline
from ..nn.layers import layers
from ..reports.memory import Run, predict_loaded
from ..training.folder import write_results
from ..training.loop import check_batch_size, trained_count
from ..training.schedule import planned_steps
from ..training.settings import Settings
from .common import device_of, say
from .diffusion_options import CACHE, DIRECTIONS, STEPS
from .outputs import JOURNAL
from .train import train, warn_if_worse

SAMPLES = "samples"  # the folder in OUT


def execute(options: argparse.Namespace) -> int:
    """Train, and tell; exit status. ValueError for bad input."""
    settings = settings_of(options)
    missing = [f"--{name.replace('_', '-')}" for name in ("data", "output_dir") if not getattr(options, name)]
    if missing:
        raise ValueError(f"missing {', '.join(missing)} (on the command line or in --config)")
    check_samples(options)
    pipeline = open_pipeline(options.pipeline)
    resolution = options.resolution or pipeline.resolution()
    law = law_of(options, pipeline, resolution)
    out = Path(options.output_dir)
    if options.resume:
        planned_steps(settings, out / JOURNAL)
    device, dtype = device_of(vars(options))
    started = time.perf_counter()
    length = options.prompt_tokens or pipeline.family.longest
    folder = Path(options.cache or out / CACHE)
    latents = cache.build(pipeline, options.data, folder, resolution, length, device, dtype)
    check_batch_size(settings, len(latents["train"]))
    if settings.patience is not None and "valid" not in latents:
        raise ValueError(f"--patience needs a validation split: {options.data} has no folder valid")
    model, origin = load(options, pipeline, device, dtype)
    task = DiffusionTask(model, pipeline.family, latents["train"], law, 2 * settings.directions)
    valid = None
    if "valid" in latents:
        valid = DiffusionTask(model, pipeline.family, latents["valid"], law, 2 * settings.directions)
    show_plan(task, settings, pipeline, resolution)
    before = None if valid is None else valid.measure()
    run = train(task, settings, vars(options), valid, samples_of(options, pipeline, latents, resolution, model))
    after = None if valid is None else valid.measure()
    save_pipeline(model, origin, pipeline, out / "model")
    results = {
        **compared(before, after),
        **run,
        "objective": dataclasses.asdict(law),
        "resolution": resolution,
        "seconds": round(time.perf_counter() - started, 1),
        "seed": settings.seed,
        "device": str(device),
        "model": str(out / "model"),
        "source": str(options.pipeline),
    }
    write_results(out, settings, results)
    print(json.dumps(results) if options.json else as_text(results))
    warn_if_worse(results["splits"], results["best"], results["model_step"])
    return 0


def samples_of(
    options: argparse.Namespace, pipeline: Pipeline, latents: dict[str, cache.Latents], resolution: int, model: Any
) -> Callable[[int], object]:
    """What draws OUT/samples/step-N.png when so many steps are made; the one of step 0 is drawn now."""
    every = options.sample_every
    if every is None:
        return lambda steps: None
    shown = latents.get("valid", latents["train"])
    prompts = [shown.prompt(i) for i in range(min(options.samples, len(shown)))]
    grid = Grid(
        pipeline, prompts, shown.prompt(None), resolution, options.sampling_steps or STEPS, options.guidance_scale
    )
    folder = Path(options.output_dir) / SAMPLES
    folder.mkdir(parents=True, exist_ok=True)

    def draw(steps: int) -> None:
        path = folder / f"step-{steps:06}.png"
        if steps % every == 0 and not path.exists():
            grid.draw(model).save(path)

    draw(0)
    return draw


def check_samples(options: argparse.Namespace) -> None:
    """ValueError for options of the samples that are out of their range."""
    for option in ("sample_every", "samples", "sampling_steps"):
        value = getattr(options, option)
        if value is not None and value < 1:
            raise ValueError(f"--{option.replace('_', '-')} {value}: expected a number >= 1")
    if not 0 <= options.guidance_scale < float("inf"):
        raise ValueError(f"--guidance-scale {options.guidance_scale}: expected a finite number >= 0 (1: no guidance)")


def settings_of(options: argparse.Namespace) -> Settings:
    """The Settings of a command line. ValueError for what is out of range."""
    names = {field.name for field in dataclasses.fields(Settings)}
    given = {key: value for key, value in vars(options).items() if key in names and value is not None}
    return Settings(**{"directions": DIRECTIONS, "one_sided": False, **given})


def law_of(options: argparse.Namespace, pipeline: Pipeline, resolution: int) -> FlowLaw:
    """The FlowLaw of a command line; its shift is the scheduler's where none is given."""
    tokens = pipeline.tokens(resolution)
    return FlowLaw(
        options.times,
        shift_of(pipeline.scheduler, tokens) if options.shift is None else options.shift,
        options.logit_mean,
        options.logit_std,
        options.weighting,
        options.draws,
        options.stratified,
        options.caption_dropout,
    )


def load(
    options: argparse.Namespace, pipeline: Pipeline, device: torch.device, dtype: torch.dtype
) -> tuple[Any, Origin]:
    """The pipeline's transformer, or that of --transformer, and where it came from."""
    given = Path(options.transformer) if options.transformer else None
    if given is not None and not given.is_file():
        raise FileNotFoundError(f"--transformer {given}: there is no such file; give a GGUF file")
    say(f"loading {given or pipeline.path / 'transformer'}")
    return load_transformer(pipeline, device, dtype, options.group_size, vars(options).get("table", "nf4"), given)


def show_plan(task: DiffusionTask, settings: Settings, pipeline: Pipeline, resolution: int) -> None:
    """What the run will do and hold in memory, on standard error."""
    count, held = 2 * settings.directions, layers(task.model, trainable=None)
    rows = settings.batch_size * task.law.draws
    passes = settings.max_steps * settings.batch_size / len(task.examples)
    say(
        f"trains: {trained_count(task.model):,} scales of {len(held)} layers\n"
        f"data: {len(task.examples):,} pictures of {resolution} x {resolution} pixels, {pipeline.tokens(resolution):,} "
        f"tokens each; times {task.law.density}, shift {task.law.shift:g}\n"
        f"steps: {settings.max_steps:,} of {settings.batch_size:,} pictures, {rows:,} rows, under {count} evaluations "
        f"({settings.directions} directions); {passes:g} passes over the data"
    )
    text = len(task.examples.prompt(None)["encoder_hidden_states"])
    run = Run(rows, text, 1, settings.directions, settings.sequential)
    try:
        total = predict_loaded(task.model, run, latent=pipeline.latent_size(resolution))["total"]
    except (ValueError, RuntimeError) as error:
        return say(f"memory: cannot be predicted ({str(error).splitlines()[0]:.200})")
    say(f"memory: {total / 1e9:.2f} GB predicted for a step on {task.device}")


def compared(before: torch.Tensor | None, after: torch.Tensor | None) -> dict[str, Any]:
    """{"before", "tuned", "splits"} of held-out losses [pictures, STRATA] before and after; the difference is paired,
    and its standard error is over the pictures."""
    if before is None or after is None:
        return {"before": None, "tuned": None, "splits": {}}
    each = (after - before).mean(1)
    losses = {"before": {"loss": float(before.mean())}, "tuned": {"loss": float(after.mean())}}
    paired = {
        "difference": float(each.mean()),
        "error": float(each.std() / len(each) ** 0.5) if len(each) > 1 else None,
        "pictures": len(each),
        "by_time": [round(value, 6) for value in (after - before).mean(0).tolist()],
    }
    return {**losses, "splits": {"valid": {**losses, **paired}}}


def as_text(results: dict[str, Any]) -> str:
    """What the run has done."""
    lines = []
    for name, found in results["splits"].items():
        error = "" if found["error"] is None else f" +- {found['error']:.5f} (paired, one standard error)"
        lines.append(
            f"{name}: loss {found['before']['loss']:.5f} before, {found['tuned']['loss']:.5f} after, difference "
            f"{found['difference']:+.5f}{error}; {found['pictures']} pictures at {STRATA} times each"
        )
    lines.append(f"tuned pipeline: {results['model']}")
    return "\n".join(lines)
