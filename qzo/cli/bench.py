"""`qzo bench`: the only door from the product to the benchmark."""

import argparse

from ..bench import command


def execute(options: argparse.Namespace) -> int:
    """Run the chosen action; exit status. ValueError and OSError for bad input."""
    return command.execute(options)
