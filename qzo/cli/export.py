"""`qzo export`: the same weights in another format."""

import argparse
import json
import statistics
from collections.abc import Mapping
from typing import Any

from ..checkpoints.save import check_format, check_source
from ..checkpoints.save import export as export_model
from ..checkpoints.source import open_checkpoint
from .common import load, replayed


def execute(options: argparse.Namespace) -> int:
    """Export, and tell; exit status. ValueError for bad input."""
    check_format(options.to, options.round_zeros)
    checkpoint = open_checkpoint(options.model, bool(options.trust_remote_code), bool(options.weight_only))
    check_source(checkpoint, options.to, options.round_zeros)
    if options.journal:
        model, steps = replayed(options.model, options.journal, None, vars(options))
    else:
        model, steps = load(options.model, vars(options)), 0
    errors = export_model(model, options.output_dir, options.to, options.round_zeros)
    rounded = None if errors is None else cost(errors)
    if options.json:
        found = {"format": options.to, "steps": steps, "output_dir": options.output_dir}
        print(json.dumps(found if rounded is None else {**found, "rounded_zeros": rounded}))
    else:
        after = f" after {steps} steps" if options.journal else ""
        print(f"the model{after} is in {options.output_dir} as {options.to}{'' if rounded is None else told(rounded)}")
    return 0


def cost(errors: Mapping[str, float]) -> dict[str, Any]:
    """{"layers", "mean", "max", "worst"} of {layer: relative error of its weights}."""
    worst = max(errors, key=errors.__getitem__, default="")
    mean, most = (statistics.fmean(errors.values()), errors[worst]) if errors else (0.0, 0.0)
    return {"layers": len(errors), "mean": mean, "max": most, "worst": worst}


def told(rounded: Mapping[str, Any]) -> str:
    if not rounded["layers"]:
        return "; all zero points were integers already"
    return (
        f"; zero points of {rounded['layers']} layers are rounded: their weights are off by {rounded['mean']:.3f} of "
        f"their size on the mean, by {rounded['max']:.3f} at most ({rounded['worst']})"
    )
