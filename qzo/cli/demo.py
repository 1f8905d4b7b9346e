"""`qzo demo`."""

import argparse
import json

from ..training.controls import NAMES
from ..training.demo import run
from .common import say, scores_as_text


def execute(options: argparse.Namespace) -> int:
    """Run the demo, and tell; exit status. ValueError for bad input."""
    out = options.output_dir
    results = run(options.seed, out, resume=options.resume, say=say, cuda_graph=options.cuda_graph)
    if options.json:
        print(json.dumps(results))
        return 0
    print(
        scores_as_text(
            [
                ("zero-shot", results["zero_shot"]),
                *((said, results[name]) for name, said in NAMES.items() if name in results),
                ("tuned", results["tuned"]),
            ]
        )
    )
    print(
        f"300 held-out headlines, {results['steps']} steps, seed {results['seed']}, {results['seconds']:.0f} s on "
        f"{results['device']}; everything is in {out}"
    )
    return 0
