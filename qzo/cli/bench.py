"""`qzo bench`: the only door from the product to the benchmark."""

from ..bench import command


def execute(options):
    """Run the chosen action; exit status. ValueError and OSError for bad input."""
    return command.execute(options)
