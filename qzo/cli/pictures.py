"""`qzo generate PIPELINE`: pictures of a prompt by a diffusers pipeline, or by a run on it."""

import argparse
import json
import time
from pathlib import Path

from ..diffusion.pictures import assemble, drawn
from ..diffusion.pipeline import INDEX, open_pipeline
from ..system.progress import tracked
from .common import check_until, device_of, say, tune
from .diffusion_options import GUIDANCE, STEPS
from .outputs import check_folder
from .train_diffusion import load


def is_pipeline(name: str) -> bool:
    """Whether it is the folder of a diffusers pipeline."""
    return (Path(name).expanduser() / INDEX).is_file()


def execute(options: argparse.Namespace, name: str, text: str) -> int:
    """Write pictures of a prompt, and tell; exit status. ValueError for bad input."""
    check(options)
    check_folder(options.output_dir, options.overwrite, name)
    pipeline = open_pipeline(name)
    resolution = options.resolution or pipeline.resolution()
    pipeline.latent_size(resolution)
    device, dtype = device_of(vars(options))
    model, _ = load(options, pipeline, device, dtype)
    steps = tune(model, options.journal, options.until)
    pipe, out = assemble(pipeline, model), Path(options.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    seeds = range(options.seed, options.seed + options.images)
    started = time.perf_counter()
    written: list[str] = []
    pictures = drawn(pipe, text, resolution, seeds, options.sampling_steps or STEPS, options.guidance_scale)
    for seed, picture in zip(seeds, tracked(pictures, "drawing", "pictures", options.images), strict=True):
        written.append(str(out / f"seed-{seed}.png"))
        picture.save(written[-1])
    seconds = time.perf_counter() - started
    told = {"model": name, "steps": steps, "prompt": text, "pictures": written, "seconds": round(seconds, 3)}
    print(json.dumps(told) if options.json else "\n".join(written))
    say(f"{len(written)} pictures in {seconds:.1f} s")
    return 0


def check(options: argparse.Namespace) -> None:
    """ValueError for options out of their range, or that are of texts."""
    check_until(options.until, options.journal)
    if options.chat is not None:
        raise ValueError("--chat is of models that write text; a pipeline draws a picture of --prompt TEXT")
    if not options.output_dir:
        raise ValueError("pictures are written to a folder: give --output-dir")
    for option, value, least in (("--images", options.images, 1), ("--sampling-steps", options.sampling_steps, 1)):
        if value is not None and value < least:
            raise ValueError(f"{option} {value}: expected a number >= {least}")
    if options.guidance_scale is None:
        options.guidance_scale = GUIDANCE
    if not 0 <= options.guidance_scale < float("inf"):
        raise ValueError(f"--guidance-scale {options.guidance_scale}: expected a finite number >= 0 (1: no guidance)")
