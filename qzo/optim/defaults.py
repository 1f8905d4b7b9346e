"""Defaults of the optimizer that commands tell before torch is imported."""

FLOOR = 2.0**-24  # smallest magnitude of a scale: the smallest float16, which a checkpoint can hold
EPS = 1e-2  # relative to each scale
CLIP = 5.0  # bound on the directional derivative
SYNC_SECONDS = 2.0  # of a run that a power failure may cost; a killed process costs nothing
