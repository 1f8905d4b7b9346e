"""`qzo bench`: the only door from the product to the benchmark."""

from ..bench.__main__ import add_commands as add_options
from ..bench.__main__ import execute

__all__ = ["add_options", "execute"]
