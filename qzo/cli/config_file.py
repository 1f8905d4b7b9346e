"""The YAML file of `qzo train --config`, and of `qzo train-diffusion`, as the command line options that its keys stand
for; like options.py, without torch. The parser itself converts the values, checks them and lets the command line win.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..system.as_yaml import read_mapping
from .diffusion_options import add_train_diffusion
from .train_options import add_train

COMMANDS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "train": add_train,
    "train-diffusion": add_train_diffusion,
}
OUTSIDE = ("checkpoint", "pipeline", "config")  # of the command line only: what is trained, and the file itself
MODEL = "model"  # stands for the first two, which a file does not name


def arguments_of(path: str, command: str = "train", but: tuple[str, ...] = ()) -> list[str]:
    """The options in a file, to be put before those of the command line, which then win.

    command: one of COMMANDS; but: keys that are left out. ValueError naming the file and the key for what the command
    does not take; OSError for a file that cannot be read.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    COMMANDS[command](parser)
    known = sorted(vars(parser.parse_args([MODEL])).keys() - set(OUTSIDE))
    if not Path(path).is_file():
        raise ValueError(f"--config {path}: there is no such file; give a YAML file of options")
    content = {key.replace("-", "_"): value for key, value in read_mapping(Path(path)).items()}
    unknown = sorted(content.keys() - set(known))
    if unknown:
        raise ValueError(f"{path}: unknown keys {', '.join(unknown)}; known are {', '.join(known)}")
    found: list[str] = []
    for key, value in content.items():
        try:
            arguments = [] if value is None else _arguments(parser, f"--{key.replace('_', '-')}", value)
            parser.parse_known_args([MODEL, *arguments])
        except (argparse.ArgumentError, ValueError) as error:
            told = error.message if isinstance(error, argparse.ArgumentError) else error
            raise ValueError(f"{path}: {key}={value!r:.200}: {told}") from None
        found += arguments if key not in but else []
    return found


def _arguments(parser: argparse.ArgumentParser, option: str, value: Any) -> list[str]:
    """An option with its value. ValueError for a value that no option has."""
    if isinstance(value, list | dict):
        raise ValueError(f"expected one value, got a {type(value).__name__}")
    flag = _is_known(parser, option)
    if flag != isinstance(value, bool):
        raise ValueError("expected true or false, or null" if flag else "expected a value, not true or false")
    if not flag:
        return [f"{option}={value}"]
    off = option.replace("--", "--no-", 1)
    if value:
        return [option]
    return [off] if _is_known(parser, off) else []


def _is_known(parser: argparse.ArgumentParser, option: str) -> bool:
    """Whether an option stands without a value."""
    try:
        return not parser.parse_known_args([MODEL, option])[1]
    except argparse.ArgumentError:
        return False
