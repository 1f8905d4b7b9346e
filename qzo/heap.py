"""Freed memory back to the system while a model is built.

glibc keeps the holes that temporaries leave between tensors that stay, and after a first large free it takes
blocks of up to 32 MB from there too: without this a load takes up to twice what the model holds.
"""
import ctypes

EVERY_BYTES = 16 << 20


class Heap:
    """Gives back what is free each time another EVERY_BYTES were taken for good."""

    def __init__(self):
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)     # musl has none and keeps no holes
        self._taken = 0

    def took(self, nbytes):
        self._taken += nbytes
        if self._taken >= EVERY_BYTES and self._trim is not None:
            self._trim(0)
            self._taken = 0
