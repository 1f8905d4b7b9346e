"""`qzo replay`: a tuned model from its base and a journal."""

import argparse
import json

from ..checkpoints.save import save_pretrained
from .common import replayed, steps_of
from .outputs import check_folder


def execute(options: argparse.Namespace) -> int:
    """Replay, save, and tell; exit status. ValueError for bad input."""
    if options.until is not None and options.until < 0:
        raise ValueError(f"--until {options.until}: expected a step number >= 0")
    check_folder(options.output_dir, options.overwrite)
    held = steps_of(options.journal)
    if options.until is not None and options.until > held:
        raise ValueError(f"--until {options.until}: {options.journal} has {held} steps")
    model, steps = replayed(options.base, options.journal, options.until, vars(options))
    save_pretrained(model, options.output_dir)
    if options.json:
        print(json.dumps({"steps": steps, "output_dir": options.output_dir}))
    else:
        print(f"{steps} steps applied; the tuned model is in {options.output_dir}")
    return 0
