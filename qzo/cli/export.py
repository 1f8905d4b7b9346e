"""`qzo export`: the same weights in another format."""

import json

from ..checkpoints.save import check_format
from ..checkpoints.save import export as export_model
from .common import add_model_options, load, replayed


def add_options(parser):
    parser.add_argument("model", help="a checkpoint: a folder, a .gguf file, or a hub id")
    parser.add_argument(
        "--to",
        required=True,
        metavar="FORMAT",
        help="awq, bitsandbytes, compressed-tensors, gptq, or "
        "(from a GGUF file) gguf; refused with the reason where it cannot hold the model exactly",
    )
    parser.add_argument("--output-dir", required=True, help="where the new checkpoint goes")
    parser.add_argument("--journal", help="the journal.qzo of a run on this model, which is replayed first")
    add_model_options(parser)


def execute(options):
    """Export, and tell; exit status. ValueError for bad input."""
    check_format(options.to)
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
