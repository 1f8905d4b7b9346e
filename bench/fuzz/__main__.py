"""`python -m qzo.bench.fuzz`: runs.py."""

from .runs import main

raise SystemExit(main())
