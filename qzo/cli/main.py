# PYTHON_ARGCOMPLETE_OK
"""The command line: `qzo COMMAND`, or `python -m qzo COMMAND`.

Exit status 0; 2 for wrong usage or bad input, with one line that says what to do; 1 for a run that failed or was
stopped. Progress goes to standard error, results to standard output. What a command does is in the module of its name,
execute(options), which is imported when that command is the one given: `--help` needs no torch.

Completion: eval "$(register-python-argcomplete qzo)" in the shell.
"""

import argparse
import importlib
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

import argcomplete

from ..system import disk
from ..version import __version__
from . import diffusion_options, early, options, report_options, train_options
from .config_file import COMMANDS as FROM_FILES
from .config_file import arguments_of

COMMANDS = {  # name: (what it does, an example, its options)
    "demo": (
        "tune SmolLM2-135M on BBC headlines, on a CPU in a few minutes",
        "qzo demo --seed 1 --output-dir out",
        options.add_demo,
    ),
    "train": (
        "fine-tune a model on JSON lines",
        "qzo train model.gguf --data data/ --output-dir out --max-steps 500 --train-layers 6",
        train_options.add_train,
    ),
    "train-diffusion": (
        "fine-tune a flow-matching diffusion transformer on pictures with captions",
        "qzo train-diffusion stable-diffusion-3.5-large --data pictures/ --output-dir out --resolution 512",
        diffusion_options.add_train_diffusion,
    ),
    "eval": (
        "loss, accuracy and perplexity of a model on JSON lines, before and after a run on it",
        "qzo eval model.gguf --data data/test.jsonl --journal out/journal.qzo --control-data data/train.jsonl",
        options.add_eval,
    ),
    "generate": (
        "write text with a model, or with a run on it",
        'qzo generate model.gguf --journal out/journal.qzo --chat "Write a haiku about rain."',
        options.add_generate,
    ),
    "replay": (
        "rebuild a tuned model from its base and a journal",
        "qzo replay model.gguf out/journal.qzo --output-dir tuned",
        options.add_replay,
    ),
    "journal": (
        "show, verify, compare, cut and join journals",
        "qzo journal show out/journal.qzo",
        report_options.add_journal,
    ),
    "export": (
        "write a quantized model in another format, weight for weight",
        "qzo export model-awq --to gptq --output-dir model-gptq --journal out/journal.qzo",
        options.add_export,
    ),
    "quantize": (
        "quantize a float checkpoint, a layer at a time, without data",
        "qzo quantize llama-3.2-1b --output-dir llama-w4 --bits 4 --group-size 64",
        options.add_quantize,
    ),
    "inspect": (
        "what a checkpoint holds and what would train, without loading it",
        "qzo inspect model.gguf --train-layers 6 --signal --eps 1e-3",
        report_options.add_inspect,
    ),
    "memory": (
        "what a fine-tune holds in memory, predicted or measured",
        "qzo memory --config llama-2-13b --batch-size 16 --seq-len 512",
        report_options.add_memory,
    ),
    "bench": (
        "time qzo beside its rivals",
        "qzo bench run --filter 4096x11008 --rows 1 16 --out results.jsonl",
        report_options.add_bench,
    ),
}


class _Parser(argparse.ArgumentParser):
    """A parser whose complaint is one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    try:
        options = parse(arguments)
    except (OSError, ValueError) as error:  # of --config
        return _refused(next((name for name in FROM_FILES if name in (arguments or sys.argv)), "train"), error)
    try:
        early.check(options)
    except (OSError, ValueError) as error:
        return _refused(options.command, error)
    early.announce(options)
    warnings.showwarning = lambda message, *_: print(f"qzo: warning: {message}", file=sys.stderr)
    command = importlib.import_module(f".{options.command.replace('-', '_')}", __package__)
    if options.command == "journal":  # which reads files alone: torch is not worth waiting for
        try:
            return command.execute(options)
        except (OSError, ValueError) as error:
            return _refused(options.command, error)
    return importlib.import_module(".errors", __package__).reporting(command.execute, options)


def _refused(command: str, error: Exception) -> int:
    print(f"qzo {command}: {disk.line_of(error)}", file=sys.stderr)
    return 1 if disk.full(error) else 2


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """What a command line asks for, over what the file of `qzo train --config` does; ValueError or OSError for a bad
    file, SystemExit for a bad line. `line` of it is the line itself."""
    parser = build_parser()
    argcomplete.autocomplete(parser)
    line = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(line)
    if options.command in FROM_FILES and options.config:
        twice = ("model",) if vars(options).get("checkpoint") else ()
        from_file = arguments_of(options.config, options.command, but=twice)
        at = line.index(options.command) + 1
        options = parser.parse_args([*line[:at], *from_file, *line[at:]])
    options.line = line
    return options


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(
        prog="qzo",
        epilog="example: qzo demo",
        description="Fine-tune 4-bit models with forward passes only, by perturbing their quantization scales.",
    )
    parser.add_argument("--version", action="version", version=f"qzo {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (text, example, add_options) in COMMANDS.items():
        command = commands.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".", epilog=f"example: {example}"
        )
        if name not in ("bench", "journal"):  # whose actions have their own
            command.add_argument("--json", action="store_true", help="results as JSON on standard output")
        add_options(command)
    return parser
