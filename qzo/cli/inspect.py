"""`qzo inspect`."""

import json
import math

from ..reports.inspect import EXAMPLES, report, table


def add_options(parser):
    parser.add_argument(
        "model",
        help="a checkpoint: a folder, a .gguf file, or a hub id that is in the local cache; "
        "of a float one, what would be quantized",
    )
    parser.add_argument("--train-layers", type=int, metavar="K", help="as in qzo train: what trains then")
    parser.add_argument("--bits", type=int, default=4, help="when a float checkpoint is quantized (default 4)")
    parser.add_argument(
        "--group-size", type=int, help="the same (default: the largest of 128, 64, 32 that fits every layer)"
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", default=None, help="run code from the checkpoint's folder"
    )
    step = parser.add_argument_group("the step whose memory is predicted")
    step.add_argument("--batch-size", type=int, default=1, help="rows (default 1)")
    step.add_argument("--seq-len", type=int, default=64, help="tokens a row (default 64)")
    step.add_argument("--directions", type=int, default=1, help="directions, two evaluations each (default 1)")
    step.add_argument("--device", choices=("cpu", "cuda"), help="whose memory (default: cuda if there is one)")
    lost = parser.add_argument_group("how much of the signal the activations' dtype leaves")
    lost.add_argument("--signal", action="store_true", help="load the model in float32 and measure it")
    lost.add_argument("--eps", type=float, default=1e-2, help="relative perturbation (default 0.01)")
    lost.add_argument(
        "--data", help=f"JSON lines as in qzo train, of which the first {EXAMPLES} are read (default: a few sentences)"
    )
    lost.add_argument("--signal-directions", type=int, default=16, metavar="J", help="directions (default 16)")


def execute(options):
    """Look, and show; exit status. ValueError for bad input."""
    for name, least in {"batch_size": 1, "seq_len": 2, "directions": 1, "signal_directions": 1}.items():
        if getattr(options, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)}: at least {least} is wanted")
    if not options.eps > 0 or not math.isfinite(options.eps):
        raise ValueError(f"--eps {options.eps:g}: a number above 0 is wanted")
    found = report(options)
    print(json.dumps(found) if options.json else table(found))
    return 0
