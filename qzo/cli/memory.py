"""`qzo memory`."""

import argparse
import json

from ..reports.memory import as_text, make_report, plot
from .options import model_of
from .outputs import check_file


def execute(options: argparse.Namespace) -> int:
    """Predict, measure if asked, and show; exit status. ValueError for bad input."""
    options.model = model_of(options)
    for option, path in (("--plot", options.plot), ("--snapshot", options.snapshot)):
        if path:
            check_file(path, options.overwrite, option)
    report = make_report(options)
    if options.plot:
        plot(report, options.plot)
    print(json.dumps(report) if options.json else f"{report['subject']}\n{as_text(report)}")
    return 0
