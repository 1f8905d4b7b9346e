"""Checkpoints in and out: a module for each format, and here the list of them.

A reader yields (Hugging Face tensor name, PackedWeight or dense tensor, where it came from); a writer copies the source
file and patches the bytes of scales that changed, so everything else is the source's own bytes. protocol.py says what a
format has to have; folder_format.py makes one of a few functions. A new one is a module with FORMAT, named below.
"""

from pathlib import Path

from . import aqlm, auto_round, awq, bnb, compressed_tensors, floats, gguf, gptq, hqq
from .protocol import Copied, Format, Gathered, Quantization

# typed by what they can do, so that a checker holds each against its protocol; tests/ holds the signatures too
_GATHERED: tuple[Gathered, ...] = (auto_round.FORMAT, awq.FORMAT, compressed_tensors.FORMAT, gptq.FORMAT)
_FOLDERS: tuple[Copied, ...] = (aqlm.FORMAT, bnb.FORMAT, hqq.FORMAT, *_GATHERED)
_FILES: tuple[Copied, ...] = (gguf.FORMAT,)
_FLOATS: tuple[Format, ...] = (floats.FORMAT,)
_TARGETS = (awq.TARGET, bnb.TARGET, compressed_tensors.TARGET, gptq.TARGET)

GATHERED = {form.method: form for form in _GATHERED}
FOLDERS = {form.method: form for form in _FOLDERS}  # by their quant_method
COPIED = {form.method: form for form in (*_FOLDERS, *_FILES)}
FORMATS = {form.method: form for form in (*_FOLDERS, *_FILES, *_FLOATS)}
TARGETS = {target.method: target for target in _TARGETS}


def of_method(method: object, where: object) -> Format:
    """The format of a quant_method. ValueError naming what it is and what can be read."""
    if not isinstance(method, str) or method not in FOLDERS:
        raise ValueError(
            f"{where}: quant_method {method!r:.60} cannot be read; supported are "
            f"{', '.join(sorted(FOLDERS))}, GGUF files, and float checkpoints"
        )
    return FOLDERS[method]


def format_of(path: Path, quantization: Quantization | None) -> Format:
    """The format of a checkpoint at this place with this quantization_config (told.quantization_of)."""
    if path.is_file():
        return gguf.FORMAT
    if quantization is None:
        return floats.FORMAT
    return of_method(quantization.get("quant_method") if quantization else hqq.METHOD, path)
