"""`qzo demo`."""

import argparse
import itertools
import json
from pathlib import Path

from ..training.demo import run
from .common import say, scores_as_text
from .outputs import check_run


def execute(options: argparse.Namespace) -> int:
    """Run the demo, and tell; exit status. ValueError for bad input."""
    if options.resume and not options.output_dir:
        raise ValueError("--resume needs the --output-dir of the demo that was stopped")
    out = options.output_dir = options.output_dir or _new_folder("qzo-demo")
    check_run(out, options.resume, options.overwrite)
    results = run(options.seed, out, resume=options.resume, say=say, cuda_graph=options.cuda_graph)
    if options.json:
        print(json.dumps(results))
        return 0
    print(
        scores_as_text(
            [
                ("zero-shot", results["zero_shot"]),
                ("control: label biases only", results["control"]),
                ("tuned", results["tuned"]),
            ]
        )
    )
    print(
        f"300 held-out headlines, {results['steps']} steps, seed {results['seed']}, {results['seconds']:.0f} s on "
        f"{results['device']}; everything is in {out}"
    )
    return 0


def _new_folder(name: str) -> str:
    """`name`, or the first of name-2, name-3, ... that does not exist."""
    names = itertools.chain([name], (f"{name}-{i}" for i in itertools.count(2)))
    return next(path for path in names if not Path(path).exists())
