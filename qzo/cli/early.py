"""What a command can check and say before torch is imported, which takes seconds: where it writes, what it loads."""

import argparse
import itertools
import sys
from pathlib import Path

from .diffusion_options import CACHE
from .options import model_of
from .outputs import JOURNAL, check_apart, check_file, check_folder, check_run


def check(options: argparse.Namespace) -> None:
    """Refuse a place that the command must not write to: ValueError or OSError, as outputs.py has them."""
    if options.command in _CHECKS:
        _CHECKS[options.command](options)


def _train(options: argparse.Namespace) -> None:
    model = model_of(options)
    if options.output_dir:
        options.resume = options.resume or (options.auto_resume and (Path(options.output_dir) / JOURNAL).exists())
        check_run(options.output_dir, options.resume, options.overwrite, model)


def _train_diffusion(options: argparse.Namespace) -> None:
    if not options.output_dir:
        return  # the command says what is missing
    out = Path(options.output_dir)
    if out.is_dir() and not options.resume and [path.name for path in out.iterdir()] == [CACHE]:
        return  # a build of the cache that was stopped goes on
    check_run(out, options.resume, options.overwrite, options.pipeline)


def _demo(options: argparse.Namespace) -> None:
    if options.resume and not options.output_dir:
        raise ValueError("--resume needs the --output-dir of the demo that was stopped")
    options.output_dir = options.output_dir or _new_folder("qzo-demo")
    check_run(options.output_dir, options.resume, options.overwrite)


def _new_folder(name: str) -> str:
    """`name`, or the first of name-2, name-3, ... that does not exist."""
    names = itertools.chain([name], (f"{name}-{i}" for i in itertools.count(2)))
    return next(path for path in names if not Path(path).exists())


def _replay(options: argparse.Namespace) -> None:
    check_folder(options.output_dir, options.overwrite, options.base)


def _export(options: argparse.Namespace) -> None:
    if options.to == "gguf" and options.output_dir.endswith(".gguf"):
        check_file(options.output_dir, options.overwrite, "--output-dir")
        check_apart(options.output_dir, options.model)
    else:
        check_folder(options.output_dir, options.overwrite, options.model)


def _quantize(options: argparse.Namespace) -> None:
    check_folder(options.output_dir, options.overwrite, options.model)


def _memory(options: argparse.Namespace) -> None:
    for option, path in (("--plot", options.plot), ("--snapshot", options.snapshot)):
        if path:
            check_file(path, options.overwrite, option)


def _bench(options: argparse.Namespace) -> None:
    if getattr(options, "out", None):
        check_file(options.out, options.overwrite, "--out")


_CHECKS = {
    "train": _train,
    "train-diffusion": _train_diffusion,
    "demo": _demo,
    "replay": _replay,
    "export": _export,
    "quantize": _quantize,
    "memory": _memory,
    "bench": _bench,
}


_DEMO = "SmolLM2-135M on BBC headlines"


def announce(options: argparse.Namespace) -> None:
    """Say which model a command begins with, and how large it is, where torch still has to be imported."""
    given = vars(options)
    model = next((given[name] for name in ("checkpoint", "model", "base", "pipeline") if given.get(name)), None)
    what = (
        f"{model}{size_of(model)}" if model and Path(model).exists() else _DEMO if options.command == "demo" else None
    )
    if "torch" not in sys.modules and what:
        print(f"qzo {options.command}: {what}", file=sys.stderr, flush=True)


def size_of(path: str | Path) -> str:
    """ ", 1.2 GB" of a file or folder; nothing for what has to be fetched, or is small."""
    path = Path(path).expanduser()
    files = [path] if path.is_file() else path.iterdir() if path.is_dir() else []
    nbytes = sum(file.stat().st_size for file in files if file.is_file())
    return f", {nbytes / 1e9:.2f} GB" if nbytes >= 1e7 else ""
