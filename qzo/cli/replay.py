"""`qzo replay`: a tuned model from its base and a journal."""

import json

from ..checkpoints.save import save_pretrained
from .common import check_until, replayed


def execute(options):
    """Replay, save, and tell; exit status. ValueError for bad input."""
    check_until(options.until, options.journal)
    model, steps = replayed(options.base, options.journal, options.until, vars(options))
    save_pretrained(model, options.output_dir)
    if options.json:
        print(json.dumps({"steps": steps, "output_dir": options.output_dir}))
    else:
        print(f"{steps} steps applied; the tuned model is in {options.output_dir}")
    return 0
