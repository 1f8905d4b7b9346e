"""`qzo replay`: a tuned model from its base and a journal."""

import argparse
import json
from pathlib import Path

from ..checkpoints.save import save_pretrained
from ..diffusion.pipeline import open_pipeline
from ..diffusion.transformer import save_pipeline
from .common import check_until, device_of, replayed, tune
from .pictures import is_pipeline
from .train_diffusion import load


def execute(options: argparse.Namespace) -> int:
    """Replay, save, and tell; exit status. ValueError for bad input."""
    check_until(options.until, options.journal)
    if is_pipeline(options.base):
        steps = _pipeline(options)
    else:
        model, steps = replayed(options.base, options.journal, options.until, vars(options))
        save_pretrained(model, options.output_dir)
    if options.json:
        print(json.dumps({"steps": steps, "output_dir": options.output_dir}))
    else:
        print(f"{steps} steps applied; the tuned model is in {options.output_dir}")
    return 0


def _pipeline(options: argparse.Namespace) -> int:
    """The same of a diffusers pipeline; how many steps."""
    pipeline = open_pipeline(options.base)
    model, origin = load(options, pipeline, *device_of(vars(options)))
    steps = tune(model, options.journal, options.until)
    save_pipeline(model, origin, pipeline, Path(options.output_dir))
    return steps
