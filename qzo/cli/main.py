"""The command line: `qzo COMMAND`, or `python -m qzo COMMAND`.

Exit status 0; 2 for wrong usage or bad input, with one line that says what to do; 1 for a run that failed or was
stopped. Progress goes to standard error, results to standard output. A command's module is imported when that command
is the one given: it has add_options(parser) and execute(options).
"""

import argparse
import importlib
import sys
import warnings

from ..version import __version__

COMMANDS = {  # name: (what it does, an example)
    "demo": ("tune SmolLM2-135M on BBC headlines, on a CPU in about two minutes", "qzo demo --seed 1 --output-dir out"),
    "train": (
        "fine-tune a model on JSON lines",
        "qzo train --model model.gguf --data data/ --output-dir out --max-steps 500 --train-layers 6",
    ),
    "replay": (
        "rebuild a tuned model from its base and a journal",
        "qzo replay model.gguf out/journal.qzo --output-dir tuned",
    ),
    "export": (
        "write a quantized model in another format, weight for weight",
        "qzo export model-awq --to gptq --output-dir model-gptq --journal out/journal.qzo",
    ),
    "quantize": (
        "quantize a float checkpoint, a layer at a time, without data",
        "qzo quantize llama-3.2-1b --output-dir llama-w4 --bits 4 --group-size 64",
    ),
    "inspect": (
        "what a checkpoint holds and what would train, without loading it",
        "qzo inspect model.gguf --train-layers 6 --signal --eps 1e-3",
    ),
    "memory": (
        "what a fine-tune holds in memory, predicted or measured",
        "qzo memory --config llama-2-13b --batch-size 16 --seq-len 512",
    ),
    "bench": ("time qzo beside its rivals", "qzo bench run --filter 4096x11008 --rows 1 16 --out results.jsonl"),
}


class _Parser(argparse.ArgumentParser):
    """A parser whose complaint is one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(arguments=None):
    """Run one command; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    name = next((argument for argument in arguments if not argument.startswith("-")), None)
    options = build_parser(name).parse_args(arguments)
    warnings.showwarning = lambda message, *_: print(f"qzo: warning: {message}", file=sys.stderr)
    return importlib.import_module(".errors", __package__).reporting(_module(options.command).execute, options)


def _module(command):
    return importlib.import_module(f".{command}", __package__)


def build_parser(chosen):
    """The parser of all commands, with the options of the one that is `chosen`."""
    parser = _Parser(
        prog="qzo",
        epilog="example: qzo demo",
        description="Fine-tune 4-bit models with forward passes only, by perturbing their quantization scales.",
    )
    parser.add_argument("--version", action="version", version=f"qzo {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (text, example) in COMMANDS.items():
        command = commands.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".", epilog=f"example: {example}"
        )
        if name != chosen:
            continue
        if name != "bench":  # whose actions have their own
            command.add_argument("--json", action="store_true", help="results as JSON on standard output")
        _module(name).add_options(command)
    return parser
