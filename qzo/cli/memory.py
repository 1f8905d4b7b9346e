"""`qzo memory`."""

import json

from ..reports.memory import make_report, plot, table
from .options import model_of


def execute(options):
    """Predict, measure if asked, and show; exit status. ValueError for bad input."""
    options.model = model_of(options)
    report = make_report(options)
    if options.plot:
        plot(report, options.plot)
    print(json.dumps(report) if options.json else f"{report['subject']}\n{table(report)}")
    return 0
