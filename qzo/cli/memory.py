"""`qzo memory`."""

import json

from ..reports.memory import make_report
from ..reports.memory_text import as_text, check_picture, plot
from .options import model_of


def execute(options):
    """Predict, measure if asked, and show; exit status. ValueError for bad input."""
    options.model = model_of(options)
    if options.plot:
        check_picture(options.plot)
    report = make_report(options)
    if options.plot:
        plot(report, options.plot)
    print(json.dumps(report) if options.json else f"{report['subject']}\n{as_text(report)}")
    return 0
