"""`qzo inspect`."""

import json
import math

from ..nn.weights import check_bits
from ..reports.inspect import as_text, report
from .options import model_of


def execute(options):
    """Look, and show; exit status. ValueError for bad input."""
    for name, least in {"batch_size": 1, "seq_len": 2, "directions": 1, "signal_directions": 1}.items():
        if getattr(options, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)}: expected at least {least}")
    if not options.eps > 0 or not math.isfinite(options.eps):
        raise ValueError(f"--eps {options.eps:g}: expected a number above 0")
    check_bits(options.bits)  # also where the checkpoint is in codes already
    options.model = model_of(options)
    if not options.model:
        raise ValueError("a model is missing: qzo inspect MODEL, a folder, a .gguf file or a Hub id")
    found = report(options)
    print(json.dumps(found) if options.json else as_text(found))
    return 0
