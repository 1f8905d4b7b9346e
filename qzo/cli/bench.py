"""`qzo bench`: the only door from the product to the benchmark."""

import argparse

from ..bench import command
from .outputs import check_file


def execute(options: argparse.Namespace) -> int:
    """Run the chosen action; exit status. ValueError and OSError for bad input."""
    if getattr(options, "out", None):
        check_file(options.out, options.overwrite, "--out")
    return command.execute(options)
