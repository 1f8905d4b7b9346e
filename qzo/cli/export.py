"""`qzo export`: the same weights in another format."""

import argparse
import json

from ..checkpoints.save import check_format
from ..checkpoints.save import export as export_model
from .common import load, replayed
from .outputs import check_file, check_folder


def execute(options: argparse.Namespace) -> int:
    """Export, and tell; exit status. ValueError for bad input."""
    check_format(options.to)
    if options.to != "gguf" or not options.output_dir.endswith(".gguf"):
        check_folder(options.output_dir, options.overwrite)
    else:
        check_file(options.output_dir, options.overwrite, "--output-dir")
    if options.journal:
        model, steps = replayed(options.model, options.journal, None, vars(options))
    else:
        model, steps = load(options.model, vars(options)), 0
    export_model(model, options.output_dir, options.to)
    if options.json:
        print(json.dumps({"format": options.to, "steps": steps, "output_dir": options.output_dir}))
    else:
        after = f" after {steps} steps" if options.journal else ""
        print(f"the model{after} is in {options.output_dir} as {options.to}")
    return 0
