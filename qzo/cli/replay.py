"""`qzo replay`: a tuned model from its base and a journal."""

import json

from ..checkpoints.save import save_pretrained
from .common import replayed, steps_of


def execute(options):
    """Replay, save, and tell; exit status. ValueError for bad input."""
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
