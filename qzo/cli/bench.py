"""`qzo bench`: the only door from the product to the benchmark."""

from ..bench.command import execute as execute
