"""`qzo quantize`."""

import json

from ..checkpoints.quantize_folder import quantize_folder
from .common import say


def execute(options):
    """Quantize, and tell; exit status. ValueError for bad input."""
    say(f"quantizing {options.model}")
    found = quantize_folder(
        options.model,
        options.output_dir,
        bits=options.bits,
        group_size=options.group_size,
        symmetric=not options.asymmetric,
        method=options.format,
        table=options.table,
        trust_remote_code=bool(options.trust_remote_code),
        strict=bool(options.strict),
    )
    if options.json:
        print(json.dumps({**found, "output_dir": options.output_dir}))
    else:
        error = "" if found["error"] is None else f"; the weights are off by {found['error']:.3f} of their size"
        bits = found["table"] or f"{found['bits']} bits"
        groups = "groups of a whole row" if found["group_size"] == -1 else f"groups of {found['group_size']}"
        print(f"{found['layers']} layers of {bits} in {groups} are in {options.output_dir} as {found['format']}{error}")
    return 0
