"""`python -m qzo.bench.study`: runs.py."""

from .runs import main

main()
